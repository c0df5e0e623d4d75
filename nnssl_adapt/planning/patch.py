"""Fitting a patch to the images and to the strides of the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def fit_patch(wanted: Sequence[int], divisors: Sequence[int], median_shape: Sequence[float]) -> tuple[int, int, int]:
    """Return the patch nearest to ``wanted`` that the network can take and the images can fill.

    All three are voxel counts in the plan's axis order. Each axis becomes a multiple of its divisor (the product of the
    network's strides), no larger than it takes to cover the median image.
    """
    sizes = [
        max(1, min(int(size) // divisor, math.ceil(extent / divisor))) * divisor
        for size, divisor, extent in zip(wanted, divisors, median_shape, strict=True)
    ]
    z, y, x = at_least_two_voxels(sizes, divisors, median_shape)
    return z, y, x


def at_least_two_voxels(sizes: Sequence[int], divisors: Sequence[int], median_shape: Sequence[float]) -> list[int]:
    """A patch with one step more where it would leave a single voxel at the network's coarsest resolution.

    Instance normalisation needs more than one there, of all axes together: one axis may have a single voxel. The axis that the
    image fills most gets the step; one without strides (the slices of a 2D network) is left as it is.
    """
    enough = list(sizes)
    if enough == list(divisors):
        strided = [axis for axis, divisor in enumerate(divisors) if divisor > 1] or [0, 1, 2]
        enough[max(strided, key=lambda axis: (median_shape[axis] / divisors[axis], axis))] *= 2
    return enough


def describe_fit(wanted: Sequence[int], fitted: Sequence[int], median_shape: Sequence[float]) -> str | None:
    """One sentence on what :func:`fit_patch` changed, or None when it changed nothing."""
    if tuple(wanted) == tuple(fitted):
        return None
    return (
        f"patch {_by(wanted)} fitted to {_by(fitted)}: the median image has {_by(f'{n:g}' for n in median_shape)} voxels, "
        "and each axis must be a multiple of the network's strides"
    )


def _by(numbers: Iterable[int | str]) -> str:
    return " × ".join(str(n) for n in numbers)
