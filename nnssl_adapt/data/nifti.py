"""Voxels of a NIfTI file, known to be all there.

SimpleITK reads a truncated ``.nii`` or ``.nii.gz`` without complaint and fills the rest with zeros or noise (seen with
SimpleITK 2.5). Here the bytes are unpacked once, with gzip's own checksum, and compared with what the header announces.
They come piece by piece, small enough for the processor's cache: whoever converts or checks them need not go through main
memory again, and the file's content is never held as a whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
from isal import igzip_lib

NIFTI_ENDINGS = (".nii.gz", ".nii")

HEADER_BYTES = 348
_GZIP_MAGIC = b"\x1f\x8b"
_PACKED_BYTES = 1 << 17
"""Read from a compressed file at a time."""

_PIECE_BYTES = 1 << 18
"""Unpacked at a time. Labels shrink five hundredfold: what one read of them holds would be tens of megabytes."""

# NIfTI-1 "datatype" codes of scalar voxels. Colour, complex and long-double voxels are left to SimpleITK.
_DTYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}


_DAMAGED_GZIP = cast(type[Exception], igzip_lib.IsalError)


class IncompleteFile(Exception):
    """The file ends early or its checksum is wrong."""


@dataclass(frozen=True)
class NiftiVoxels:
    """The voxels of one file, still to be read.

    Attributes:
        dtype: of the pieces: the file's own type, or float32 where the header asks for scaling (float64 of float64).
        shape: array shape, slowest axis first.
        pieces: the voxels in file order, in flat arrays that can be read once. Reading raises :class:`IncompleteFile` when
            bytes are missing or damaged.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Iterator[np.ndarray]


def is_nifti(path: Path) -> bool:
    """Whether the name is one of a NIfTI file, ``.NII.GZ`` included."""
    return path.name.lower().endswith(NIFTI_ENDINGS)


def open_nifti(path: Path, shape: tuple[int, ...]) -> NiftiVoxels | None:
    """Open a ``.nii`` or ``.nii.gz`` file for reading.

    Args:
        path: the file.
        shape: array shape (slowest axis first) that SimpleITK found in the header.

    Returns:
        The voxels, equal to what SimpleITK reads; None for a kind of file that only SimpleITK knows (NIfTI-2, a separate
        ``.img``, colour voxels, ...).

    Raises:
        IncompleteFile: there is not even a header.
    """
    stream = unpacked(path)
    head = b""
    while len(head) < HEADER_BYTES:
        piece = next(stream, None)
        if piece is None:
            raise IncompleteFile(f"only {len(head)} bytes")
        head += piece
    order = byte_order(head)
    if order is None or head[344:348] != b"n+1\0":
        return None
    (code,) = struct.unpack_from(order + "h", head, 70)
    (offset,) = struct.unpack_from(order + "f", head, 108)
    slope, intercept = struct.unpack_from(order + "2f", head, 112)
    if code not in _DTYPES or not np.isfinite([offset, slope, intercept]).all():
        return None
    stored = np.dtype(order + _DTYPES[code])
    count = int(np.prod(shape))
    if _announced_voxels(head, order) != count:
        return None
    slope = slope or 1.0  # the standard has slope 0 switch off the intercept too; ITK does not
    pieces = _numbers(head, stream, int(offset), stored, count)
    if (slope, intercept) == (1.0, 0.0):
        return NiftiVoxels(stored, shape, pieces)
    scaled = np.dtype(np.float64 if stored.itemsize == 8 and stored.kind == "f" else np.float32)
    return NiftiVoxels(scaled, shape, _scaled(pieces, scaled, slope, intercept))


def read_nifti_voxels(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """All voxels that :func:`open_nifti` gives, in one array of ``shape``; None and IncompleteFile as there."""
    voxels = open_nifti(path, shape)
    if voxels is None:
        return None
    result = np.empty(int(np.prod(shape)), voxels.dtype)
    start = 0
    for piece in voxels.pieces:
        result[start : start + len(piece)] = piece
        start += len(piece)
    return result.reshape(shape)


def _numbers(head: bytes, stream: Iterator[bytes], offset: int, stored: np.dtype, count: int) -> Iterator[np.ndarray]:
    """``count`` numbers from byte ``offset`` on. The rest of the file is read too, since its checksum comes last."""
    have, expected, rest = 0, offset + count * stored.itemsize, b""
    position, piece = 0, head
    while True:
        start, stop = max(offset - position, 0), min(expected - position, len(piece))
        position += len(piece)
        if stop > start:
            part = rest + piece[start:stop] if rest else piece[start:stop]
            whole = len(part) // stored.itemsize
            rest = part[whole * stored.itemsize :]
            have += whole
            yield np.frombuffer(part, stored, count=whole)
        following = next(stream, None)
        if following is None:
            break
        piece = following
    if have < count:
        raise IncompleteFile(f"{position} of {expected} bytes")


def _scaled(pieces: Iterator[np.ndarray], kind: np.dtype, slope: float, intercept: float) -> Iterator[np.ndarray]:
    """``voxels · slope + intercept`` as ITK rounds it."""
    for piece in pieces:
        yield (piece.astype(kind).astype(np.float64) * slope + intercept).astype(kind)


def unpacked(path: Path) -> Iterator[bytes]:
    """The content of a file, unpacked if it is gzip's, in pieces that fit the processor's cache."""
    with open(path, "rb") as stream:
        first = stream.read(_PACKED_BYTES)
        if first.startswith(_GZIP_MAGIC):
            yield from _unzipped(first, stream)
            return
        while first:
            yield first
            first = stream.read(_PIECE_BYTES)


def _unzipped(packed: bytes, stream: IO[bytes]) -> Iterator[bytes]:
    while True:  # a gzip file may have several members (bgzip, concatenated files)
        decoder = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        while not decoder.eof:
            if decoder.needs_input and not packed:
                raise IncompleteFile("the gzip data end early")
            try:
                piece = decoder.decompress(packed, _PIECE_BYTES)
            except _DAMAGED_GZIP as error:
                raise IncompleteFile(f"damaged gzip data: {error}") from None
            if piece:
                yield piece
            if not decoder.eof:
                packed = stream.read(_PACKED_BYTES) if decoder.needs_input else b""
        packed = decoder.unused_data.lstrip(b"\0")  # tape-style padding is legal
        while len(packed) < len(_GZIP_MAGIC):
            more = stream.read(_PACKED_BYTES)
            if not more:
                return
            packed = (packed + more).lstrip(b"\0")
        if not packed.startswith(_GZIP_MAGIC):
            return


def byte_order(content: bytes) -> str | None:
    for order in "<>":
        if struct.unpack_from(order + "i", content, 0)[0] == HEADER_BYTES:
            return order
    return None


def _announced_voxels(content: bytes, order: str) -> int:
    dims = struct.unpack_from(order + "8h", content, 40)
    return int(np.prod([max(cast(int, n), 1) for n in dims[1 : 1 + max(dims[0], 0)]], dtype=np.int64))
