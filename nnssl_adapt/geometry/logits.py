"""From logits to labels on another grid, equal to nnU-Net's voxel by voxel and many times faster.

The classes are never all held at the new size: see :mod:`nnssl_adapt.geometry.blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from nnssl_adapt.geometry.blocks import Blocks, mixed, resize_by_blocks, slicewise, taps_of
from nnssl_adapt.geometry.resample import as_array, checked_shape
from nnssl_adapt.geometry.spacing import separate_z_axis

_SLAB = 1 << 15
"""Voxels whose classes are compared at a time: what is needed for that stays in the processor's cache."""

_FLOAT32_ERROR = 2e-6
"""Of an interpolation in float32, relative to the largest number in it: eight products and their sum, twice that."""


def logits_to_labels(
    logits: Any,
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    rounding: npt.DTypeLike | None = np.float16,
) -> np.ndarray:
    """Resample logits (K, Z, Y, X), array or tensor, to ``new_shape`` (Z, Y, X) and return the winning class.

    Linear interpolation and nnU-Net's separate-z rule.

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
        return _winner(logits, precision)
    axis = separate_z_axis(spacing, new_spacing)
    return slicewise(logits, shape, axis, lambda volume, size, flat: _resize(volume, size, flat, precision))


def _resize(logits: np.ndarray, shape: tuple[int, ...], flat: bool, precision: np.dtype[Any]) -> np.ndarray:
    """Resize logits (K, Z, Y, X) and take the winner; ``flat``: slices (along Z) don't see each other."""
    logits = np.ascontiguousarray(logits)
    if logits.shape[1:] == shape:
        return _winner(logits, precision)
    close = np.empty(logits.shape[1:], bool)
    winner = _winner(logits, precision, close)
    by_class = logits.reshape(len(logits), -1)
    # Blocks with a close corner are settled like those that don't agree.
    winner[close] = mixed(winner)
    return resize_by_blocks(
        winner, taps_of(winner.shape, shape), flat, lambda blocks: _settle(by_class, blocks, precision)
    )


# -- the winner at every voxel -----------------------------------------------------------------------------------------


def _winner(logits: np.ndarray, precision: np.dtype[Any], close: np.ndarray | None = None) -> np.ndarray:
    """Class with the largest rounded logit, the lowest of equals; (K, Z, Y, X) → (Z, Y, X).

    ``close`` (Z, Y, X) is filled with where that is close. Not close means: in a block that agrees on the winner, no
    interpolated logit rounds to the winner's. Its lead is more than the distance of two floating-point numbers at its own
    size (at most eps times that) in every corner, so also between them; four times, because the logits are rounded here
    already.
    """
    values = np.ascontiguousarray(logits).reshape(len(logits), -1)
    winner = np.empty(values.shape[1], _type_for(len(values)))
    limits = np.finfo(precision)
    exact = np.result_type(precision, np.float32)
    for start in range(0, len(winner), _SLAB):
        part = slice(start, start + _SLAB)
        if values.dtype == np.float32 and precision == np.float16:
            winner[part], best, second = _best_two_rounded(values[:, part])
        else:
            winner[part], best, second = _best_two(values[:, part].astype(precision, copy=False), close is not None)
        if close is not None:
            best, second = best.astype(exact), second.astype(exact)
            margin = 4 * limits.eps * np.abs(best) + 4 * limits.smallest_subnormal
            np.less_equal(best - second, margin, out=close.reshape(-1)[part])
            close.reshape(-1)[part] |= best >= limits.max  # all such numbers are equal when rounded: infinite
    return winner.reshape(logits.shape[1:])


def _best_two(values: np.ndarray, with_second: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each column of (K, n): the row with the largest number (the first of equals), that number, and the second largest.

    Where the largest is positive, the second is not given below 0. ``with_second``: whether it is asked for.
    """
    # Processors compare integers many times faster than half-precision numbers. Positive ones are ordered as their bits.
    bits = values.view(f"i{values.itemsize}")
    winner, best, second = _race(bits, with_second)
    np.maximum(second, 0, out=second)
    others = np.flatnonzero(best <= 0)
    if len(others):
        largest = np.iinfo(bits.dtype).max
        some = bits[:, others]
        # With zero and negative numbers among the best, all are brought into order: sign and size to two's complement.
        winner[others], *pair = _race(np.where(some < 0, -(some & largest), some), with_second)
        best[others], second[others] = (np.where(n < 0, ~largest | -n, n) for n in pair)
    return winner, best.view(values.dtype), second.view(values.dtype)


def _best_two_rounded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As :func:`_best_two` of float32 numbers, the row by what they are when rounded to float16; the numbers as they were.

    Rounding all of them takes longer than everything else. It only matters where the two largest are close.
    """
    winner, best, second = _best_two(np.ascontiguousarray(values))
    half = np.finfo(np.float16)
    margin = 4 * half.eps * np.abs(best) + 4 * half.smallest_subnormal
    near = np.flatnonzero((best - second <= margin) | (np.abs(best) >= half.max))
    if len(near):
        with np.errstate(over="ignore"):  # too large becomes infinite, as nnU-Net's does
            rounded = values[:, near].astype(np.float16)
        winner[near] = _best_two(rounded, with_second=False)[0]
    return winner, best, second


def _race(keys: np.ndarray, with_second: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As :func:`_best_two`, for integers."""
    best = keys[0].copy()
    second = np.full_like(best, np.iinfo(keys.dtype).min + 1)
    winner = np.zeros(best.shape, _type_for(len(keys)))
    better, mark, lower = np.empty(best.shape, bool), np.empty_like(winner), np.empty_like(best)
    for index, key in enumerate(keys[1:], start=1):
        np.greater(key, best, out=better)
        np.multiply(better.view(np.uint8), winner.dtype.type(index), out=mark)
        np.maximum(winner, mark, out=winner)
        if with_second:
            np.minimum(key, best, out=lower)
            np.maximum(second, lower, out=second)
        np.maximum(best, key, out=best)
    return winner, best, second


# -- the winner between voxels -----------------------------------------------------------------------------------------


def _settle(by_class: np.ndarray, blocks: Blocks, precision: np.dtype[Any]) -> np.ndarray:
    """The class that wins at each of n output voxels. ``by_class`` are logits (K, source voxels).

    All classes are interpolated in float32 first. Only where the lead is too small to be sure are they in float64, as
    nnU-Net's are.
    """
    source, weights = _interpolation(blocks)
    rows = np.empty((len(source), len(by_class)), np.float32)
    nearby = np.stack([logit.take(source) for logit in by_class])
    rows[...] = np.ascontiguousarray(nearby.T)
    winner, best, second = _best_two(np.ascontiguousarray((weights @ rows).T))
    limits = np.finfo(precision)
    margin = limits.eps * np.maximum(np.abs(best), np.abs(second)) + limits.smallest_subnormal
    error = _FLOAT32_ERROR * max(rows.max(), -rows.min())
    unsure = np.flatnonzero(best - second <= margin + error)
    if len(unsure):
        winner[unsure] = _settle_exactly(by_class, blocks.some(unsure), precision)
    return winner


def _interpolation(blocks: Blocks) -> tuple[np.ndarray, csr_array]:
    """The m source voxels that n blocks are made of, and the float32 matrix (n, m) of their weights."""
    number = len(blocks)
    index = np.empty((number, 8), np.int64)
    weight = np.empty((number, 8), np.float32)
    for corner, (where, (z, y, x)) in enumerate(blocks.corners()):
        index[:, corner] = where
        weight[:, corner] = z * y * x
    lowest = index.min()
    index -= lowest
    is_needed = np.zeros(index.max() + 1, bool)
    is_needed[index] = True
    source = np.flatnonzero(is_needed)
    column = np.empty(len(is_needed), np.int32)
    column[source] = np.arange(len(source), dtype=np.int32)
    rows = np.arange(0, 8 * number + 1, 8, dtype=np.int32)
    matrix = csr_array((weight.reshape(-1), column[index.reshape(-1)], rows), shape=(number, len(source)))
    return source + lowest, matrix


def _settle_exactly(by_class: np.ndarray, blocks: Blocks, precision: np.dtype[Any]) -> np.ndarray:
    """The same in float64, class by class."""
    corners = [(index, weights) for index, weights in blocks.corners() if all(w.any() for w in weights)]
    best = np.full(len(blocks), -np.inf, precision)
    chosen = np.zeros(len(best), _type_for(len(by_class)))
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


def _type_for(classes: int) -> type[np.unsignedinteger[Any]]:
    """Numbers for that many classes, and one more (see :func:`nnssl_adapt.geometry.blocks.mixed`)."""
    return np.uint8 if classes < 256 else np.uint16
