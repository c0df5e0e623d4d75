"""What the augmentation does to intensities: each step with its numbers drawn, and the arithmetic.

The distributions, their order and the arithmetic are those of batchgeneratorsv2's transforms as nnU-Net sets them up. Steps
change an image (C, Z, Y, X) in place, on any device, without waiting for it. On a CPU they go through it in pieces that stay
in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

_PIECE_VOXELS = 32 * 1024
_SMALLEST_SPREAD = 1e-7
_KERNEL_REACH = 6
"""A blur's kernel is this many standard deviations wide, all in all, rounded to an odd number of voxels."""


@dataclass(frozen=True)
class Noise:
    """Adds Gaussian noise, independent in every voxel and channel.

    ``spread`` is its standard deviation, drawn from 0 to 0.1. nnU-Net calls these numbers ``noise_variance``, but uses them as
    standard deviations; what they do is what counts here.
    """

    spread: float
    seed: int

    def apply(self, image: Tensor) -> None:
        generator = torch.Generator(image.device).manual_seed(self.seed)
        for piece in _pieces(image):
            piece.add_(torch.empty_like(piece).normal_(generator=generator), alpha=self.spread)


@dataclass(frozen=True)
class Blur:
    """Blurs a channel with a Gaussian of ``spreads`` (voxels; Z, Y, X); the image goes on reflected beyond its border."""

    channel: int
    spreads: tuple[float, float, float]

    def apply(self, image: Tensor) -> None:
        volume = image[self.channel]
        z, y, x = self.spreads
        whole = volume.device.type != "cpu"
        # Slice by slice along two axes, then in the planes across: each of them fits into the cache.
        for plane in [volume] if whole else volume.unbind(0):
            plane.copy_(_blurred(_blurred(plane, y, -2), x, -1))
        for plane in [volume] if whole else volume.unbind(1):
            plane.copy_(_blurred(plane, z, 0))


@dataclass(frozen=True)
class Brightness:
    """Multiplies a channel."""

    channel: int
    factor: float

    def apply(self, image: Tensor) -> None:
        image[self.channel].mul_(self.factor)


@dataclass(frozen=True)
class Contrast:
    """Multiplies a channel's differences from its mean, keeping to the range of values that it had."""

    channel: int
    factor: float

    def apply(self, image: Tensor) -> None:
        pieces = list(_pieces(image[self.channel]))
        low, high = _range(pieces)
        offset = _mean(pieces) * (1 - self.factor)
        for piece in pieces:
            torch.clamp(piece.mul_(self.factor).add_(offset), low, high, out=piece)


@dataclass(frozen=True)
class LowResolution:
    """Shrinks a channel to ``scale`` of its voxels (Z, Y, X) by leaving some out, and enlarges it again, linearly."""

    channel: int
    scale: tuple[float, float, float]

    def apply(self, image: Tensor) -> None:
        volume = image[self.channel]
        small = [round(size * part) for size, part in zip(volume.shape, self.scale, strict=True)]
        shrunk = interpolate(volume[None, None], small, mode="nearest-exact")
        volume.copy_(interpolate(shrunk, volume.shape, mode="trilinear")[0, 0])


@dataclass(frozen=True)
class Gamma:
    """Raises a channel, scaled to 0..1, to a power and gives it back its mean and standard deviation.

    ``inverted``: bright is dark while that is done.
    """

    channel: int
    exponent: float
    inverted: bool

    def apply(self, image: Tensor) -> None:
        pieces = list(_pieces(image[self.channel]))
        low, high = _range(pieces)
        mean, spread = _moments(pieces)
        extent = high - low
        scale = (-1.0 if self.inverted else 1.0) / extent.clamp(min=_SMALLEST_SPREAD)
        start = high if self.inverted else low
        for piece in pieces:
            piece.sub_(start).mul_(scale).log_().mul_(self.exponent).exp_()  # as a power, in 2/5 of its time
        new_mean, new_spread = _moments(pieces)
        stretch = extent * (spread / (extent * new_spread).clamp(min=_SMALLEST_SPREAD))
        stretch = -stretch if self.inverted else stretch
        offset = mean - stretch * new_mean
        for piece in pieces:
            piece.mul_(stretch).add_(offset)


IntensityStep = Noise | Blur | Brightness | Contrast | LowResolution | Gamma


def draw_steps(
    random: np.random.Generator, channels: int, slice_by_slice: bool, noise_seed: int
) -> tuple[IntensityStep, ...]:
    """What to do to an image with so many channels, in this order: nnU-Net's probabilities. Often nothing.

    ``slice_by_slice``: slices are far apart, so their number is not reduced.
    """
    steps: list[IntensityStep] = []
    if random.random() < 0.1:
        steps.append(Noise(random.uniform(0, 0.1), noise_seed))
    if random.random() < 0.2:
        for channel in _some(random, channels):
            z, y, x = random.uniform(0.5, 1.0, 3).tolist()
            steps.append(Blur(channel, (z, y, x)))
    if random.random() < 0.15:
        steps += [Brightness(channel, _factor(random, 0.75, 1.25)) for channel in range(channels)]
    if random.random() < 0.15:
        steps += [Contrast(channel, _factor(random, 0.75, 1.25)) for channel in range(channels)]
    if random.random() < 0.25:
        for channel in _some(random, channels):
            scale = random.uniform(0.5, 1)
            steps.append(LowResolution(channel, (1.0 if slice_by_slice else scale, scale, scale)))
    for probability, inverted in ((0.1, True), (0.3, False)):
        if random.random() < probability:
            steps += [Gamma(channel, _factor(random, 0.7, 1.5), inverted) for channel in range(channels)]
    return tuple(steps)


def _some(random: np.random.Generator, channels: int) -> list[int]:
    """Each channel with probability 1/2."""
    return [channel for channel in range(channels) if random.random() < 0.5]


def _factor(random: np.random.Generator, low: float, high: float) -> float:
    """As likely below 1 as above, however far the range reaches."""
    return random.uniform(low, 1) if random.random() < 0.5 else random.uniform(1, high)


# -- arithmetic ----------------------------------------------------------------------------------------------------------


def blur_kernel(spread: float) -> list[float]:
    """Weights of a Gaussian of ``spread`` voxels: 3, 5 or 7 of them for spreads from 0.5 to 1."""
    exact = spread * _KERNEL_REACH + 0.5
    width = round(exact)
    if width % 2 == 0:  # to the nearest odd number, upwards from the middle
        width += 1 if exact >= width else -1
    half = (width - 1) // 2
    weights = [math.exp(-0.5 * (offset / spread) ** 2) for offset in range(-half, half + 1)]
    return [weight / sum(weights) for weight in weights]


def _blurred(values: Tensor, spread: float, axis: int) -> Tensor:
    kernel = blur_kernel(spread)
    size, reach = values.shape[axis], len(kernel) // 2
    if size == 1:  # a slice by itself goes on as it is
        return values
    reach = min(reach, size - 1)  # a thin patch has no more to reflect
    before = values.narrow(axis, 1, reach).flip(axis)
    after = values.narrow(axis, size - 1 - reach, reach).flip(axis)
    padded = torch.cat([before, values, after], dim=axis)
    middle = len(kernel) // 2
    result = values * kernel[middle]
    for distance in range(1, reach + 1):
        both = padded.narrow(axis, reach - distance, size) + padded.narrow(axis, reach + distance, size)
        result.add_(both, alpha=kernel[middle + distance])
    return result


def _pieces(values: Tensor) -> Iterator[Tensor]:
    """Flat views that together are all of ``values`` (contiguous); one on a GPU."""
    flat = values.view(-1)
    yield from flat.split(_PIECE_VOXELS if values.device.type == "cpu" else max(1, flat.numel()))


def _range(pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
    ends = [torch.aminmax(piece) for piece in pieces]
    return torch.stack([end.min for end in ends]).min(), torch.stack([end.max for end in ends]).max()


def _mean(pieces: list[Tensor]) -> Tensor:
    count = sum(piece.numel() for piece in pieces)
    return (torch.stack([piece.sum() for piece in pieces]).double().sum() / count).float()


def _moments(pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation; each piece about its own mean first, so that a large mean costs no digits."""
    sizes = torch.tensor([piece.numel() for piece in pieces], dtype=torch.float64, device=pieces[0].device)
    means = [piece.mean() for piece in pieces]
    squares = []
    for piece, mean in zip(pieces, means, strict=True):
        centred = piece - mean
        squares.append(torch.dot(centred, centred))
    of_pieces = torch.stack(means).double()
    mean = (of_pieces * sizes).sum() / sizes.sum()
    total = torch.stack(squares).double().sum() + (sizes * (of_pieces - mean) ** 2).sum()
    return mean.float(), (total / (sizes.sum() - 1).clamp(min=1)).sqrt().float()
