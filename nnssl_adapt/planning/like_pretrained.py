"""Plans that train the network of the weights, on images as the pre-training had them or as another spacing mode says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
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
    dataset_entries,
    keep_own_spacing,
    name_stores,
    pretrain_info,
    resampled_median_shape,
)
from nnssl_adapt.planning.fit_gpu import usual_step
from nnssl_adapt.planning.low_resolution import coarser_images, refusal, stages
from nnssl_adapt.planning.memory import MIN_BATCH, estimate_memory
from nnssl_adapt.planning.normalization import (
    Normalization,
    choose_normalization,
    intensity_statistics,
    parse_normalization,
)
from nnssl_adapt.planning.patch import describe_fit, fit_patch
from nnssl_adapt.planning.plan import CONFIGURATION, LOW_RESOLUTION, FinetunePlan
from nnssl_adapt.planning.plans_file import describe_settings
from nnssl_adapt.planning.preflight import check_transfer
from nnssl_adapt.planning.provenance import KEY, Provenance
from nnssl_adapt.planning.request import PlanRequest
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.architectures import nearest_patch

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 2
"""Samples a batch, nnU-Net's minimum and what the published fine-tunings used."""

_SPACING_UNKNOWN = (
    "the file does not say at which spacing this network was trained: using the dataset's median. Where you know it, give it "
    "with -am fixed -os Z Y X"
)


def plan_like_pretrained(
    raw: RawDataset,
    checkpoint: Checkpoint,
    request: PlanRequest,
    orient: Callable[[RawDataset], RawDataset],
    know: Callable[[RawDataset], DatasetFingerprint],
) -> FinetunePlan:
    """Plan to train the network of the weights.

    Args:
        raw: the dataset, as it is.
        checkpoint: the weights.
        request: how to plan.
        orient: returns the dataset in the orientation requested.
        know: returns the fingerprint of a dataset.

    Raises what :func:`make_plan` raises.
    """
    check_fixed(request.mode, request.spacing)
    parse_normalization(request.normalization, raw)
    patch = nearest_patch(checkpoint.architecture, checkpoint.plan.patch_size)
    check_transfer(raw, checkpoint, checkpoint.architecture, patch, request.settings)
    raw = orient(raw)
    base = BasePlans.find(raw.name, request.base_plans)
    fingerprint = know(raw)
    choice = _choose_spacing(checkpoint, fingerprint, request)
    return FinetunePlan(_content(raw, checkpoint, fingerprint, base, choice, request), request.configurations[0])


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
        logger.warning(_SPACING_UNKNOWN if checkpoint.plan.supervised else choice.note)
    return choice


def _content(
    raw: RawDataset,
    checkpoint: Checkpoint,
    fingerprint: DatasetFingerprint,
    base: BasePlans,
    choice: SpacingChoice,
    request: PlanRequest,
) -> dict[str, Any]:
    """The plans file."""
    reference_spacing = choice.spacing or median_spacing(fingerprint.spacings, fingerprint.shapes_after_crop)
    forward = _axis_order(choice, reference_spacing, checkpoint.plan)
    normalization = choose_normalization(request.normalization, checkpoint.plan, raw, fingerprint, request.settings)
    schemes, _ = normalization
    full = _full_resolution(checkpoint, fingerprint, choice, reference_spacing, forward, normalization, base.batch_dice)
    content: dict[str, Any] = {
        **dataset_entries(raw, fingerprint, raw.image_reader or base.image_reader, forward),
        "plans_name": request.plans_name or f"ptPlans__{request.name}____{describe_settings(choice.spacing, schemes)}",
        "configurations": _configurations(raw, checkpoint, request, full, choice),
        "experiment_planner_used": "nnssl_adapt",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": intensity_statistics(
            request.normalization,
            schemes,
            checkpoint.plan,
            raw,
            base.content.get("foreground_intensity_properties_per_channel", fingerprint.intensity),
            request.settings,
        ),
        "pretrain_info": pretrain_info(checkpoint),
    }
    provenance = replace(
        Provenance.of(checkpoint, request.settings),
        spacing_mode=choice.mode,
        architecture_preset=checkpoint.architecture.preset,
        preprocessing_digest=name_stores(content),
    )
    return {**content, KEY: provenance.to_dict()}


def _full_resolution(
    checkpoint: Checkpoint,
    fingerprint: DatasetFingerprint,
    choice: SpacingChoice,
    reference_spacing: Spacing,
    forward: Sequence[int],
    normalization: Normalization,
    batch_dice: bool,
) -> dict[str, Any]:
    """The configuration ``3d_fullres``."""
    spacing = [float(reference_spacing[axis]) for axis in forward]
    median_shape = resampled_median_shape(fingerprint, choice.spacing, forward)
    architecture = checkpoint.architecture
    wanted = checkpoint.plan.recommended_patch_size or checkpoint.plan.patch_size
    patch = fit_patch(wanted, architecture.total_stride, median_shape)
    if message := describe_fit(wanted, patch, median_shape):
        logger.info(message)
    configuration = configuration_entries(
        architecture, patch, DEFAULT_BATCH_SIZE, spacing, median_shape, normalization, batch_dice
    )
    if choice.spacing is None:
        keep_own_spacing(configuration)
    return configuration


def _configurations(
    raw: RawDataset, checkpoint: Checkpoint, request: PlanRequest, full: dict[str, Any], choice: SpacingChoice
) -> dict[str, dict[str, Any]]:
    """The full resolution, and where they are requested the low one and the cascade."""
    if not request.wants_stages:
        return {CONFIGURATION: full}
    if choice.spacing is None:
        raise ConfigurationError(
            f"-am no_resample keeps the spacing of each image, and {LOW_RESOLUTION} is another spacing: choose another mode, or "
            f"-c {CONFIGURATION}"
        )
    spacing, shape, network = full["spacing"], full["median_image_size_in_voxels"], checkpoint.architecture
    wanted = checkpoint.plan.recommended_patch_size or checkpoint.plan.patch_size
    found = coarser_images(
        spacing, shape, full["patch_size"], lambda _, coarse: fit_patch(wanted, network.total_stride, coarse)
    )
    if not found.is_worth_it:
        raise refusal(raw.name, full["patch_size"], shape, found)
    patch = fit_patch(wanted, network.total_stride, found.rounded_shape)
    normalization = full["normalization_schemes"], full["use_mask_for_norm"]
    low = configuration_entries(
        network, patch, DEFAULT_BATCH_SIZE, found.spacing, found.rounded_shape, normalization, batch_dice=False
    )
    return stages(full, low)


def _axis_order(choice: SpacingChoice, spacing: Sequence[float], pretraining: AdaptationPlan) -> list[int]:
    """``transpose_forward``: the pre-training's where it is followed, else coarsest axis first (nnU-Net's planner).

    Weights for one orientation know their axes: they get them in their own order whatever the spacing. A segmentation
    network too, unless nnU-Net's rule (median) was asked for, and not only fallen back to for want of a spacing to follow.
    """
    as_trained = pretraining.supervised and (choice.mode != "median" or bool(choice.note))
    if choice.mode in ("like_pretrained", "no_resample") or as_trained or pretraining.orientation is not None:
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
