"""Images and labels on disk, read and written through SimpleITK.

Arrays are (C, Z, Y, X): SimpleITK's array order, slowest axis first, and nnU-Net's. Spacing is in millimetres in that
order; origin and direction stay in ITK's (x, y, z), since nothing but writing uses them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnssl_adapt.data.nifti import IncompleteFile, read_nifti_voxels
from nnssl_adapt.errors import CaseError, OutputError
from nnssl_adapt.files import atomic_path

logger = logging.getLogger(__name__)

FLAT_IMAGE_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".gif")
"""Endings of picture formats, which have no spacing; nnU-Net reads some of them, we don't."""

_NIFTI_ENDINGS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class ImageGeometry:
    """Where the voxels of a 3D image lie in space.

    Attributes:
        spacing: millimetres between voxel centres, (Z, Y, X).
        origin: position of the first voxel in millimetres, ITK's (x, y, z).
        direction: nine cosines, ITK's row-major matrix for (x, y, z).
        size: voxels, (Z, Y, X).
    """

    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    size: tuple[int, int, int]

    def to_properties(self) -> dict[str, Any]:
        """Return the two entries that nnU-Net keeps for a case: ``spacing`` (Z, Y, X) and ``sitk_stuff`` (x, y, z)."""
        return {
            "sitk_stuff": {"spacing": self.spacing[::-1], "origin": self.origin, "direction": self.direction},
            "spacing": list(self.spacing),
        }

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any], size: Sequence[int]) -> ImageGeometry:
        """Rebuild a geometry from nnU-Net's entries and the image's size (Z, Y, X).

        Entries of a 4D image (channels on the fourth axis) lose that axis. Raises CaseError if nnU-Net read the image
        with another library than SimpleITK, which leaves other entries.
        """
        try:
            stuff = properties["sitk_stuff"]
            spacing = tuple(float(s) for s in stuff["spacing"])[:3]
            origin = tuple(float(o) for o in stuff["origin"])[:3]
            matrix = np.asarray(stuff["direction"], dtype=float)
        except KeyError as error:
            raise CaseError(
                f"the case was not read with SimpleITK (its properties have no {error}); preprocess it again with "
                "'image_reader_writer': 'SimpleITKIO'"
            ) from None
        side = round(len(matrix) ** 0.5)
        direction = tuple(float(v) for v in matrix.reshape(side, side)[:3, :3].ravel())
        z, y, x = (int(n) for n in size)
        return cls(spacing=spacing[::-1], origin=origin, direction=direction, size=(z, y, x))  # type: ignore[arg-type]


def read_image(paths: Sequence[str | Path]) -> tuple[np.ndarray, ImageGeometry]:
    """Read the channel files of one image.

    Args:
        paths: one file a channel, in channel order, or a single 4D file with the channels on its fourth axis.

    Returns:
        float32 (C, Z, Y, X), and the geometry of the first file.

    Raises:
        CaseError: a file is missing, unreadable, truncated or 2D; has NaN or infinite voxels; or the files differ in
            shape or spacing. (As in nnU-Net, another origin or direction is only logged as a warning.)
    """
    files = [Path(path) for path in paths]
    if not files:
        raise CaseError("no image file was given")
    first = read_geometry(files[0])
    image: np.ndarray | None = None
    for channel, path in enumerate(files):
        geometry = first if channel == 0 else read_geometry(path)
        for problem in geometry_problems(first, geometry):
            raise CaseError(f"{path}: {problem} from {files[0]}; all channels of a case must share one grid")
        for doubt in geometry_doubts(first, geometry):
            logger.warning("%s: %s from %s", path, doubt, files[0])
        voxels = _read_voxels(path)
        if image is None:
            image = np.empty((len(files) if voxels.ndim == 3 else len(voxels), *first.size), np.float32)
        if voxels.ndim == 4:
            if len(files) > 1:
                raise CaseError(f"{path} is 4D: give one 3D file for each channel, or a single 4D file")
            image[:] = voxels
        else:
            image[channel] = voxels
        del voxels
        _refuse_non_finite(image if len(files) == 1 else image[channel], path)
    assert image is not None
    return image, first


def read_labels(path: str | Path) -> tuple[np.ndarray, ImageGeometry]:
    """Read a label file, stored as any number type.

    Returns:
        int16 (1, Z, Y, X), and its geometry.

    Raises:
        CaseError: missing, unreadable, truncated, not 3D; values that are NaN, not whole numbers, or beyond int16.
    """
    path = Path(path)
    geometry = read_geometry(path)
    voxels = _read_voxels(path)
    if voxels.ndim == 4:
        if len(voxels) != 1:
            raise CaseError(f"{path}: labels must be 3D, got {len(voxels)} volumes")
        voxels = voxels[0]
    if voxels.dtype.kind == "f":
        _refuse_non_finite(voxels, path)
        fractions = [plane[plane != np.rint(plane)] for plane in voxels]  # a slice at a time: they may be float64
        if count := sum(map(len, fractions)):
            example = next(found[0] for found in fractions if len(found))
            raise CaseError(
                f"{path}: labels must be whole numbers, {count} voxels are not (e.g. {example:g}); was it resampled with "
                "interpolation?"
            )
    low, high = voxels.min(), voxels.max()
    limits = np.iinfo(np.int16)
    if low < limits.min or high > limits.max:
        raise CaseError(f"{path}: labels must lie between {limits.min} and {limits.max}, got {low:g} to {high:g}")
    return voxels.astype(np.int16)[None], geometry


def read_geometry(path: str | Path) -> ImageGeometry:
    """Read only the header of an image file. Raises CaseError if it is missing, unreadable, or not 3D (or 4D)."""
    reader = _open(Path(path))
    spacing, origin, size = reader.GetSpacing()[:3], reader.GetOrigin()[:3], reader.GetSize()[:3]
    side = reader.GetDimension()
    direction = np.asarray(reader.GetDirection()).reshape(side, side)[:3, :3]
    return ImageGeometry(
        spacing=tuple(abs(float(s)) for s in spacing[::-1]),  # type: ignore[arg-type]
        origin=tuple(float(o) for o in origin),  # type: ignore[arg-type]
        direction=tuple(float(v) for v in direction.ravel()),
        size=tuple(int(n) for n in size[::-1]),  # type: ignore[arg-type]
    )


def count_channels(path: str | Path) -> int:
    """Return the number of channels in one file: 1 for a 3D image, the length of the fourth axis of a 4D one."""
    reader = _open(Path(path))
    return 1 if reader.GetDimension() == 3 else int(reader.GetSize()[3])


def write_labels(path: str | Path, labels: np.ndarray, geometry: ImageGeometry) -> None:
    """Write labels (Z, Y, X) as a compressed image in the given geometry, whole or not at all.

    Stored as uint8 where the largest label is below 255 and as uint16 otherwise, as nnU-Net does.
    Raises OutputError if the file can't be written.
    """
    path = Path(path)
    if labels.shape != geometry.size:
        raise ValueError(f"labels have shape {labels.shape}, the geometry is of {geometry.size}")
    image = sitk.GetImageFromArray(np.ascontiguousarray(labels, np.uint8 if labels.max() < 255 else np.uint16))
    image.SetSpacing(geometry.spacing[::-1])
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    with atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), True)
        except RuntimeError as error:  # ITK hides why (disk full, permissions, unknown format) behind one kind of error
            raise OutputError(f"can't write {path}: {_last_line(error)}") from error
        _refuse_half_written(temporary, path, labels.shape)


def _refuse_half_written(temporary: Path, path: Path, shape: tuple[int, ...]) -> None:
    """On a full disk ITK writes as much of a NIfTI file as fits, and says nothing (seen with SimpleITK 2.5)."""
    if not path.name.lower().endswith(_NIFTI_ENDINGS):
        return
    try:
        read_nifti_voxels(temporary, shape)
    except IncompleteFile as error:
        raise OutputError(f"{path} could not be written whole ({error}), probably because the disk is full") from error


def geometry_problems(reference: ImageGeometry, other: ImageGeometry) -> Iterator[str]:
    """Yield what makes two grids unusable together: another shape, or another spacing (nnU-Net's tolerance)."""
    if reference.size != other.size:
        yield f"shape {_joined(other.size)} (Z, Y, X) differs"
    if not np.allclose(other.spacing, reference.spacing):
        yield f"spacing {_joined(other.spacing)} mm (not {_joined(reference.spacing)}; Z, Y, X) differs"


def geometry_doubts(reference: ImageGeometry, other: ImageGeometry) -> Iterator[str]:
    """Yield what may be a mistake but does not stop nnU-Net: another origin or direction."""
    if not np.allclose(other.origin, reference.origin):
        yield f"origin {_joined(other.origin)} mm (not {_joined(reference.origin)}; x, y, z) differs"
    if not np.allclose(other.direction, reference.direction):
        yield f"direction {_joined(other.direction)} (not {_joined(reference.direction)}) differs"


def distinct_values(labels: np.ndarray) -> list[int]:
    """Return the different values of an integer array in ascending order. Many times faster than ``np.unique``."""
    flat = labels.reshape(-1)
    seen = set(flat[:1].tolist())
    for start in range(0, flat.size - 1, 1 << 20):  # pieces that stay in the processor's cache
        part = flat[start : start + (1 << 20) + 1]
        # Neighbours are mostly equal: all values turn up where they are not.
        seen.update(np.unique(part[1:][part[1:] != part[:-1]]).tolist())
    return sorted(seen)


# -- reading -------------------------------------------------------------------------------------------------------


def _open(path: Path) -> sitk.ImageFileReader:
    """Return a reader that has read the header of a 3D or 4D image with one number a voxel."""
    if not path.is_file():
        raise CaseError(f"{path}: no such file")
    if path.name.lower().endswith(FLAT_IMAGE_ENDINGS):
        raise CaseError(f"{path}: 2D pictures are not supported yet; 3D formats are .nii.gz, .nii, .nrrd, .mha")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with _explain_read_errors(path):
        reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1:
        raise CaseError(f"{path}: has {reader.GetNumberOfComponents()} numbers a voxel; store one channel a file")
    if reader.GetDimension() not in (3, 4):
        raise CaseError(f"{path}: {reader.GetDimension()}D images are not supported yet, only 3D ones")
    return reader


def _read_voxels(path: Path) -> np.ndarray:
    """Voxels (Z, Y, X) or (C, Z, Y, X), in the file's own number type."""
    reader = _open(path)
    if path.name.lower().endswith(_NIFTI_ENDINGS):
        try:
            voxels = read_nifti_voxels(path, tuple(reader.GetSize()[::-1]))
        except IncompleteFile as error:
            raise CaseError(f"{path} is truncated or damaged ({error}): copy or download it again") from None
        except OSError as error:
            raise CaseError(f"{path} can't be read: {error.strerror}") from error
        if voxels is not None:
            return voxels
    with _explain_read_errors(path):
        return sitk.GetArrayFromImage(reader.Execute())


@contextmanager
def _explain_read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CaseError(
            f"{path} can't be read as an image (truncated, or another format?): {_last_line(error)}"
        ) from error


def _last_line(error: Exception) -> str:
    """What ITK means; the lines before it say where in its C++ sources it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR: ") if lines else type(error).__name__


def _refuse_non_finite(voxels: np.ndarray, path: Path) -> None:
    # One sum, without a mask: NaN and infinities survive it, and finite float32 voxels can't overflow float64.
    if np.isfinite(voxels.sum(dtype=np.float64)):
        return
    nan, infinite = int(np.isnan(voxels).sum()), int(np.isinf(voxels).sum())
    if nan or infinite:
        raise CaseError(
            f"{path}: {nan} voxels are NaN and {infinite} infinite; replace them by a number that makes sense"
        )


def _joined(values: Sequence[float]) -> str:
    return " × ".join(f"{v:g}" for v in values)
