"""The content of a plans file, key for key as nnU-Net 2.x writes it, plus ``pretrain_info`` and ``nnssl_adapt``."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.fingerprint import DatasetFingerprint
from nnssl_adapt.geometry.spacing import SpacingChoice, median_spacing, resampled_shape
from nnssl_adapt.planning.base_plans import BasePlans
from nnssl_adapt.planning.naming import describe_settings
from nnssl_adapt.planning.normalization import FROM_PRETRAINING, choose_normalization
from nnssl_adapt.planning.patch import describe_fit, fit_patch
from nnssl_adapt.planning.plan import CONFIGURATION, KEEP, RESAMPLE, FinetunePlan
from nnssl_adapt.weights.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint import Checkpoint
from nnssl_adapt.weights.settings import TransferSettings
from nnssl_adapt.weights.source import Origin

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
    backward = [forward.index(axis) for axis in range(3)]
    spacing = [float(reference_spacing[axis]) for axis in forward]
    median_shape = _median_shape(fingerprint, choice, forward)
    architecture = checkpoint.architecture
    wanted = checkpoint.plan.recommended_patch_size or checkpoint.plan.patch_size
    patch = fit_patch(wanted, architecture.total_stride, median_shape)
    if message := describe_fit(wanted, patch, median_shape):
        logger.info(message)
    schemes, use_mask = choose_normalization(normalization, checkpoint.plan, raw, fingerprint, settings)
    resampling = (
        {"force_separate_z": None, "is_seg": False, "order": 3, "order_z": 0},
        {"force_separate_z": None, "is_seg": True, "order": 1, "order_z": 0},
        {"force_separate_z": None, "is_seg": False, "order": 1, "order_z": 0},
    )
    keep = choice.spacing is None
    data_kwargs, seg_kwargs, probability_kwargs = ({}, {}, {}) if keep else resampling
    function = KEEP if keep else RESAMPLE
    configuration: dict[str, Any] = {
        "data_identifier": "",  # filled in below, since it names the digest of these settings
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": DEFAULT_BATCH_SIZE,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [float(n) for n in median_shape],
        "spacing": spacing,
        "normalization_schemes": list(schemes),
        "use_mask_for_norm": list(use_mask),
        "resampling_fn_data": function,
        "resampling_fn_seg": function,
        "resampling_fn_data_kwargs": data_kwargs,
        "resampling_fn_seg_kwargs": seg_kwargs,
        "resampling_fn_probabilities": function,
        "resampling_fn_probabilities_kwargs": probability_kwargs,
        "architecture": architecture.to_plans_dict(patch),
        "batch_dice": base.batch_dice,
    }
    median_original_spacing = np.median(np.asarray(fingerprint.spacings, dtype=float), axis=0)[forward]
    median_original_shape = np.median(np.asarray(fingerprint.shapes_after_crop, dtype=float), axis=0)[forward]
    content: dict[str, Any] = {
        "dataset_name": raw.name,
        "plans_name": plans_name or f"ptPlans__{name}____{describe_settings(choice.spacing, schemes)}",
        "original_median_spacing_after_transp": [float(s) for s in median_original_spacing],
        "original_median_shape_after_transp": [round(n) for n in median_original_shape.tolist()],
        "image_reader_writer": base.image_reader,
        "transpose_forward": forward,
        "transpose_backward": backward,
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "nnssl_adapt",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": base.content.get(
            "foreground_intensity_properties_per_channel", copy.deepcopy(fingerprint.intensity)
        ),
        "pretrain_info": pretrain_info(checkpoint),
        "nnssl_adapt": {
            **provenance(checkpoint, settings),
            "spacing_mode": choice.mode,
            "architecture_preset": architecture.preset,
        },
    }
    configuration["data_identifier"], digest = data_identifier(FinetunePlan(content))
    content["nnssl_adapt"]["preprocessing_digest"] = digest
    return content


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


def provenance(checkpoint: Checkpoint, settings: TransferSettings) -> dict[str, Any]:
    """Our own entries of a plans file: which weights, opened how, fitted how."""
    return {
        "version": package_version(),
        "source": checkpoint.origin.to_dict(),
        "source_choices": dict(checkpoint.choices),
        "transfer": settings.to_dict(),
        "trainer_name": checkpoint.trainer_name,
        "orientation": checkpoint.plan.orientation,
    }


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


def _median_shape(fingerprint: DatasetFingerprint, choice: SpacingChoice, forward: Sequence[int]) -> list[float]:
    """Median shape (voxels, transposed axes) of the cropped images once they are resampled."""
    shapes = [
        tuple(shape) if choice.spacing is None else resampled_shape(shape, spacing, choice.spacing)
        for shape, spacing in zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True)
    ]
    return [float(n) for n in np.median(np.asarray(shapes, dtype=float), axis=0)[list(forward)]]


def package_version() -> str:
    """Version of the installed nnssl-adapt, or ``unknown`` in a bare source tree."""
    try:
        return version("nnssl-adapt")
    except PackageNotFoundError:
        return "unknown"
