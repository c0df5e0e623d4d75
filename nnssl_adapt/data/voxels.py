"""Voxels of one image file, read with SimpleITK's understanding of it: piece by piece, checked on the way."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnssl_adapt.data.nifti import NIFTI_ENDINGS, IncompleteFile, NiftiVoxels, is_nifti, open_nifti
from nnssl_adapt.errors import CaseError, OutputError
from nnssl_adapt.files import atomic_path

if TYPE_CHECKING:
    import SimpleITK as sitk

FLAT_IMAGE_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".gif")
"""Endings of picture formats, which have no spacing and are read by readers of their own (:mod:`nnssl_adapt.data.pictures`)."""

READ_PICTURES = (
    "pictures are read where dataset.json has their 'file_ending' (.png, .bmp, .tif), or 'overwrite_image_reader_writer': "
    "'NaturalImage2DIO' ('Tiff3DIO' for 3D .tif)"
)
"""What to do about a picture among 3D images."""

_PIECE = 1 << 18
"""Voxels converted and checked at a time, in the processor's cache."""


class ShearedAffine(CaseError):
    """The image's axes are not at right angles, which SimpleITK can't read and nibabel can."""


ROUNDING = 1e-3
"""Labels no further from a whole number than this differ from it by rounding (0.99999), not by interpolation."""


class FractionalLabels(CaseError):
    """``count`` voxels of a label file are not whole numbers, and up to ``worst`` away from one."""

    def __init__(self, path: Path, count: int, worst: float, example: float) -> None:
        self.by_rounding = worst <= ROUNDING
        cause = (
            ": a rounding error; 'nnssl-adapt verify --fix' makes a copy of the dataset with such labels repaired"
            if self.by_rounding
            else "; was it resampled with interpolation?"
        )
        super().__init__(
            f"{path}: labels must be whole numbers, {count} voxels are not (e.g. {example:.7g}){cause}", path=path
        )


@dataclass(frozen=True)
class Extremes:
    """The least and the largest value of an image."""

    low: float
    high: float


def open_image(path: Path) -> sitk.ImageFileReader:
    """Return a reader that has read the header of a 3D or 4D image with one number a voxel. Raises CaseError."""
    import SimpleITK as sitk  # loaded where it is needed: training on a bare machine has none

    if not path.is_file():
        raise CaseError(f"{path}: no such file", path=path)
    if path.name.lower().endswith(FLAT_IMAGE_ENDINGS):
        raise CaseError(f"{path} is a picture: {READ_PICTURES}", path=path)
    reader = sitk.ImageFileReader()
    with explain_read_errors(path), _name_for_itk(path) as name:
        reader.SetFileName(str(name))
        reader.ReadImageInformation()
    reader.SetFileName(str(path))
    if reader.GetNumberOfComponents() != 1:
        raise CaseError(
            f"{path}: has {reader.GetNumberOfComponents()} numbers a voxel; store one channel a file", path=path
        )
    if reader.GetDimension() == 2:
        raise CaseError(
            f"{path}: a 2D image, and images need three axes: store it as a volume of one slice (which -c 2d trains)",
            path=path,
        )
    if reader.GetDimension() not in (3, 4):
        raise CaseError(f"{path}: {reader.GetDimension()}D images are not supported yet, only 3D ones", path=path)
    return reader


def read_itk_image(path: Path) -> sitk.Image:
    """An image with all its voxels, as ITK has it. Raises CaseError."""
    import SimpleITK as sitk  # loaded where it is needed: training on a bare machine has none

    with explain_read_errors(path), _name_for_itk(path) as name:
        return sitk.ReadImage(str(name))


def fill_floats(path: Path, pieces: Iterator[np.ndarray], out: np.ndarray) -> Extremes:
    """Fill ``out``, contiguous float32 of the image's shape, with its voxels in flat pieces, and return its extremes.

    Raises CaseError for NaN and infinite voxels, and whatever is wrong with the file.
    """
    flat, start = out.reshape(-1), 0
    low, high = np.inf, -np.inf
    with explain_damage(path):
        for piece in pieces:
            target = flat[start : start + len(piece)]
            target[...] = piece
            start += len(piece)
            if not len(piece):
                continue
            # Short integers are compared fastest as they are. NaN and infinities survive minimum and maximum.
            seen = piece if piece.dtype.kind in "iu" and piece.dtype.itemsize < 4 else target
            low, high = np.minimum(low, seen.min()), np.maximum(high, seen.max())
    if len(flat) and not np.isfinite([low, high]).all():
        nan, infinite = int(np.isnan(flat).sum()), int(np.isinf(flat).sum())
        raise CaseError(_said_of_non_finite(path, nan, infinite), path=path)
    return Extremes(float(low), float(high))


def fill_labels(path: Path, pieces: Iterator[np.ndarray], out: np.ndarray, repair: bool = False) -> int:
    """Fill ``out``, int16 of the image's shape, with pieces of any number type.

    With ``repair``, values within :data:`ROUNDING` of a whole number become that number; returns how many did.
    Raises CaseError for values that are NaN, beyond int16, or not whole numbers (:class:`FractionalLabels`).
    """
    flat, start = out.reshape(-1), 0
    limits = np.iinfo(np.int16)
    low, high = float("inf"), float("-inf")
    fractions, worst, example, unusable = 0, 0.0, 0.0, np.zeros(2, int)
    with explain_damage(path):
        for piece in pieces:
            if piece.dtype.kind == "f":
                finite = np.isfinite(piece)
                if not finite.all():
                    unusable += (int(np.isnan(piece).sum()), int(np.isinf(piece).sum()))
                    piece = np.where(finite, piece, 0)
                off = np.abs(piece - np.rint(piece))
                if off.any():
                    fractions += int(np.count_nonzero(off))
                    if off.max() > worst:
                        worst, example = float(off.max()), float(piece[off.argmax()])
                    piece = np.rint(piece)
            if piece.size:
                low, high = min(low, float(piece.min())), max(high, float(piece.max()))
            fits = low >= limits.min and high <= limits.max
            flat[start : start + len(piece)] = piece if fits else np.clip(piece, limits.min, limits.max)
            start += len(piece)
    if unusable.any():
        raise CaseError(_said_of_non_finite(path, *unusable), path=path)
    if fractions and not (repair and worst <= ROUNDING):
        raise FractionalLabels(path, fractions, worst, example)
    if low < limits.min or high > limits.max:
        raise CaseError(
            f"{path}: labels must lie between {limits.min} and {limits.max}, got {low:g} to {high:g}", path=path
        )
    return fractions


def voxel_pieces(path: Path, reader: sitk.ImageFileReader) -> Iterator[np.ndarray]:
    """The voxels in file order, in flat pieces of the file's own number type."""
    import SimpleITK as sitk  # loaded where it is needed: training on a bare machine has none

    voxels: NiftiVoxels | None = None
    if is_nifti(path):
        voxels = open_nifti(path, tuple(reader.GetSize()[::-1]))
    if voxels is not None:
        yield from voxels.pieces
        return
    with explain_read_errors(path):
        image = reader.Execute()  # has the memory that the array below looks at
        flat = sitk.GetArrayViewFromImage(image).reshape(-1)
    for start in range(0, len(flat), _PIECE):
        yield flat[start : start + _PIECE]


@contextmanager
def _name_for_itk(path: Path) -> Iterator[Path]:
    """ITK knows ``.nii.gz`` and ``.NII.GZ``, but no ``.nii.GZ``: such a file is read through a link of another name."""
    ending = ending_of(path)
    if not is_nifti(path) or path.name.endswith((ending, ending.upper())):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"image{ending}"
        link.symlink_to(path.resolve())
        yield link


def ending_of(path: Path) -> str:
    """``.nii.gz``, ``.nii``, ``.nrrd``, …: what the name ends with, in small letters; nothing else in the name counts."""
    name = path.name.lower()
    return next((ending for ending in NIFTI_ENDINGS if name.endswith(ending)), path.suffix.lower())


def write_image_file(image: sitk.Image, path: Path) -> None:
    """Write an image, compressed, whole or not at all; the format goes by the ending of ``path``, ``.NII.GZ`` included.

    Raises OutputError.
    """
    import SimpleITK as sitk  # loaded where it is needed: training on a bare machine has none

    # ITK finds formats anywhere in a name, so the temporary one has nothing of the case's (which may be "c00.hdr").
    with atomic_path(path, ending=ending_of(path)) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), True)
        except RuntimeError as error:  # ITK hides why (disk full, permissions, unknown format) behind one kind of error
            raise OutputError(f"can't write {path}: {last_line(error)}", path=path) from error
        refuse_half_written(temporary, path, tuple(image.GetSize()[::-1]))


def refuse_half_written(temporary: Path, path: Path, shape: tuple[int, ...]) -> None:
    """On a full disk ITK writes as much of a NIfTI file as fits, and says nothing (seen with SimpleITK 2.5)."""
    if not is_nifti(path):
        return
    try:
        voxels = open_nifti(temporary, shape)
        for _ in () if voxels is None else voxels.pieces:
            pass
    except IncompleteFile as error:
        raise OutputError(
            f"{path} could not be written whole ({error}), probably because the disk is full", path=path
        ) from error


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turn what goes wrong while the voxels are read into CaseError."""
    try:
        yield
    except IncompleteFile as error:
        raise CaseError(f"{path} is truncated or damaged ({error}): copy or download it again", path=path) from None
    except OSError as error:
        raise CaseError(f"{path} can't be read: {error.strerror or error}", path=path) from error


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turn ITK's errors into CaseError. Its warnings are kept back: what they are about is said by us, once."""
    import SimpleITK as sitk  # loaded where it is needed: training on a bare machine has none

    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise ShearedAffine(
                f"{path}: its axes are not at right angles (a sheared affine), which SimpleITK can't read: correct or "
                "resample the file, or set 'overwrite_image_reader_writer': 'NibabelIO' in dataset.json, which keeps "
                "such grids",
                path=path,
            ) from error
        raise CaseError(
            f"{path} can't be read as an image (truncated, or another format?): {last_line(error)}", path=path
        ) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def last_line(error: Exception) -> str:
    """What ITK means; the lines before it say where in its C++ sources it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR: ") if lines else type(error).__name__


def _said_of_non_finite(path: Path, nan: int, infinite: int) -> str:
    return f"{path}: {nan} voxels are NaN and {infinite} infinite; replace them by a number that makes sense"
