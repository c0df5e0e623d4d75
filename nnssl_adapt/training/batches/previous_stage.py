"""The segmentation of a cascade's first network as channels of a patch, and nnU-Net's augmentation of it.

Trained on segmentations as good as those of the training cases, a network would trust them too much: structures are thickened
or thinned, holes closed or opened, and whole components left out. Rules, probabilities and shapes are nnU-Net's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_CHANGED, _REMOVED, _EACH_LABEL = 0.4, 0.2, 0.5
_RADII = (1.0, 8.0)

_LARGEST_REMOVED = 0.15
"""Components of more than this share of the patch stay."""

DILATION, EROSION, CLOSING, OPENING = "dilation", "erosion", "closing", "opening"
OPERATORS = (DILATION, EROSION, CLOSING, OPENING)


@dataclass(frozen=True)
class StageSteps:
    """What happens to a sample's channels of the previous stage, in this order.

    Attributes:
        operations: channel, one of :data:`OPERATORS`, and radius in voxels.
        removals: channel, and which of its components is left out (0 to 1, of those that may be).
    """

    operations: tuple[tuple[int, str, float], ...] = ()
    removals: tuple[tuple[int, float], ...] = ()

    @classmethod
    def draw(cls, seed: int, channels: int) -> StageSteps:
        """What happens to the sample with this seed."""
        random = np.random.default_rng(seed)
        operations: tuple[tuple[int, str, float], ...] = ()
        removals: tuple[tuple[int, float], ...] = ()
        if random.random() < _CHANGED:
            operations = tuple(
                (channel, OPERATORS[random.integers(len(OPERATORS))], float(random.uniform(*_RADII)))
                for channel in _some(random, channels)
            )
        if random.random() < _REMOVED:
            removals = tuple((channel, float(random.random())) for channel in _some(random, channels))
        return cls(operations, removals)

    def apply(self, channels: Tensor) -> None:
        """Change channels of zeros and ones (labels, Z, Y, X) in place."""
        for channel, operator, radius in self.operations:
            before = channels[channel] > 0
            after = morphed(before, operator, ball(radius).to(before.device))
            added = after & ~before
            for other in range(len(channels)):
                channels[other].masked_fill_(added, 0)
            channels[channel].copy_(after)
        for channel, which in self.removals:
            _remove_component(channels[channel], which)


def _some(random: np.random.Generator, channels: int) -> list[int]:
    """Half of the channels, on average, in any order."""
    return [int(channel) for channel in random.permutation(channels) if random.random() < _EACH_LABEL]


def write_one_hot(channels: Tensor, codes: Tensor, labels: Sequence[int]) -> None:
    """Fill channels (labels, Z, Y, X) from label codes (label + 1, 0 outside) of the previous stage."""
    for channel, label in zip(channels, labels, strict=True):
        channel.copy_(codes == label + 1)


def ball(radius: float) -> Tensor:
    """The voxels within ``radius`` (voxels) of the centre, bool; a fractional radius is spread over the voxels it covers."""
    along = slice(-radius, radius, complex(0, 2 * radius + 1))
    z, y, x = np.mgrid[along, along, along]  # as skimage has it: at the rim, rounding decides
    return torch.from_numpy(x**2 + y**2 + z**2 <= radius * radius)


def morphed(mask: Tensor, operator: str, element: Tensor) -> Tensor:
    """A binary operation on a mask (Z, Y, X). Beyond the patch nothing is dilated, and nothing is eroded from there."""
    if operator == DILATION:
        return _dilated(mask, element)
    if operator == EROSION:
        return ~_dilated(~mask, element)
    if operator == CLOSING:
        return ~_dilated(~_dilated(mask, element), element)
    return _dilated(~_dilated(~mask, element), element)


def _dilated(mask: Tensor, element: Tensor) -> Tensor:
    """By a Fourier transform, which costs the same for every radius."""
    before = [(n - 1) // 2 for n in element.shape]
    size = [a + b - 1 for a, b in zip(mask.shape, element.shape, strict=True)]
    padded = mask.new_zeros(size, dtype=torch.float32)
    padded[tuple(slice(b, b + n) for b, n in zip(before, mask.shape, strict=True))] = mask.float()
    counted = torch.fft.irfftn(torch.fft.rfftn(padded) * torch.fft.rfftn(element.float(), s=size).conj(), s=size)
    z, y, x = mask.shape
    hit: Tensor = counted[:z, :y, :x] > 0.5  # numbers of voxels, as exact as float32 has them
    return hit


def _remove_component(channel: Tensor, which: float) -> None:
    from scipy import ndimage  # only cascades need it

    mask = channel.cpu().numpy() > 0
    components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count == 0:
        return
    sizes = np.bincount(components.ravel())[1:]
    small = np.flatnonzero(sizes < _LARGEST_REMOVED * math.prod(mask.shape)) + 1
    if len(small):
        gone = components == small[int(which * len(small))]
        channel.masked_fill_(torch.from_numpy(gone).to(channel.device), 0)
