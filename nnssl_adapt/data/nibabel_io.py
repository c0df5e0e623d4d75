"""NIfTI files as nnU-Net's nibabel readers read and write them: spacings in the file's own unit, affines with shear kept.

Arrays have SimpleITK's order (Z, Y, X), which is the reverse of nibabel's.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.nifti import is_nifti
from nnssl_adapt.errors import CaseError, OutputError
from nnssl_adapt.files import atomic_path

_PIECE = 1 << 18
_LPS = np.diag([-1.0, -1.0, 1.0])
"""From nibabel's world (right, anterior, superior) to ITK's."""

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Affines:
    """Where nibabel found an image: 4 × 4 matrices from voxels (x, y, z) to millimetres (RAS).

    Attributes:
        original: the file's.
        reoriented: of the image turned to RAS, where the reader turns images; else None.
    """

    original: Matrix
    reoriented: Matrix | None = None

    @classmethod
    def of(cls, original: np.ndarray, reoriented: np.ndarray | None) -> Affines:
        """From arrays (4, 4)."""
        return cls(_as_tuples(original), None if reoriented is None else _as_tuples(reoriented))

    @classmethod
    def from_properties(cls, stuff: Mapping[str, Any]) -> Affines:
        """From nnU-Net's ``nibabel_stuff``. Raises CaseError for other entries."""
        try:
            turned = stuff.get("reoriented_affine")
            affines = cls.of(np.asarray(stuff["original_affine"]), None if turned is None else np.asarray(turned))
            numbers = np.array([affines.original, affines.reoriented or affines.original])
            if not (np.abs(numbers) <= np.finfo(np.float32).max).all():  # what a header can hold; not true of NaN
                raise ValueError("an affine that is not finite")
            return affines
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise CaseError(f"the case's 'nibabel_stuff' is not nnU-Net's ({error}): preprocess it again") from None

    def to_properties(self) -> dict[str, np.ndarray]:
        """nnU-Net's ``nibabel_stuff``."""
        stuff = {"original_affine": np.array(self.original)}
        if self.reoriented is not None:
            stuff["reoriented_affine"] = np.array(self.reoriented)
        return stuff

    @property
    def world(self) -> tuple[tuple[float, float, float], tuple[float, ...]]:
        """Origin (mm) and direction (nine cosines, row by row) in ITK's world, of the image as it was read."""
        affine = np.array(self.original if self.reoriented is None else self.reoriented)
        x, y, z = (float(v) for v in _LPS @ affine[:3, 3])
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        direction = _LPS @ affine[:3, :3] / np.where(lengths > 0, lengths, 1)
        return (x, y, z), tuple(float(v) for v in direction.ravel())


def _as_tuples(matrix: np.ndarray) -> Matrix:
    if matrix.shape != (4, 4):
        raise ValueError(f"expected a 4 × 4 affine, got shape {matrix.shape}")
    return tuple(tuple(float(v) for v in row) for row in matrix)


class NibabelImage:
    """A NIfTI file whose header has been read by nibabel; ``reorient``: as turned to RAS."""

    def __init__(self, path: Path, image: Any, reorient: bool) -> None:
        self.path = path
        self._image = image
        self._reorient = reorient
        header = _header_turned_to_ras(image) if reorient else image
        self.affines = Affines.of(image.affine, header.affine if reorient else None)
        # In the unit of the file, which is taken for millimetres.
        sx, sy, sz = (float(zoom) for zoom in header.header.get_zooms())
        x, y, z = (int(n) for n in header.shape)
        self.spacing: tuple[float, float, float] = (sz, sy, sx)
        self.size: tuple[int, int, int] = (z, y, x)

    @property
    def world(self) -> tuple[tuple[float, float, float], tuple[float, ...]]:
        """Origin and direction in ITK's world."""
        return self.affines.world

    def pieces(self) -> Iterator[np.ndarray]:
        """The voxels, float64 as nibabel gives them, flat and in the order (Z, Y, X). Raises CaseError for damaged files."""
        from nibabel.orientations import io_orientation

        try:
            image = self._image.as_reoriented(io_orientation(self._image.affine)) if self._reorient else self._image
            voxels = image.get_fdata(caching="unchanged").transpose((2, 1, 0))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise CaseError(
                f"{self.path} is truncated or damaged ({error}): copy or download it again", path=self.path
            ) from error
        for plane in voxels:
            yield plane.reshape(-1)


def _header_turned_to_ras(image: Any) -> Any:
    """What ``as_reoriented`` gives, without reading voxels: an image that says how it lies and holds none."""
    from nibabel.orientations import inv_ornt_aff, io_orientation

    orientation = io_orientation(image.affine)
    shape = np.empty(3, int)
    shape[orientation[:, 0].astype(int)] = image.shape
    affine = image.affine @ inv_ornt_aff(orientation, image.shape)
    return image.__class__(np.broadcast_to(np.int8(0), shape), affine, image.header)


def open_image(path: Path, reorient: bool) -> NibabelImage:
    """Read the header. Raises CaseError for files that are missing, not NIfTI, damaged or not 3D."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    if not path.is_file():
        raise CaseError(f"{path}: no such file", path=path)
    if not is_nifti(path):
        raise CaseError(f"{path}: nnU-Net's nibabel readers read .nii.gz and .nii only", path=path)
    try:
        image: Any = nibabel.load(str(path))
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        raise CaseError(
            f"{path} can't be read as an image (truncated, or another format?): {error}", path=path
        ) from error
    if len(image.shape) != 3:
        raise CaseError(
            f"{path}: nnU-Net's nibabel readers read 3D images, this one has {len(image.shape)} axes", path=path
        )
    return NibabelImage(path, image, reorient)


def write_image(path: Path, voxels: np.ndarray, affines: Affines) -> None:
    """Write an array (Z, Y, X) with the affine of the image that it belongs to, turned back where that was turned.

    Raises OutputError.
    """
    import nibabel
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    if not is_nifti(path):
        raise OutputError(f"can't write {path}: an image that nibabel read is written as .nii.gz or .nii", path=path)
    affine = np.array(affines.original if affines.reoriented is None else affines.reoriented)
    image = nibabel.Nifti1Image(voxels.transpose((2, 1, 0)), affine=affine)
    if affines.reoriented is not None:
        back = ornt_transform(axcodes2ornt("RAS"), io_orientation(np.array(affines.original)))
        image = image.as_reoriented(back)
    ending = ".nii.gz" if path.name.lower().endswith(".gz") else ".nii"
    with atomic_path(path, ending=ending) as temporary:
        nibabel.save(image, str(temporary))
