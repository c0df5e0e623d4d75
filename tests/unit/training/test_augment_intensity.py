"""Steps on intensities: what they do; parity with the library's is tests/parity's."""

import math

import numpy as np
import pytest
import torch

from nnssl_adapt.training.batches import intensity
from nnssl_adapt.training.batches.intensity import (
    Blur,
    Brightness,
    Contrast,
    Gamma,
    LowResolution,
    Noise,
    blur_kernel,
    draw_steps,
)

SHAPE = (2, 7, 12, 17)
STEPS = [
    Noise(0.05, 3),
    Blur(1, (0.5, 0.7, 1.0)),
    Brightness(1, 1.2),
    Contrast(1, 1.25),
    LowResolution(1, (1.0, 0.6, 0.6)),
    Gamma(1, 1.4, False),
    Gamma(1, 0.7, True),
]


def image():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 2 + 5


@pytest.mark.parametrize("step", STEPS[1:], ids=lambda step: type(step).__name__)
def test_a_step_changes_its_channel_alone(step):
    before, after = image(), image()
    step.apply(after)
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])
    assert torch.isfinite(after).all()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_pieces_do_not_matter(step, monkeypatch):
    whole, pieces = image(), image()
    step.apply(whole)
    if isinstance(step, Noise):
        return  # which voxel gets which number may change
    monkeypatch.setattr(intensity, "_PIECE_VOXELS", 100)
    step.apply(pieces)
    assert torch.allclose(whole, pieces, atol=1e-5)


def test_noise_has_its_spread_and_follows_from_its_seed():
    before, one, again, other = (torch.zeros(2, 20, 30, 40) for _ in range(4))
    Noise(0.07, 5).apply(one)
    Noise(0.07, 5).apply(again)
    Noise(0.07, 6).apply(other)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert (one - before).std() == pytest.approx(0.07, rel=0.02) and abs(one.mean()) < 0.002
    assert not torch.equal(one[0], one[1])


def test_blur_keeps_sums_in_the_middle_and_smooths():
    values = torch.zeros(1, 15, 17, 19)
    values[0, 7, 8, 9] = 1
    Blur(0, (0.5, 0.8, 1.0)).apply(values)
    assert values.sum() == pytest.approx(1, abs=1e-5)
    spreads = [float((values.sum(other) * (torch.arange(n) - n // 2) ** 2).sum()) for other, n in _axes()]
    assert spreads[0] < spreads[1] < spreads[2]


def _axes():
    return [((0, 2, 3), 15), ((0, 1, 3), 17), ((0, 1, 2), 19)]


def test_blur_reflects_at_the_border_and_takes_thin_patches():
    constant = torch.full((1, 2, 1, 9), 3.0)
    Blur(0, (1.0, 1.0, 1.0)).apply(constant)
    assert constant.shape == (1, 2, 1, 9) and torch.isfinite(constant).all()
    line = torch.arange(8.0).view(1, 1, 1, 8).repeat(1, 8, 8, 1)
    Blur(0, (0.5, 0.5, 0.5)).apply(line)
    kernel = blur_kernel(0.5)
    assert float(line[0, 4, 4, 0]) == pytest.approx(2 * kernel[0] * 1, abs=1e-5)  # 1 on both sides of the first 0


def test_kernels():
    assert [len(blur_kernel(spread)) for spread in (0.5, 0.58, 0.6, 0.9, 0.92, 1.0)] == [3, 3, 5, 5, 7, 7]
    for spread in (0.5, 0.75, 1.0):
        kernel = blur_kernel(spread)
        assert len(kernel) % 2 == 1 and sum(kernel) == pytest.approx(1) and kernel == kernel[::-1]


def test_contrast_keeps_the_range():
    values = image()
    low, high = values[1].min(), values[1].max()
    Contrast(1, 1.25).apply(values)
    assert values[1].min() == low and values[1].max() == high


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_keeps_mean_and_spread(inverted):
    values = image() * 1000 + 1e5  # a large mean costs no digits
    mean, spread = values[1].double().mean(), values[1].double().std()
    Gamma(1, 1.4, inverted).apply(values)
    assert float(values[1].double().mean()) == pytest.approx(float(mean), rel=1e-5)
    assert float(values[1].double().std()) == pytest.approx(float(spread), rel=1e-3)


def test_gamma_of_a_constant():
    values = torch.full(SHAPE, 2.5)
    Gamma(0, 1.3, False).apply(values)
    Gamma(1, 1.3, True).apply(values)
    assert torch.allclose(values, torch.full(SHAPE, 2.5))


def test_low_resolution_leaves_slices_alone_that_are_far_apart():
    values = torch.arange(7.0).view(1, 7, 1, 1).repeat(1, 1, 12, 17)
    LowResolution(0, (1.0, 0.5, 0.5)).apply(values)
    assert torch.allclose(values[0, :, 3, 4], torch.arange(7.0))


def drawn(count=20000, channels=1, slice_by_slice=False):
    random = np.random.default_rng(0)
    return [draw_steps(random, channels, slice_by_slice, 9) for _ in range(count)]


def test_how_often_steps_are_drawn_and_how_strong():
    samples = drawn()
    rates = {Noise: 0.1, Blur: 0.1, Brightness: 0.15, Contrast: 0.15, LowResolution: 0.125}
    for kind, rate in rates.items():
        found = sum(any(isinstance(step, kind) for step in steps) for steps in samples) / len(samples)
        assert found == pytest.approx(rate, abs=4 * math.sqrt(rate / len(samples)))
    gammas = [step for steps in samples for step in steps if isinstance(step, Gamma)]
    assert sum(g.inverted for g in gammas) / len(samples) == pytest.approx(0.1, abs=0.01)
    assert sum(not g.inverted for g in gammas) / len(samples) == pytest.approx(0.3, abs=0.015)
    assert np.mean([g.exponent < 1 for g in gammas]) == pytest.approx(0.5, abs=0.03)
    assert min(g.exponent for g in gammas) < 0.72 and max(g.exponent for g in gammas) > 1.48
    noise = [step.spread for steps in samples for step in steps if isinstance(step, Noise)]
    assert np.mean(noise) == pytest.approx(0.05, abs=0.003) and max(noise) <= 0.1


def test_steps_come_in_the_librarys_order():
    order = [Noise, Blur, Brightness, Contrast, LowResolution, Gamma]
    for steps in drawn(2000, channels=2):
        places = [order.index(type(step)) for step in steps]
        assert places == sorted(places)


def test_channels_are_drawn_apart():
    steps = [step for steps in drawn(3000, channels=2) for step in steps]
    brightness = [step for step in steps if isinstance(step, Brightness)]
    assert {step.channel for step in brightness} == {0, 1}
    assert brightness[0].factor != brightness[1].factor
    thin = [step for steps in drawn(3000, slice_by_slice=True) for step in steps if isinstance(step, LowResolution)]
    assert all(step.scale[0] == 1 and step.scale[1] == step.scale[2] < 1 for step in thin)
