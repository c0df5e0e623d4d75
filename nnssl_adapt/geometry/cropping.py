"""The part of an image that is not empty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


_COLUMNS_AT_ONCE = 16
"""Columns (along X) looked at together: those that share a cache line."""


def nonzero_box(image: np.ndarray | Sequence[np.ndarray]) -> Box:
    """First and one past the last index of each axis (Z, Y, X) at which any channel of ``image`` (C, Z, Y, X) is not 0.

    An image that is 0 everywhere keeps its whole extent. Holes don't matter to a bounding box. Only the empty margins are
    looked at, from outside until something is met.
    """
    parts = list(image)
    offsets: list[tuple[int, int]] = []
    for axis in range(3):
        low = _empty_margin(parts, axis, parts[0].shape[axis])
        if low == parts[0].shape[axis]:  # only along the first axis: later ones have something in them
            z, y, x = ((0, n) for n in parts[0].shape)
            return z, y, x
        reverse = tuple(slice(None, None, -1) if a == axis else slice(None) for a in range(3))
        high = _empty_margin([part[reverse] for part in parts], axis, parts[0].shape[axis])
        offsets.append((low, parts[0].shape[axis] - high))
        inside = tuple(slice(*offsets[axis]) if a == axis else slice(None) for a in range(3))
        parts = [part[inside] for part in parts]
    z, y, x = offsets
    return z, y, x


def _empty_margin(channels: Sequence[np.ndarray], axis: int, length: int) -> int:
    """How many planes across ``axis`` are 0 in all channels before the first that is not; ``length`` if all are."""
    step = _COLUMNS_AT_ONCE if axis == 2 else 1
    others = tuple(a for a in range(3) if a != axis)
    for start in range(0, length, step):
        planes = tuple(slice(start, start + step) if a == axis else slice(None) for a in range(3))
        occupied = np.any([(channel[planes] != 0).any(axis=others) for channel in channels], axis=0)
        if occupied.any():
            return start + int(occupied.argmax())
    return length


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """A copy of ``mask`` (Z, Y, X) in which background that does not reach the border (over faces) is filled.

    The same voxels as ``scipy.ndimage.binary_fill_holes``, but looked for only where the mask has something on both sides
    along X: everything else can be seen from the border. In images of a body that leaves next to nothing.
    """
    filled: np.ndarray = mask.copy()
    hidden = _hidden(mask)
    if len(hidden) == 0:
        return filled
    if len(hidden) > _FEW * mask.size:
        return _filled_by_labelling(mask)
    holes = hidden[~_reach_daylight(hidden, mask)]
    filled.reshape(-1)[holes] = True
    return filled


_FEW = 0.03
"""Share of hidden voxels from which on labelling the whole background is faster than following their neighbours."""


def _hidden(mask: np.ndarray) -> np.ndarray:
    """Flat indices, ascending, of background with the mask on both sides in its row (along X)."""
    rows = mask.reshape(-1, mask.shape[2])
    # Only a row in which the mask starts more than once has any; of a body that is no row, or few.
    starts = np.empty(rows.shape, bool)
    starts[:, 0] = rows[:, 0]
    np.greater(rows[:, 1:], rows[:, :-1], out=starts[:, 1:])
    if np.count_nonzero(starts) == np.count_nonzero(rows.any(axis=1)):
        return np.zeros(0, np.int64)
    broken = np.flatnonzero(np.count_nonzero(starts, axis=1) > 1)
    inside = _between_first_and_last(rows[broken]) & ~rows[broken]
    row, column = np.nonzero(inside)
    found: np.ndarray = broken[row] * rows.shape[1] + column
    return found


def _between_first_and_last(rows: np.ndarray) -> np.ndarray:
    """Whether each row, which has something, has it before and after each of its places."""
    width = rows.shape[1]
    first = rows.argmax(axis=1).astype(np.int32)[:, None]
    last = (width - 1 - rows[:, ::-1].argmax(axis=1)).astype(np.int32)[:, None]
    column = np.arange(width, dtype=np.int32)
    between: np.ndarray = column > first
    between &= column < last
    return between


def _reach_daylight(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """For sorted flat indices of hidden background voxels: whether a path of background leads out of hiding."""
    place = np.unravel_index(hidden, mask.shape)
    background = ~mask.reshape(-1)
    outside = np.zeros(len(hidden), bool)
    pairs = []
    steps = (mask.shape[1] * mask.shape[2], mask.shape[2], 1)
    for axis, step in enumerate(steps):
        for sign, edge in ((-1, 0), (1, mask.shape[axis] - 1)):
            at_edge = place[axis] == edge
            outside |= at_edge
            here = np.flatnonzero(~at_edge)
            there = hidden[here] + sign * step
            here, there = here[background[there]], there[background[there]]
            found = np.minimum(np.searchsorted(hidden, there), len(hidden) - 1)
            is_hidden = hidden[found] == there
            outside[here[~is_hidden]] = True
            if sign > 0:
                pairs.append(np.stack((here[is_hidden], found[is_hidden])))
    one, other = np.concatenate(pairs, axis=1)
    from scipy.sparse import coo_array  # half a second: most images have no hole
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(hidden), len(hidden)))
    count, group = connected_components(links, directed=False)
    lit = np.zeros(count, bool)
    lit[group[outside]] = True
    shown: np.ndarray = lit[group]
    return shown


def _filled_by_labelling(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    pieces, count = ndimage.label(~mask)
    reaches_border = np.zeros(count + 1, bool)
    for axis in range(mask.ndim):
        for side in (0, -1):
            reaches_border[np.unique(pieces.take(side, axis))] = True
    reaches_border[0] = False  # 0 is the mask itself
    found: np.ndarray = ~reaches_border[pieces]
    return found
