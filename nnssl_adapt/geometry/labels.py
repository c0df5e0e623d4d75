"""Resampling that ends in labels: of label maps, and of logits. Equal to nnU-Net's voxel by voxel, many times faster.

nnU-Net resizes one indicator volume a label (one logit volume a class) and takes the largest at every voxel. But an
output voxel only depends on the 2 × 2 × 2 source voxels around it, and where those agree on the winner there is nothing
to compute. That leaves the surfaces, a few voxels in a hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.spacing import separate_z_axis
from nnssl_adapt.geometry.weights import LinearTaps, linear_taps, nearest_index

_CHUNK = 1 << 17
"""Mixed voxels settled at a time; bounds the memory."""

_CORNERS = tuple((z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1))

Taps = tuple[LinearTaps, LinearTaps, LinearTaps]
Settle = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


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
    shape = tuple(int(n) for n in new_shape)
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
    logits: Any, new_shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> np.ndarray:
    """Resample logits (K, Z, Y, X), array or CPU tensor, to ``new_shape`` (Z, Y, X) and return the winning class.

    uint8 (uint16 from 256 classes on), (Z, Y, X). Linear interpolation, nnU-Net's separate-z rule, and resampled logits
    rounded to float16 before the winner is taken, as nnU-Net stores them; ties go to the lowest class. The classes are
    never all held at the new size.
    """
    logits = np.asarray(logits)
    shape = tuple(int(n) for n in new_shape)
    axis = separate_z_axis(spacing, new_spacing)
    if logits.shape[1:] == shape:
        return _winner(logits)
    if axis is None:
        return _resize_logits(logits, shape, flat=False)
    return _slicewise(logits, shape, axis, lambda volume, size, flat: _resize_logits(volume, size, flat))


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
    small = (labels.astype(np.int64) - lowest).astype(
        np.uint8 if span < 255 else np.uint16 if span < 65535 else np.uint32
    )

    def settle(z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return _most_weight(small, taps, z, y, x)

    return (_by_blocks(small, taps, flat, settle).astype(np.int64) + lowest).astype(labels.dtype)


def _most_weight(labels: np.ndarray, taps: Taps, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The label with the largest weight in the block around each of n output voxels."""
    corners = list(_corners(taps, z, y, x))
    found = np.stack([labels[corner] for corner, _ in corners])  # (8, n), as the weights
    weights = np.stack([weight for _, weight in corners])
    nearest = labels[taps[0].nearest[z], taps[1].nearest[y], taps[2].nearest[x]]
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


def _winner(logits: np.ndarray) -> np.ndarray:
    """Class with the largest logit, the lowest of equals; (K, Z, Y, X) → (Z, Y, X), without a copy of all classes."""
    winner = np.zeros(logits.shape[1:], np.uint8 if len(logits) < 256 else np.uint16)
    best = logits[0].astype(np.float32)
    for index in range(1, len(logits)):
        better = logits[index] > best
        np.copyto(best, logits[index], where=better)
        winner[better] = index
    return winner


def _resize_logits(logits: np.ndarray, shape: tuple[int, ...], flat: bool) -> np.ndarray:
    """Resize logits (K, Z, Y, X) and take the winner; ``flat``: slices (along Z) don't see each other."""
    winner = _winner(logits)
    if winner.shape == shape:
        return winner
    taps = _taps(winner.shape, shape)
    by_class = np.ascontiguousarray(logits).reshape(len(logits), -1)

    def settle(z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        corners = [
            (np.ravel_multi_index(corner, winner.shape), weight)
            for corner, weight in _corners(taps, z, y, x)
            if weight.any()
        ]
        best = np.full(len(z), -np.inf, np.float16)
        chosen = np.zeros(len(z), winner.dtype)
        for index, values in enumerate(by_class):
            value = sum(values[where] * weight for where, weight in corners).astype(np.float16)
            better = value > best
            best[better] = value[better]
            chosen[better] = index
        return chosen

    return _by_blocks(winner, taps, flat, settle)


# -- blocks ----------------------------------------------------------------------------------------------------------


def _taps(old: Sequence[int], new: Sequence[int]) -> Taps:
    z, y, x = (linear_taps(int(a), int(b)) for a, b in zip(old, new, strict=True))
    return z, y, x


def _corners(
    taps: Taps, z: np.ndarray, y: np.ndarray, x: np.ndarray
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]]:
    """Indices and weights (float64) of the eight source voxels around output voxels ``(z, y, x)``."""
    for a, b, c in _CORNERS:
        weight = (taps[0].weight[a][z] * taps[1].weight[b][y]) * taps[2].weight[c][x]
        yield (taps[0].index[a][z], taps[1].index[b][y], taps[2].index[c][x]), weight


def _by_blocks(labels: np.ndarray, taps: Taps, flat: bool, settle: Settle) -> np.ndarray:
    """Resize a map of unsigned labels: the block's label where it has only one, ``settle`` for all other voxels."""
    mixed = np.iinfo(labels.dtype).max  # never a label: callers leave room for it
    result = _uniform_blocks(labels, flat, mixed)
    for axis in sorted(range(3), key=lambda a: len(taps[a].low) / labels.shape[a]):
        if len(taps[axis].low) != labels.shape[axis]:
            result = result.take(taps[axis].low, axis)
    result = np.ascontiguousarray(result)
    voxels = result.reshape(-1)
    unsettled = np.flatnonzero(voxels == mixed)
    for start in range(0, len(unsettled), _CHUNK):
        chunk = unsettled[start : start + _CHUNK]
        voxels[chunk] = settle(*np.unravel_index(chunk, result.shape))
    return result


def _uniform_blocks(labels: np.ndarray, flat: bool, mixed: int) -> np.ndarray:
    """For each source voxel the label of the block that starts there (edges continued), or ``mixed``."""
    uniform = np.ones(labels.shape, bool)
    for axis in range(1 if flat else 0, 3):
        here = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
        next_ = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
        # Uniform along the axes so far, at both ends of this axis, and the same label there.
        narrowed = uniform.copy()
        narrowed[here] &= uniform[next_]
        narrowed[here] &= labels[here] == labels[next_]
        uniform = narrowed
    return np.where(uniform, labels, np.asarray(mixed, labels.dtype))
