"""From a raw case to a preprocessed one: transpose, crop to nonzero, normalise, resample, remember where classes lie.

The steps, their order, and what is stored are those of nnU-Net 2.8's ``DefaultPreprocessor``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnssl_adapt.data.class_locations import class_locations
from nnssl_adapt.data.dataset import RawCase
from nnssl_adapt.data.images import (
    ImageGeometry,
    distinct_values,
    geometry_problems,
    read_image,
    read_labels,
)
from nnssl_adapt.data.labels import LabelScheme, label_problem
from nnssl_adapt.data.normalize import CT_STATISTICS, SCHEMES, normalize_channel
from nnssl_adapt.data.store import PreprocessedCase
from nnssl_adapt.errors import CaseError, PlanError
from nnssl_adapt.geometry.cropping import Box, fill_holes, nonzero_box
from nnssl_adapt.geometry.labels import resample_labels
from nnssl_adapt.geometry.resample import resample_image
from nnssl_adapt.geometry.spacing import resampled_shape

logger = logging.getLogger(__name__)

_DIGEST_VERSION = 1
"""Raised when the arithmetic changes what is stored, so that older stores are done again."""


@dataclass(frozen=True)
class ResamplingRule:
    """How arrays are interpolated.

    Attributes:
        order: of the spline, in plane where the coarse axis is done apart: 3 cubic, 1 linear, 0 nearest.
        order_z: along the coarse axis where it is done apart.
        force_separate_z: True or False to decide whether it is; None: if its spacing is over three times the others'.
    """

    order: int
    order_z: int = 0
    force_separate_z: bool | None = None


@dataclass(frozen=True)
class PreprocessSettings:
    """Everything that decides what a preprocessed case looks like. "Transposed" means after ``transpose_forward``.

    Attributes:
        spacing: millimetres to resample to, transposed axes; None keeps each case's own. Two numbers: within the slices of the
            first axis, which stay as far apart as they are (nnU-Net's 2D configurations).
        transpose_forward: which axis (Z, Y, X) of the image becomes which of the result.
        transpose_backward: its inverse.
        normalization_schemes: one a channel, see :data:`nnssl_adapt.data.normalize.SCHEMES`.
        use_mask_for_norm: for each channel, whether z-score looks at the nonzero region only.
        intensity_properties: channel index (as text) → the dataset's foreground statistics, for CT.
        patch_size: of the training to come (voxels, transposed); decides only how files are cut into pieces.
        resampling_data: for images.
        resampling_seg: for labels.

    Raises:
        PlanError: naming everything that does not fit together.
    """

    spacing: tuple[float, ...] | None
    transpose_forward: tuple[int, ...]
    transpose_backward: tuple[int, ...]
    normalization_schemes: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    intensity_properties: dict[str, dict[str, float]] = field(default_factory=dict)
    patch_size: tuple[int, ...] = (128, 128, 128)
    resampling_data: ResamplingRule = ResamplingRule(order=3)
    resampling_seg: ResamplingRule = ResamplingRule(order=1)

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise PlanError("these preprocessing settings can't be used: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        forward, backward = list(self.transpose_forward), list(self.transpose_backward)
        if sorted(forward) != [0, 1, 2]:
            problems.append(f"transpose_forward must be an order of 0, 1, 2, got {forward}")
        elif backward != [forward.index(axis) for axis in range(3)]:
            problems.append(f"transpose_backward must undo transpose_forward {forward}, got {backward}")
        if self.spacing is not None and not (
            len(self.spacing) in (2, 3) and all(0 < s < math.inf for s in self.spacing)
        ):
            problems.append(f"spacing must be three positive millimetres (two: within slices), got {self.spacing}")
        if len(self.use_mask_for_norm) != len(self.normalization_schemes):
            problems.append(
                f"use_mask_for_norm has {len(self.use_mask_for_norm)} entries, normalization_schemes "
                f"{len(self.normalization_schemes)}; expected one a channel"
            )
        for channel, scheme in enumerate(self.normalization_schemes):
            if scheme not in SCHEMES:
                problems.append(f"channel {channel}: unknown normalisation {scheme!r}; known: {', '.join(SCHEMES)}")
            missing = set(CT_STATISTICS) - set(self.intensity_properties.get(str(channel), {}))
            if scheme == "CTNormalization" and missing:
                problems.append(
                    f"channel {channel}: CTNormalization needs foreground_intensity_properties_per_channel with "
                    f"{', '.join(sorted(missing))}"
                )
        return problems

    def target_spacing(self, own: Sequence[float]) -> tuple[float, ...] | None:
        """What an image of the spacing ``own`` is resampled to, mm, both in transposed axes; None: nothing."""
        if self.spacing is None:
            return None
        return (float(own[0]), *self.spacing)[-3:]

    def to_dict(self) -> dict[str, Any]:
        """Everything that changes voxels, at full precision: not the patch size, and statistics only where CT uses them."""
        return {
            "version": _DIGEST_VERSION,
            "spacing": None if self.spacing is None else [float(s) for s in self.spacing],
            "transpose_forward": [int(a) for a in self.transpose_forward],
            "normalization_schemes": list(self.normalization_schemes),
            "use_mask_for_norm": [bool(m) for m in self.use_mask_for_norm],
            "intensity_properties": {
                str(channel): {name: float(self.intensity_properties[str(channel)][name]) for name in CT_STATISTICS}
                for channel, scheme in enumerate(self.normalization_schemes)
                if scheme == "CTNormalization"
            },
            "resampling_data": vars(self.resampling_data),
            "resampling_seg": vars(self.resampling_seg),
        }

    def digest(self) -> str:
        """Hexadecimal SHA-256 of :meth:`to_dict`: equal if and only if the same voxels come out."""
        return digest_of(self.to_dict())


def digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- one case ----------------------------------------------------------------------------------------------------------


def preprocess_case(case: RawCase, settings: PreprocessSettings, label_scheme: LabelScheme) -> PreprocessedCase:
    """Read and preprocess the files of a case; see :func:`preprocess_arrays`.

    Raises:
        CaseError: a file is missing, unreadable, truncated, has NaN voxels; images and labels lie on different grids;
            the labels have values that dataset.json does not have; another number of channels than planned.
    """
    # One after the other, and neither whole image nor whole labels wait in memory for what follows.
    image, geometry = read_image(case.images, case.reader)
    try:
        cropped = _crop_image(image, settings)
    except CaseError as error:
        raise CaseError(f"{case.images[0]}: {error}") from error
    del image
    if case.label is not None:
        cropped.add_labels(_checked_labels(case, geometry, label_scheme), settings)
    try:
        return _finish(cropped, geometry, settings, label_scheme)
    except CaseError as error:
        raise CaseError(f"{case.images[0]}: {error}") from error


def _checked_labels(case: RawCase, geometry: ImageGeometry, label_scheme: LabelScheme) -> np.ndarray:
    assert case.label is not None
    labels, label_geometry = read_labels(case.label, case.reader)
    for problem in geometry_problems(geometry, label_geometry):
        raise CaseError(f"{case.label}: {problem} from that of {case.images[0]}; labels must lie on the image's grid")
    unknown = label_problem(case.label, distinct_values(labels), label_scheme.values_in_files)
    if unknown is not None:
        raise CaseError(unknown)
    return labels


def preprocess_arrays(
    image: np.ndarray,
    labels: np.ndarray | None,
    geometry: ImageGeometry,
    settings: PreprocessSettings,
    label_scheme: LabelScheme,
) -> PreprocessedCase:
    """Preprocess an image, as nnU-Net does. The inputs are not changed.

    Args:
        image: (C, Z, Y, X), any number type.
        labels: (1, Z, Y, X), or None when predicting.
        geometry: of the image.
        settings: what to do.
        label_scheme: which classes' locations to remember.

    Returns:
        Data, labels and properties in transposed axes.

    Raises:
        CaseError: the number of channels or the shape of the labels does not fit.
    """
    cropped = _crop_image(image, settings)
    if labels is not None:
        if labels.shape != (1, *image.shape[1:]):
            raise CaseError(f"labels have shape {labels.shape}, expected {(1, *image.shape[1:])} as the image")
        cropped.add_labels(labels, settings)
    return _finish(cropped, geometry, settings, label_scheme)


@dataclass
class _Cropped:
    """An image cut to its nonzero box, in transposed axes: copies, free to be changed."""

    data: np.ndarray
    shape_before: tuple[int, ...]
    box: Box
    labels: np.ndarray | None = None

    @property
    def cut(self) -> tuple[slice, ...]:
        return (slice(None), *(slice(low, high) for low, high in self.box))

    def add_labels(self, labels: np.ndarray, settings: PreprocessSettings) -> None:
        """Cut out the labels (1, Z, Y, X) of the whole image."""
        self.labels = np.array(labels.transpose(_transposed(settings))[self.cut], dtype=np.int16, order="C")

    def taken(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and labels, which are then no longer held here."""
        data, labels = self.data, self.labels
        self.data, self.labels = np.empty(0), None
        return data, labels


def _crop_image(image: np.ndarray, settings: PreprocessSettings) -> _Cropped:
    channels = len(settings.normalization_schemes)
    if image.ndim != 4:
        raise CaseError(f"expected an image (C, Z, Y, X), got {image.ndim} axes")
    if len(image) != channels:
        raise CaseError(f"the image has {len(image)} channel(s), the plan is for {channels}")
    image = image.transpose(_transposed(settings))
    cropped = _Cropped(image, image.shape[1:], nonzero_box(image))
    cropped.data = np.array(image[cropped.cut], dtype=np.float32, order="C")
    return cropped


def _transposed(settings: PreprocessSettings) -> tuple[int, ...]:
    return (0, *(axis + 1 for axis in settings.transpose_forward))


def _finish(
    cropped: _Cropped, geometry: ImageGeometry, settings: PreprocessSettings, label_scheme: LabelScheme
) -> PreprocessedCase:
    """Normalise, resample and find the classes; uses up ``cropped``."""
    spacing = tuple(geometry.spacing[axis] for axis in settings.transpose_forward)
    data, labels = cropped.taken()
    properties = geometry.to_properties()
    properties["shape_before_cropping"] = cropped.shape_before
    properties["bbox_used_for_cropping"] = [[int(low), int(high)] for low, high in cropped.box]
    properties["shape_after_cropping_and_before_resampling"] = data.shape[1:]
    has_labels = labels is not None
    seg = _mark_outside(labels, data)
    del labels
    # Before resampling: afterwards the nonzero region would no longer fit the image exactly.
    _normalize(data, seg[0], settings)
    target = settings.target_spacing(spacing)
    if target is not None:
        new_shape = resampled_shape(data.shape[1:], spacing, target)
        data = resample_image(data, new_shape, spacing, target, **vars(settings.resampling_data))
        if has_labels:
            seg = resample_labels(seg, new_shape, spacing, target, **vars(settings.resampling_seg))
    if not has_labels:
        return PreprocessedCase(data, None, properties)
    properties["class_locations"] = class_locations(seg, label_scheme.sampled_classes)
    return PreprocessedCase(data, seg, properties)


def _mark_outside(labels: np.ndarray | None, data: np.ndarray) -> np.ndarray:
    """Labels (int16, changed in place) with -1 where there are none and the image is zero up to its border; 0 without labels."""
    nonzero = data[0] != 0
    for channel in data[1:]:
        nonzero |= channel != 0
    inside = fill_holes(nonzero)
    seg = np.zeros((1, *inside.shape), np.int16) if labels is None else labels
    for values, kept in zip(seg[0], inside, strict=True):  # a slice stays in the processor's cache
        unlabelled = values == 0
        np.greater(unlabelled, kept, out=unlabelled)
        np.subtract(values, unlabelled.view(np.int8), out=values)
    return seg


def _normalize(data: np.ndarray, seg: np.ndarray, settings: PreprocessSettings) -> None:
    for channel, scheme in enumerate(settings.normalization_schemes):
        normalize_channel(
            data[channel],
            scheme,
            inside=seg >= 0 if settings.use_mask_for_norm[channel] else None,
            statistics=settings.intensity_properties.get(str(channel)),
        )
