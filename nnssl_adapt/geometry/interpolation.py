"""One-dimensional interpolation: which source samples an output sample is made of.

Resizing an image is separable, so that everything about it is said by one matrix an axis. Voxel centres of source and
target cover the same extent: output sample ``i`` lies at ``(i + 1/2) · n_in / n_out − 1/2`` in source samples, as in
scikit-image's ``resize`` and scipy's ``zoom`` with ``grid_mode``, which nnU-Net uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_SPLINE_PADDING = 12
"""Edge samples that scipy puts on both sides before it computes spline coefficients (mode ``nearest``)."""

_BLOCK = 64
"""Output samples handled at a time; each block reads only the band of source samples that it depends on. Smaller ones save
products with zero, and lose more by being small."""

_OUTSIDE_BAND = 1e-7
_NEGLIGIBLE = 1e-9
"""Spline weights fall off by a factor of 0.27 a sample. The tail is below float32's resolution, but as denormal numbers
it would slow the products down five- to tenfold."""


def positions(n_in: int, n_out: int) -> np.ndarray:
    """Position of each output sample in source samples, float64 (n_out,)."""
    return (np.arange(n_out, dtype=np.float64) + 0.5) * (n_in / n_out) - 0.5


def nearest_index(n_in: int, n_out: int) -> np.ndarray:
    """Index of the source sample nearest to each output sample, halves upwards (n_out,)."""
    inside = np.clip((float(n_in) / n_out) * (np.arange(n_out) + 0.5) - 0.5, 0, n_in - 1)
    found: np.ndarray = np.floor(inside + 0.5).astype(np.int64)
    return found


@dataclass(frozen=True)
class LinearTaps:
    """The two source samples around each output sample, and their weights; arrays of length n_out."""

    low: np.ndarray
    high: np.ndarray
    weight_low: np.ndarray
    weight_high: np.ndarray
    nearest: np.ndarray

    @property
    def index(self) -> tuple[np.ndarray, np.ndarray]:
        return self.low, self.high

    @property
    def weight(self) -> tuple[np.ndarray, np.ndarray]:
        return self.weight_low, self.weight_high


@lru_cache(maxsize=64)
def linear_taps(n_in: int, n_out: int) -> LinearTaps:
    """Linear interpolation with the edge sample continued outwards.

    Ties between labels depend on the last bit, so the weights are scipy's: the upper one by subtraction, and beyond the
    edge two fractional weights of the same sample rather than a single 1.
    """
    where = positions(n_in, n_out)
    first = np.floor(where)
    weight_low = 1.0 - (where - first)
    weight_high = 1.0 - weight_low
    low, high, nearest = (
        np.clip(index, 0, n_in - 1).astype(np.int64) for index in (first, first + 1, np.floor(where + 0.5))
    )
    return LinearTaps(low, high, weight_low, weight_high, nearest)


def linear_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Linear interpolation as a matrix (n_out, n_in), float64."""
    taps = linear_taps(n_in, n_out)
    matrix = np.zeros((n_out, n_in))
    rows = np.arange(n_out)
    matrix[rows, taps.low] += taps.weight_low
    matrix[rows, taps.high] += taps.weight_high
    return matrix


def cubic_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Interpolation by cubic B-splines as a matrix (n_out, n_in), float64.

    The product of three linear maps: continue the edges, compute spline coefficients, evaluate four splines at each position.
    """
    from scipy.ndimage import spline_filter1d  # half a second, for volumes that are resampled only

    padded = n_in + 2 * _SPLINE_PADDING
    continued = np.zeros((padded, n_in))
    continued[np.arange(padded), np.clip(np.arange(padded) - _SPLINE_PADDING, 0, n_in - 1)] = 1
    coefficients = spline_filter1d(continued, 3, axis=0, mode="nearest", output=np.float64)
    where = positions(n_in, n_out) + _SPLINE_PADDING
    first = np.floor(where).astype(np.int64)
    t = where - first
    splines = ((1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 4 - 6 * (1 - t) ** 2 + 3 * (1 - t) ** 3, t**3)
    evaluation = np.zeros((n_out, padded))
    for offset, spline in enumerate(splines):
        evaluation[np.arange(n_out), first - 1 + offset] += spline / 6
    found: np.ndarray = evaluation @ coefficients
    return found


def nearest_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Nearest neighbour as a matrix (n_out, n_in)."""
    matrix = np.zeros((n_out, n_in))
    matrix[np.arange(n_out), nearest_index(n_in, n_out)] = 1
    return matrix


MATRICES = {0: nearest_matrix, 1: linear_matrix, 3: cubic_matrix}
"""Interpolation matrix by order of the spline."""


@dataclass(frozen=True)
class Band:
    """Output samples ``[start, stop)`` are ``weights`` (float32) times source samples ``[low, high)``."""

    start: int
    stop: int
    low: int
    high: int
    weights: np.ndarray


@lru_cache(maxsize=64)
def bands(n_in: int, n_out: int, order: int) -> tuple[Band, ...]:
    """The interpolation matrix of this order, cut into blocks of rows that read only the columns they need."""
    matrix = MATRICES[order](n_in, n_out)
    matrix[np.abs(matrix) < _NEGLIGIBLE] = 0
    blocks = []
    for start in range(0, n_out, _BLOCK):
        rows = matrix[start : start + _BLOCK]
        columns = np.flatnonzero((np.abs(rows) > _OUTSIDE_BAND).any(axis=0))
        low, high = int(columns[0]), int(columns[-1]) + 1
        weights = np.ascontiguousarray(rows[:, low:high], dtype=np.float32)
        blocks.append(Band(start, start + len(rows), low, high, weights))
    return tuple(blocks)
