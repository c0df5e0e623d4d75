"""Resampling of intensities and logits, equal to nnU-Net's and many times faster.

nnU-Net resizes with scikit-image (splines of order 3 for images, 1 for logits, edges continued, values clipped to the
input's range); where one axis is much coarser than the others, slice by slice, and by nearest neighbour along that axis.
The same numbers come from one banded matrix product an axis. Arrays are (C, Z, Y, X), spacings mm (Z, Y, X).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.interpolation import MATRICES, bands, nearest_index
from nnssl_adapt.geometry.spacing import separate_z_axis


def resample_image(
    image: np.ndarray,
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    order: int = 3,
    order_z: int = 0,
    force_separate_z: bool | None = None,
) -> np.ndarray:
    """Resample an image (C, Z, Y, X) to ``new_shape`` (Z, Y, X); float32, never changes its input.

    Args:
        image: intensities of any number type.
        new_shape: voxels, usually :func:`~nnssl_adapt.geometry.spacing.resampled_shape`.
        spacing: of ``image``; only decides whether one axis is treated apart.
        new_spacing: of the result; likewise.
        order: spline order in general: 0, 1 or 3.
        order_z: order along the axis treated apart: 0 (nearest neighbour) or 1.
        force_separate_z: whether to treat the coarsest axis apart; None decides by the spacings.

    Where nothing changes the input itself is returned (as float32). Raises ConfigurationError for another order.
    """
    shape = checked_shape(image, new_shape)
    _check_orders(order, order_z)
    image = np.asarray(image, dtype=np.float32)
    if shape == image.shape[1:]:
        return image
    axis = separate_z_axis(spacing, new_spacing, force_separate_z)
    if len(image) == 1:  # nothing to put together
        return np.ascontiguousarray(_resample_volume(image[0], shape, axis, order, order_z))[None]
    result = np.empty((image.shape[0], *shape), dtype=np.float32)
    for source, target in zip(image, result, strict=True):
        target[...] = _resample_volume(source, shape, axis, order, order_z)
    return result


def resample_logits(
    logits: Any, new_shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> np.ndarray:
    """Resample logits (K, Z, Y, X), array or tensor, to ``new_shape``: linear, nnU-Net's separate-z rule; float32."""
    return resample_image(as_array(logits), new_shape, spacing, new_spacing, order=1, order_z=0)


def _resample_volume(
    volume: np.ndarray, shape: tuple[int, ...], axis: int | None, order: int, order_z: int
) -> np.ndarray:
    """One channel (Z, Y, X). ``axis`` is treated apart, if any."""
    if axis is None:
        low, high = volume.min(), volume.max()
        volume = _along_axes(volume, shape, order)
        return np.clip(volume, low, high, out=volume) if order == 3 else volume
    in_plane = tuple(a for a in range(3) if a != axis)
    if order_z == 0 and shape[axis] != volume.shape[axis]:
        # Nearest neighbour first: slices that nobody asks for need not be resampled, and equal ones only once.
        chosen, again = np.unique(nearest_index(volume.shape[axis], shape[axis]), return_inverse=True)
        volume = volume.take(chosen, axis)
    else:
        again = None
    low, high = volume.min(axis=in_plane, keepdims=True), volume.max(axis=in_plane, keepdims=True)
    kept = tuple(volume.shape[a] if a == axis else shape[a] for a in range(3))
    if kept != volume.shape:
        volume = _along_axes(volume, kept, order)
        if order == 3:
            np.clip(volume, low, high, out=volume)
    if again is not None:
        return volume.take(again, axis)
    return _along_axes(volume, shape, order_z)


def _along_axes(volume: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """Interpolate axis by axis, the most shrinking one first, so that later ones have less to do."""
    changing = [a for a in range(3) if volume.shape[a] != shape[a]]
    for axis in sorted(changing, key=lambda a: shape[a] / volume.shape[a]):
        volume = _along_axis(np.ascontiguousarray(volume), shape[axis], axis, order)
    return volume


def _along_axis(volume: np.ndarray, size: int, axis: int, order: int) -> np.ndarray:
    """Interpolate one axis of a contiguous float32 volume to ``size`` samples."""
    result = np.empty(tuple(size if a == axis else n for a, n in enumerate(volume.shape)), dtype=np.float32)
    # Each case is one or a few large matrix products on views of contiguous memory.
    for band in bands(volume.shape[axis], size, order):
        if axis == 0:
            source, target = volume.reshape(volume.shape[0], -1), result.reshape(size, -1)
            np.matmul(band.weights, source[band.low : band.high], out=target[band.start : band.stop])
        elif axis == 1:
            np.matmul(band.weights, volume[:, band.low : band.high], out=result[:, band.start : band.stop])
        else:
            source, target = volume.reshape(-1, volume.shape[2]), result.reshape(-1, size)
            np.matmul(source[:, band.low : band.high], band.weights.T, out=target[:, band.start : band.stop])
    return result


def as_array(values: Any) -> np.ndarray:
    """An array of an array, or of a tensor on any device; float32 of bfloat16, which numpy does not have."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
    return np.asarray(values)


def checked_shape(array: np.ndarray, new_shape: Sequence[int]) -> tuple[int, ...]:
    """``new_shape`` as integers; ValueError unless it is (Z, Y, X) and ``array`` is (C, Z, Y, X)."""
    shape = tuple(int(n) for n in new_shape)
    if array.ndim != 4 or len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"expected an array (C, Z, Y, X) and a shape (Z, Y, X) of at least 1, got {array.shape} and {shape}"
        )
    return shape


def _check_orders(order: int, order_z: int) -> None:
    if order not in MATRICES or order_z not in (0, 1):
        raise ConfigurationError(
            f"resampling order {order} (order_z {order_z}) is not supported: order is 0, 1 or 3, order_z 0 or 1"
        )
