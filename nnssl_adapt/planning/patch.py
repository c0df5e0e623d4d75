"""Fitting a patch to the images and to the strides of the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def fit_patch(wanted: Sequence[int], divisors: Sequence[int], median_shape: Sequence[float]) -> tuple[int, int, int]:
    """Return the patch nearest to ``wanted`` that the network can take and the images can fill.

    All three are voxel counts in the plan's axis order. Each axis becomes a multiple of its divisor (the product of the
    network's strides), no larger than it takes to cover the median image, and leaves at least two voxels at the
    network's coarsest resolution, where instance normalisation needs more than one.
    """
    z, y, x = (
        _fit_axis(int(size), int(divisor), float(extent))
        for size, divisor, extent in zip(wanted, divisors, median_shape, strict=True)
    )
    return z, y, x


def _fit_axis(size: int, divisor: int, extent: float) -> int:
    smallest = divisor if divisor == 1 else 2 * divisor
    covers_the_image = math.ceil(extent / divisor) * divisor
    return max(smallest, min(max(1, size // divisor) * divisor, covers_the_image))


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
