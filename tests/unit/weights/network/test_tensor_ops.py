"""Properties of the pure tensor functions, on sizes that differ along every axis."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv3d, conv_transpose3d, instance_norm, interpolate

from nnssl_adapt.weights.network.tensor_ops import (
    adapt_input_channels,
    copy_leading,
    copy_rows,
    map_input_channels,
    resample_positions,
    resize_kernel,
    resize_patch_embedding,
    resize_upsampling,
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
def test_channel_adaptation_leaves_its_input_alone_and_does_not_round(old, new):
    weight = random(2, old, 3, 1, 2).half()
    kept = weight.clone()
    adapted = adapt_input_channels(weight, new)
    assert adapted.shape == (2, new, 3, 1, 2)
    assert adapted.dtype == (torch.float32)
    adapted.zero_()
    assert torch.equal(weight, kept)


def test_half_precision_kernels_are_summed_in_single_precision():
    weight = torch.full((1, 4096, 1, 1, 1), 1.0).half()
    assert adapt_input_channels(weight, 1).item() == 4096  # a running sum in half precision stops at 2048


def test_no_channels_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        adapt_input_channels(random(2, 1, 3, 1, 2), 0)


@given(old=channels, new=channels)
@settings(max_examples=30, deadline=None)
def test_the_mean_of_all_channels_does_the_same_to_an_image_given_in_each(old, new):
    weight, image = random(3, old, 1, 3, 2), random(1, 1, 3, 5, 4, seed=1)
    adapted = adapt_input_channels(weight, new, "mean")
    before = conv3d(image.expand(-1, old, -1, -1, -1), weight)
    torch.testing.assert_close(conv3d(image.expand(-1, new, -1, -1, -1), adapted), before, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(adapted[:, i], adapted[:, 0]) for i in range(new))


@given(old=channels, new=channels)
@settings(max_examples=30, deadline=None)
def test_new_channels_of_the_zero_rule_are_silent_and_leading_ones_as_they_were(old, new):
    weight, image = random(3, old, 1, 3, 2), random(1, max(old, new), 3, 5, 4, seed=1)
    image_before = image[:, :old].clone()
    image_before[:, new:] = 0
    after = conv3d(image[:, :new], adapt_input_channels(weight, new, "zero"))
    torch.testing.assert_close(after, conv3d(image_before, weight), rtol=1e-12, atol=1e-12)


@given(data=st.data(), old=channels)
@settings(max_examples=40, deadline=None)
def test_a_map_gives_each_pretraining_channel_once_in_all(data, old):
    chosen = data.draw(st.lists(st.none() | st.integers(0, old - 1), min_size=1, max_size=6))
    weight, image = random(3, old, 1, 3, 2), random(1, old, 3, 5, 4, seed=1)
    if all(channel is None for channel in chosen):
        return
    given_image = torch.cat([9 * image[:, :1] if c is None else image[:, [c]] for c in chosen], dim=1)
    used = image.clone()
    used[:, [c for c in range(old) if c not in chosen]] = 0
    after = conv3d(given_image, map_input_channels(weight, chosen))
    torch.testing.assert_close(after, conv3d(used, weight), rtol=1e-12, atol=1e-12)


def test_a_map_by_hand():
    weight = torch.tensor([2.0, 10.0, 7.0]).reshape(1, 3, 1, 1, 1)
    assert map_input_channels(weight, [1, None, 0, 1]).flatten().tolist() == [5, 0, 2, 5]
    with pytest.raises(ValueError, match="3 channels"):
        map_input_channels(weight, [3])


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule 'average'"):
        adapt_input_channels(random(2, 1, 3, 1, 2), 2, "average")


# -- kernels ---------------------------------------------------------------------------------------------------------


def convolved(image, weight):
    """As a layer of dynamic_network_architectures: padded by (width - 1) // 2 on both sides."""
    return conv3d(image, weight, padding=[(n - 1) // 2 for n in weight.shape[2:]])


odd = st.sampled_from([1, 3, 5])


@given(old=st.tuples(odd, odd, odd), more=st.tuples(*[st.sampled_from([0, 2, 4])] * 3))
@settings(max_examples=40, deadline=None)
def test_a_grown_kernel_computes_what_it_did(old, more):
    weight, image = random(3, 2, *old), random(1, 2, 6, 7, 8, seed=1)
    grown = resize_kernel(weight, [a + b for a, b in zip(old, more, strict=True)])
    torch.testing.assert_close(convolved(image, grown), convolved(image, weight), rtol=1e-12, atol=1e-12)


def test_even_kernels_grow_around_the_voxel_that_their_padding_aligns():
    weight, image = random(3, 2, 1, 2, 3), random(1, 2, 6, 7, 8, seed=1)
    before, after = convolved(image, weight), convolved(image, resize_kernel(weight, (2, 3, 4)))
    z, y, x = (min(a, b) for a, b in zip(before.shape[2:], after.shape[2:], strict=True))
    torch.testing.assert_close(after[:, :, :z, :y, :x], before[:, :, :z, :y, :x], rtol=1e-12, atol=1e-12)


@given(old=st.integers(2, 6), new=st.integers(1, 5), axis=st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_a_shrunk_kernel_is_exact_on_images_constant_along_that_axis(old, new, axis):
    new = min(new, old - 1)
    size = [1, 3, 2]
    size[axis] = old
    weight = random(3, 2, *size)
    image = random(1, 2, *[1 if a == axis else 5 for a in range(3)], seed=1)
    image = image.expand(-1, -1, *[9 if a == axis else 5 for a in range(3)])
    shrunk = resize_kernel(weight, [new if a == axis else n for a, n in enumerate(size)])
    before, after = conv3d(image, weight), conv3d(image, shrunk)
    kept = min(before.shape[2 + axis], after.shape[2 + axis])
    torch.testing.assert_close(
        after.narrow(2 + axis, 0, kept), before.narrow(2 + axis, 0, kept), rtol=1e-12, atol=1e-12
    )


def test_shrinking_a_separable_kernel_shrinks_its_factor_and_nothing_else():
    along, across = random(4), random(3, seed=1)
    weight = (along[:, None, None] * across[None, None, :]).reshape(1, 1, 4, 1, 3)
    shrunk = resize_kernel(weight, (2, 1, 3))
    expected = torch.stack([along[0] + along[1], along[2] + along[3]])[:, None] * across
    torch.testing.assert_close(shrunk.reshape(2, 3), expected)


def test_a_kernel_can_grow_along_one_axis_and_shrink_along_another():
    weight = torch.arange(1.0, 7).reshape(1, 1, 1, 3, 2)
    changed = resize_kernel(weight, (3, 1, 2))
    assert changed.flatten().tolist() == [0, 0, 9, 12, 0, 0]
    assert weight.flatten().tolist() == [1, 2, 3, 4, 5, 6]


@given(old=st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 3), more=st.tuples(*[st.integers(0, 4)] * 3))
@settings(max_examples=30, deadline=None)
def test_a_grown_patch_embedding_gives_the_tokens_that_the_patch_gave(old, more):
    weight, patch = random(5, 2, *old), random(1, 2, *old, seed=1)
    size = [a + b for a, b in zip(old, more, strict=True)]
    larger = interpolate(patch, size=size, mode="trilinear", align_corners=False)
    torch.testing.assert_close(conv3d(larger, resize_patch_embedding(weight, size)), conv3d(patch, weight))


@given(new=st.tuples(*[st.sampled_from([1, 2])] * 3), factor=st.tuples(*[st.integers(1, 3)] * 3))
@settings(max_examples=30, deadline=None)
def test_a_shrunk_patch_embedding_sees_each_voxel_as_those_it_stands_for(new, factor):
    old = [n * f for n, f in zip(new, factor, strict=True)]
    weight, patch = random(5, 2, *old), random(1, 2, *new, seed=1)
    repeated = patch
    for axis, times in enumerate(factor):
        repeated = repeated.repeat_interleave(times, dim=2 + axis)
    torch.testing.assert_close(conv3d(patch, resize_patch_embedding(weight, new)), conv3d(repeated, weight))


@given(small=st.tuples(*[st.integers(1, 3)] * 3), factor=st.tuples(*[st.integers(1, 2)] * 3))
@settings(max_examples=30, deadline=None)
def test_an_upsampling_with_another_step_paints_the_same_resized_by_area(small, factor):
    image = random(1, 2, 2, 3, 2, seed=1)
    large = [n * f for n, f in zip(small, factor, strict=True)]

    def painted(weight):
        return conv_transpose3d(image, weight, stride=weight.shape[2:])

    coarse, fine = random(2, 3, *small), random(2, 3, *large)
    grown, shrunk = resize_upsampling(coarse, large), resize_upsampling(fine, small)
    repeated = interpolate(painted(coarse), scale_factor=factor, mode="nearest")
    torch.testing.assert_close(painted(grown), repeated)
    averaged = torch.nn.functional.avg_pool3d(painted(fine), factor, factor)
    torch.testing.assert_close(painted(shrunk), averaged)


@pytest.mark.parametrize("resize", [resize_kernel, resize_patch_embedding, resize_upsampling])
def test_resizing_to_the_same_size_is_the_identity_on_a_copy(resize):
    weight = random(2, 3, 1, 2, 3).half()
    same = resize(weight, (1, 2, 3))
    assert torch.equal(same, weight)
    assert same.data_ptr() != weight.data_ptr()


# -- widths ----------------------------------------------------------------------------------------------------------


@given(old=st.tuples(st.integers(1, 4), st.integers(1, 4)), more=st.tuples(st.integers(0, 3), st.integers(0, 3)))
@settings(max_examples=30, deadline=None)
def test_leading_features_of_a_wider_layer_compute_exactly_what_they_did(old, more):
    weight, bias = random(old[0], old[1], 1, 3, 2), random(old[0])
    out, inputs = old[0] + more[0], old[1] + more[1]
    own, own_bias = random(out, inputs, 1, 3, 2, seed=2), random(out, seed=3)
    image = random(1, inputs, 3, 5, 4, seed=1)
    wide, wide_bias = copy_leading(weight, own), copy_leading(bias, own_bias, in_axis=None)

    def layer(image, weight, bias):
        return instance_norm(conv3d(image, weight, bias))

    after = layer(image, wide, wide_bias)
    torch.testing.assert_close(after[:, : old[0]], layer(image[:, : old[1]], weight, bias), rtol=1e-9, atol=1e-9)
    assert torch.equal(wide[old[0] :], own[old[0] :])


def test_a_narrower_layer_is_the_leading_part():
    weight = random(4, 3, 1, 3, 2)
    assert torch.equal(copy_leading(weight, random(2, 2, 1, 3, 2, seed=1)), weight[:2, :2])


def test_features_of_transposed_convolutions_lie_on_their_second_axis():
    weight, own, image = random(2, 3, 1, 2, 2), random(4, 5, 1, 2, 2, seed=1), random(1, 4, 2, 3, 2, seed=2)
    wide = copy_leading(weight, own, out_axis=1, in_axis=0)
    after = conv_transpose3d(image, wide, stride=(1, 2, 2))[:, :3]
    torch.testing.assert_close(after, conv_transpose3d(image[:, :2], weight, stride=(1, 2, 2)))


def test_joined_inputs_lead_each_in_its_own_half():
    weight, own = random(2, 4, 1, 3, 2), random(3, 6, 1, 3, 2, seed=1)
    up, skip = random(1, 3, 3, 5, 4, seed=2), random(1, 3, 3, 5, 4, seed=3)
    after = conv3d(torch.cat([up, skip], dim=1), copy_leading(weight, own, parts=(2, 2)))[:, :2]
    torch.testing.assert_close(after, conv3d(torch.cat([up[:, :2], skip[:, :2]], dim=1), weight))
    single = copy_leading(weight[:, :2], own, parts=(1, 2))  # without a skip before
    torch.testing.assert_close(conv3d(torch.cat([up, skip], dim=1), single)[:, :2], conv3d(up[:, :2], weight[:, :2]))


def test_rows_are_taken_by_their_numbers():
    value, own = torch.tensor([10.0, 20, 30]), torch.tensor([1.0, 2, 3, 4])
    assert copy_rows(value, own, [2, None, 0, None]).tolist() == [30, 2, 10, 4]
    assert own.tolist() == [1, 2, 3, 4]


# -- tokens ----------------------------------------------------------------------------------------------------------


@given(grid=grids, order=orders)
@settings(max_examples=20, deadline=None)
def test_interpolating_to_the_same_grid_is_the_identity(grid, order):
    tokens = random(1, math.prod(grid), 3)
    assert torch.equal(resample_positions(tokens, grid, grid, order, order), tokens)


@given(grid=grids)
@settings(max_examples=20, deadline=None)
def test_exchanging_the_order_there_and_back_is_the_identity(grid):
    tokens = random(1, math.prod(grid), 3)
    there = resample_positions(tokens, grid, grid, "hwd", "whd")
    assert torch.equal(resample_positions(there, grid, grid, "whd", "hwd"), tokens)


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
    assert result.dtype == (torch.float16 if source_grid == target_grid else torch.float32)
    assert torch.equal(result.float(), torch.full((1, math.prod(target_grid), 2), 0.25))


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


def test_same_values_looks_at_every_tensor():
    weight = random(2, 3)
    assert same_values([weight, weight, weight.clone()])
    assert not same_values([weight, weight.clone(), weight + 1e-9])
