"""Plans that keep the data's own nnU-Net network, which nnU-Net planned or its rules plan here, and fit the weights to it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.reorient import ORIENTATION_KEY, common_orientation
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.errors import ConfigurationError, PlanError
from nnssl_adapt.geometry.spacing import median_spacing
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.planning.entries import (
    PLANNER,
    BasePlans,
    configuration_entries,
    dataset_entries,
    pretrain_info,
    resampled_median_shape,
    with_record,
)
from nnssl_adapt.planning.low_resolution import refusal, stages
from nnssl_adapt.planning.memory import by
from nnssl_adapt.planning.normalization import Normalization, normalization_of_data
from nnssl_adapt.planning.plan import CONFIGURATION, KEEP, LOW_RESOLUTION, RESAMPLE, FinetunePlan
from nnssl_adapt.planning.plans_file import NNUNET_PLANS, plans_beside, refuse_ignored_keys
from nnssl_adapt.planning.preflight import check_transfer
from nnssl_adapt.planning.provenance import KEY, Provenance, package_version
from nnssl_adapt.planning.request import PlanRequest
from nnssl_adapt.planning.task import PlanningTask
from nnssl_adapt.planning.topology import NNUNET_PRESETS, check_preset, low_resolution, plan_network
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.families.nnunet import PRIMUS_TRAINERS
from nnssl_adapt.weights.network.architectures import Architecture, nearest_patch

logger = logging.getLogger(__name__)

SPACING_MODE = "base_plans"
"""``spacing_mode`` of such a plan: everything about the images is the base plan's."""

PLANNED_HERE = "planned_here"
"""``base_plans`` of a plan whose network follows nnU-Net's rules, but was planned by this package."""

_REPLACED = (
    "plans_name",
    "configurations",
    "experiment_planner_used",
    "pretrain_info",
    "nnssl_adapt",
    "image_orientation",
)

_PRESET_OF_PLANS = dict(zip(NNUNET_PLANS, ("default", "ResEncM", "ResEncL", "ResEncXL"), strict=True))
"""Which preset nnU-Net's planners of these names are."""


def plan_dynamic(task: PlanningTask) -> FinetunePlan:
    """Plan to train the network of the dataset's nnU-Net plans. Raises what :func:`make_plan` raises."""
    request = task.request
    refuse_spacing(request)
    task = task.oriented()  # a plan knows the order of its images' axes, so it must be the oriented dataset's
    topology = _topology(task)
    for name in (CONFIGURATION, LOW_RESOLUTION) if request.wants_stages else (CONFIGURATION,):
        seen = topology.seen_through(name)
        check_transfer(task.raw, task.checkpoint, seen.architecture, seen.patch_size, request.settings)
    _compare_axes(topology, task.checkpoint)
    return FinetunePlan(dynamic_content(task, topology), request.configurations[0])


def _topology(task: PlanningTask) -> FinetunePlan:
    """The plan whose network is kept: a file of nnU-Net's, or one by its rules where there is none or a preset is requested."""
    raw, request = task.raw, task.request
    preset = request.preset
    if preset is None and (found := find_topology(raw.name, request.base_plans)) is not None:
        _require_stages(found, request)
        return found
    chosen = preset or preset_for(task.network)
    topology = nnunet_plan(raw, task.fingerprint, chosen, request.wants_stages)
    logger.info(
        "network planned here by nnU-Net's rules, preset %s%s: %s, patch %s, batch %d",
        chosen,
        "" if preset else " (as the weights; --preset chooses another)",
        topology.architecture,
        by(topology.patch_size),
        topology.batch_size,
    )
    return topology


def find_topology(dataset_name: str, name: str | None, configuration: str = CONFIGURATION) -> FinetunePlan | None:
    """The plan whose network is to be kept: ``name``, or ``nnUNetPlans`` where it exists; else None.

    Raises PlanError where ``name`` does not exist, or the plan found is not this dataset's.
    """
    chosen = (name or NNUNET_PLANS[0]).removesuffix(".json")
    path = preprocessed_folder() / dataset_name / f"{chosen}.json"
    if not path.is_file():
        if name is None:
            return None
        preset = _PRESET_OF_PLANS.get(chosen)
        instead = f"with --preset {preset}" if preset else "without it, or with another name"
        raise PlanError(
            f"-pl {name}: there is no {path} (found: {plans_beside(dataset_name)}). Run this command {instead}: the "
            "network is then planned here, by nnU-Net's rules"
        )
    plan = FinetunePlan.load(path, configuration)
    refuse_ignored_keys(plan.settings_of_configuration, configuration, path)
    if plan.dataset_name != dataset_name:
        raise PlanError(f"{path} is a plan for {plan.dataset_name}, not for {dataset_name}")
    return plan


def nnunet_plan(
    raw: RawDataset, fingerprint: DatasetFingerprint, preset: str, with_stages: bool = False
) -> FinetunePlan:
    """The plan with the ``3d_fullres`` configuration of nnU-Net's planner ``preset``. It is in memory only, and unnamed.

    Spacing (median), order of axes, normalisation, network, patch, batch and Dice setting are nnU-Net's. For a Primus
    (``PrimusV3S``, …) the patch is rounded to multiples of 8, where nnU-Net's own trainer would fail. ``with_stages``: also with
    ``3d_lowres`` and ``3d_cascade_fullres``.

    Raises PlanError for images that no 3D U-Net takes, or too small for the low resolution; ConfigurationError for an
    unknown preset.
    """
    target = median_spacing(fingerprint.spacings, fingerprint.shapes_after_crop)
    coarsest = int(np.argmax(target))
    forward = [coarsest, *(axis for axis in range(3) if axis != coarsest)]
    spacing = [target[axis] for axis in forward]
    median_shape = resampled_median_shape(fingerprint, target, forward)
    if median_shape[0] == 1:
        raise PlanError(f"the images of {raw.name} are 2D (one voxel thick): only 3D networks can be planned")
    normalization = normalization_of_data(raw, fingerprint)
    found = low_resolution(preset, spacing, median_shape, len(raw.json.labels))
    full = _planned_entries(raw, preset, spacing, median_shape, normalization, found.is_worth_it)
    configurations = {CONFIGURATION: full}
    if with_stages:
        if not found.is_worth_it:
            raise refusal(raw.name, full["patch_size"], median_shape, found)
        low = _planned_entries(
            raw, preset, found.spacing, found.rounded_shape, normalization, False, math.prod(found.median_shape)
        )
        configurations = stages(full, low)
    return FinetunePlan(
        {
            **dataset_entries(raw, fingerprint, raw.image_reader or BasePlans().image_reader, forward),
            "plans_name": PLANNED_HERE,
            "configurations": configurations,
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": copy.deepcopy(fingerprint.intensity),
            KEY: {"preset": preset},
        }
    )


def _planned_entries(
    raw: RawDataset,
    preset: str,
    spacing: Sequence[float],
    median_shape: Sequence[float],
    normalization: Normalization,
    batch_dice: bool,
    voxels: float | None = None,
) -> dict[str, Any]:
    """A configuration by nnU-Net's rules; ``voxels``: of the median image, where its shape is rounded."""
    number = raw.json.num_training or len(raw.cases)
    in_all = (math.prod(median_shape) if voxels is None else voxels) * number
    planned = plan_network(preset, spacing, median_shape, len(raw.json.labels), in_all)
    if preset in PRIMUS_TRAINERS:
        primus = Architecture.named(preset)
        planned = replace(planned, architecture=primus, patch_size=nearest_patch(primus, planned.patch_size))
    return configuration_entries(
        planned.architecture,
        planned.patch_size,
        planned.batch_size,
        spacing,
        median_shape,
        normalization,
        batch_dice,
    )


def _require_stages(base: FinetunePlan, request: PlanRequest) -> None:
    """Raise PlanError where a low resolution is requested, and nnU-Net planned none."""
    there = base.content["configurations"]
    if request.wants_stages and LOW_RESOLUTION not in there:
        raise PlanError(
            f"{base.path} has no {LOW_RESOLUTION}, but {', '.join(there)}: nnU-Net plans it where a patch sees less than a "
            f"quarter of the median image. Use -c {CONFIGURATION}"
        )


def preset_for(architecture: Architecture) -> str:
    """The preset whose network these weights fit best: ``ResEncL`` for residual encoders, ``default`` for plain ones.

    Raises PlanError for transformers, which nnU-Net doesn't plan.
    """
    for name in ("default", "ResEncL"):
        if NNUNET_PRESETS[name].class_name == architecture.class_name:
            return name
    raise PlanError(
        f"--keep-topology is for U-Nets: nnU-Net's planner has no network for weights of {architecture}. Leave "
        "--keep-topology out to train the network of the weights"
    )


def dynamic_content(task: PlanningTask, base: FinetunePlan) -> dict[str, Any]:
    """The plans file: the base plan's configurations that are requested as they are, plus where the weights come from, if any.

    ``base`` is a file that nnU-Net wrote, or what :func:`nnunet_plan` made by its rules, which is said in the result.

    Spacing, patch, batch size, normalisation, resampling, order of axes and the network stay the base plan's. The
    preprocessed cases get a folder of our own, since nnU-Net would take one of its own name for finished.

    Raises PlanError where the base plan does not fit the dataset, or resamples in a way that is not supported.
    """
    raw, checkpoint, request = task.raw, task.given, task.request
    chosen = base.settings_of_configuration
    where = base.path or base.plans_name
    if base.num_channels != raw.num_channels:
        raise PlanError(
            f"{where} is for {base.num_channels} channel(s), {raw.name} has {raw.num_channels}: run nnU-Net's planning again"
        )
    for key in ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
        if chosen.get(key, RESAMPLE) not in (RESAMPLE, KEEP):
            raise PlanError(f"{where}: {key} is {chosen[key]}, not supported yet; supported are {RESAMPLE} and {KEEP}")
    _ = task.fingerprint  # preprocessing needs its file, and images that can't be read should show now
    content = {key: copy.deepcopy(value) for key, value in base.content.items() if key not in _REPLACED}
    content.update(
        plans_name=request.plans_name or f"ptPlans_dynamic__{request.name}",
        configurations=_kept(base, request),
        experiment_planner_used=PLANNER,
        **({} if checkpoint is None else {"pretrain_info": pretrain_info(checkpoint)}),
    )
    lies = common_orientation(raw)
    content.update({} if lies is None else {ORIENTATION_KEY: lies})
    planned_here = base.plans_name == PLANNED_HERE  # such a plan exists in no file and has no name
    provenance = replace(
        Provenance(package_version()) if checkpoint is None else Provenance.of(checkpoint, request.settings),
        spacing_mode=SPACING_MODE,
        base_plans=None if planned_here else base.plans_name,
        topology={"planned_by": PLANNER, "preset": base.provenance.preset} if planned_here else None,
        architecture_preset=base.provenance.architecture_preset,
    )
    return with_record(content, provenance)


def _kept(base: FinetunePlan, request: PlanRequest) -> dict[str, dict[str, Any]]:
    """The base plan's configurations that are requested, each with the entries that it inherits."""
    full = base.settings_of_configuration
    if base.is_planar:
        return {base.configuration: full}
    if not request.wants_stages:
        return {CONFIGURATION: full}
    return stages(full, base.seen_through(LOW_RESOLUTION).settings_of_configuration)


def _compare_axes(base: FinetunePlan, checkpoint: Checkpoint) -> None:
    """Kernels trained along one axis and used along another are not wrong, but worth a word."""
    if tuple(base.transpose_forward) != checkpoint.plan.transpose_forward:
        logger.warning(
            "%s puts the images' axes in the order %s, the weights were trained with %s",
            "nnU-Net's rule" if base.plans_name == PLANNED_HERE else f"plan {base.plans_name}",
            list(base.transpose_forward),
            list(checkpoint.plan.transpose_forward),
        )


def check_preset_use(request: PlanRequest, from_scratch: bool = False) -> None:
    """Raise ConfigurationError where the preset is unknown, or something else says which network is trained."""
    preset, base_plans = request.preset, request.base_plans
    assert preset is not None  # there is one to check
    check_preset(preset)
    if not request.keep_topology and not from_scratch:
        raise ConfigurationError(
            f"--preset {preset} is a network of nnU-Net's planner: add --keep-topology, or leave --preset out to train the "
            "network of the weights"
        )
    if base_plans is not None:
        raise ConfigurationError(
            f"--preset {preset} plans a network, -pl {base_plans} names one that is planned already: leave one of them out"
        )


def refuse_spacing(request: PlanRequest) -> None:
    """The spacing of a kept network can't be chosen as well."""
    if request.mode != "like_pretrained" or request.spacing is not None:
        raise ConfigurationError(
            "--keep-topology keeps the spacing of the nnU-Net plans too: leave -am and -os out, or leave --keep-topology out"
        )
