"""Resampling that ends in labels: of label maps, and of logits. Equal to nnU-Net's voxel by voxel, many times faster.

nnU-Net resizes one indicator volume a label (one logit volume a class) and takes the largest at every voxel. But an
output voxel only depends on the 2 × 2 × 2 source voxels around it, and where those agree on the winner there is nothing
to compute. That leaves the surfaces, a few voxels in a hundred.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.resample import as_array, checked_shape
from nnssl_adapt.geometry.spacing import separate_z_axis
from nnssl_adapt.geometry.weights import LinearTaps, linear_taps, nearest_index

_CHUNK = 1 << 15
"""Mixed voxels settled at a time; bounds the memory, and keeps it in the processor's cache."""

Taps = tuple[LinearTaps, LinearTaps, LinearTaps]
Settle = Callable[["_Blocks"], np.ndarray]


def resample_labels(
    labels: np.ndarray,
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    order: int = 1,
    order_z: int = 0,
    force_separate_z: bool | None = None,
) -> np.ndarray:
    """Resample a label map (1, Z, Y, X) of integers (negative ones too) to ``new_shape``; same type, input unchanged.

    Each output voxel takes the label whose linearly interpolated indicator is largest; ties go to the nearest source
    voxel's label if it is among them, else to the lowest (the rule of batchgenerators 0.25.5, which nnU-Net calls).

    Args:
        labels: label map.
        new_shape: voxels (Z, Y, X).
        spacing: mm (Z, Y, X) of ``labels``; only decides whether one axis is treated apart.
        new_spacing: of the result; likewise.
        order: 1, or 0 for the nearest voxel.
        order_z: order along an axis treated apart; nearest neighbour (0) only.
        force_separate_z: whether to treat the coarsest axis apart; None decides by the spacings.

    Where nothing changes the input itself is returned. Raises ConfigurationError for another order.
    """
    labels = np.asarray(labels)
    shape = checked_shape(labels, new_shape)
    axis = separate_z_axis(spacing, new_spacing, force_separate_z)
    if order not in (0, 1) or (axis is not None and order_z != 0):
        raise ConfigurationError(
            f"resampling labels with order {order}, order_z {order_z} is not supported: use 1 and 0"
        )
    if labels.shape[1:] == shape:
        return labels
    result = np.empty((labels.shape[0], *shape), dtype=labels.dtype)
    for source, target in zip(labels, result, strict=True):
        target[...] = _slicewise(source, shape, axis, lambda volume, size, flat: _resize(volume, size, flat, order))
    return result


def logits_to_labels(
    logits: Any,
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    rounding: npt.DTypeLike | None = np.float16,
) -> np.ndarray:
    """Resample logits (K, Z, Y, X), array or tensor, to ``new_shape`` (Z, Y, X) and return the winning class.

    Linear interpolation and nnU-Net's separate-z rule. The classes are never all held at the new size.

    Args:
        logits: finite; (K, Z, Y, X).
        new_shape: voxels (Z, Y, X).
        spacing: mm (Z, Y, X) of ``logits``; only decides whether one axis is treated apart.
        new_spacing: of the result; likewise.
        rounding: precision in which the classes are compared; ties go to the lowest class. nnU-Net's logits are float16
            and stay so when resampled. None: that of ``logits``, as nnU-Net's function treats logits of another type.

    Returns:
        uint8, or uint16 from 256 classes on; (Z, Y, X).
    """
    logits = as_array(logits)
    shape = checked_shape(logits, new_shape)
    precision = np.dtype(logits.dtype if rounding is None else rounding)
    if logits.shape[1:] == shape:
        return _winner(logits, precision)[0]
    axis = separate_z_axis(spacing, new_spacing)
    return _slicewise(logits, shape, axis, lambda volume, size, flat: _resize_logits(volume, size, flat, precision))


def _slicewise(
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


# -- label maps ------------------------------------------------------------------------------------------------------


def _resize(labels: np.ndarray, shape: tuple[int, ...], flat: bool, order: int) -> np.ndarray:
    """Resize one label map (Z, Y, X); ``flat``: slices (along Z) don't see each other."""
    if labels.shape == shape:
        return labels
    taps = _taps(labels.shape, shape)
    if order == 0:
        nearest = [nearest_index(old, new) for old, new in zip(labels.shape, shape, strict=True)]
        return labels[np.ix_(*nearest)]
    lowest = int(labels.min())
    span = int(labels.max()) - lowest
    small = np.empty(labels.shape, np.uint8 if span < 255 else np.uint16 if span < 65535 else np.uint32)
    _shifted(labels, -lowest, small)

    def settle(blocks: _Blocks) -> np.ndarray:
        return _most_weight(small.reshape(-1), blocks)

    result = np.empty(shape, labels.dtype)
    _shifted(_by_blocks(small, taps, flat, settle), lowest, result)
    return result


def _shifted(labels: np.ndarray, by: int, out: np.ndarray) -> None:
    """``out = labels + by`` slice by slice, since whole volumes of the 64-bit numbers in between would not fit any cache."""
    for source, target in zip(labels, out, strict=True):
        target[...] = source.astype(np.int64) + by


def _most_weight(labels: np.ndarray, blocks: _Blocks) -> np.ndarray:
    """The label with the largest weight in each of n blocks; ``labels`` is flat."""
    found = np.empty((8, len(blocks.nearest)), labels.dtype)
    weights = np.empty(found.shape)
    for corner, (index, (z, y, x)) in enumerate(blocks.corners()):
        np.take(labels, index, out=found[corner], mode="clip")
        np.multiply(z * y, x, out=weights[corner])
    nearest = labels[blocks.nearest]
    low, high = found.min(axis=0), found.max(axis=0)
    # Nearly all blocks lie on the surface between two labels, which takes a quarter of the work.
    several = ~((found == low) | (found == high)).all(axis=0)
    low_score, high_score = _score(found, weights, low), _score(found, weights, high)
    winner = np.where((high_score > low_score) | ((high_score == low_score) & (nearest == high)), high, low)
    if several.any():
        winner[several] = _most_weight_of_several(found[:, several], weights[:, several], nearest[several])
    return winner


def _score(found: np.ndarray, weights: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Interpolated indicator of ``label`` (n,), summed corner by corner: the last bit of the sum decides exact ties."""
    score = np.zeros(len(label))
    for corner, weight in zip(found, weights, strict=True):
        score += weight * (corner == label)
    return np.minimum(score, 1.0, out=score)


def _most_weight_of_several(found: np.ndarray, weights: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """The same for blocks (8, n) with any number of labels."""
    best = np.full(len(nearest), -1.0)
    winner = np.zeros(len(nearest), found.dtype)
    for candidate in found:
        score = _score(found, weights, candidate)
        better = (score > best) | ((score == best) & (candidate < winner))
        winner = np.where(better, candidate, winner)
        best = np.where(better, score, best)
    return np.where(_score(found, weights, nearest) == best, nearest, winner)


# -- logits ----------------------------------------------------------------------------------------------------------


def _winner(logits: np.ndarray, precision: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Class with the largest rounded logit, the lowest of equals; (K, Z, Y, X) → (Z, Y, X). And where that is close.

    Not close means: in a block that agrees on the winner, no interpolated logit rounds to the winner's. Its lead is more
    than the distance of two floating-point numbers at its own size (at most eps times that) in every corner, so also
    between them; four times, because the logits are rounded here already.
    """
    shape = logits.shape[1:]
    winner = np.zeros(shape, np.uint8 if len(logits) < 256 else np.uint16)
    close = np.zeros(shape, bool)
    limits = np.finfo(precision)
    exact = np.result_type(precision, np.float32)
    slab = max(1, _CHUNK // max(1, shape[1] * shape[2]))
    for start in range(0, shape[0], slab):
        part = slice(start, start + slab)
        best = np.full(winner[part].shape, -np.inf, exact)
        second = best.copy()
        for index, logit in enumerate(logits[:, part]):
            value = logit.astype(precision, copy=False).astype(exact, copy=False)
            np.copyto(winner[part], index, where=value > best)
            np.maximum(second, np.minimum(value, best), out=second)
            np.maximum(best, value, out=best)
        np.less_equal(best - second, 4 * limits.eps * np.abs(best) + 4 * limits.smallest_subnormal, out=close[part])
    return winner, close


def _resize_logits(logits: np.ndarray, shape: tuple[int, ...], flat: bool, precision: np.dtype[Any]) -> np.ndarray:
    """Resize logits (K, Z, Y, X) and take the winner; ``flat``: slices (along Z) don't see each other."""
    winner, close = _winner(logits, precision)
    if winner.shape == shape:
        return winner
    by_class = np.ascontiguousarray(logits).reshape(len(logits), -1)

    def settle(blocks: _Blocks) -> np.ndarray:
        corners = [(index, weights) for index, weights in blocks.corners() if all(w.any() for w in weights)]
        best = np.full(len(blocks.nearest), -np.inf, precision)
        chosen = np.zeros(len(best), winner.dtype)
        for number, logit in enumerate(by_class):
            total = np.zeros(len(best))
            for index, (z, y, x) in corners:
                # In scipy's order: the last bit decides to which side a value halfway between two is rounded.
                value = logit[index] * z
                value *= y
                value *= x
                total += value
            value = total.astype(precision)
            better = value > best
            np.copyto(best, value, where=better)
            chosen[better] = number
        return chosen

    # Blocks with a close corner are settled like those that don't agree.
    winner[close] = _mixed(winner)
    return _by_blocks(winner, _taps(winner.shape, shape), flat, settle)


# -- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """The 2 × 2 × 2 source voxels around each of n output voxels, as indices into the flat source.

    Attributes:
        index: for each axis, what the lower and the upper voxel contribute to the index; each (n,).
        weight: for each axis, the weight of the lower and the upper voxel, float64; each (n,).
        nearest: index of the nearest source voxel (n,).
    """

    index: tuple[tuple[np.ndarray, np.ndarray], ...]
    weight: tuple[tuple[np.ndarray, np.ndarray], ...]
    nearest: np.ndarray

    @classmethod
    def around(cls, voxels: tuple[np.ndarray, ...], taps: Taps, shape: Sequence[int]) -> _Blocks:
        """The blocks around the output voxels ``(z, y, x)`` of a source of ``shape``."""
        steps = (shape[1] * shape[2], shape[2], 1)
        axes = list(zip(taps, voxels, steps, strict=True))
        return cls(
            tuple((tap.low[at] * step, tap.high[at] * step) for tap, at, step in axes),
            tuple((tap.weight_low[at], tap.weight_high[at]) for tap, at, _ in axes),
            sum((tap.nearest[at] * step for tap, at, step in axes), start=np.zeros(len(voxels[0]), np.int64)),
        )

    def corners(self) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """Index of each corner, and its three factors of weight; X runs fastest."""
        for z, y, x in itertools.product((0, 1), repeat=3):
            index = self.index[0][z] + self.index[1][y] + self.index[2][x]
            yield index, (self.weight[0][z], self.weight[1][y], self.weight[2][x])


def _taps(old: Sequence[int], new: Sequence[int]) -> Taps:
    z, y, x = (linear_taps(int(a), int(b)) for a, b in zip(old, new, strict=True))
    return z, y, x


def _mixed(labels: np.ndarray) -> int:
    """What stands for a block with several labels. Never a label: callers leave room for it."""
    return int(np.iinfo(labels.dtype).max)


def _by_blocks(labels: np.ndarray, taps: Taps, flat: bool, settle: Settle) -> np.ndarray:
    """Resize a map of unsigned labels: the block's label where it has only one, ``settle`` for all other voxels."""
    result = _uniform_blocks(labels, flat)
    for axis in sorted(range(3), key=lambda a: len(taps[a].low) / labels.shape[a]):
        if len(taps[axis].low) != labels.shape[axis]:
            result = result.take(taps[axis].low, axis)
    result = np.ascontiguousarray(result)
    voxels = result.reshape(-1)
    unsettled = np.flatnonzero(voxels == _mixed(labels))
    for start in range(0, len(unsettled), _CHUNK):
        chunk = unsettled[start : start + _CHUNK]
        voxels[chunk] = settle(_Blocks.around(np.unravel_index(chunk, result.shape), taps, labels.shape))
    return result


def _uniform_blocks(labels: np.ndarray, flat: bool) -> np.ndarray:
    """For each source voxel the label of the block that starts there (edges continued), or :func:`_mixed`."""
    uniform = np.ones(labels.shape, bool)
    for axis in range(1 if flat else 0, 3):
        here = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
        next_ = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
        # Uniform along the axes so far, at both ends of this axis, and the same label there.
        narrowed = uniform.copy()
        narrowed[here] &= uniform[next_]
        narrowed[here] &= labels[here] == labels[next_]
        uniform = narrowed
    return np.where(uniform, labels, np.asarray(_mixed(labels), labels.dtype))
