"""Plans files: how they are called, and reading one that a person may have edited by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnssl_adapt.errors import ArchitectureError, ConfigurationError, PlanError
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.weights.checkpoint.nnunet_plan import planned_architecture

logger = logging.getLogger(__name__)

NNUNET_PLANS = ("nnUNetPlans", "nnUNetResEncUNetMPlans", "nnUNetResEncUNetLPlans", "nnUNetResEncUNetXLPlans")
"""What nnU-Net's own planners write, the usual one first; they would replace a plan of ours of that name."""

_SHORT_NORM_NAMES = {
    "ZScoreNormalization": "Z",
    "CTNormalization": "CT",
    "NoNormalization": "No",
    "RescaleTo01Normalization": "01",
    "RGBTo01Normalization": "RGB01",
}

ARCHITECTURE_KEYS = (
    "n_stages",
    "features_per_stage",
    "kernel_sizes",
    "strides",
    "n_conv_per_stage",
    "n_conv_per_stage_encoder",
    "n_blocks_per_stage",
    "n_conv_per_stage_decoder",
    "conv_bias",
    "norm_op",
    "nonlin",
)
"""What describes a network, and counts only inside ``architecture.arch_kwargs``. The published guide to the
contrast-agnostic spinal cord weights has them beside ``patch_size``, where nnU-Net reads none of them."""


def read_plans(path: Path) -> Any:
    """Read the JSON of a plans file. A key that stands twice with different values counts as JSON has it (the last), but is
    warned of. Configurations in the form before nnU-Net 2.3 are given in today's, as nnU-Net does when it reads them.

    Raises PlanError naming the file.
    """
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content and content[key] != value:
                twice.append(key)
            content[key] = value
        return content

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=collect)
    except FileNotFoundError:
        raise PlanError(f"no plans file {path}{_plans_beside(path)}") from None
    except RecursionError:
        raise PlanError(f"{path} is not a plans file: its content is nested too deeply", path=path) from None
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} is not a plans file: {error}", path=path) from error
    for key in dict.fromkeys(twice):
        logger.warning("%s has the key %r twice, with different values: the last one counts", path, key)
    configurations = content.get("configurations") if isinstance(content, dict) else None
    if isinstance(configurations, dict):
        content["configurations"] = {name: _in_todays_form(entries) for name, entries in configurations.items()}
    return content


_BEFORE_2_3 = (
    *("UNet_class_name", "UNet_base_num_features", "unet_max_num_features", "num_pool_per_axis"),
    *("n_conv_per_stage_encoder", "n_conv_per_stage_decoder", "pool_op_kernel_sizes", "conv_kernel_sizes"),
)
"""What described the network before ``architecture`` did."""


def _in_todays_form(entries: Any) -> Any:
    """A configuration with its network described under ``architecture``; as it is where that can't be made of it."""
    if not isinstance(entries, dict) or "architecture" in entries or "UNet_class_name" not in entries:
        return entries
    try:
        architecture = planned_architecture(entries).to_plans_dict(entries["patch_size"])
    except (ArchitectureError, KeyError, TypeError, ValueError):
        return entries  # it is refused where it is used, in words for a user
    rest = {key: value for key, value in entries.items() if key not in _BEFORE_2_3}
    return {**rest, "architecture": architecture}


def refuse_ignored_keys(configuration: Mapping[str, Any], name: str, path: Path) -> None:
    """Raise PlanError for a description of the network that stands where nobody reads it and is not the network's.

    Args:
        configuration: entries of one configuration, with those it inherits.
        name: of the configuration.
        path: of the plans file, for the message.
    """
    architecture = configuration["architecture"]
    kwargs = (architecture.get("arch_kwargs") if isinstance(architecture, Mapping) else None) or {}
    ignored = [
        key for key in ARCHITECTURE_KEYS if key in configuration and not _same(configuration[key], kwargs.get(key))
    ]
    if ignored:
        shown = "; ".join(
            f"{key} is {configuration[key]} there, the network has {kwargs.get(key, 'no such key')}" for key in ignored
        )
        raise PlanError(
            f"{path}: configuration {name} has {', '.join(ignored)} beside 'architecture', where nnU-Net ignores them "
            f"({shown}). They belong in architecture.arch_kwargs; a plan with the pre-training's network and patch is "
            "made by: nnUNetv2_preprocess_like_nnssl -d DATASET -pc WEIGHTS -n NAME --plans_name "
            "nnUNetPlans_contrast_agnostic"
        )


def _same(one: Any, other: Any) -> bool:
    """Equal, with a number for a whole list of it (``n_conv_per_stage: 2``) and tuples for lists."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, (list, tuple)) and one and isinstance(other, int):
        return all(_same(a, other) for a in one)
    if isinstance(other, (list, tuple)) and other and isinstance(one, int):
        return all(_same(one, b) for b in other)
    return bool(one == other)


def _plans_beside(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f": the folder {folder} does not exist; run nnUNetv2_preprocess_like_nnssl first"
    ignored = {"dataset.json", "dataset_fingerprint.json", "splits_final.json"}
    names = sorted(p.stem for p in folder.glob("*.json") if p.name not in ignored)
    return f"; plans there: {', '.join(names) or 'none, run nnUNetv2_preprocess_like_nnssl first'}"


def plans_beside(dataset_name: str) -> str:
    """Names of the plans files that a dataset has, for messages."""
    folder = preprocessed_folder() / dataset_name
    return ", ".join(sorted(p.stem for p in folder.glob("*Plans*.json"))) or "none"


def describe_settings(spacing: Sequence[float] | None, schemes: Sequence[str]) -> str:
    """``Spacing__1.00_1.00_1.00___Norm__Z``: spacing (mm) and the normalisation of each channel, as in nnU-Net's own nnssl
    integration."""
    spacing_part = "None" if spacing is None else "_".join(_readable(s) for s in spacing)
    return f"Spacing__{spacing_part}___Norm__" + "_".join(_SHORT_NORM_NAMES.get(scheme, scheme) for scheme in schemes)


def _readable(spacing: float) -> str:
    """Two decimals as nnU-Net's integration writes, more where two would change the number."""
    for decimals in (2, 3, 4):
        text = f"{spacing:.{decimals}f}"
        if abs(float(text) - spacing) < 1e-5:
            return text
    return text


def check_name(name: str, flag: str = "-n") -> None:
    """Raise ConfigurationError for a name that can't be part of a file's name."""
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise ConfigurationError(
            f"{flag} {name!r}: use letters, digits, '-', '_' and '.', since it becomes part of file names"
        )


def check_plans_name(name: str) -> str:
    """Return the name of a plan without ``.json``; ConfigurationError where it is none or is kept for nnU-Net's planners."""
    name = name.removesuffix(".json")
    check_name(name, "--plans_name")
    if name in (*NNUNET_PLANS, "dataset", "dataset_fingerprint", "splits_final", "plans"):
        raise ConfigurationError(
            f"--plans_name {name}: nnU-Net writes {name}.json itself; choose another such as nnUNetPlans_contrast_agnostic"
        )
    return name


def refuse_to_replace_unknown(path: Path) -> None:
    """Raise PlanError if ``path`` is a plan that somebody else made."""
    if not path.is_file():
        return
    content = read_plans(path)
    if not isinstance(content, dict) or "nnssl_adapt" not in content:
        raise PlanError(
            f"{path} exists and was not made by this command: it is left as it is. Choose another name, or move it away"
        )
