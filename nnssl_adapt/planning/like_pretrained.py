"""Plans that train the network of the weights, on images as the pre-training had them or as another spacing mode says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.spacing import (
    Spacing,
    SpacingChoice,
    check_fixed,
    checked_spacing,
    choose_spacing,
    median_spacing,
)
from nnssl_adapt.planning.advice import AUTO, SpacingAdvice, advise_spacing
from nnssl_adapt.planning.entries import (
    BasePlans,
    configuration_entries,
    entries_for_weights,
    keep_own_spacing,
    resampled_median_shape,
)
from nnssl_adapt.planning.fit_gpu import usual_step
from nnssl_adapt.planning.low_resolution import coarser_images, refusal, stages
from nnssl_adapt.planning.memory import MIN_BATCH, estimate_memory
from nnssl_adapt.planning.normalization import (
    choose_normalization,
    parse_normalization,
)
from nnssl_adapt.planning.patch import describe_fit, fit_patch
from nnssl_adapt.planning.plan import CONFIGURATION, LOW_RESOLUTION, FinetunePlan
from nnssl_adapt.planning.preflight import check_transfer
from nnssl_adapt.planning.request import PlanRequest
from nnssl_adapt.planning.task import PlanningTask
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.architectures import nearest_patch

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 2
"""Samples a batch, nnU-Net's minimum and what the published fine-tunings used."""

_XYZ = (2, 1, 0)
"""``transpose_forward`` to MONAI's (x, y, z) arrays."""

_SPACING_UNKNOWN = (
    "the file does not say at which spacing this network was trained: using the dataset's median. Where you know it, give it "
    "with -am fixed -os Z Y X"
)


def plan_like_pretrained(task: PlanningTask) -> FinetunePlan:
    """Plan to train the network of the weights. Raises what :func:`make_plan` raises."""
    request, network = task.request, task.network
    check_fixed(request.mode, request.spacing)
    parse_normalization(request.normalization, task.raw)
    patch = nearest_patch(network, task.checkpoint.plan.patch_size)
    check_transfer(task.raw, task.checkpoint, network, patch, request.settings)
    task = task.oriented()
    base = BasePlans.find(task.raw.name, request.base_plans)
    choice = _choose_spacing(task.checkpoint, task.fingerprint, request)
    return FinetunePlan(_content(task, base, choice), request.configurations[0])


def _choose_spacing(checkpoint: Checkpoint, fingerprint: DatasetFingerprint, request: PlanRequest) -> SpacingChoice:
    mode = request.mode
    if mode == AUTO:
        advice = spacing_advice(checkpoint, fingerprint)
        logger.info("%s", advice)
        mode = advice.picked
    choice = choose_spacing(
        mode,
        pretrained=_spacing_of_images(checkpoint),
        spacings=fingerprint.spacings,
        shapes=fingerprint.shapes_after_crop,
        fixed=None if request.spacing is None else tuple(float(s) for s in request.spacing),
    )
    if choice.note:
        # In nnssl's plan none means each image's own; tensors alone say nothing of the images.
        kept_own = checkpoint.plan.names_keys and not checkpoint.plan.supervised
        logger.warning(choice.note if kept_own else _SPACING_UNKNOWN)
    return choice


def _content(task: PlanningTask, base: BasePlans, choice: SpacingChoice) -> dict[str, Any]:
    """The plans file."""
    spacing = choice.spacing or median_spacing(task.fingerprint.spacings, task.fingerprint.shapes_after_crop)
    forward = _axis_order(choice, spacing, task.checkpoint.plan)
    full = _full_resolution(task, choice, spacing, forward, base.batch_dice)
    return entries_for_weights(task, base, forward, choice.spacing, _configurations(task, full, choice), choice.mode)


def _full_resolution(
    task: PlanningTask, choice: SpacingChoice, reference_spacing: Spacing, forward: Sequence[int], batch_dice: bool
) -> dict[str, Any]:
    """The configuration ``3d_fullres``."""
    request, network = task.request, task.network
    spacing = [float(reference_spacing[axis]) for axis in forward]
    median_shape = resampled_median_shape(task.fingerprint, choice.spacing, forward)
    normalization = choose_normalization(
        request.normalization, task.checkpoint.plan, task.raw, task.fingerprint, request.settings
    )
    patch = fit_patch(task.wanted_patch, network.total_stride, median_shape)
    if message := describe_fit(task.wanted_patch, patch, median_shape):
        logger.info(message)
    configuration = configuration_entries(
        network, patch, DEFAULT_BATCH_SIZE, spacing, median_shape, normalization, batch_dice
    )
    if choice.spacing is None:
        keep_own_spacing(configuration)
    return configuration


def _configurations(task: PlanningTask, full: dict[str, Any], choice: SpacingChoice) -> dict[str, dict[str, Any]]:
    """The full resolution, and where they are requested the low one and the cascade."""
    if not task.request.wants_stages:
        return {CONFIGURATION: full}
    if choice.spacing is None:
        raise ConfigurationError(
            f"-am no_resample keeps the spacing of each image, and {LOW_RESOLUTION} is another spacing: choose another mode, or "
            f"-c {CONFIGURATION}"
        )
    spacing, shape, network = full["spacing"], full["median_image_size_in_voxels"], task.network
    wanted = task.wanted_patch
    found = coarser_images(
        spacing, shape, full["patch_size"], lambda _, coarse: fit_patch(wanted, network.total_stride, coarse)
    )
    if not found.is_worth_it:
        raise refusal(task.raw.name, full["patch_size"], shape, found)
    patch = fit_patch(wanted, network.total_stride, found.rounded_shape)
    normalization = full["normalization_schemes"], full["use_mask_for_norm"]
    low = configuration_entries(
        network, patch, DEFAULT_BATCH_SIZE, found.spacing, found.rounded_shape, normalization, batch_dice=False
    )
    return stages(full, low)


def _axis_order(choice: SpacingChoice, spacing: Sequence[float], pretraining: AdaptationPlan) -> list[int]:
    """``transpose_forward``: the pre-training's where it is followed, else coarsest axis first (nnU-Net's planner).

    Weights for one orientation know their axes: they get them in their own order at every spacing. So does a
    segmentation network, unless nnU-Net's rule (median) was requested, and not only taken because no spacing is known. A
    network that is not symmetric and saw (x, y, z) arrays always gets images turned to that: its weights can't be turned.
    """
    as_trained = pretraining.supervised and (choice.mode != "median" or bool(choice.note))
    turned = not pretraining.architecture.kind.has_symmetric_axes and pretraining.transpose_forward == _XYZ
    in_own_order = as_trained or turned or pretraining.orientation is not None
    if choice.mode in ("like_pretrained", "no_resample") or in_own_order:
        return list(pretraining.transpose_forward)
    coarsest = int(np.argmax(spacing))
    return [coarsest, *(axis for axis in range(3) if axis != coarsest)]


def spacing_advice(
    checkpoint: Checkpoint,
    fingerprint: DatasetFingerprint,
    fixed: Sequence[float] | None = None,
    heads: int | None = None,
) -> SpacingAdvice:
    """Compare what the spacing modes would mean for a dataset, and pick one; see :func:`advise_spacing` for the rule.

    With ``heads``, the outputs of the network for the dataset, also what memory each would take.
    """
    plan, network = checkpoint.plan, checkpoint.architecture
    axes = [plan.transpose_forward.index(axis) for axis in range(3)]  # of the weights, in the images' own order
    wanted, divisors = plan.recommended_patch_size or plan.patch_size, network.total_stride

    def memory_of(patch: Sequence[int]) -> int:
        of_weights = [patch[axis] for axis in plan.transpose_forward]
        step = usual_step(network)
        return estimate_memory(network, len(fingerprint.intensity), heads or 1, of_weights, MIN_BATCH, step).total

    return advise_spacing(
        pretrained=_spacing_of_images(checkpoint),
        spacings=fingerprint.spacings,
        shapes=fingerprint.shapes_after_crop,
        wanted_patch=[wanted[axis] for axis in axes],
        divisors=[divisors[axis] for axis in axes],
        fixed=None if fixed is None else checked_spacing(fixed),
        memory_of=None if heads is None else memory_of,
    )


def _spacing_of_images(checkpoint: Checkpoint) -> Spacing | None:
    """The pre-training's spacing (mm) in the order of an image's own axes (Z, Y, X)."""
    plan = checkpoint.plan
    if plan.spacing is None:
        return None
    z, y, x = (plan.spacing[plan.transpose_forward.index(axis)] for axis in range(3))
    return z, y, x
