"""Pictures (.png, .bmp, .jpg, .tif) and 3D TIFF stacks, as nnU-Net's ``NaturalImage2DIO`` and ``Tiff3DIO`` read and write them.

A picture is an image of one slice, (C, 1, Y, X), with a channel for each colour. It has no spacing: nnU-Net gives it 1 mm, and
999 mm from slice to slice. A stack has its spacing in a JSON file beside it, ``CASE.json``, and neither has an orientation.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.errors import CaseError, ConfigurationError, OutputError
from nnssl_adapt.files import atomic_path, write_json
from nnssl_adapt.text import dimensions, read_json

logger = logging.getLogger(__name__)

NATURAL_2D, TIFF_3D = "NaturalImage2DIO", "Tiff3DIO"

PICTURE_READERS = (NATURAL_2D, TIFF_3D)
"""nnU-Net's names of the two readers."""

TIFF_ENDINGS = (".tif", ".tiff")
PICTURE_ENDINGS = (".png", ".bmp", *TIFF_ENDINGS, ".jpg", ".jpeg")
LOSSY_ENDINGS = (".jpg", ".jpeg")
"""Formats that change numbers: images can be stored in them, labels can't."""

BETWEEN_SLICES = 999.0
"""Millimetres that nnU-Net puts between the slices of a picture, of which there is one."""

INSTALL = "pip install 'nnssl-adapt[pictures]'"

_COLOURS = (3, 4)
"""Channels of colour pictures: red, green and blue, and an alpha channel."""

_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    KeyError,
    IndexError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""What Pillow and tifffile raise for damaged files. SyntaxError is Pillow's for broken PNGs, RuntimeError imagecodecs'."""


@dataclass(frozen=True)
class Picture:
    """A picture or stack whose size is known.

    Attributes:
        path: the file.
        reader: ``NaturalImage2DIO`` or ``Tiff3DIO``.
        size: voxels (Z, Y, X).
        channels: numbers a pixel: 1, or those of its colours.
        spacing: mm (Z, Y, X).
    """

    path: Path
    reader: str
    size: tuple[int, int, int]
    channels: int
    spacing: tuple[float, float, float]

    def pieces(self) -> Iterator[np.ndarray]:
        """The voxels, flat, channel by channel in the order (Z, Y, X). Raises CaseError for damaged files."""
        array = _pixels(self.path)
        if self.reader == NATURAL_2D:
            array = _colours_last(array)
            array = array if array.ndim == 2 else np.moveaxis(array, -1, 0)
        yield from (plane.reshape(-1) for plane in array.reshape(-1, *self.size[1:]))


def open_picture(path: Path, reader: str) -> Picture:
    """Read what the header says.

    Raises CaseError for files that are missing, damaged, or no pictures (``NaturalImage2DIO``) or stacks (``Tiff3DIO``), and
    ConfigurationError without the package that reads them.
    """
    if not path.is_file():
        raise CaseError(f"{path}: no such file", path=path)
    ending = path.suffix.lower()
    if reader == TIFF_3D:
        if ending not in TIFF_ENDINGS:
            raise CaseError(f"{path}: nnU-Net's {TIFF_3D} reads .tif and .tiff only", path=path)
        shape = _tiff_shape(path)
        if len(shape) != 3:
            raise CaseError(
                f"{path}: {TIFF_3D} reads 3D stacks, this one has {len(shape)} axes ({dimensions(shape)}); pictures are read "
                f"with 'overwrite_image_reader_writer': '{NATURAL_2D}'",
                path=path,
            )
        return Picture(path, reader, shape, 1, _spacing_beside(path))  # type: ignore[arg-type]
    if ending not in PICTURE_ENDINGS:
        raise CaseError(
            f"{path}: nnU-Net's {NATURAL_2D} reads pictures ({', '.join(PICTURE_ENDINGS)}), not {ending}", path=path
        )
    shape = _tiff_shape(path) if ending in TIFF_ENDINGS else _pillow_shape(path)
    shape = _shape_with_colours_last(shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in _COLOURS):
        raise CaseError(
            f"{path}: {NATURAL_2D} reads pictures with one, three or four numbers a pixel, this one has the shape "
            f"{dimensions(shape)}; 3D stacks (.tif) are read with 'overwrite_image_reader_writer': '{TIFF_3D}'",
            path=path,
        )
    channels = 1 if len(shape) == 2 else shape[2]
    return Picture(path, reader, (1, shape[0], shape[1]), channels, (BETWEEN_SLICES, 1.0, 1.0))


def reader_for_ending(file_ending: str, example: Path | None) -> str | None:
    """The picture reader that nnU-Net takes for a dataset with this ending, None for formats that are not pictures'.

    ``.tif`` is used for pictures and for stacks: ``example``, one of the dataset's images, tells which.
    """
    ending = file_ending.lower()
    if ending in (".png", ".bmp"):
        return NATURAL_2D
    if ending == ".tiff":
        return TIFF_3D
    if ending != ".tif":
        return None
    if example is not None:
        try:
            open_picture(example, NATURAL_2D)
        except CaseError:
            return TIFF_3D
    return NATURAL_2D


def reader_for_picture(path: Path) -> str | None:
    """The reader for one file whose reader nobody names; None for other formats than pictures'."""
    ending = path.suffix.lower()
    if ending in TIFF_ENDINGS:
        return reader_for_ending(".tif", path)
    return NATURAL_2D if ending in PICTURE_ENDINGS else None


def write_labels_as_picture(path: Path, labels: np.ndarray, spacing: tuple[float, float, float], reader: str) -> None:
    """Write labels (Z, Y, X), uint8 or uint16, as a picture (one slice) or a stack with its spacing beside it.

    Raises OutputError for a format that can't hold them.
    """
    ending = path.suffix.lower()
    if ending in LOSSY_ENDINGS:
        raise OutputError(
            f"can't write {path}: JPEG changes numbers, so labels can't be stored in it: use .png", path=path
        )
    if reader == TIFF_3D:
        if ending not in TIFF_ENDINGS:
            raise OutputError(
                f"can't write {path}: {dimensions(labels.shape)} voxels are no picture: use .tif", path=path
            )
        write_json(path.with_suffix(".json"), {"spacing": list(spacing)})
        pixels = labels
    else:
        if len(labels) != 1:
            raise OutputError(
                f"can't write {path}: a picture has one slice, these labels have {len(labels)}", path=path
            )
        pixels = labels[0]
    with atomic_path(path, ending=ending) as temporary:
        try:
            if ending in TIFF_ENDINGS:
                _package("tifffile").imwrite(temporary, data=np.ascontiguousarray(pixels), compression="zlib")
            else:
                _package("PIL.Image").fromarray(np.ascontiguousarray(pixels)).save(temporary)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"can't write {path}: {error}", path=path) from error


# -- reading ---------------------------------------------------------------------------------------------------------


def _pixels(path: Path) -> np.ndarray:
    try:
        if path.suffix.lower() in TIFF_ENDINGS:
            return np.asarray(_package("tifffile").imread(path))
        with _opened(path) as picture:
            return np.asarray(picture)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _tiff_shape(path: Path) -> tuple[int, ...]:
    try:
        with _package("tifffile").TiffFile(path) as file:
            return tuple(int(n) for n in file.series[0].shape)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _pillow_shape(path: Path) -> tuple[int, ...]:
    try:
        with _opened(path) as picture:
            bands = len(picture.getbands())
            return (picture.height, picture.width) if bands == 1 else (picture.height, picture.width, bands)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _opened(path: Path) -> Any:
    """The picture, with colours where it has a palette, and 16 bits as unsigned numbers."""
    image = _package("PIL.Image")
    try:
        picture = image.open(path)
    except image.DecompressionBombError as error:
        raise _damaged(path, error) from error
    if picture.mode == "P":
        return picture.convert(picture.palette.mode)
    return picture.convert("I;16") if picture.format == "PNG" and picture.mode == "I" else picture


def _damaged(path: Path, error: Exception) -> CaseError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CaseError(f"{path} can't be read as a picture (truncated, or another format?): {said}", path=path)


def _shape_with_colours_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A TIFF may have its colours first: three or four slices are taken for them, as nnU-Net's reader does."""
    if len(shape) > 2 and shape[-1] not in _COLOURS and shape[-3] in _COLOURS:
        return (*shape[:-3], shape[-2], shape[-1], shape[-3])
    return shape


def _colours_last(array: np.ndarray) -> np.ndarray:
    return array if _shape_with_colours_last(array.shape) == array.shape else np.moveaxis(array, -3, -1)


def _spacing_beside(path: Path) -> tuple[float, float, float]:
    """Of a stack: from ``CASE.json``, which is beside the images ``CASE_0000.tif`` and the labels ``CASE.tif``."""
    for name in dict.fromkeys((path.stem, re.sub(r"_\d{4}$", "", path.stem))):
        beside = path.with_name(f"{name}.json")
        content = read_json(beside, CaseError, "the spacing of a stack") if beside.is_file() else None
        if content is None or (name == path.stem != re.sub(r"_\d{4}$", "", path.stem) and "spacing" not in content):
            continue
        spacing = content.get("spacing")
        if not _is_spacing(spacing):
            raise CaseError(
                f"{beside}: 'spacing' must be three positive numbers, mm (Z, Y, X), got {json.dumps(spacing)}",
                path=beside,
            )
        z, y, x = (float(s) for s in spacing)
        return z, y, x
    logger.debug("%s has no spacing beside it (CASE.json): 1 mm along each axis", path)
    return 1.0, 1.0, 1.0


def _is_spacing(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(s, (int, float)) and not isinstance(s, bool) and 0 < s < math.inf for s in value)
    )


def check_packages() -> None:
    """Raise ConfigurationError saying what to install, where pictures can't be read."""
    _package("PIL.Image")
    _package("tifffile")


def _package(name: str) -> Any:
    """Pillow or tifffile. Raises ConfigurationError saying what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = "Pillow" if name.startswith("PIL") else name
        raise ConfigurationError(
            f"pictures need {package}, which is not installed: {INSTALL}", next_command=INSTALL
        ) from error
