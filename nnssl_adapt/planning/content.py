"""The content of a plans file, key for key as nnU-Net 2.x writes it, plus ``pretrain_info`` and ``nnssl_adapt``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.reorient import ORIENTATION_KEY, common_orientation
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.geometry.spacing import Spacing, SpacingChoice, median_spacing, resampled_shape
from nnssl_adapt.planning.base_plans import BasePlans
from nnssl_adapt.planning.naming import describe_settings
from nnssl_adapt.planning.normalization import (
    FROM_PRETRAINING,
    Normalization,
    choose_normalization,
    intensity_statistics,
)
from nnssl_adapt.planning.patch import describe_fit, fit_patch
from nnssl_adapt.planning.plan import CONFIGURATION, KEEP, RESAMPLE, FinetunePlan
from nnssl_adapt.planning.provenance import KEY, Provenance
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.architectures import Architecture
from nnssl_adapt.weights.sources.resolved import Origin
from nnssl_adapt.weights.transfer.settings import TransferSettings

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 2
"""Samples a batch, nnU-Net's minimum and what the published fine-tunings used."""


def plans_content(
    raw: RawDataset,
    checkpoint: Checkpoint,
    fingerprint: DatasetFingerprint,
    base: BasePlans,
    choice: SpacingChoice,
    name: str,
    plans_name: str | None,
    settings: TransferSettings,
    normalization: str = FROM_PRETRAINING,
) -> dict[str, Any]:
    """The plans file; ``plans_name`` replaces the name that is made up of ``name``, spacing and normalisation."""
    reference_spacing = choice.spacing or median_spacing(fingerprint.spacings, fingerprint.shapes_after_crop)
    forward = _axis_order(choice, reference_spacing, checkpoint.plan)
    spacing = [float(reference_spacing[axis]) for axis in forward]
    median_shape = resampled_median_shape(fingerprint, choice.spacing, forward)
    architecture = checkpoint.architecture
    wanted = checkpoint.plan.recommended_patch_size or checkpoint.plan.patch_size
    patch = fit_patch(wanted, architecture.total_stride, median_shape)
    if message := describe_fit(wanted, patch, median_shape):
        logger.info(message)
    schemes, use_mask = choose_normalization(normalization, checkpoint.plan, raw, fingerprint, settings)
    configuration = configuration_entries(
        architecture, patch, DEFAULT_BATCH_SIZE, spacing, median_shape, (schemes, use_mask), base.batch_dice
    )
    if choice.spacing is None:
        keep_own_spacing(configuration)
    content: dict[str, Any] = {
        **dataset_entries(raw, fingerprint, raw.json.image_reader or base.image_reader, forward),
        "plans_name": plans_name or f"ptPlans__{name}____{describe_settings(choice.spacing, schemes)}",
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "nnssl_adapt",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": intensity_statistics(
            normalization,
            schemes,
            checkpoint.plan,
            raw,
            base.content.get("foreground_intensity_properties_per_channel", fingerprint.intensity),
            settings,
        ),
        "pretrain_info": pretrain_info(checkpoint),
    }
    configuration["data_identifier"], digest = data_identifier(FinetunePlan(content))
    provenance = replace(
        Provenance.of(checkpoint, settings),
        spacing_mode=choice.mode,
        architecture_preset=architecture.preset,
        preprocessing_digest=digest,
    )
    return {**content, KEY: provenance.to_dict()}


def dataset_entries(
    raw: RawDataset, fingerprint: DatasetFingerprint, image_reader: str, forward: Sequence[int]
) -> dict[str, Any]:
    """What a plans file says of the dataset and of the order of its axes (``forward``)."""
    spacing = np.median(np.asarray(fingerprint.spacings, dtype=float), axis=0)[list(forward)]
    shape = np.median(np.asarray(fingerprint.shapes_after_crop, dtype=float), axis=0)[list(forward)]
    lies = common_orientation(raw)
    return {
        "dataset_name": raw.name,
        **({} if lies is None else {ORIENTATION_KEY: lies}),
        "original_median_spacing_after_transp": [float(s) for s in spacing],
        "original_median_shape_after_transp": [round(n) for n in shape.tolist()],
        "image_reader_writer": image_reader,
        "transpose_forward": list(forward),
        "transpose_backward": [forward.index(axis) for axis in range(3)],
    }


def configuration_entries(
    architecture: Architecture,
    patch_size: Sequence[int],
    batch_size: int,
    spacing: Sequence[float],
    median_shape: Sequence[float],
    normalization: Normalization,
    batch_dice: bool,
) -> dict[str, Any]:
    """A configuration that resamples to ``spacing`` (mm, transposed axes) as nnU-Net does."""
    schemes, use_mask = normalization
    return {
        "data_identifier": "",  # filled in later, since it names the digest of these settings
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": list(patch_size),
        "median_image_size_in_voxels": [float(n) for n in median_shape],
        "spacing": [float(s) for s in spacing],
        "normalization_schemes": list(schemes),
        "use_mask_for_norm": list(use_mask),
        "resampling_fn_data": RESAMPLE,
        "resampling_fn_seg": RESAMPLE,
        "resampling_fn_data_kwargs": {"force_separate_z": None, "is_seg": False, "order": 3, "order_z": 0},
        "resampling_fn_seg_kwargs": {"force_separate_z": None, "is_seg": True, "order": 1, "order_z": 0},
        "resampling_fn_probabilities": RESAMPLE,
        "resampling_fn_probabilities_kwargs": {"force_separate_z": None, "is_seg": False, "order": 1, "order_z": 0},
        "architecture": architecture.to_plans_dict(patch_size),
        "batch_dice": batch_dice,
    }


def keep_own_spacing(configuration: dict[str, Any]) -> None:
    """Change a configuration so that images keep their own spacing."""
    for what in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{what}"] = KEEP
        configuration[f"resampling_fn_{what}_kwargs"] = {}


def data_identifier(plan: FinetunePlan) -> tuple[str, str]:
    """Folder of the plan's preprocessed cases, and the digest of its settings.

    The readable part rounds, and has the images' own order of axes; the digest is of the exact settings, so that other
    settings are another folder.
    """
    settings = plan.settings
    digest = settings.digest()
    spacing = None if settings.spacing is None else [settings.spacing[axis] for axis in settings.transpose_backward]
    readable = describe_settings(spacing, settings.normalization_schemes)
    return f"nnssl_adapt__{readable}__{digest[:8]}", digest


def pretrain_info(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entries that nnU-Net's own nnssl integration reads. The path is a hint; the digest decides."""
    plan = checkpoint.plan
    return {
        "checkpoint_path": _path_hint(checkpoint.origin),
        "checkpoint_name": checkpoint.origin.filename,
        "key_to_encoder": plan.key_to_encoder,
        "key_to_stem": plan.key_to_stem,
        "keys_to_in_proj": list(plan.keys_to_in_proj or ()),
        "key_to_lpe": plan.key_to_lpe,
        "pt_num_in_channels": plan.num_input_channels,
        "pt_used_patchsize": list(plan.patch_size),
        "pt_recommended_downstream_patchsize": list(plan.recommended_patch_size or plan.patch_size),
        "citations": list(checkpoint.citations),
    }


def _path_hint(origin: Origin) -> str:
    """Where the weights lay when the plan was made, for nnU-Net; we ourselves go by source and digest."""
    path = Path(origin.source).expanduser()
    # A name below $nnssl_pretrained_models, on the hub or on the web is no path from here.
    return str(path.resolve()) if path.exists() else origin.source


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


def resampled_median_shape(
    fingerprint: DatasetFingerprint, spacing: Spacing | None, forward: Sequence[int]
) -> list[float]:
    """Median shape (voxels, transposed axes) of the cropped images once they are resampled to ``spacing`` (mm)."""
    shapes = [
        tuple(shape) if spacing is None else resampled_shape(shape, own, spacing)
        for shape, own in zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True)
    ]
    return [float(n) for n in np.median(np.asarray(shapes, dtype=float), axis=0)[list(forward)]]
