"""nnU-Net's default 3D augmentation: all is drawn first, then no more is read than it takes.

Two thirds of the patches are neither turned nor scaled: they are read as they are, mirrored on the way. For the others it is
the voxels around the turned patch. Intensities follow in place (:mod:`nnssl_adapt.training.batches.intensity`). What is
drawn has the distributions of nnU-Net's own chain of batchgeneratorsv2 transforms, and does the same to a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.batches.intensity import IntensityStep, draw_steps
from nnssl_adapt.training.batches.patches import Place, seeds_for
from nnssl_adapt.training.batches.previous_stage import StageSteps, write_one_hot
from nnssl_adapt.training.batches.reading import read_box, read_previous
from nnssl_adapt.training.batches.spatial import (
    Box,
    Size,
    affine_matrix,
    code_type,
    in_plane_matrix,
    mirrored,
    needed_box,
    sample_into,
    with_centre,
)

DUMMY_2D_ABOVE = 3
"""Sizes whose longest axis exceeds the first by more than this factor are rotated and scaled slice by slice."""

_LONG_SLICE = 1.5
"""Slices of 2D networks that are longer than wide by more than this factor are turned by 15 degrees at most."""

_ASSUMED_SMALLEST_SCALE = 0.85
"""What nnU-Net sizes the patch to read by; scaling goes down to 0.7, which it has never been adapted to."""


@dataclass(frozen=True)
class SpatialRange:
    """How far patches of a shape are turned, and how much must be read for it (nnU-Net's rules).

    Attributes:
        rotation: largest angle in radians, either way, about each axis.
        slice_by_slice: rotate and scale within (Y, X) only, since slices are far apart.
        read_size: voxels (Z, Y, X) to read for a patch.
    """

    rotation: float
    slice_by_slice: bool
    read_size: Size

    @classmethod
    def of(cls, patch_size: Sequence[int], is_planar: bool = False) -> SpatialRange:
        """The range for a patch (Z, Y, X) in voxels; ``is_planar``: of a 2D network, whose patches are one slice."""
        z, y, x = patch_size
        if is_planar:
            rotation = math.radians(15) if max(y, x) / min(y, x) > _LONG_SLICE else math.pi
            return cls(rotation, True, (1, *_rotated_slice(y, x, min(rotation, math.pi / 2))))
        slice_by_slice = max(patch_size) / z > DUMMY_2D_ABOVE
        rotation = math.pi if slice_by_slice else math.radians(30)
        read_z, read_y, read_x = _rotated_extent((z, y, x), min(rotation, math.pi / 2))
        return cls(rotation, slice_by_slice, (z if slice_by_slice else read_z, read_y, read_x))


def _rotated_slice(y: int, x: int, angle: float) -> tuple[int, int]:
    """The same for a slice (Y, X), turned one way."""
    cos, sin = math.cos(angle), math.sin(angle)
    corners = np.array([(y, x), (y * cos + x * sin, x * cos - y * sin)])
    read_y, read_x = (int(n) for n in np.abs(corners).max(axis=0) / _ASSUMED_SMALLEST_SCALE)
    return read_y, read_x


def _rotated_extent(patch: Size, angle: float) -> Size:
    """nnU-Net's size of a patch to read: its corner, turned by ``angle`` about one axis at a time, over the scale.

    Only one corner is turned and one way, so that some axes come out smaller than a rotation needs; what is missing is
    padded with zeros, as there.
    """
    z, y, x = patch
    cos, sin = math.cos(angle), math.sin(angle)
    corners = np.array(
        [
            (z, y, x),
            (z, y * cos + x * sin, x * cos - y * sin),
            (z * cos - x * sin, y, z * sin + x * cos),
            (z * cos + y * sin, y * cos - z * sin, x),
        ]
    )
    read_z, read_y, read_x = (int(n) for n in np.abs(corners).max(axis=0) / _ASSUMED_SMALLEST_SCALE)
    return read_z, read_y, read_x


# -- what is drawn -------------------------------------------------------------------------------------------------------

_TURNED, _SCALED, _MIRRORED = 0.2, 0.2, 0.5
_SCALES = (0.7, 1.4)


@dataclass(frozen=True)
class Drawn:
    """What happens to one sample.

    Attributes:
        matrix: 3×3 (Z, Y, X), from a voxel of the patch to where its value is found; None: neither turned nor scaled.
        mirrored: axes along which the result is flipped.
        steps: what is done to intensities, in order.
        stage: what is done to the channels of a cascade's previous stage.
    """

    matrix: np.ndarray | None = None
    mirrored: tuple[int, ...] = ()
    steps: tuple[IntensityStep, ...] = ()
    stage: StageSteps = field(default_factory=StageSteps)


@dataclass(frozen=True)
class Augmentation:
    """nnU-Net's probabilities and ranges, for a patch.

    Attributes:
        spatial: how far it is turned.
        mirror_axes: axes that may be flipped.
        stage_channels: how many channels are of a cascade's previous stage.
    """

    spatial: SpatialRange
    mirror_axes: tuple[int, ...]
    stage_channels: int = 0

    def draw(self, seed: int, channels: int) -> Drawn:
        """What happens to the sample with this seed."""
        parameters, noise, later = seeds_for(seed)
        random = np.random.default_rng(parameters)
        steps = draw_steps(random, channels, self.spatial.slice_by_slice, noise)
        flipped = tuple(axis for axis in self.mirror_axes if random.random() < _MIRRORED)
        stage = StageSteps.draw(later, self.stage_channels) if self.stage_channels else StageSteps()
        return Drawn(self._draw_matrix(random), flipped, steps, stage)

    def _draw_matrix(self, random: np.random.Generator) -> np.ndarray | None:
        turned, scaled = random.random() < _TURNED, random.random() < _SCALED
        if not turned and not scaled:
            return None
        limit = self.spatial.rotation if turned else 0.0
        angles = random.uniform(-limit, limit, 3).tolist()
        scale = random.uniform(*_SCALES) if scaled else 1.0
        return in_plane_matrix(angles[0], scale) if self.spatial.slice_by_slice else affine_matrix(angles, scale)


# -- how it is done --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What the loss is given, made of label codes (label + 1, 0 outside): labels, or a channel for each region."""

    labels: LabelScheme

    @property
    def dtype(self) -> torch.dtype:
        """int16 labels or bool regions."""
        return torch.bool if self.labels.has_regions else torch.int16

    @property
    def channels(self) -> int:
        """1, or one a region, and one more for what is to be ignored, last."""
        return len(self._regions) if self.labels.has_regions else 1

    @property
    def code_type(self) -> torch.dtype:
        """What codes of these labels are stored as."""
        return code_type(max(self.labels.values_in_files))

    @property
    def _regions(self) -> list[Any]:
        ignored = [] if self.labels.ignore_label is None else [self.labels.ignore_label]
        return [*self.labels.regions, *ignored]

    def write(self, target: Tensor, codes: Tensor) -> None:
        """Fill ``target`` (channels, Z, Y, X) from ``codes`` (Z, Y, X), which are changed. Outside is background."""
        codes.clamp_(min=1).sub_(1)
        if not self.labels.has_regions:
            target[0].copy_(codes)
            return
        for channel, region in zip(target, self._regions, strict=True):
            values = region if isinstance(region, tuple) else (region,)
            torch.eq(codes, values[0], out=channel)
            for value in values[1:]:
                channel.logical_or_(codes == value)


def finish(image: Tensor, target: Tensor, codes: Tensor, drawn: Drawn, masked: Sequence[int], rule: Target) -> None:
    """The end of every sample, in place: intensities, channels that are 0 outside, the loss's target."""
    for step in drawn.steps:
        step.apply(image)
    if masked:
        outside = codes == 0
        for channel in masked:
            image[channel].masked_fill_(outside, 0)
    rule.write(target, codes)


@dataclass(frozen=True)
class PatchTransform:
    """Makes batches of finished samples.

    Called with the places of a batch's samples, returns ``image`` float32 (B, C, Z, Y, X) and ``target`` (B, 1, Z, Y, X) int16
    labels or (B, R, Z, Y, X) bool regions.

    Attributes:
        labels: what they mean.
        augmentation: what may happen to them; None: nothing.
        masked: channels that are set to 0 outside the nonzero region after the augmentation.
        stage: labels of a cascade's previous stage, which become further channels.
    """

    labels: LabelScheme
    augmentation: Augmentation | None = None
    masked: tuple[int, ...] = ()
    stage: tuple[int, ...] = ()

    def __call__(self, places: Sequence[Place]) -> dict[str, Any]:
        rule, size, channels = Target(self.labels), places[0].patch_size, places[0].channels
        images = torch.empty((len(places), channels + len(self.stage), *size))
        targets = torch.empty((len(places), rule.channels, *size), dtype=rule.dtype)
        codes = torch.empty(size, dtype=rule.code_type)
        for place, whole, target in zip(places, images, targets, strict=True):
            image = whole[:channels]
            drawn = Drawn() if self.augmentation is None else self.augmentation.draw(place.seed, channels)
            if drawn.matrix is None:
                read_box(place, place.patch_box, image, codes, drawn.mirrored)
            else:
                box, matrix = turned_box(place, drawn)
                read_image, read_codes = image.new_empty((channels, *box.size)), codes.new_empty(box.size)
                read_turned(place, box, read_image, read_codes)
                sample_into(image, codes, read_image, read_codes, matrix)
            finish(image, target, codes, drawn, self.masked, rule)
            if self.stage:
                previous = previous_codes(place, drawn, rule.code_type)
                finish_stage(whole[channels:], previous, drawn, self.stage)
        return {"image": images, "target": targets}


def previous_codes(place: Place, drawn: Drawn, kind: torch.dtype) -> Tensor:
    """Codes (Z, Y, X) of the previous stage in the patch, turned and mirrored as the image is."""
    codes = torch.empty(place.patch_size, dtype=kind)
    if drawn.matrix is None:
        read_previous(place, place.patch_box, codes, drawn.mirrored)
        return codes
    box, matrix = turned_box(place, drawn)
    read = codes.new_empty(box.size)
    read_previous(place, box, read)
    sample_into(torch.empty((0, *place.patch_size)), codes, torch.empty((0, *box.size)), read, matrix)
    return codes


def finish_stage(channels: Tensor, codes: Tensor, drawn: Drawn, labels: Sequence[int]) -> None:
    """Fill the channels (labels, Z, Y, X) of the previous stage from its codes, augmented."""
    write_one_hot(channels, codes, labels)
    drawn.stage.apply(channels)


def turned_box(place: Place, drawn: Drawn) -> tuple[Box, np.ndarray]:
    """The voxels of the image that a turned patch takes, and the 3×4 matrix from the patch's voxels to the box's."""
    assert drawn.matrix is not None
    matrix = mirrored(with_centre(drawn.matrix, place.read_size, place.patch_size), place.patch_size, drawn.mirrored)
    matrix[:, 3] += place.corner
    box = needed_box(matrix, place.patch_size, place.filled)
    if place.read_size[0] == 1:
        z, (_, y, x), (_, end_y, end_x) = place.corner[0], box.start, box.stop
        box = Box((z, y, x), (z + 2, end_y, end_x))
    matrix[:, 3] -= box.start
    return box, matrix


def read_turned(place: Place, box: Box, image: Tensor, codes: Tensor) -> None:
    """Fill ``image`` and ``codes`` with the box of :func:`turned_box`.

    A slice by itself is there twice: interpolation looks at two, and labels are found fastest where these agree.
    """
    read_box(place, box, image, codes)
    if place.read_size[0] == 1:
        image[:, 1], codes[1] = image[:, 0], codes[0]


def training_transforms(
    patch_size: Sequence[int],
    spatial: SpatialRange,
    mirror_axes: Sequence[int],
    use_mask_for_norm: Sequence[bool],
    labels: LabelScheme,
    stage: Sequence[int] = (),
) -> PatchTransform:
    """The training chain: patches augmented on the CPU as nnU-Net does.

    ``use_mask_for_norm`` has a flag for each channel: those channels are zero again outside the nonzero region.
    ``stage`` has the labels of a cascade's previous stage.
    """
    augmentation = Augmentation(spatial, tuple(mirror_axes), len(stage))
    return PatchTransform(labels, augmentation, masked_channels(use_mask_for_norm), tuple(stage))


def masked_channels(use_mask_for_norm: Sequence[bool]) -> tuple[int, ...]:
    """The channels that are 0 outside the nonzero region."""
    return tuple(channel for channel, mask in enumerate(use_mask_for_norm) if mask)


def plain_transforms(labels: LabelScheme, stage: Sequence[int] = ()) -> PatchTransform:
    """The chain of validation, and of training without augmentation: only the loss's target is made."""
    return PatchTransform(labels, stage=tuple(stage))
