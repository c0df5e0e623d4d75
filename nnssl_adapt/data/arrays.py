"""Arrays in blosc2 files, as nnU-Net's stores have them: how they are cut into pieces, packed and opened."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnssl_adapt.errors import CaseError

if TYPE_CHECKING:  # half a second, and a bare machine has none: loaded where arrays are packed and opened
    import blosc2

MADE_AGAIN = "run the preprocessing command again with --check, which finds damaged cases and makes them again"

_MMAP = {} if os.name == "nt" else {"mmap_mode": "r"}  # blosc2 can't map files on Windows (nnUNet issue 2723)


def piece_shapes(
    shape: Sequence[int],
    patch_size: Sequence[int],
    itemsize: int,
    block_bytes: int = 128 * 1024,
    chunk_bytes: int = 6 * 1024**2,
    chunk_to_patch: float = 1.5,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose blosc2's block and chunk shapes for reading random patches. The rule is nnU-Net 2.8's.

    Blocks are what is unpacked at once, chunks what is read at once; both hold one channel. A block starts as the patch,
    rounded up to powers of two, and is halved along the axis that is largest relative to the patch until it fits. A chunk
    grows from it by a block at a time along the axis that covers the patch least.

    Args:
        shape: of the array, (C, Z, Y, X).
        patch_size: of the training to come, (Z, Y, X).
        itemsize: bytes a voxel.
        block_bytes: most bytes of a block.
        chunk_bytes: most bytes of a chunk.
        chunk_to_patch: most that a chunk may exceed the patch by, per axis.

    Returns:
        Block shape and chunk shape, both (1, Z, Y, X).
    """
    size = [int(n) for n in shape[1:]]
    patch = [int(n) for n in patch_size]
    target = [max(1, min(n, math.floor(chunk_to_patch * p))) for n, p in zip(size, patch, strict=True)]
    block = [min(1 << max(0, p - 1).bit_length(), n) for p, n in zip(patch, size, strict=True)]
    while math.prod(block) * itemsize > min(block_bytes, chunk_bytes):
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: (block[a] / target[a], a))
        block[axis] = 1 << ((block[axis] - 1).bit_length() - 1)
    chunk = list(block)
    while True:
        grown = []
        for axis in range(3):
            if patch[axis] == 1 or chunk[axis] >= target[axis]:
                continue
            wider = list(chunk)
            wider[axis] = min(chunk[axis] + block[axis], target[axis])
            if math.prod(wider) * itemsize <= chunk_bytes:
                grown.append(((chunk[axis] / target[axis], -size[axis], axis), wider))
        if not grown:
            return (1, *block), (1, *chunk)
        chunk = min(grown)[1]


def compressed(array: np.ndarray, patch_size: Sequence[int]) -> bytes:
    """The bytes of a ``.b2nd`` file.

    Packed in memory and written by ordinary means: blosc2 itself dies of a bus error (memory-mapped) or says nothing of
    the cause (otherwise) when the disk is full. LZ4's fastest level with shuffling costs a tenth of nnU-Net's choice (high
    compression, after trying out filters) for files a few per cent larger that are read as fast.
    """
    return packed(array, *piece_shapes(array.shape, patch_size, array.itemsize))


def packed(array: np.ndarray, blocks: Sequence[int], chunks: Sequence[int]) -> bytes:
    """As :func:`compressed`, with given shapes of blocks and chunks."""
    import blosc2

    packed_array = blosc2.empty(
        array.shape,
        array.dtype,
        chunks=tuple(chunks),
        blocks=tuple(blocks),
        contiguous=True,  # then its bytes need not be put together first
        cparams={"codec": blosc2.Codec.LZ4, "clevel": 1, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1},
    )
    # One assignment: blosc2.asarray copies each chunk out first, and small chunks then cost more than their compression.
    packed_array[...] = np.ascontiguousarray(array)
    found: bytes = packed_array.to_cframe()
    return found


def open_array(path: Path) -> blosc2.NDArray:
    """The array in a file, of which only what is read is unpacked. Raises CaseError for a damaged file."""
    import blosc2

    try:
        return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **_MMAP)
    except (RuntimeError, OSError, ValueError) as error:
        raise CaseError(f"{path} is damaged ({error}): {MADE_AGAIN}", path=path) from error
