"""From logits to labels where the logits are: on a GPU, slab by slab, so that only labels leave it.

The labels are those of :func:`nnssl_adapt.geometry.logits.logits_to_labels`, voxel by voxel. There, blocks of voxels that
agree are left out, which saves a processor most of the work. A GPU would rather do the same everywhere: each class is
interpolated over a slab in float32, beside the best and the second best so far. Where these two are so close that rounding
decides, the voxel is computed again in float64, in scipy's order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnssl_adapt.geometry.interpolation import LinearTaps, linear_taps, nearest_index
from nnssl_adapt.geometry.spacing import separate_z_axis

_SLAB = 1 << 23
"""Voxels of the result that are worked on together: some ten float32 volumes of that size are in memory."""

_UNSURE = 1 << 20
"""Voxels that are computed in float64 together."""

_FLOAT32_ERROR = 2e-6
"""Of an interpolation in float32, relative to the largest number in it: three roundings for each of three axes, doubled twice."""

_HALF = torch.finfo(torch.float16)


@torch.no_grad()
def labels_on_device(
    logits: Tensor, new_shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float], slab: int = _SLAB
) -> Tensor:
    """Resample logits to ``new_shape`` and return the winning class; they are compared as float16, ties go to the lowest.

    Args:
        logits: (K, Z, Y, X), float32 or float16, on any device.
        new_shape: voxels (Z, Y, X).
        spacing: mm (Z, Y, X) of ``logits``; only decides whether one axis is treated apart.
        new_spacing: of the result; likewise.
        slab: voxels that are worked on together.

    Returns:
        uint8, or int16 from 256 classes on; (Z, Y, X), on the device of the logits.
    """
    shape = tuple(int(n) for n in new_shape)
    classes, *size = logits.shape
    result = torch.empty(shape, dtype=torch.uint8 if classes < 256 else torch.int16, device=logits.device)
    apart = None if tuple(size) == shape else separate_z_axis(spacing, new_spacing)
    axes = []
    for axis, (old, new) in enumerate(zip(size, shape, strict=True)):
        taps = _nearest(old, new) if axis == apart else linear_taps(old, new)
        axes.append(_Axis.of(taps, old == new, logits.device))
    first = _nearest(size[0], shape[0]) if apart == 0 else linear_taps(size[0], shape[0])
    rows = max(1, slab // max(1, shape[1] * shape[2]))
    for start in range(0, shape[0], rows):
        part = slice(start, min(start + rows, shape[0]))
        planes = slice(int(first.low[part.start]), int(first.high[part.stop - 1]) + 1)
        _Slab([axes[0].part(part), axes[1], axes[2]], planes).decide(logits, result[part])
    return result


def _nearest(n_in: int, n_out: int) -> LinearTaps:
    """As taps: each output sample is one source sample."""
    index = nearest_index(n_in, n_out)
    ones = np.ones(n_out)
    return LinearTaps(index, index, ones, ones - 1, index)


class _Axis:
    """The taps of one axis on a device. ``second``: whether an output sample is made of two."""

    def __init__(self, low: Tensor, high: Tensor, weight_low: Tensor, weight_high: Tensor, taken: bool) -> None:
        self.low, self.high = low, high
        self.weight_low, self.weight_high = weight_low, weight_high  # float64
        self.taken = taken  # samples are taken as they are, in order: there is nothing to do
        self.second = not taken and bool((weight_high != 0).any())

    @classmethod
    def of(cls, taps: LinearTaps, unchanged: bool, device: torch.device) -> _Axis:
        parts = (taps.low, taps.high, taps.weight_low, taps.weight_high)
        low, high, weight_low, weight_high = (torch.from_numpy(part).to(device) for part in parts)
        return cls(low, high, weight_low, weight_high, unchanged)

    def part(self, where: slice) -> _Axis:
        parts = (self.low, self.high, self.weight_low, self.weight_high)
        low, high, weight_low, weight_high = (part[where] for part in parts)
        axis = _Axis(low, high, weight_low, weight_high, False)
        axis.taken = self.taken and where.start == 0 and len(low) == len(self.low)
        axis.second = self.second
        return axis

    def interpolate(self, values: Tensor, axis: int) -> Tensor:
        """Along an axis of a float32 volume."""
        if self.taken:
            return values
        low = values.index_select(axis, self.low)
        if not self.second:
            return low
        form = [-1 if a == axis else 1 for a in range(3)]
        low = low.mul_(self.weight_low.float().view(form))
        return low.addcmul_(values.index_select(axis, self.high), self.weight_high.float().view(form))


class _Slab:
    """Some planes of the result; ``planes`` are those of the logits that they are made of."""

    def __init__(self, axes: list[_Axis], planes: slice) -> None:
        self.axes = axes
        self.planes = planes
        self.shape = tuple(len(axis.low) for axis in axes)
        self.interpolated = any(axis.second for axis in axes)

    def decide(self, logits: Tensor, winner: Tensor) -> None:
        """Fill ``winner`` with the classes that win."""
        winner.zero_()
        best = self._values(logits[0])
        second = torch.full_like(best, -math.inf)
        largest = logits[0, self.planes].abs().amax() if self.interpolated else None
        for number in range(1, len(logits)):
            value = self._values(logits[number])
            if largest is not None:
                largest = torch.maximum(largest, logits[number, self.planes].abs().amax())
            better = value > best
            if self.interpolated:
                second = torch.where(better, best, torch.maximum(second, value))
            winner.masked_fill_(better, number)
            torch.maximum(best, value, out=best)
        if largest is None:
            return
        margin = (
            torch.maximum(best.abs(), second.abs())
            .mul_(_HALF.eps)
            .add_(_FLOAT32_ERROR * largest + _HALF.smallest_normal * _HALF.eps)
        )
        unsure = ((best - second <= margin) | (best >= _HALF.max)).view(-1).nonzero().view(-1)
        flat = winner.view(-1)
        for chunk in unsure.split(_UNSURE):
            flat[chunk] = self._exactly(logits, chunk).to(winner.dtype)

    def _values(self, logit: Tensor) -> Tensor:
        """One class on this slab: float32, interpolated; or rounded to float16 where nothing is interpolated."""
        if not self.interpolated:
            for axis, taps in enumerate(self.axes):
                logit = logit if taps.taken else logit.index_select(axis, taps.low)
            return logit.half().float()
        values = logit.float()
        for axis, taps in enumerate(self.axes):
            values = taps.interpolate(values, axis)
        return values.clone() if values.data_ptr() == logit.data_ptr() else values

    def _exactly(self, logits: Tensor, voxels: Tensor) -> Tensor:
        """The class that wins at these voxels (flat indices of the slab), by float64 rounded to float16."""
        _, height, width = self.shape
        at = (voxels // (height * width), voxels // width % height, voxels % width)
        taps = [
            [(axis.low[i], axis.weight_low[i]), *([(axis.high[i], axis.weight_high[i])] if axis.second else [])]
            for axis, i in zip(self.axes, at, strict=True)
        ]
        best = torch.full(voxels.shape, -math.inf, device=voxels.device)
        chosen = torch.zeros_like(voxels)
        for number, logit in enumerate(logits):
            total = torch.zeros(voxels.shape, dtype=torch.float64, device=voxels.device)
            for (z, of_z), (y, of_y), (x, of_x) in itertools.product(*taps):
                # In scipy's order: the last bit decides to which side a value halfway between two is rounded.
                total += logit[z, y, x].double().mul_(of_z).mul_(of_y).mul_(of_x)
            value = rounded_once(total)
            better = value > best
            best = torch.where(better, value, best)
            chosen.masked_fill_(better, number)
        return chosen


def rounded_once(values: Tensor) -> Tensor:
    """float64 rounded to float16's precision, ties to even, as float32.

    PyTorch converts by way of float32 and so rounds twice, which can end on the other side of a tie. Rounding to odd on the
    way (towards zero, then the last bit set where something was cut off) leaves the second rounding to decide alone.
    """
    single = values.float()
    bits = single.view(torch.int32)
    bits = bits - (single.double().abs() > values.abs()).int()
    bits = torch.where(bits.view(torch.float32).double() != values, bits | 1, bits)
    return bits.view(torch.float32).half().float()
