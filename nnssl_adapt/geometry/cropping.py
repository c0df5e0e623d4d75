"""The part of an image that is not empty."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def nonzero_box(image: np.ndarray) -> Box:
    """First and one past the last index of each axis (Z, Y, X) at which any channel of ``image`` (C, Z, Y, X) is not 0.

    An image that is 0 everywhere keeps its whole extent. Holes don't matter to a bounding box.
    """
    occupied = [np.zeros(n, bool) for n in image.shape[1:]]
    for channel in image:
        nonzero = channel != 0
        plane = nonzero.any(axis=0)
        occupied[0] |= nonzero.any(axis=(1, 2))
        occupied[1] |= plane.any(axis=1)
        occupied[2] |= plane.any(axis=0)
    z, y, x = (_extent(axis) for axis in occupied)
    return z, y, x


def _extent(occupied: np.ndarray) -> tuple[int, int]:
    where = np.flatnonzero(occupied)
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, len(occupied))


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """A copy of ``mask`` (Z, Y, X) in which background that does not reach the border (over faces) is filled.

    The same voxels as ``scipy.ndimage.binary_fill_holes``, by one labelling of the background instead of repeated dilation.
    """
    background = ~mask
    if not background.any():
        return mask.copy()
    pieces, count = ndimage.label(background)
    reaches_border = np.zeros(count + 1, bool)
    for axis in range(mask.ndim):
        for side in (0, -1):
            reaches_border[np.unique(pieces.take(side, axis))] = True
    reaches_border[0] = False  # 0 is the mask itself
    if reaches_border[1:].all():
        return mask.copy()
    return ~reaches_border[pieces]
