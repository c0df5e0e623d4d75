"""Names of plans and of the folders that their preprocessed cases lie in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnssl_adapt.errors import ConfigurationError, PlanError
from nnssl_adapt.planning.plans_json import read_plans

NNUNET_PLANS = ("nnUNetPlans", "nnUNetResEncUNetMPlans", "nnUNetResEncUNetLPlans", "nnUNetResEncUNetXLPlans")
"""What nnU-Net's own planners write, the usual one first; they would replace a plan of ours of that name."""

_SHORT_NORM_NAMES = {
    "ZScoreNormalization": "Z",
    "CTNormalization": "CT",
    "NoNormalization": "No",
    "RescaleTo01Normalization": "01",
    "RGBTo01Normalization": "RGB01",
}


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


def refuse_to_replace_stranger(path: Path) -> None:
    """Raise PlanError if ``path`` is a plan that somebody else made."""
    if not path.is_file():
        return
    content = read_plans(path)
    if not isinstance(content, dict) or "nnssl_adapt" not in content:
        raise PlanError(
            f"{path} exists and was not made by this command: it is left as it is. Choose another name, or move it away"
        )
