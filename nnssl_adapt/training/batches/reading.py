"""Reading a box of a sample's case: only the blocks of the store that it touches are unpacked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from nnssl_adapt.training.batches.patches import Place
from nnssl_adapt.training.batches.spatial import Box
from nnssl_adapt.training.batches.store_check import explained_damage


def read_box(place: Place, box: Box, image: Tensor, codes: Tensor, flipped: Sequence[int] = ()) -> None:
    """Fill ``image`` and ``codes`` with a box of a place's case, unpacking only the blocks that it touches.

    Args:
        place: whose ``filled`` voxels have values; the others become 0.
        box: what to read (voxels of the image; may stick out).
        image: float32 (C, Z, Y, X) of the box's size.
        codes: uint8 or int16 (Z, Y, X): label + 1, 0 outside.
        flipped: axes along which what is read is written backwards.
    """
    source, target = _overlap(place, box)
    flips = (slice(None), *(slice(None, None, -1 if axis in flipped else 1) for axis in range(3)))
    pixels, marks = image.numpy()[flips], codes[None].numpy()[flips]
    _clear_around(pixels, target)
    _clear_around(marks, target)
    if all(part.start < part.stop for part in source[1:]):
        with explained_damage(place.case):
            voxels, labels = place.case.data[source], place.case.seg[source]
        pixels[target] = voxels
        np.add(labels, 1, out=marks[target], casting="unsafe")


def read_previous(place: Place, box: Box, codes: Tensor, flipped: Sequence[int] = ()) -> None:
    """As :func:`read_box`, the codes (Z, Y, X) of the previous stage."""
    assert place.previous is not None
    source, target = _overlap(place, box)
    marks = codes.numpy()[tuple(slice(None, None, -1 if axis in flipped else 1) for axis in range(3))]
    _clear_around(marks[None], target)
    if all(part.start < part.stop for part in source[1:]):
        with explained_damage(place.case):
            labels = place.previous[source[1:]]
        np.add(labels, 1, out=marks[target[1:]], casting="unsafe")


def _overlap(place: Place, box: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Which voxels of the case (C, Z, Y, X) a box has, and where they lie in the box."""
    filled = place.filled
    start = [min(max(a, f), g) for a, f, g in zip(box.start, filled.start, filled.stop, strict=True)]
    stop = [max(min(b, g), a) for b, g, a in zip(box.stop, filled.stop, start, strict=True)]
    source = (slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))
    target = (slice(None), *(slice(a - c, b - c) for a, b, c in zip(start, stop, box.start, strict=True)))
    return source, target


def _clear_around(values: np.ndarray, target: Sequence[slice]) -> None:
    """Zeros around what there is, and no more."""
    for axis, within in enumerate(target[1:], start=1):
        across = np.moveaxis(values, axis, 0)
        across[: within.start] = 0
        across[within.stop :] = 0
