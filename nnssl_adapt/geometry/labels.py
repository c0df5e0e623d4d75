"""Resampling of label maps, equal to nnU-Net's voxel by voxel and many times faster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.blocks import Blocks, resize_by_blocks, slicewise, taps_of
from nnssl_adapt.geometry.interpolation import nearest_index
from nnssl_adapt.geometry.resample import checked_shape
from nnssl_adapt.geometry.spacing import separate_z_axis


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
        target[...] = slicewise(source, shape, axis, lambda volume, size, flat: _resize(volume, size, flat, order))
    return result


def _resize(labels: np.ndarray, shape: tuple[int, ...], flat: bool, order: int) -> np.ndarray:
    """Resize one label map (Z, Y, X); ``flat``: slices (along Z) don't see each other."""
    if labels.shape == shape:
        return labels
    taps = taps_of(labels.shape, shape)
    if order == 0:
        nearest = [nearest_index(old, new) for old, new in zip(labels.shape, shape, strict=True)]
        found: np.ndarray = labels[np.ix_(*nearest)]
        return found
    lowest = int(labels.min())
    span = int(labels.max()) - lowest
    small = np.empty(labels.shape, np.uint8 if span < 255 else np.uint16 if span < 65535 else np.uint32)
    _shifted(labels, -lowest, small)

    def settle(blocks: Blocks) -> np.ndarray:
        return _most_weight(small.reshape(-1), blocks)

    result = np.empty(shape, labels.dtype)
    _shifted(resize_by_blocks(small, taps, flat, settle), lowest, result)
    return result


def _shifted(labels: np.ndarray, by: int, out: np.ndarray) -> None:
    """``out = labels + by``, in the larger of the two number types: sums that wrap around there come out right in the end."""
    wide = max(labels.dtype, out.dtype, key=lambda kind: kind.itemsize)
    number = np.asarray(by).astype(wide)
    for source, target in zip(labels, out, strict=True):
        np.add(source, number, out=target, dtype=wide, casting="unsafe")


def _most_weight(labels: np.ndarray, blocks: Blocks) -> np.ndarray:
    """The label with the largest weight in each of n blocks; ``labels`` is flat."""
    found = np.empty((8, len(blocks)), labels.dtype)
    weights = np.empty(found.shape)
    for corner, (index, (z, y, x)) in enumerate(blocks.corners()):
        np.take(labels, index, out=found[corner], mode="clip")
        np.multiply(z * y, x, out=weights[corner])
    nearest = labels[blocks.nearest]
    low, high = found.min(axis=0), found.max(axis=0)
    # Nearly all blocks lie on the surface between two labels, which takes a quarter of the work.
    several = ~((found == low) | (found == high)).all(axis=0)
    low_score, high_score = _score(found, weights, low), _score(found, weights, high)
    winner: np.ndarray = np.where((high_score > low_score) | ((high_score == low_score) & (nearest == high)), high, low)
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
