"""Plans of networks that nnssl did not train: in nnU-Net's own files, or read off the tensors."""

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
from nnssl_adapt.weights.families.family import Facts, Family
from nnssl_adapt.weights.families.nnunet import NNUNET_CITATION, architecture_of_trainer, trained_by_nnunet
from nnssl_adapt.weights.families.registry import family_of_size
from nnssl_adapt.weights.network.architectures import Architecture
from nnssl_adapt.weights.network.network_parts import Tensors, join_name
from nnssl_adapt.weights.network.topology import Topology, read_topology

CONFIGURATION, PLANAR = "3d_fullres", "2d"

_AXES_OF_LETTERS = {"R": 0, "L": 0, "A": 1, "P": 1, "I": 2, "S": 2}


# -- from nnU-Net's files --------------------------------------------------------------------------------------------


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
    _refuse_other_networks(name, settings, where)
    try:
        architecture = architecture_of_trainer(trainer_name) or _architecture(settings)
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
        fields["head_names"] = _head_names(dataset_json, where)
        fields["orientation"] = _orientation(dataset_json.get("image_orientation"), where)
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
    """The configuration of this name, with what it inherits."""
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
    return str(name), settings


def _refuse_other_networks(name: str, settings: Mapping[str, Any], where: str) -> None:
    if settings.get("previous_stage") is not None:
        raise AdaptationPlanError(
            f"{where}: configuration {name} is the second stage of a cascade, which takes another network's labels as input: "
            "take the model's 3d_fullres or 3d_lowres"
        )


def _as_volume(patch: Any) -> Any:
    """A 2D network's patch as one slice."""
    return [1, *patch] if isinstance(patch, (list, tuple)) and len(patch) == 2 else patch


def _architecture(settings: Mapping[str, Any]) -> Architecture:
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


# -- from the tensors ------------------------------------------------------------------------------------------------


def _cube_of_positions(tensors: Tensors, topology: Topology) -> list[int] | None:
    """The patch of a Primus whose learned positions fill a cube; None where they don't, or there are none."""
    positions = tensors.get(join_name(topology.encoder, "pos_embed"))
    count = int(positions.shape[1]) if positions is not None and positions.ndim == 3 else 0
    side = round(count ** (1 / 3))
    if count == 0 or side**3 != count:
        return None
    return [side * step for step in topology.architecture.total_stride]


def plan_from_tensors(
    tensors: Tensors,
    where: str,
    trainer_name: str | None = None,
    family: Family | None = None,
    beside: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[AdaptationPlan, str, list[str]]:
    """The plan of a U-Net without any plan, as far as its tensors tell, what is known of its family, and notes on the rest.

    ``family`` is the one that its names told; else it is looked for by the network's size. ``beside`` are entries of the plan
    that a file beside the weights tells, ``arguments`` what the user says of the network where its tensors don't. Returns the
    plan, the order of its image axes (``zyx`` or ``xyz``) and notes. Raises AdaptationPlanError when it is no network that is
    known, or an entry makes no sense.
    """
    told_beside = dict(beside or {})
    hints = {**(family.arguments if family else {}), **told_beside.pop("arguments", {})}
    try:
        topology = read_topology(tensors, {**hints, **(arguments or {})})
    except ArchitectureError as error:
        raise AdaptationPlanError(f"{where} has no plan, and none can be read off its tensors: {error}") from error
    architecture = topology.architecture
    cube = _cube_of_positions(tensors, topology) if architecture.is_transformer else None
    if architecture.is_transformer and cube is None:
        raise AdaptationPlanError(
            f"{where} has no plan, and a Primus's tensors don't show its patch: copy its adaptation_plan.json beside it"
        )
    family = family or family_of_size(topology, Path(where).name)
    facts = Facts() if family is None else family.facts
    told = facts.supervised
    supervised = trained_by_nnunet(trainer_name) or (topology.heads or 0) > 1 if told is None else told
    z, y, x = cube or [4 * step for step in architecture.total_stride]  # nnU-Net stops pooling at four voxels
    z = 1 if architecture.is_planar else z
    plan = AdaptationPlan(
        architecture=architecture,
        spacing=facts.spacing,
        patch_size=facts.patch_size or (z, y, x),
        recommended_patch_size=facts.patch_size,
        num_input_channels=topology.channels,
        normalization_schemes=(facts.normalization,) * topology.channels,
        use_mask_for_norm=(False,) * topology.channels,
        intensity=(facts.window.statistics(),) * topology.channels if facts.window else (),
        supervised=supervised,
        head_names=facts.labels if supervised and topology.heads == len(facts.labels) else (),
        orientation=facts.orientation,
        citations=tuple(dict(entry) for entry in facts.citations),
    )
    notes = [f"no plan in the file or beside it: the architecture was read off the tensors ({architecture})"]
    if beside:
        try:
            plan = AdaptationPlan.model_validate({**dict(plan), **told_beside})
        except ValidationError as error:
            raise AdaptationPlanError(f"beside {where}: wrong at {first_problem(error)}") from error
        return plan, facts.axes, notes
    notes += facts.notes()
    if not facts.told and facts.spacing is None:
        how = "the cube that its positions fill" if cube else "four times the network's stride"
        notes.append(
            f"its spacing and patch are not in the file: choose -am median or fixed; the patch {[z, y, x]} is {how}"
        )
    if topology.guessed:
        notes.append(f"assumed, since the tensors don't show it: {', '.join(topology.guessed)}")
    if not supervised and told is None:
        notes.append(
            "it is not known whether it was trained to segment: only its encoder is used, or say --scope encoder+decoder"
        )
    return plan, facts.axes, notes
