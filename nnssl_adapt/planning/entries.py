"""The entries of a plans file, key for key as nnU-Net 2.x writes them, plus ``pretrain_info``: what every planner here needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.reorient import ORIENTATION_KEY, common_orientation
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.errors import PlanError
from nnssl_adapt.geometry.spacing import Spacing, resampled_shape
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.planning.normalization import Normalization, intensity_statistics
from nnssl_adapt.planning.plan import CONFIGURATION, KEEP, RESAMPLE, FinetunePlan
from nnssl_adapt.planning.plans_file import NNUNET_PLANS, describe_settings, plans_beside
from nnssl_adapt.planning.provenance import KEY, Provenance
from nnssl_adapt.planning.task import PlanningTask
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.architectures import Architecture
from nnssl_adapt.weights.sources.resolved import Origin

logger = logging.getLogger(__name__)

PLANNER = "nnssl_adapt"
"""``experiment_planner_used`` of the plans that are made here."""


@dataclass(frozen=True)
class BasePlans:
    """What is taken over from an existing nnU-Net plan; ``content`` is empty when there is none."""

    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, dataset_name: str, name: str | None, configuration: str = CONFIGURATION) -> BasePlans:
        """The plans file ``name`` of a dataset, by default ``nnUNetPlans`` where it exists. Raises PlanError."""
        path = preprocessed_folder() / dataset_name / f"{(name or NNUNET_PLANS[0]).removesuffix('.json')}.json"
        if not path.is_file():
            if name is not None:
                raise PlanError(
                    f"no base plans {path}; found: {plans_beside(dataset_name)}. Leave -pl out to plan without it"
                )
            return cls()
        plan = FinetunePlan.load(path, configuration)
        logger.info("using the nnU-Net plans %s for the image reader, intensity statistics and Dice setting", path)
        return cls(plan.content)

    @property
    def batch_dice(self) -> bool:
        configuration = self.content.get("configurations", {}).get(CONFIGURATION, {})
        return bool(configuration.get("batch_dice", False))

    @property
    def image_reader(self) -> str:
        return str(self.content.get("image_reader_writer", "SimpleITKIO"))


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


def resampled_median_shape(
    fingerprint: DatasetFingerprint, spacing: Spacing | None, forward: Sequence[int]
) -> list[float]:
    """Median shape (voxels, transposed axes) of the cropped images once they are resampled to ``spacing`` (mm)."""
    shapes = [
        tuple(shape) if spacing is None else resampled_shape(shape, own, spacing)
        for shape, own in zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True)
    ]
    return [float(n) for n in np.median(np.asarray(shapes, dtype=float), axis=0)[list(forward)]]


def entries_for_weights(
    task: PlanningTask,
    base: BasePlans,
    forward: Sequence[int],
    spacing: Sequence[float] | None,
    configurations: dict[str, dict[str, Any]],
    spacing_mode: str,
) -> dict[str, Any]:
    """The plans file that trains the network of the weights.

    Args:
        task: the dataset, oriented, the weights and the request.
        base: what is taken over from nnU-Net's plans.
        forward: order of the axes (``transpose_forward``).
        spacing: mm that images are resampled to; None: they keep their own.
        configurations: name → entries, all with the same normalisation; their stores are named here.
        spacing_mode: that took effect.
    """
    raw, checkpoint, request, fingerprint = task.raw, task.checkpoint, task.request, task.fingerprint
    schemes = next(iter(configurations.values()))["normalization_schemes"]
    content = {
        **dataset_entries(raw, fingerprint, raw.image_reader or base.image_reader, forward),
        "plans_name": request.plans_name or f"ptPlans__{request.name}____{describe_settings(spacing, schemes)}",
        "configurations": configurations,
        "experiment_planner_used": PLANNER,
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
        spacing_mode=spacing_mode,
        architecture_preset=checkpoint.architecture.preset,
    )
    return with_record(content, provenance)


def with_record(content: dict[str, Any], provenance: Provenance) -> dict[str, Any]:
    """The plans file with the names of its stores, and at its end the record of how it was made, with their digest."""
    digest = _name_stores(content)
    return {**content, KEY: replace(provenance, preprocessing_digest=digest).to_dict()}


def _name_stores(content: dict[str, Any]) -> str:
    """Give each configuration the folder of its preprocessed cases; returns the digest of the full resolution's settings.

    One that inherits from another has its folder, too.
    """
    digests = {}
    for name, entries in content["configurations"].items():
        if "inherits_from" not in entries:
            entries["data_identifier"], digests[name] = data_identifier(FinetunePlan(content, name))
    return digests.get(CONFIGURATION) or next(iter(digests.values()))


def data_identifier(plan: FinetunePlan) -> tuple[str, str]:
    """Folder of the plan's preprocessed cases, and the digest of its settings.

    The readable part rounds, and has the images' own order of axes; the digest is of the exact settings, so that other
    settings are another folder.
    """
    settings = plan.settings
    digest = settings.digest()
    spacing = settings.spacing
    if spacing is not None and len(spacing) == 3:
        spacing = tuple(spacing[axis] for axis in settings.transpose_backward)
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
