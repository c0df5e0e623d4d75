"""From a dataset and a checkpoint to a FinetunePlan."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.fingerprint import DatasetFingerprint, fingerprint_dataset
from nnssl_adapt.data.verify import verify_dataset
from nnssl_adapt.errors import ConfigurationError, PlanError
from nnssl_adapt.files import atomic_path, make_folder
from nnssl_adapt.geometry.spacing import SpacingChoice, canonical_mode, choose_spacing, median_spacing, resampled_shape
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.planning.patch import describe_fit, fit_patch
from nnssl_adapt.planning.plan import CONFIGURATION, KEEP, RESAMPLE, FinetunePlan
from nnssl_adapt.weights.checkpoint import Checkpoint, open_checkpoint
from nnssl_adapt.weights.settings import TransferSettings
from nnssl_adapt.weights.source import Origin

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 2
"""Samples a batch, nnU-Net's minimum and what the published fine-tunings used."""

_SHORT_NORM_NAMES = {
    "ZScoreNormalization": "Z",
    "CTNormalization": "CT",
    "NoNormalization": "No",
    "RescaleTo01Normalization": "01",
    "RGBTo01Normalization": "RGB01",
}


def make_plan(
    dataset: int | str | Path | RawDataset,
    checkpoint: Checkpoint | str | Path,
    mode: str = "like_pretrained",
    name: str = "pretrained",
    spacing: Sequence[float] | None = None,
    base_plans: str | None = None,
    transfer: TransferSettings | None = None,
    workers: int = 2,
    progress: bool = False,
) -> FinetunePlan:
    """Plan the fine-tuning of ``checkpoint`` on ``dataset``; nothing is preprocessed yet.

    Needs no earlier step: a ``dataset_fingerprint.json`` that lies in the dataset's preprocessed folder is used (also
    one that nnU-Net made), else the raw dataset is verified and the fingerprint made and saved.

    Args:
        dataset: id, name or folder of a raw dataset in nnU-Net format.
        checkpoint: what :func:`open_checkpoint` returned, or anything that it takes.
        mode: where the spacing comes from. ``like_pretrained``: the pre-training's (the dataset's median when the
            pre-training kept every image's own); ``median`` (also ``default_nnunet``): nnU-Net's rule; ``fixed``: ``spacing``;
            ``no_resample``: every image keeps its own.
        name: short name of the pre-training, part of the plan's file name.
        spacing: millimetres (Z, Y, X) in the image's array order, for mode ``fixed`` only.
        base_plans: name of an existing nnU-Net plans file whose reader, intensity statistics and Dice setting are
            taken over; by default ``nnUNetPlans`` where it exists.
        transfer: how the weights will be fitted to the network (by default as suits most).
        workers: processes that read images when the fingerprint has to be made.
        progress: whether to draw progress bars.

    Returns:
        An unsaved plan; call ``.save()``, or :func:`preprocess_dataset`, which saves it.

    Raises:
        DatasetError: the dataset is missing or inconsistent (all problems at once).
        PlanError: ``base_plans`` does not exist.
        ConfigurationError: mode, name or spacing make no sense.

    Axes: in the modes that follow the pre-training (``like_pretrained``, ``no_resample``) images keep their axis order, as
    nnssl kept it. In the others the axis of the coarsest target spacing comes first, as in nnU-Net.
    """
    mode = canonical_mode(mode)
    _check_name(name)
    raw = dataset if isinstance(dataset, RawDataset) else RawDataset.open(dataset)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    fingerprint = load_or_make_fingerprint(raw, workers=workers, progress=progress)
    base = _BasePlans.find(raw.name, base_plans)
    choice = choose_spacing(
        mode,
        pretrained=checkpoint.plan.spacing,
        spacings=fingerprint.spacings,
        shapes=fingerprint.shapes_after_crop,
        fixed=None if spacing is None else tuple(float(s) for s in spacing),
    )
    if choice.note:
        logger.warning(choice.note)
    return FinetunePlan(
        _plans_content(raw, checkpoint, fingerprint, base, choice, name, transfer or TransferSettings())
    )


def load_or_make_fingerprint(raw: RawDataset, workers: int = 2, progress: bool = False) -> DatasetFingerprint:
    """Return the dataset's fingerprint from its preprocessed folder, verifying and measuring the images if it is missing.

    A fingerprint of another number of cases than the dataset has is made anew.
    """
    path = preprocessed_folder() / raw.name / "dataset_fingerprint.json"
    if path.is_file():
        fingerprint = DatasetFingerprint.load(path)
        if len(fingerprint.spacings) == len(raw.cases):
            logger.info("using the fingerprint %s", path)
            return fingerprint
        logger.warning(
            "%s describes %d cases, the dataset has %d: making it anew", path, len(fingerprint.spacings), len(raw.cases)
        )
    logger.info("verifying %s (%d cases)", raw.name, len(raw.cases))
    report = verify_dataset(raw, workers=workers, progress=progress)
    for warning in report.warnings:
        logger.warning("%s", warning)
    report.raise_if_bad()
    fingerprint = fingerprint_dataset(raw, workers=workers, progress=progress)
    fingerprint.save(path)
    return fingerprint


@dataclass(frozen=True)
class _BasePlans:
    """What is taken over from an existing nnU-Net plan; ``content`` is empty when there is none."""

    content: dict[str, Any]

    @classmethod
    def find(cls, dataset_name: str, name: str | None) -> _BasePlans:
        folder = preprocessed_folder() / dataset_name
        path = folder / f"{(name or 'nnUNetPlans').removesuffix('.json')}.json"
        if not path.is_file():
            if name is not None:
                found = sorted(p.stem for p in folder.glob("*Plans*.json"))
                raise PlanError(
                    f"no base plans {path}; found: {', '.join(found) or 'none'}. Leave -pl out to do without"
                )
            return cls({})
        plan = FinetunePlan.load(path)
        logger.info("using the nnU-Net plans %s for the image reader, intensity statistics and Dice setting", path)
        return cls(plan.content)

    @property
    def batch_dice(self) -> bool:
        configuration = self.content.get("configurations", {}).get(CONFIGURATION, {})
        return bool(configuration.get("batch_dice", False))

    @property
    def image_reader(self) -> str:
        return str(self.content.get("image_reader_writer", "SimpleITKIO"))


def _plans_content(
    raw: RawDataset,
    checkpoint: Checkpoint,
    fingerprint: DatasetFingerprint,
    base: _BasePlans,
    choice: SpacingChoice,
    name: str,
    settings: TransferSettings,
) -> dict[str, Any]:
    """The plans file, key for key as nnU-Net 2.x writes it, plus ``pretrain_info`` and ``nnssl_adapt``."""
    reference_spacing = choice.spacing or median_spacing(fingerprint.spacings, fingerprint.shapes_after_crop)
    forward = _axis_order(choice, reference_spacing)
    backward = [forward.index(axis) for axis in range(3)]
    spacing = [float(reference_spacing[axis]) for axis in forward]
    median_shape = _median_shape(fingerprint, choice, forward)
    architecture = checkpoint.architecture
    wanted = checkpoint.plan.recommended_patch_size or checkpoint.plan.patch_size
    patch = fit_patch(wanted, architecture.total_stride, median_shape)
    if message := describe_fit(wanted, patch, median_shape):
        logger.info(message)
    schemes, use_mask = _normalization(checkpoint, raw.num_channels)
    resampling = (
        {"force_separate_z": None, "is_seg": False, "order": 3, "order_z": 0},
        {"force_separate_z": None, "is_seg": True, "order": 1, "order_z": 0},
        {"force_separate_z": None, "is_seg": False, "order": 1, "order_z": 0},
    )
    keep = choice.spacing is None
    data_kwargs, seg_kwargs, probability_kwargs = ({}, {}, {}) if keep else resampling
    function = KEEP if keep else RESAMPLE
    plans_name = f"ptPlans__{name}____{_spacing_part(choice.spacing)}___{_norm_part(schemes)}"
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
        "plans_name": plans_name,
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
        "pretrain_info": _pretrain_info(checkpoint),
        "nnssl_adapt": {
            "version": package_version(),
            "source": checkpoint.origin.to_dict(),
            "source_choices": dict(checkpoint.choices),
            "transfer": settings.to_dict(),
            "trainer_name": checkpoint.trainer_name,
            "spacing_mode": choice.mode,
            "architecture_preset": architecture.preset,
        },
    }
    configuration["data_identifier"] = f"{CONFIGURATION}_placeholder"
    digest = FinetunePlan(content).settings.digest()
    # The readable part rounds; the digest is of the exact settings, so that other settings are another folder.
    configuration["data_identifier"] = (
        f"nnssl_adapt__{_spacing_part(choice.spacing)}___{_norm_part(schemes)}__{digest[:8]}"
    )
    content["nnssl_adapt"]["preprocessing_digest"] = digest
    return content


def _axis_order(choice: SpacingChoice, spacing: Sequence[float]) -> list[int]:
    """``transpose_forward``: unchanged where pre-training is followed, else coarsest axis first (nnU-Net's planner)."""
    if choice.mode in ("like_pretrained", "no_resample"):
        return [0, 1, 2]
    coarsest = int(np.argmax(spacing))
    return [coarsest, *(axis for axis in range(3) if axis != coarsest)]


def _median_shape(fingerprint: DatasetFingerprint, choice: SpacingChoice, forward: Sequence[int]) -> list[float]:
    """Median shape (voxels, transposed axes) of the cropped images once they are resampled."""
    shapes = [
        tuple(shape) if choice.spacing is None else resampled_shape(shape, spacing, choice.spacing)
        for shape, spacing in zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True)
    ]
    return [float(n) for n in np.median(np.asarray(shapes, dtype=float), axis=0)[list(forward)]]


def _normalization(checkpoint: Checkpoint, channels: int) -> tuple[list[str], list[bool]]:
    """Normalisation of each downstream channel: as in pre-training, where all channels had one scheme."""
    schemes = list(dict.fromkeys(checkpoint.plan.normalization_schemes)) or ["ZScoreNormalization"]
    masks = list(dict.fromkeys(checkpoint.plan.use_mask_for_norm)) or [False]
    if len(checkpoint.plan.normalization_schemes) == channels:
        return list(checkpoint.plan.normalization_schemes), list(checkpoint.plan.use_mask_for_norm)
    if len(schemes) > 1 or len(masks) > 1:
        raise PlanError(
            f"the pre-training normalised its {len(checkpoint.plan.normalization_schemes)} channels differently "
            f"({', '.join(checkpoint.plan.normalization_schemes)}), so there is no one scheme for the dataset's "
            f"{channels} channels; use a checkpoint with one scheme"
        )
    return schemes * channels, masks * channels


def _pretrain_info(checkpoint: Checkpoint) -> dict[str, Any]:
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
    if origin.kind == "huggingface":
        return origin.source
    return str(Path(origin.source).expanduser().resolve())


def _spacing_part(spacing: Sequence[float] | None) -> str:
    if spacing is None:
        return "Spacing__None"
    return "Spacing__" + "_".join(_readable(s) for s in spacing)


def _readable(spacing: float) -> str:
    """Two decimals as nnU-Net's integration writes, more where two would change the number."""
    for decimals in (2, 3, 4):
        text = f"{spacing:.{decimals}f}"
        if abs(float(text) - spacing) < 1e-5:
            return text
    return text


def _norm_part(schemes: Sequence[str]) -> str:
    return "Norm__" + "_".join(_SHORT_NORM_NAMES.get(scheme, scheme) for scheme in schemes)


def _check_name(name: str) -> None:
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise ConfigurationError(
            f"-n {name!r}: use letters, digits, '-', '_' and '.', since it becomes part of file names"
        )


def package_version() -> str:
    """Version of the installed nnssl-adapt, or ``unknown`` in a bare source tree."""
    try:
        return version("nnssl-adapt")
    except PackageNotFoundError:
        return "unknown"


def copy_dataset_json(raw: RawDataset, folder: Path) -> None:
    """Put the dataset's ``dataset.json`` beside the plans, byte for byte, where nnU-Net expects it."""
    make_folder(folder)
    content = (raw.folder / "dataset.json").read_bytes()
    target = folder / "dataset.json"
    if target.is_file() and target.read_bytes() == content:
        return
    json.loads(content)  # never replace a good copy by a broken one
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
