"""Resampling that ends in labels, by looking at the 2 × 2 × 2 source voxels around each output voxel.

nnU-Net resizes one indicator volume a label (one logit volume a class) and takes the largest at every voxel. But an
output voxel only depends on its block of source voxels, and where those agree on the winner there is nothing to compute.
That leaves the surfaces, a few voxels in a hundred, for which the caller says what wins.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_adapt.geometry.interpolation import LinearTaps, linear_taps, nearest_index

_CHUNK = 1 << 15
"""Mixed voxels settled at a time; bounds the memory, and keeps it in the processor's cache."""

Taps = tuple[LinearTaps, LinearTaps, LinearTaps]
Settle = Callable[["Blocks"], np.ndarray]


def slicewise(
    volume: np.ndarray, shape: tuple[int, ...], axis: int | None, resize: Callable[..., np.ndarray]
) -> np.ndarray:
    """Resize the last three axes; along ``axis`` by nearest neighbour, so that only slices which are asked for are resized."""
    if axis is None:
        return resize(volume, shape, False)
    first = volume.ndim - 3
    slices = np.moveaxis(volume, first + axis, first)
    chosen, again = np.unique(nearest_index(slices.shape[first], shape[axis]), return_inverse=True)
    in_plane = tuple(n for a, n in enumerate(shape) if a != axis)
    resized = resize(slices.take(chosen, first), (len(chosen), *in_plane), True)
    return np.moveaxis(resized.take(again, 0), 0, axis)


@dataclass(frozen=True)
class Blocks:
    """The 2 × 2 × 2 source voxels around each of n output voxels.

    Attributes:
        voxels: the output voxels: their indices along Z, Y and X, each (n,).
        taps: from which source voxels each index takes.
        shape: of the source (Z, Y, X). Source voxels are told by their index in the flat source.
    """

    voxels: tuple[np.ndarray, ...]
    taps: Taps
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.voxels[0])

    def some(self, chosen: np.ndarray) -> Blocks:
        """A part of the blocks."""
        return replace(self, voxels=tuple(at[chosen] for at in self.voxels))

    @property
    def nearest(self) -> np.ndarray:
        """The source voxel nearest to each output voxel (n,)."""
        found: np.ndarray = sum(tap.nearest[at] * step for tap, at, step in self._axes())
        return found

    def corners(self) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """For each of 8 corners the source voxels (n,), and three factors of their weights, float64; X runs fastest."""
        index = [(tap.low[at] * step, tap.high[at] * step) for tap, at, step in self._axes()]
        weight = [(tap.weight_low[at], tap.weight_high[at]) for tap, at, _ in self._axes()]
        for z, y, x in itertools.product((0, 1), repeat=3):
            yield index[0][z] + index[1][y] + index[2][x], (weight[0][z], weight[1][y], weight[2][x])

    def _axes(self) -> Iterator[tuple[LinearTaps, np.ndarray, int]]:
        return zip(self.taps, self.voxels, (self.shape[1] * self.shape[2], self.shape[2], 1), strict=True)


def taps_of(old: Sequence[int], new: Sequence[int]) -> Taps:
    z, y, x = (linear_taps(int(a), int(b)) for a, b in zip(old, new, strict=True))
    return z, y, x


def mixed(labels: np.ndarray) -> int:
    """What stands for a block with several labels. Never a label: callers leave room for it."""
    return int(np.iinfo(labels.dtype).max)


def resize_by_blocks(labels: np.ndarray, taps: Taps, flat: bool, settle: Settle) -> np.ndarray:
    """Resize a map of unsigned labels: the block's label where it has only one, ``settle`` for all other voxels."""
    result = _uniform_blocks(labels, flat)
    for axis in sorted(range(3), key=lambda a: len(taps[a].low) / labels.shape[a]):
        if len(taps[axis].low) != labels.shape[axis]:
            result = result.take(taps[axis].low, axis)
    result = np.ascontiguousarray(result)
    voxels = result.reshape(-1)
    unsettled = np.flatnonzero(voxels == mixed(labels))
    for start in range(0, len(unsettled), _CHUNK):
        chunk = unsettled[start : start + _CHUNK]
        voxels[chunk] = settle(Blocks(np.unravel_index(chunk, result.shape), taps, labels.shape))
    return result


def _uniform_blocks(labels: np.ndarray, flat: bool) -> np.ndarray:
    """For each source voxel the label of the block that starts there (edges continued), or :func:`mixed`."""
    result = np.empty_like(labels)
    several = labels.dtype.type(mixed(labels))
    varies, below = np.empty(labels.shape[1:], bool), np.empty(labels.shape[1:], bool)
    _varies_in_plane(labels[0], varies)
    for z, here in enumerate(labels):  # a slice stays in the processor's cache
        if z + 1 < len(labels):
            _varies_in_plane(labels[z + 1], below)
            if not flat:
                # A block is of one label where both of its squares are, and the two labels are the same.
                varies |= below
                varies |= here != labels[z + 1]
        np.multiply(varies.view(np.uint8), several, out=result[z])
        np.maximum(here, result[z], out=result[z])
        varies, below = below, varies
    return result


def _varies_in_plane(labels: np.ndarray, out: np.ndarray) -> None:
    """Whether the 2 × 2 labels that start at each voxel (Y, X) differ; edges continued."""
    np.not_equal(labels[:, :-1], labels[:, 1:], out=out[:, :-1])
    out[:, -1] = False
    out[:-1] |= out[1:]
    out[:-1] |= labels[:-1] != labels[1:]
