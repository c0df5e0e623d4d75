"""Images and labels on disk, read and written as nnU-Net's readers do: with SimpleITK, nibabel, Pillow or tifffile.

Arrays are (C, Z, Y, X): SimpleITK's array order, slowest axis first, and nnU-Net's. Spacing is in millimetres in that
order; origin and direction stay in ITK's (x, y, z), since nothing but writing uses them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data import nibabel_io
from nnssl_adapt.data.nibabel_io import Affines
from nnssl_adapt.data.pictures import (
    BETWEEN_SLICES,
    NATURAL_2D,
    PICTURE_ENDINGS,
    PICTURE_READERS,
    TIFF_3D,
    Picture,
    open_picture,
    reader_for_picture,
    write_labels_as_picture,
)
from nnssl_adapt.data.voxels import (
    Extremes,
    ShearedAffine,
    fill_floats,
    fill_labels,
    open_image,
    voxel_pieces,
    write_image_file,
)
from nnssl_adapt.errors import CaseError
from nnssl_adapt.geometry.orientation import orientation_code
from nnssl_adapt.text import dimensions

logger = logging.getLogger(__name__)

SIMPLE_ITK, NIBABEL, NIBABEL_REORIENT = "SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"

NIFTI_READERS = (SIMPLE_ITK, NIBABEL, NIBABEL_REORIENT)
READERS = (*NIFTI_READERS, *PICTURE_READERS)
"""nnU-Net's names of the image readers that there are here. SimpleITK and nibabel differ in the units of spacings (SimpleITK
converts micrometres), in affines with shear (nibabel keeps them) and in the order of axes (the third one turns images to RAS).
The last two read pictures and stacks (:mod:`nnssl_adapt.data.pictures`)."""

_UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class ImageGeometry:
    """Where the voxels of a 3D image lie in space.

    Attributes:
        spacing: millimetres between voxel centres, (Z, Y, X).
        origin: position of the first voxel in millimetres, ITK's (x, y, z).
        direction: nine cosines, ITK's row-major matrix for (x, y, z).
        size: voxels, (Z, Y, X).
        affines: what nibabel found, of images that were read with it; else None. Origin and direction are then the
            affine's, in ITK's world, and the direction's columns need not be at right angles.
        picture: the reader, where it is one of pictures or stacks; else None. They have no place in space: the origin is 0
            and the direction the identity.
    """

    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    size: tuple[int, int, int]
    affines: Affines | None = None
    picture: str | None = None

    @property
    def reader(self) -> str:
        """The reader that found it, one of :data:`READERS`."""
        if self.picture is not None:
            return self.picture
        if self.affines is None:
            return SIMPLE_ITK
        return NIBABEL if self.affines.reoriented is None else NIBABEL_REORIENT

    @property
    def orientation(self) -> str | None:
        """How it lies, a code such as ``RPI``; None of a picture, which lies nowhere."""
        return None if self.picture is not None else orientation_code(self.direction)

    def to_properties(self) -> dict[str, Any]:
        """Return what nnU-Net keeps for a case: ``spacing`` (Z, Y, X), and ``sitk_stuff`` (x, y, z) or ``nibabel_stuff``; of a
        picture only the spacing."""
        if self.picture is not None:
            return {"spacing": list(self.spacing)}
        if self.affines is not None:
            return {"nibabel_stuff": self.affines.to_properties(), "spacing": list(self.spacing)}
        return {
            "sitk_stuff": {"spacing": self.spacing[::-1], "origin": self.origin, "direction": self.direction},
            "spacing": list(self.spacing),
        }

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any], size: Sequence[int]) -> ImageGeometry:
        """Rebuild a geometry from nnU-Net's entries and the image's size (Z, Y, X).

        Entries of a 4D image (channels on the fourth axis) lose that axis. Raises CaseError if nnU-Net read the image
        with a library that leaves other entries, or the entries are none of a grid.
        """
        try:
            geometry = cls._from_properties(properties, size)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise CaseError(f"the case's properties don't say how it lies ({type(error).__name__}: {error})") from error
        numbers = (*geometry.spacing, *geometry.origin, *geometry.direction)
        counts = (len(geometry.spacing), len(geometry.origin), len(geometry.direction))
        # ITK never comes back from a direction that is not finite, or whose numbers are no cosines.
        is_small = np.isfinite(numbers).all() and max(map(abs, numbers)) < 1e9 and max(map(abs, geometry.direction)) < 2
        if counts != (3, 3, 9) or not is_small or min(geometry.spacing) <= 0:
            raise CaseError(
                f"the case's properties are none of a grid: spacing {geometry.spacing}, origin {geometry.origin}, direction "
                f"{geometry.direction}"
            )
        return geometry

    @classmethod
    def _from_properties(cls, properties: Mapping[str, Any], size: Sequence[int]) -> ImageGeometry:
        z, y, x = (int(n) for n in size)
        if "nibabel_stuff" in properties:
            affines = Affines.from_properties(properties["nibabel_stuff"])
            origin, direction = affines.world
            return cls(tuple(float(s) for s in properties["spacing"]), origin, direction, (z, y, x), affines)  # type: ignore[arg-type]
        if properties.keys().isdisjoint(_STUFF) and "spacing" in properties:
            dz, dy, dx = (float(s) for s in properties["spacing"])
            is_flat = z == 1 and dz == BETWEEN_SLICES
            return _geometry_of_picture((dz, dy, dx), (z, y, x), NATURAL_2D if is_flat else TIFF_3D)
        try:
            stuff = properties["sitk_stuff"]
            spacing = tuple(float(s) for s in stuff["spacing"])[:3]
            start = tuple(float(o) for o in stuff["origin"])[:3]
            matrix = np.asarray(stuff["direction"], dtype=float)
        except KeyError as error:
            raise CaseError(
                f"the case was read neither with SimpleITK nor with nibabel (its properties have no {error}); preprocess it "
                "again with 'image_reader_writer': 'SimpleITKIO'"
            ) from None
        side = round(len(matrix) ** 0.5)
        cosines = tuple(float(v) for v in matrix.reshape(side, side)[:3, :3].ravel())
        return cls(spacing=spacing[::-1], origin=start, direction=cosines, size=(z, y, x))  # type: ignore[arg-type]


_STUFF = ("sitk_stuff", "nibabel_stuff", "itk_stuff")


def _geometry_of_picture(spacing: tuple[float, float, float], size: tuple[int, int, int], reader: str) -> ImageGeometry:
    return ImageGeometry(spacing, (0.0, 0.0, 0.0), _UPRIGHT, size, picture=reader)


def read_image(paths: Sequence[str | Path], reader: str = SIMPLE_ITK) -> tuple[np.ndarray, ImageGeometry]:
    """Read the channel files of one image.

    Args:
        paths: one file a channel, in channel order, or a single 4D file with the channels on its fourth axis.
        reader: how: one of :data:`READERS`.

    Returns:
        float32 (C, Z, Y, X), and the geometry of the first file.

    Raises:
        CaseError: a file is missing, unreadable, truncated or 2D; has NaN or infinite voxels; or the files differ in
            shape or spacing. (As in nnU-Net, another origin or direction is only logged as a warning.)
    """
    files = [Path(path) for path in paths]
    if not files:
        raise CaseError("no image file was given")
    opened = [OpenImage.open(path, reader) for path in files]
    first = opened[0]
    for other in opened:
        _refuse_other_grid(first, other, alone=len(files) == 1)
    image = np.empty((sum(each.channels or 1 for each in opened), *first.geometry.size), np.float32)
    start = 0
    for each in opened:
        stop = start + (each.channels or 1)
        each.read(image[start:stop])
        start = stop
    return image, first.geometry


def _refuse_other_grid(first: OpenImage, other: OpenImage, alone: bool) -> None:
    """Raise CaseError where two channel files of one image don't fit together; warn of what may be a mistake."""
    path = other.path
    if other.geometry.picture is None and other.channels is not None and not alone:
        raise CaseError(f"{path} is 4D: give one 3D file for each channel, or a single 4D file", path=path)
    for problem in geometry_problems(first.geometry, other.geometry):
        raise CaseError(f"{path}: {problem} from {first.path}; all channels of a case must share one grid", path=path)
    if other.channels != first.channels:
        raise CaseError(
            f"{path} has {other.channels} number(s) a pixel, {first.path} has {first.channels}: save all pictures of a case in "
            "one way (grey, or RGB)",
            path=path,
        )
    for doubt in geometry_doubts(first.geometry, other.geometry):
        logger.warning("%s: %s from %s", path, doubt, first.path)


def read_labels(path: str | Path, reader: str = SIMPLE_ITK) -> tuple[np.ndarray, ImageGeometry]:
    """Read a label file, stored as any number type, as ``reader`` (one of :data:`READERS`) does.

    Returns:
        int16 (1, Z, Y, X), and its geometry.

    Raises:
        CaseError: missing, unreadable, truncated, not 3D; values that are NaN, not whole numbers, or beyond int16.
    """
    labels, geometry, _ = _read_labels(Path(path), reader, repair=False)
    return labels, geometry


def read_and_repair_labels(path: str | Path, reader: str = SIMPLE_ITK) -> tuple[np.ndarray, ImageGeometry, int]:
    """As :func:`read_labels`, with values that are a rounding error away from a whole number (0.99999) rounded.

    The third value is how many voxels were. The file stays as it is. Raises CaseError.
    """
    return _read_labels(Path(path), reader, repair=True)


def _read_labels(path: Path, reader: str, repair: bool) -> tuple[np.ndarray, ImageGeometry, int]:
    opened = OpenImage.open(path, reader)
    if opened.channels not in (None, 1):
        if opened.geometry.picture is not None:
            raise CaseError(
                f"{path}: labels need one number a pixel, the label's value; this picture has {opened.channels} (colours, or a "
                "palette of them): save it in grey, as 8 or 16 bits",
                path=path,
            )
        raise CaseError(f"{path}: labels must be 3D, got {opened.channels} volumes", path=path)
    labels = np.empty((1, *opened.geometry.size), np.int16)
    repaired = opened.read_labels(labels, repair)
    return labels, opened.geometry, repaired


def read_geometry(path: str | Path, reader: str = SIMPLE_ITK) -> ImageGeometry:
    """Read only the header of an image file. Raises CaseError if it is missing, unreadable, or not 3D (or 4D)."""
    return OpenImage.open(Path(path), reader).geometry


def count_channels(path: str | Path, reader: str = SIMPLE_ITK) -> int:
    """Return the number of channels in one file: 1 for a 3D image, the length of the fourth axis of a 4D one, a picture's
    colours."""
    return OpenImage.open(Path(path), reader).channels or 1


def reader_for(paths: Iterable[str | Path]) -> str:
    """A reader that can read all these files on the axes that they are stored in: SimpleITK, nibabel for sheared affines, or
    that of the first file's pictures.

    For files whose reader nobody names, such as segmentations that are compared. Files that neither can read are left to
    whoever reads them to complain about.
    """
    for path in map(Path, paths):
        picture = reader_for_picture(path) if path.is_file() else None
        if picture is not None:
            return picture
        try:
            open_image(path)
        except ShearedAffine:
            return NIBABEL
        except CaseError:
            continue
    return SIMPLE_ITK


@dataclass(frozen=True)
class OpenImage:
    """An image file whose header has been read.

    Attributes:
        path: the file.
        geometry: of its voxels.
        channels: length of the fourth axis of a 4D image, None of a 3D one; numbers a pixel of a picture.
        source: the reader that knows the voxels.
    """

    path: Path
    geometry: ImageGeometry
    channels: int | None
    source: Any

    @classmethod
    def open(cls, path: Path, reader: str = SIMPLE_ITK) -> OpenImage:
        """Read the header. Raises CaseError."""
        if reader in PICTURE_READERS:
            picture = open_picture(path, reader)
            return cls(path, _geometry_of_picture(picture.spacing, picture.size, reader), picture.channels, picture)
        if reader != SIMPLE_ITK:
            image = nibabel_io.open_image(path, reorient=reader == NIBABEL_REORIENT)
            origin, direction = image.world
            geometry = ImageGeometry(image.spacing, origin, direction, image.size, image.affines)
            return cls(path, geometry, None, image)
        header = open_image(path)
        side = header.GetDimension()
        cosines = np.asarray(header.GetDirection()).reshape(side, side)[:3, :3]
        geometry = ImageGeometry(
            spacing=tuple(abs(float(s)) for s in header.GetSpacing()[:3][::-1]),  # type: ignore[arg-type]
            origin=tuple(float(o) for o in header.GetOrigin()[:3]),  # type: ignore[arg-type]
            direction=tuple(float(v) for v in cosines.ravel()),
            size=tuple(int(n) for n in header.GetSize()[:3][::-1]),  # type: ignore[arg-type]
        )
        return cls(path, geometry, int(header.GetSize()[3]) if side == 4 else None, header)

    def read(self, out: np.ndarray) -> Extremes:
        """Fill ``out``, contiguous float32 (C, Z, Y, X), and return its least and largest value. Raises CaseError."""
        return fill_floats(self.path, self._pieces(), out)

    def read_labels(self, out: np.ndarray, repair: bool = False) -> int:
        """Fill ``out``, contiguous int16; return how many voxels were repaired. Raises CaseError."""
        return fill_labels(self.path, self._pieces(), out, repair)

    def _pieces(self) -> Iterator[np.ndarray]:
        if isinstance(self.source, (nibabel_io.NibabelImage, Picture)):
            return self.source.pieces()
        return voxel_pieces(self.path, self.source)


def write_labels(path: str | Path, labels: np.ndarray, geometry: ImageGeometry) -> None:
    """Write labels (Z, Y, X) as a compressed image in the given geometry, whole or not at all.

    Stored as uint8 where the largest label is below 255 and as uint16 otherwise, as nnU-Net does. Labels of an image that
    nibabel read are written with its affine, turned back where it was turned; then the file must be NIfTI. With a picture's
    ending, a picture is written; of a 3D image a stack (.tif) with its spacing beside it.
    Raises OutputError if the file can't be written.
    """
    path = Path(path)
    if labels.shape != geometry.size:
        raise ValueError(f"labels have shape {labels.shape}, the geometry is of {geometry.size}")
    voxels = np.ascontiguousarray(labels, np.uint8 if labels.max() < 255 else np.uint16)
    if path.suffix.lower() in PICTURE_ENDINGS:
        write_labels_as_picture(path, voxels, geometry.spacing, geometry.picture or TIFF_3D)
        return
    if geometry.affines is not None:
        nibabel_io.write_image(path, voxels, geometry.affines)
        return
    import SimpleITK as sitk  # loaded where it is needed: training on a bare machine has none

    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(geometry.spacing[::-1])
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    write_image_file(image, path)


def geometry_problems(reference: ImageGeometry, other: ImageGeometry) -> Iterator[str]:
    """Yield what makes two grids unusable together: another shape, or another spacing (nnU-Net's tolerance)."""
    if reference.size != other.size:
        yield f"shape {dimensions(other.size)} (Z, Y, X) differs"
    if not np.allclose(other.spacing, reference.spacing):
        yield f"spacing {dimensions(other.spacing)} mm (not {dimensions(reference.spacing)}; Z, Y, X) differs"


def geometry_doubts(reference: ImageGeometry, other: ImageGeometry) -> Iterator[str]:
    """Yield what may be a mistake but does not stop nnU-Net: another origin or direction."""
    if not np.allclose(other.origin, reference.origin):
        yield f"origin {dimensions(other.origin)} mm (not {dimensions(reference.origin)}; x, y, z) differs"
    if not np.allclose(other.direction, reference.direction):
        yield f"direction {dimensions(other.direction)} (not {dimensions(reference.direction)}) differs"


def distinct_values(labels: np.ndarray) -> list[int]:
    """Return the different values of an integer array in ascending order. Many times faster than ``np.unique``."""
    flat = labels.reshape(-1)
    seen = set(flat[:1].tolist())
    for start in range(0, flat.size - 1, 1 << 20):  # pieces that stay in the processor's cache
        part = flat[start : start + (1 << 20) + 1]
        # Neighbours are mostly equal: all values turn up where they are not.
        seen.update(np.unique(part[1:][part[1:] != part[:-1]]).tolist())
    return sorted(seen)
