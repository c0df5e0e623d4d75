"""The plan of a network that nnU-Net trained, from the content of its own files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import AdaptationPlanError, ArchitectureError, DatasetJsonError
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan, first_problem, in_one_line
from nnssl_adapt.weights.families.nnunet import NNUNET_CITATION, architecture_of_trainer, trained_by_nnunet
from nnssl_adapt.weights.network.architectures import Architecture

CONFIGURATION, PLANAR = "3d_fullres", "2d"

_AXES_OF_LETTERS = {"R": 0, "L": 0, "A": 1, "P": 1, "I": 2, "S": 2}


def plan_of_nnunet(
    content: Mapping[str, Any], weights: Path, folder: Path | None, plans: Any = None, dataset_json: Any = None
) -> AdaptationPlan | None:
    """The plan of weights that nnU-Net trained, None where there is none.

    Args:
        content: of the weight file, in which nnU-Net's trainer says how it was made.
        weights: their file.
        folder: the trained model folder that it lies in; its name says what the file doesn't.
        plans, dataset_json: content of the folder's ``plans.json`` and ``dataset.json`` (None if it has none). Without a folder
            those that the trainer keeps in the weight file count.

    Raises what :func:`plan_from_nnunet` does.
    """
    init_args, trainer = content.get("init_args"), content.get("trainer_name")
    arguments: Mapping[str, Any] = init_args if isinstance(init_args, Mapping) else {}
    configuration, where = arguments.get("configuration"), weights if folder is None else folder
    if not isinstance(configuration, str):
        configuration = None if folder is None else configuration_of_folder(folder.name)
    if folder is not None:
        trainer = trainer or folder.name.partition("__")[0]
    else:
        plans, dataset_json = arguments.get("plans"), arguments.get("dataset_json")
        dataset_json = dataset_json if isinstance(dataset_json, Mapping) else None
        # nnssl's trainers keep a plan there too, with another layout and without a description of the network.
        if not trained_by_nnunet(trainer) or not isinstance(plans, Mapping):
            return None
    return plan_from_nnunet(plans, dataset_json, configuration, str(where), trainer)


def plan_from_nnunet(
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any] | None,
    configuration: str | None,
    where: str,
    trainer_name: str | None = None,
) -> AdaptationPlan:
    """The plan of a network that nnU-Net trained, from the content of its plans.json and dataset.json.

    Args:
        plans: of nnU-Net 2, also of the format before 2.3, which describes the network by ``UNet_class_name``.
        dataset_json: names channels and labels, and the orientation (``image_orientation``); None when it is lost.
        configuration: that the network was trained in; None is ``3d_fullres``, or the only one there is beside ``2d``.
        where: the file or folder, for messages.
        trainer_name: of the trainer; some build a network of their own (Primus), whatever the plans say.

    Raises AdaptationPlanError when something is missing or the network is the second of a cascade, DatasetJsonError
    when the labels make no sense.
    """
    name, settings = _configuration(plans, configuration, where)
    try:
        architecture = architecture_of_trainer(
            trainer_name, lambda: planned_architecture(settings)
        ) or planned_architecture(settings)
    except (ArchitectureError, TypeError, ValueError, KeyError) as error:
        raise AdaptationPlanError(f"{where}, configuration {name}: {in_one_line(error)}") from error
    fields: dict[str, Any] = {
        "architecture": architecture,
        "spacing": settings.get("spacing"),
        "patch_size": _as_volume(settings.get("patch_size")),
        "normalization_schemes": settings.get("normalization_schemes"),
        "use_mask_for_norm": settings.get("use_mask_for_norm"),
        "transpose_forward": plans.get("transpose_forward"),
        "num_input_channels": _channels(dataset_json, settings),
        "channel_names": _channel_names(dataset_json),
        "intensity": _intensity(plans),
        "citations": (NNUNET_CITATION,),
        "supervised": True,
    }
    raw: dict[str, Any] = {"nnunet_plans": dict(plans)}
    if dataset_json is not None:
        fields["orientation"] = _orientation(dataset_json.get("image_orientation"), where)
        fields["head_names"] = _head_names(dataset_json, where)
        raw["dataset_json"] = dict(dataset_json)
        raw["licence"] = dataset_json.get("licence") or dataset_json.get("license")
    ours = plans.get("nnssl_adapt")
    if isinstance(ours, Mapping) and isinstance(ours.get("licence"), str):
        raw["licence"] = ours["licence"]  # the model's own, from its package; the other is the data's
    given = {key: value for key, value in fields.items() if value is not None or key in ("spacing", "patch_size")}
    try:
        return AdaptationPlan.model_validate({**given, "raw": raw})
    except ValidationError as error:
        raise AdaptationPlanError(f"{where}, configuration {name}: wrong at {first_problem(error)}") from error


def _configuration(plans: Mapping[str, Any], name: str | None, where: str) -> tuple[str, dict[str, Any]]:
    """The configuration of this name, with what it inherits; raises for the second stage of a cascade."""
    configurations = plans.get("configurations")
    if not isinstance(configurations, Mapping) or not configurations:
        raise AdaptationPlanError(f"{where}: the plans have no 'configurations'")
    if name is None:
        volumetric = [key for key in configurations if key != PLANAR]
        name = CONFIGURATION if CONFIGURATION in configurations or len(volumetric) != 1 else volumetric[0]
        if not volumetric:
            name = PLANAR
    settings: dict[str, Any] = {}
    seen: list[str] = []
    parent: Any = name
    while parent is not None:
        entry = configurations.get(parent) if isinstance(parent, str) else None
        if not isinstance(entry, Mapping):
            raise AdaptationPlanError(
                f"{where}: the plans have no configuration {parent!r}; they have {', '.join(map(str, configurations))}"
            )
        if parent in seen:
            raise AdaptationPlanError(f"{where}: configurations inherit from each other: {' → '.join([*seen, parent])}")
        seen.append(parent)
        settings = {**entry, **settings}
        parent = entry.get("inherits_from")
    if settings.get("previous_stage") is not None:
        raise AdaptationPlanError(
            f"{where}: configuration {name} is the second stage of a cascade, which takes another network's labels as input: "
            "take the model's 3d_fullres or 3d_lowres"
        )
    return str(name), settings


def _as_volume(patch: Any) -> Any:
    """A 2D network's patch as one slice."""
    return [1, *patch] if isinstance(patch, (list, tuple)) and len(patch) == 2 else patch


def planned_architecture(settings: Mapping[str, Any]) -> Architecture:
    """The network that a configuration of nnU-Net's plans describes, today's form or that before 2.3.

    Raises ArchitectureError, KeyError, TypeError or ValueError for one that makes no sense.
    """
    if isinstance(settings.get("architecture"), Mapping):
        return Architecture.from_plans_dict(settings["architecture"])
    class_name = settings.get("UNet_class_name")
    if class_name is None:
        raise ArchitectureError("it has neither 'architecture' nor (before nnU-Net 2.3) 'UNet_class_name'")
    blocks = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}.get(class_name)
    if blocks is None:
        raise ArchitectureError(f"unknown network {class_name!r}; known are PlainConvUNet and ResidualEncoderUNet")
    counts = list(settings["n_conv_per_stage_encoder"])
    base, most = int(settings["UNet_base_num_features"]), int(settings["unet_max_num_features"])
    axes = len(settings["patch_size"])
    kwargs: dict[str, Any] = {
        "n_stages": len(counts),
        "features_per_stage": [min(base * 2**stage, most) for stage in range(len(counts))],
        "conv_op": f"Conv{axes}d",
        "kernel_sizes": settings["conv_kernel_sizes"],
        "strides": settings["pool_op_kernel_sizes"],
        blocks: counts,
        "n_conv_per_stage_decoder": settings["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"InstanceNorm{axes}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(class_name, kwargs)


def _channels(dataset_json: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> int | None:
    for names in ((dataset_json or {}).get("channel_names"), settings.get("normalization_schemes")):
        if isinstance(names, (Mapping, list, tuple)) and names:
            return len(names)
    return None


def _channel_names(dataset_json: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Names of the channels in order; files before nnU-Net 2 call them ``modality``. Empty where they can't be told."""
    content = dataset_json or {}
    names = content.get("channel_names", content.get("modality"))
    if isinstance(names, Mapping):
        names = [names.get(str(index), names.get(index)) for index in range(len(names))]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def _intensity(plans: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Statistics of the foreground's intensities, one a channel, in order; empty where the plans have none."""
    found = plans.get("foreground_intensity_properties_per_channel")
    if not isinstance(found, Mapping):
        return ()
    entries = [found.get(str(index)) for index in range(len(found))]
    good = [dict(entry) for entry in entries if isinstance(entry, Mapping) and _is_statistics(entry)]
    return tuple(good) if len(good) == len(entries) else ()


def _is_statistics(entry: Mapping[str, Any]) -> bool:
    """Whether an entry holds the numbers that nnU-Net's normalisation of CT uses."""
    numbers = [entry.get(key) for key in ("mean", "std", "percentile_00_5", "percentile_99_5")]
    return all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)


def _head_names(dataset_json: Mapping[str, Any], where: str) -> tuple[str, ...]:
    try:
        return LabelScheme.from_dataset_json(dataset_json, f"{where}, dataset.json").head_names
    except DatasetJsonError as error:
        raise DatasetJsonError(in_one_line(error)) from error


def _orientation(value: Any, where: str) -> str | None:
    """Three letters, one for each pair of directions; raises AdaptationPlanError for anything else but None."""
    if value is None:
        return None
    letters = value.upper() if isinstance(value, str) else ""
    if len(letters) != 3 or {_AXES_OF_LETTERS.get(letter) for letter in letters} != {0, 1, 2}:
        shown = in_one_line(repr(value))
        raise AdaptationPlanError(
            f"{where}: 'image_orientation' in dataset.json is {shown}, expected three letters such as RPI or LAS"
        )
    return str(letters)


def configuration_of_folder(name: str) -> str | None:
    """The configuration in a model folder's name, ``<Trainer>__<Plans>__<configuration>``."""
    parts = name.split("__")
    return parts[-1] if len(parts) >= 3 and re.fullmatch(r"\w+", parts[-1]) else None
