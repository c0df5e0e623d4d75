"""Where a case's classes lie: voxels that patches are centred on, so that every class is seen in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnssl_adapt.data.labels import LabelOrRegion

_SEED = 1234
_LEAST = 10_000
_LEAST_FRACTION = 0.01
_BEYOND_CACHE = 1 << 23
_IN_CACHE = 1 << 18
"""Voxels looked at together, that stay in the processor's cache."""


def class_locations(seg: np.ndarray, classes: Sequence[LabelOrRegion]) -> dict[LabelOrRegion, Any]:
    """Draw voxels of every class, for patches that are centred on one: nnU-Net's draws, with its generator and in its order.

    Args:
        seg: integers (1, Z, Y, X).
        classes: label values, or tuples of them (regions).

    Returns:
        Class → (N, 4) int64 indices into ``seg``, 10 000 of them or a hundredth of the class's voxels if that is more, but
        never one twice; an empty list for a class that does not occur.
    """
    flat = seg.reshape(-1)
    starts, lengths = _runs(flat)
    values = flat.take(starts)
    random = np.random.RandomState(_SEED)
    result: dict[LabelOrRegion, Any] = {}
    for entry in classes:
        # A draw counts through the region's labels one after the other.
        members = [_voxels_of(starts, lengths, values == value) for value in _values(entry)]
        voxels = members[0] if len(members) == 1 else np.concatenate(members)
        if len(voxels) == 0:
            result[entry] = []
            continue
        number = max(min(_LEAST, len(voxels)), math.ceil(len(voxels) * _LEAST_FRACTION))
        chosen = voxels[_drawn(random, len(voxels), number)]
        result[entry] = np.stack(np.unravel_index(chosen, seg.shape), axis=1).astype(np.int64, copy=False)
    return result


def _runs(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of equal labels start, and how long they are: labels are the same over many voxels in a row."""
    kind = np.int32 if len(flat) <= np.iinfo(np.int32).max else np.int64
    parts = [np.zeros(min(1, len(flat)), kind)]
    for start in range(0, len(flat) - 1, _IN_CACHE):
        part = flat[start : start + _IN_CACHE + 1]
        parts.append(np.flatnonzero(part[1:] != part[:-1]).astype(kind) + kind(start + 1))
    starts = np.concatenate(parts)
    del parts
    return starts, np.diff(starts, append=kind(len(flat)))


def _voxels_of(starts: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Flat indices, ascending, of the voxels in the chosen runs."""
    starts, lengths = starts[chosen], lengths[chosen]
    before = np.cumsum(lengths, dtype=starts.dtype) - lengths
    voxels = np.repeat(starts - before, lengths)
    voxels += np.arange(len(voxels), dtype=voxels.dtype)
    return voxels


def _drawn(random: np.random.RandomState, total: int, number: int) -> np.ndarray:
    """``random.choice(total, number, replace=False)``, draw for draw."""
    # Shuffling jumps about in memory: beyond the cache, numbers of half the size are done in two thirds of the time.
    everything = np.arange(total, dtype=np.int32 if _BEYOND_CACHE < total <= np.iinfo(np.int32).max else np.int64)
    random.shuffle(everything)
    return everything[:number]


def _values(entry: LabelOrRegion) -> tuple[int, ...]:
    return entry if isinstance(entry, tuple) else (entry,)
