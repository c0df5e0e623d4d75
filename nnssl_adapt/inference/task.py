"""One image to predict: its files, where its segmentation goes, and what it will take, from its header alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnssl_adapt.data.dataset import RawCase
from nnssl_adapt.data.images import (
    SIMPLE_ITK,
    ImageGeometry,
    geometry_doubts,
    geometry_problems,
    read_geometry,
    read_image,
    read_labels,
)
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.nifti_header import placement_doubt
from nnssl_adapt.data.pictures import PICTURE_ENDINGS
from nnssl_adapt.data.preprocess_cases import memory_needed
from nnssl_adapt.data.turning import turn_geometry
from nnssl_adapt.data.verifying.grids import grid_distance
from nnssl_adapt.errors import CaseError
from nnssl_adapt.geometry.orientation import Turn
from nnssl_adapt.geometry.spacing import resampled_shape
from nnssl_adapt.inference.postprocess import BYTES_PER_VOXEL
from nnssl_adapt.inference.sliding_window import tile_positions
from nnssl_adapt.planning.plan import FinetunePlan

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
"""Of the image formats that are read, in lower case."""

_RESAMPLED_LOGIT = 10
"""Bytes a voxel of a class that is held at the image's own size: float32 twice and float16 once."""

_PROBABILITY = 8

_SAME_PLACE = 0.1
"""Voxels by which channels of one image may lie apart: headers hold about six digits, and registrations leave less."""


@dataclass(frozen=True)
class ImageTask:
    """One image to predict.

    Attributes:
        identifier: its name.
        files: of its channels; empty when it is in memory.
        target: the label file to write; None: labels are returned.
        loaded: an image in memory (C, Z, Y, X) and its geometry.
        reader: of the files, the model's.
        orientation: code such as ``RPI`` that the image is turned to before the network; None: it is taken as it lies.
        previous: labels by the first network of a cascade: a file, or (Z, Y, X).
    """

    identifier: str
    files: tuple[Path, ...]
    target: Path | None
    loaded: tuple[np.ndarray, ImageGeometry] | None = None
    reader: str = SIMPLE_ITK
    orientation: str | None = None
    previous: Path | np.ndarray | None = None

    def read_previous(self, geometry: ImageGeometry) -> np.ndarray:
        """What a cascade's first network made of the image, int16 (1, Z, Y, X) as the image is stored. Raises CaseError."""
        if self.previous is None:
            raise CaseError(f"{self.identifier} has no segmentation by the cascade's first network")
        if isinstance(self.previous, np.ndarray):
            return self.previous.astype(np.int16)[None]
        labels, other = read_labels(self.previous, self.reader)
        problems = list(geometry_problems(geometry, other))
        if problems:
            raise CaseError(f"{self.previous} is not of the image: {'; '.join(problems)}", path=self.previous)
        return labels

    def read(self, num_channels: int, expected: str) -> tuple[np.ndarray, ImageGeometry]:
        """The image (C, Z, Y, X) and its geometry.

        Raises CaseError: it can't be read, has other channels (with ``expected``), or they don't lie on one grid.
        """
        if self.loaded is not None:
            return self.loaded
        self._refuse_other_places()
        image, geometry = read_image(self.files, self.reader)
        if len(image) != num_channels:
            raise CaseError(f"{self.files[0]}: got {len(image)} channel(s); {expected}")
        return image, geometry

    def _refuse_other_places(self) -> None:
        """nnU-Net only warns, and lays channels on each other that are not of the same place."""
        first, *others = self.files
        reference = read_geometry(first, self.reader) if others else None
        for path in others:
            assert reference is not None
            other = read_geometry(path, self.reader)
            if list(geometry_problems(reference, other)) or grid_distance(reference, other) <= _SAME_PLACE:
                continue  # problems of size and spacing are told when it is read
            raise CaseError(
                f"{path} does not lie where {first} does ({'; '.join(geometry_doubts(reference, other))}): resample it to "
                "that grid, or correct the header that is wrong",
                path=path,
            )

    def outputs(self, with_probabilities: bool) -> list[Path]:
        """The files that are there when the image is done; none for an image that is returned."""
        if self.target is None:
            return []
        return [self.target, *(self.beside_target(e) for e in (".npz", ".pkl") if with_probabilities)]

    def beside_target(self, ending: str = "") -> Path:
        """The target's path with another ending."""
        assert self.target is not None
        return self.target.with_name(without_ending(self.target.name) + ending)


def without_ending(name: str) -> str:
    """The name of an image file without ``.nii.gz`` and the like, in capitals or not."""
    ending = next((ending for ending in (*IMAGE_ENDINGS, *PICTURE_ENDINGS) if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


# -- what it will take ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foresight:
    """What one image will take, at most: as if nothing were cropped.

    Attributes:
        tiles: that each network will see.
        memory: bytes, from reading to the written labels; 0 where the header can't be read (reading will tell why).
        lies: orientation code of the image as it is stored; None where nothing tells.
        doubts: what is contradictory in its files' headers, a sentence each.
    """

    tiles: int
    memory: int
    lies: str | None = None
    doubts: tuple[str, ...] = ()


def foresee(
    task: ImageTask,
    plan: FinetunePlan,
    labels: LabelScheme,
    step: float,
    bytes_per_logit: int = 4,
    with_probabilities: bool = False,
    with_postprocessing: bool = False,
) -> Foresight:
    """Foresee one image; ``bytes_per_logit`` is of the sums over tiles."""
    try:
        geometry = task.loaded[1] if task.loaded is not None else read_geometry(task.files[0], task.reader)
    except CaseError:
        return Foresight(1, 0)
    lies = geometry.orientation if task.files else None
    if task.orientation is not None:
        geometry = turn_geometry(geometry, Turn.to(task.orientation, geometry.direction))
    shape = network_shape(geometry, plan)
    source, target = math.prod(geometry.size), math.prod(shape)
    padded = math.prod(max(n, patch) for n, patch in zip(shape, plan.patch_size, strict=True))
    heads = labels.num_heads
    running = padded * (heads * bytes_per_logit + 8) + target * 4 * (
        plan.num_channels + len(plan.stage_channels(labels))
    )
    exporting = target * (heads * bytes_per_logit + 4) + source * 4
    if with_probabilities:
        exporting += source * heads * (_RESAMPLED_LOGIT + _PROBABILITY)
    elif labels.has_regions:
        exporting += source * (_RESAMPLED_LOGIT + 4)  # one at a time, beside the one before
    if with_postprocessing:
        exporting = max(exporting, target * heads * bytes_per_logit + source * BYTES_PER_VOXEL)
    reading = memory_needed(RawCase(task.identifier, task.files), plan.settings) if task.files else 0
    doubts = tuple(f"{path}: {doubt}" for path in task.files if (doubt := placement_doubt(path)) is not None)
    return Foresight(count_tiles(shape, plan.patch_size, step), max(reading, running, exporting), lies, doubts)


def network_shape(geometry: ImageGeometry, plan: FinetunePlan) -> tuple[int, ...]:
    """Voxels (transposed axes) of the image as the network would see it if nothing were cropped."""
    size = [geometry.size[axis] for axis in plan.transpose_forward]
    if plan.spacing is None:
        return tuple(size)
    spacing = [geometry.spacing[axis] for axis in plan.transpose_forward]
    return tuple(resampled_shape(size, spacing, plan.settings.target_spacing(spacing) or spacing))


def count_tiles(shape: tuple[int, ...], patch_size: tuple[int, ...], step: float) -> int:
    """Tiles of an image of ``shape`` (voxels), padded to the patch where it is smaller."""
    padded = [max(n, patch) for n, patch in zip(shape, patch_size, strict=True)]
    return math.prod(len(starts) for starts in tile_positions(padded, patch_size, step))
