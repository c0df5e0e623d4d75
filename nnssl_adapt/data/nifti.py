"""Voxels of a NIfTI file, known to be all there.

SimpleITK reads a truncated ``.nii`` or ``.nii.gz`` without complaint and fills the rest with zeros or noise (seen with
SimpleITK 2.5). Here the bytes are unpacked once, with gzip's own checksum, and compared with what the header announces.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import cast

import numpy as np
from isal import igzip_lib, isal_zlib

_HEADER_BYTES = 348
_GZIP_MAGIC = b"\x1f\x8b"

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


_DAMAGED_GZIP = (zlib.error, cast(type[Exception], igzip_lib.IsalError))


class IncompleteFile(Exception):
    """The file ends early or its checksum is wrong."""


def read_nifti_voxels(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Read the voxels of a ``.nii`` or ``.nii.gz`` file.

    Args:
        path: the file.
        shape: array shape (slowest axis first) that SimpleITK found in the header.

    Returns:
        Array of ``shape`` in the file's own type, or float32 where the header asks for scaling (float64 of float64);
        None for a kind of file that only SimpleITK knows (NIfTI-2, a separate ``.img``, colour voxels, ...). Equal to
        what SimpleITK reads.

    Raises:
        IncompleteFile: bytes are missing or damaged.
    """
    content = _unpacked(path)
    if len(content) < _HEADER_BYTES:
        raise IncompleteFile(f"only {len(content)} bytes")
    order = _byte_order(content)
    if order is None or content[344:348] != b"n+1\0":
        return None
    (code,) = struct.unpack_from(order + "h", content, 70)
    (offset,) = struct.unpack_from(order + "f", content, 108)
    slope, intercept = struct.unpack_from(order + "2f", content, 112)
    if code not in _DTYPES or not np.isfinite([offset, slope, intercept]).all():
        return None
    dtype = np.dtype(order + _DTYPES[code])
    count = int(np.prod(shape))
    if _announced_voxels(content, order) != count:
        return None
    expected = int(offset) + count * dtype.itemsize
    if len(content) < expected:
        raise IncompleteFile(f"{len(content)} of {expected} bytes")
    voxels = np.frombuffer(content, dtype, count=count, offset=int(offset)).reshape(shape)
    slope = slope or 1.0  # the standard has slope 0 switch off the intercept too; ITK does not
    return voxels if (slope, intercept) == (1.0, 0.0) else _scaled(voxels, slope, intercept)


def _scaled(voxels: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """``voxels · slope + intercept`` as ITK rounds it, a slice at a time, so that float64 never fills the memory."""
    scaled = np.empty(
        voxels.shape, np.float64 if voxels.dtype.itemsize == 8 and voxels.dtype.kind == "f" else np.float32
    )
    for source, target in zip(voxels, scaled, strict=True):
        target[...] = source.astype(scaled.dtype).astype(np.float64) * slope + intercept
    return scaled


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(_GZIP_MAGIC):
        return content
    parts = []
    while content:  # a gzip file may have several members (bgzip, concatenated files)
        decoder = isal_zlib.decompressobj(wbits=31)
        try:
            parts.append(decoder.decompress(content))
        except _DAMAGED_GZIP as error:
            raise IncompleteFile(f"damaged gzip data: {error}") from None
        if not decoder.eof:
            raise IncompleteFile("the gzip data end early")
        content = decoder.unused_data.lstrip(b"\0")  # tape-style padding is legal
        if not content.startswith(_GZIP_MAGIC):
            break
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _byte_order(content: bytes) -> str | None:
    for order in "<>":
        if struct.unpack_from(order + "i", content, 0)[0] == _HEADER_BYTES:
            return order
    return None


def _announced_voxels(content: bytes, order: str) -> int:
    dims = struct.unpack_from(order + "8h", content, 40)
    return int(np.prod([max(cast(int, n), 1) for n in dims[1 : 1 + max(dims[0], 0)]], dtype=np.int64))
