"""Plans of nnU-Net's ``2d``: a network of slices, from the weights of another 2D network or from scratch.

Slices lie across the axis of the coarsest spacing, as in nnU-Net. They stay as far apart as they are in each image, so the
spacing of such a configuration has two numbers.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.pictures import NATURAL_2D
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.spacing import Spacing, check_fixed, median_spacing
from nnssl_adapt.planning.dynamic import PLANNED_HERE, dynamic_content, find_topology, preset_for, refuse_spacing
from nnssl_adapt.planning.entries import (
    BasePlans,
    configuration_entries,
    dataset_entries,
    entries_for_weights,
    keep_own_spacing,
    resampled_median_shape,
)
from nnssl_adapt.planning.memory import by
from nnssl_adapt.planning.normalization import (
    FROM_PRETRAINING,
    choose_normalization,
    normalization_of_data,
    parse_normalization,
)
from nnssl_adapt.planning.patch import describe_fit, fit_patch
from nnssl_adapt.planning.plan import CONFIGURATION, PLANAR, FinetunePlan
from nnssl_adapt.planning.preflight import check_transfer
from nnssl_adapt.planning.provenance import KEY
from nnssl_adapt.planning.request import PlanRequest
from nnssl_adapt.planning.task import PlanningTask
from nnssl_adapt.planning.topology import PLANAR_BATCH, plan_network
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.families.nnunet import PRIMUS_TRAINERS
from nnssl_adapt.weights.network.architectures import Architecture, nearest_patch

logger = logging.getLogger(__name__)

_USUAL_PRESET = "default"
_ABOVE = (1,)
"""What a slice has along the first axis."""


def plan_planar(task: PlanningTask) -> FinetunePlan:
    """Plan to train a 2D network.

    Without weights, the network is that of the dataset's nnU-Net plans, or of nnU-Net's rules. Raises what :func:`make_plan`
    raises.
    """
    request, checkpoint = task.request, task.given
    if request.fit_gpu is not None:
        raise ConfigurationError(f"--fit-gpu chooses 3D patches: leave it out with -c {PLANAR}")
    if request.preset in PRIMUS_TRAINERS:
        raise ConfigurationError(
            f"--preset {request.preset} is a 3D transformer, and -c {PLANAR} trains a network of slices"
        )
    if checkpoint is not None and not request.keep_topology:
        return _plan_network_of_weights(task)
    refuse_spacing(request)
    if request.normalization != FROM_PRETRAINING:
        raise ConfigurationError(
            "from scratch, normalisation is nnU-Net's, by channel names: leave --normalization out"
        )
    task = task.oriented()
    topology = _topology(task)
    if checkpoint is not None:
        check_transfer(task.raw, checkpoint, topology.architecture, topology.patch_size, request.settings)
    return FinetunePlan(dynamic_content(task, topology), PLANAR)


def refuse_volumes_of_pictures(raw: RawDataset, configurations: Sequence[str]) -> None:
    """Raise ConfigurationError when a dataset of pictures is to be planned as volumes, which nnU-Net doesn't either."""
    volumetric = [name for name in configurations if name != PLANAR]
    if raw.image_reader == NATURAL_2D and volumetric:
        raise ConfigurationError(
            f"{raw.name} has pictures ({raw.json.file_ending}), and {', '.join(volumetric)} needs volumes: plan them "
            f"with -c {PLANAR}, from the weights of a 2D network (-pc) or from scratch (without -pc)"
        )


def refuse_other_sources(architecture: Architecture, configurations: Sequence[str]) -> None:
    """Raise ConfigurationError where the weights' network and the configurations have different numbers of axes."""
    if architecture.is_planar == (PLANAR in configurations):
        return
    if architecture.is_planar:
        raise ConfigurationError(
            f"these weights are a 2D network's ({architecture}), whose kernels have two axes: train it with -c {PLANAR}, not "
            f"{', '.join(configurations)}"
        )
    kind = "a 3D transformer, whose tokens are cubes" if architecture.is_transformer else "a 3D network"
    raise ConfigurationError(
        f"-c {PLANAR} trains a network of slices, and these weights are of {kind} ({architecture}): its kernels have three "
        f"axes, and no rule makes them compute the same with two. Use -c {CONFIGURATION}; or for {PLANAR} a 2D "
        "nnU-Net as the source, or none (leave -pc out) to train from scratch"
    )


# -- the network of nnU-Net's plans ------------------------------------------------------------------------------------


def _topology(task: PlanningTask) -> FinetunePlan:
    raw, request, checkpoint = task.raw, task.request, task.given
    if request.preset is None and (found := find_topology(raw.name, request.base_plans, PLANAR)) is not None:
        return found
    preset = request.preset or (_USUAL_PRESET if checkpoint is None else preset_for(checkpoint.architecture))
    topology = nnunet_planar_plan(raw, task.fingerprint, preset)
    logger.info(
        "network planned here by nnU-Net's rules, preset %s: %s, patch %s, batch %d",
        preset,
        topology.architecture,
        by(topology.patch_size[1:]),
        topology.batch_size,
    )
    return topology


def nnunet_planar_plan(raw: RawDataset, fingerprint: DatasetFingerprint, preset: str) -> FinetunePlan:
    """The plan with the ``2d`` configuration of nnU-Net's planner ``preset``. It is in memory only, and unnamed.

    Raises PlanError for images that are too small for a U-Net, ConfigurationError for an unknown preset.
    """
    target, forward = _axes(fingerprint)
    spacing = [target[axis] for axis in forward]
    median_shape = resampled_median_shape(fingerprint, target, forward)
    number = raw.json.num_training or len(raw.cases)
    planned = plan_network(
        preset, spacing[1:], median_shape[1:], len(raw.json.labels), math.prod(median_shape) * number
    )
    configuration = configuration_entries(
        planned.architecture,
        planned.patch_size,
        planned.batch_size,
        spacing[1:],
        median_shape[1:],
        normalization_of_data(raw, fingerprint),
        batch_dice=True,
    )
    content = {
        **dataset_entries(raw, fingerprint, raw.image_reader or BasePlans().image_reader, forward),
        "plans_name": PLANNED_HERE,
        "configurations": {PLANAR: configuration},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": copy.deepcopy(fingerprint.intensity),
        KEY: {"preset": preset},
    }
    return FinetunePlan(content, PLANAR)


def _axes(fingerprint: DatasetFingerprint) -> tuple[Spacing, list[int]]:
    """nnU-Net's target spacing (mm, the images' axes), and their order with the coarsest first."""
    target = median_spacing(fingerprint.spacings, fingerprint.shapes_after_crop)
    coarsest = int(np.argmax(target))
    return target, [coarsest, *(axis for axis in range(3) if axis != coarsest)]


# -- the network of the weights ----------------------------------------------------------------------------------------


def _plan_network_of_weights(task: PlanningTask) -> FinetunePlan:
    request, network, checkpoint = task.request, task.network, task.checkpoint
    if request.mode == "auto":
        raise ConfigurationError(
            f"-am auto compares 3D spacings: with -c {PLANAR} choose like_pretrained, median or fixed"
        )
    check_fixed(request.mode, request.spacing)
    parse_normalization(request.normalization, task.raw)
    own_patch = nearest_patch(network, checkpoint.plan.patch_size)
    check_transfer(task.raw, checkpoint, network, own_patch, request.settings)
    task = task.oriented()
    base = BasePlans.find(task.raw.name, request.base_plans, PLANAR)
    fingerprint = task.fingerprint
    target, forward = _axes(fingerprint)
    chosen = _spacing_of_slices(checkpoint, request, target, forward)
    in_plane = chosen or tuple(target[axis] for axis in forward[1:])
    shape = _median_slice(fingerprint, chosen, target, forward)
    patch = fit_patch(task.wanted_patch, network.total_stride, (*_ABOVE, *shape))
    if message := describe_fit(task.wanted_patch, patch, (*_ABOVE, *shape)):
        logger.info(message)
    normalization = choose_normalization(
        request.normalization, checkpoint.plan, task.raw, fingerprint, request.settings
    )
    configuration = configuration_entries(
        network, patch[1:], _batch_of(checkpoint), in_plane, shape, normalization, batch_dice=True
    )
    if chosen is None:
        keep_own_spacing(configuration)
    content = entries_for_weights(task, base, forward, chosen, {PLANAR: configuration}, request.mode)
    return FinetunePlan(content, PLANAR)


def _spacing_of_slices(
    checkpoint: Checkpoint, request: PlanRequest, target: Spacing, forward: Sequence[int]
) -> tuple[float, ...] | None:
    """Millimetres (Y, X) that slices are resampled to; None: they keep their own."""
    if request.mode == "no_resample":
        return None
    if request.mode == "fixed" and request.spacing is not None:
        return tuple(float(request.spacing[axis]) for axis in forward[1:])
    known = checkpoint.plan.spacing
    if request.mode == "like_pretrained" and known is not None:
        return tuple(known[-2:])
    if request.mode == "like_pretrained":
        logger.warning("the file does not say at which spacing this network was trained: using the dataset's median")
    return tuple(target[axis] for axis in forward[1:])


def _median_slice(
    fingerprint: DatasetFingerprint, in_plane: Sequence[float] | None, target: Spacing, forward: Sequence[int]
) -> list[float]:
    """Voxels (Y, X) of the median slice once resampled."""
    if in_plane is None:
        return resampled_median_shape(fingerprint, None, forward)[1:]
    transposed = (target[forward[0]], *in_plane)
    z, y, x = (float(transposed[forward.index(axis)]) for axis in range(3))
    return resampled_median_shape(fingerprint, (z, y, x), forward)[1:]


def _batch_of(checkpoint: Checkpoint) -> int:
    """Slices a batch as in the weights' own training, where its plans say so."""
    plans: Mapping[str, Any] = checkpoint.plan.raw.get("nnunet_plans", {})
    entries = plans.get("configurations", {}).get(PLANAR, {})
    size = entries.get("batch_size") if isinstance(entries, Mapping) else None
    return size if isinstance(size, int) and size > 0 else PLANAR_BATCH
