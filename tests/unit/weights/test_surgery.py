"""Properties of the pure tensor functions, on sizes that differ along every axis."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv3d, interpolate

from nnssl_adapt.weights.surgery import (
    adapt_input_channels,
    find_token_grid,
    resample_positions,
    same_values,
    swap_rotary_axes,
)

channels = st.integers(1, 7)
grids = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
orders = st.sampled_from(["whd", "hwd"])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(old=channels, new=channels)
@settings(max_examples=49, deadline=None)
def test_copies_of_one_image_give_what_they_gave_before(old, new):
    weight = random(3, old, 1, 3, 2)
    image = random(1, 1, 3, 5, 4, seed=1)
    before = conv3d(image.expand(-1, old, -1, -1, -1), weight)
    after = conv3d(image.expand(-1, new, -1, -1, -1), adapt_input_channels(weight, new))
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@given(old=channels, factor=st.integers(1, 4))
@settings(max_examples=28, deadline=None)
def test_cycled_channels_give_what_the_channels_gave_before(old, factor):
    weight = random(3, old, 1, 3, 2)
    image = random(1, old, 3, 5, 4, seed=1)
    after = conv3d(image.repeat(1, factor, 1, 1, 1), adapt_input_channels(weight, factor * old))
    torch.testing.assert_close(after, conv3d(image, weight), rtol=1e-12, atol=1e-12)


@given(old=channels, new=channels)
@settings(max_examples=30, deadline=None)
def test_channel_adaptation_keeps_type_and_input(old, new):
    weight = random(2, old, 3, 1, 2).half()
    kept = weight.clone()
    adapted = adapt_input_channels(weight, new)
    assert adapted.shape == (2, new, 3, 1, 2)
    assert adapted.dtype == torch.float16
    adapted.zero_()
    assert torch.equal(weight, kept)


def test_half_precision_kernels_are_summed_in_single_precision():
    weight = torch.full((1, 4096, 1, 1, 1), 1.0).half()
    assert adapt_input_channels(weight, 1).item() == 4096  # a running sum in half precision stops at 2048


def test_no_channels_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        adapt_input_channels(random(2, 1, 3, 1, 2), 0)


@given(grid=grids, source=orders, target=orders)
@settings(max_examples=60, deadline=None)
def test_changing_the_token_order_moves_each_place_to_its_new_index(grid, source, target):
    def index(place, order):
        z, y, x = place
        return (z * grid[1] + y) * grid[2] + x if order == "whd" else (y * grid[0] + z) * grid[2] + x

    tokens = torch.arange(math.prod(grid), dtype=torch.float64).reshape(1, -1, 1)
    moved = resample_positions(tokens, grid, grid, source, target)
    for place in itertools.product(*map(range, grid)):
        assert moved[0, index(place, target), 0] == index(place, source)


@given(source_grid=grids, target_grid=grids, order=orders)
@settings(max_examples=40, deadline=None)
def test_order_and_interpolation_commute(source_grid, target_grid, order):
    volume = random(1, 5, *source_grid)
    expected = interpolate(volume, size=target_grid, mode="trilinear", align_corners=False)
    tokens = volume.permute(0, 2, 3, 4, 1)
    tokens = (tokens.transpose(1, 2) if order == "hwd" else tokens).reshape(1, -1, 5)
    result = resample_positions(tokens, source_grid, target_grid, order, "whd")
    torch.testing.assert_close(result, expected.permute(0, 2, 3, 4, 1).reshape(1, -1, 5))


@given(source_grid=grids, target_grid=grids)
@settings(max_examples=20, deadline=None)
def test_constant_positions_stay_constant(source_grid, target_grid):
    tokens = torch.full((1, math.prod(source_grid), 2), 0.25, dtype=torch.float16)
    result = resample_positions(tokens, source_grid, target_grid)
    assert result.dtype == torch.float16
    assert torch.equal(result, torch.full((1, math.prod(target_grid), 2), 0.25, dtype=torch.float16))


def test_positions_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match="fill"):
        resample_positions(random(1, 23, 2), (2, 3, 4), (2, 3, 4))
    with pytest.raises(ValueError, match="token order"):
        resample_positions(random(1, 24, 2), (2, 3, 4), (2, 3, 4), "dhw")


@given(heads=st.integers(1, 4), third=st.sampled_from([2, 4, 6]), columns=st.sampled_from([(), (5,)]))
@settings(max_examples=24, deadline=None)
def test_rotary_axes_are_exchanged_within_each_head_and_back(heads, third, columns):
    weight = random(heads * 3 * third, *columns)
    swapped = swap_rotary_axes(weight, heads)
    for before, after in zip(weight.split(3 * third), swapped.split(3 * third), strict=True):
        assert torch.equal(after[:third], before[third : 2 * third])
        assert torch.equal(after[third : 2 * third], before[:third])
        assert torch.equal(after[2 * third :], before[2 * third :])
    assert torch.equal(swap_rotary_axes(swapped, heads), weight)


def test_rows_that_are_not_three_axes_are_refused():
    with pytest.raises(ValueError, match="three equal parts"):
        swap_rotary_axes(random(16, 4), 2)


def test_grid_comes_from_the_first_candidate_that_fits_then_from_a_cube():
    assert find_token_grid(24, [None, (2, 3, 5), (2, 3, 4), (4, 3, 2)]) == (2, 3, 4)
    assert find_token_grid(27, [(2, 3, 4)]) == (3, 3, 3)
    assert find_token_grid(28, [(2, 3, 4)]) is None


def test_same_values_looks_at_every_tensor():
    weight = random(2, 3)
    assert same_values([weight, weight, weight.clone()])
    assert not same_values([weight, weight.clone(), weight + 1e-9])
