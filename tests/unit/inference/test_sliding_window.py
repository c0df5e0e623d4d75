"""Tiles, weights, padding, mirroring and blending, each against arithmetic that is simple enough to believe."""

import itertools
import logging
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_adapt.errors import ConfigurationError, PredictionError
from nnssl_adapt.inference import sliding_window, sums
from nnssl_adapt.inference.convolutions import exact_float32
from nnssl_adapt.inference.sliding_window import (
    finish,
    gaussian_importance,
    sliding_window_logits,
    tile_positions,
    with_float32_as_fallback,
)
from nnssl_adapt.inference.sums import SumsPlace
from nnssl_adapt.inference.tile_batches import TileBatch, tiles_at_once

PATCH = (8, 12, 16)


class Pointwise(nn.Module):
    """Logits that depend on their own voxel only, so that the tiling must not show."""

    def forward(self, x):
        assert x.shape[2:] == PATCH
        assert not self.training
        return torch.cat([2 * x[:, :1] - 1, x[:, 1:2] ** 2, x[:, :1] * x[:, 1:2]], dim=1)


class Directional(nn.Module):
    """Logits that differ from those of the mirrored image, along every axis."""

    def forward(self, x):
        ramp = sum(
            weight * torch.arange(n, dtype=x.dtype).reshape([-1 if a == axis else 1 for a in range(5)])
            for axis, (n, weight) in enumerate(zip(x.shape, (0, 0, 1.0, 0.1, 0.01), strict=True))
        )
        return x + ramp


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "patch", "step", "expected"),
    [
        (110, 64, 0.5, [0, 23, 46]),
        (64, 64, 0.5, [0]),
        (65, 64, 0.5, [0, 1]),
        (10, 4, 1.0, [0, 3, 6]),
        (11, 4, 0.25, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_tiles_are_even_and_reach_both_ends(size, patch, step, expected):
    assert tile_positions((size,), (patch,), step) == [expected]


def test_each_axis_has_its_own_tiles():
    assert tile_positions((10, 20, 30), (8, 12, 30)) == [[0, 2], [0, 4, 8], [0]]


@pytest.mark.parametrize("step", [0, -0.5, 1.01])
def test_a_step_that_would_leave_gaps_is_refused(step):
    with pytest.raises(ConfigurationError, match="0 < step <= 1"):
        tile_positions((10,), (4,), step)


def test_weights_peak_in_the_middle_and_are_nowhere_zero():
    weights = gaussian_importance((10, 20, 30), scale=3)
    assert weights.shape == (10, 20, 30)
    assert weights.argmax() == np.ravel_multi_index((5, 10, 15), (10, 20, 30))
    assert weights.max() == 3
    half = gaussian_importance((10, 20, 30), dtype=torch.float16)
    assert half.dtype == torch.float16 and half.min() > 0


@pytest.mark.parametrize("shape", [(10, 20, 30), (8, 12, 16), (5, 20, 9)])
@pytest.mark.parametrize("mirror_axes", [None, (0, 2)])
def test_blending_tiles_gives_what_the_network_gives_voxel_by_voxel(shape, mirror_axes):
    data = image(2, *shape)
    kept = data.clone()
    logits = sliding_window_logits(Pointwise(), data, PATCH, 3, mirror_axes=mirror_axes)
    expected = torch.stack([2 * data[0] - 1, data[1] ** 2, data[0] * data[1]])
    assert logits.dtype == torch.float32 and logits.shape == (3, *shape)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(data, kept)


def test_small_images_lie_in_the_middle_of_zeros():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return x

    data = image(1, 5, 20, 9)
    sliding_window_logits(Spy(), data, PATCH, 1, mirror_axes=())
    tile = seen[0][0, 0]
    assert torch.equal(tile[1:6, :, 3:12], data[0, :, :12])
    assert tile.count_nonzero() == data[0, :, :12].count_nonzero()


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_mirroring_averages_every_combination_of_axes(axes):
    data = image(1, *PATCH)
    network = Directional()
    flips = [c for n in range(len(axes) + 1) for c in itertools.combinations([a + 2 for a in axes], n)]
    batch = data[None]
    expected = torch.stack([torch.flip(network(torch.flip(batch, f)), f) for f in flips]).mean(0)[0]
    logits = sliding_window_logits(network, data, PATCH, 1, mirror_axes=axes)
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, network(batch)[0])


def test_the_finest_output_of_deep_supervision_is_taken_and_training_mode_comes_back():
    class Deep(nn.Module):
        def forward(self, x):
            return [x, x[..., ::2, ::2, ::2]]

    network = Deep().train()
    data = image(1, 10, 20, 30)
    torch.testing.assert_close(sliding_window_logits(network, data, PATCH, 1), data, rtol=1e-5, atol=1e-6)
    assert network.training


@pytest.mark.parametrize("batch_size", [2, 3, 8, 100])
@pytest.mark.parametrize("axes", [(), (0, 2)])
def test_batches_of_any_size_give_the_same(batch_size, axes):
    class Counting(Directional):
        sizes = []

        def forward(self, x):
            self.sizes.append(len(x))
            return super().forward(x)

    data = image(1, 10, 20, 30)
    expected = sliding_window_logits(Directional(), data, PATCH, 1, mirror_axes=axes)
    network = Counting()
    network.sizes = []
    logits = sliding_window_logits(network, data, PATCH, 1, mirror_axes=axes, batch_size=batch_size)
    torch.testing.assert_close(logits, expected)
    looks = 2 * 3 * 3 * 2 ** len(axes)
    assert sum(network.sizes) == looks and max(network.sizes) == min(batch_size, looks)


def test_a_batch_that_is_too_large_is_halved_and_finished_tiles_are_kept():
    class Small(Directional):
        seen = 0

        def forward(self, x):
            if len(x) > 2:
                raise torch.OutOfMemoryError("too much")
            self.seen += len(x)
            return super().forward(x)

    data = image(1, 10, 20, 30)
    network, calls = Small(), []
    logits = sliding_window_logits(
        network, data, PATCH, 1, mirror_axes=(1,), batch_size=8, progress=lambda *c: calls.append(c)
    )
    torch.testing.assert_close(logits, sliding_window_logits(Directional(), data, PATCH, 1, mirror_axes=(1,)))
    assert network.seen == 2 * 18 and calls == [(i, 18) for i in range(1, 19)]


def test_a_network_too_large_for_the_memory_says_so():
    class Huge(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError):
        sliding_window_logits(Huge(), image(1, *PATCH), PATCH, 1, batch_size=4)


@pytest.mark.parametrize("shape", [(10, 20, 30), (8, 12, 16), (5, 20, 9)])
def test_the_result_lies_in_the_memory_it_was_given(shape):
    given = []

    def allocate(size, dtype):
        given.append(torch.zeros(size, dtype=dtype))
        return given[-1]

    data = image(2, *shape)
    logits = sliding_window_logits(Pointwise(), data, PATCH, 3, mirror_axes=None, allocate=allocate)
    assert len(given) == 1 and logits.data_ptr() == given[0].data_ptr()
    assert torch.equal(logits, sliding_window_logits(Pointwise(), data, PATCH, 3, mirror_axes=None))


def test_progress_counts_tiles():
    calls = []
    sliding_window_logits(
        Pointwise(), image(2, 10, 20, 16), PATCH, 3, mirror_axes=None, progress=lambda *c: calls.append(c)
    )
    assert calls == [(i, 6) for i in range(1, 7)]


def test_logits_that_are_not_finite_are_an_error():
    class Broken(nn.Module):
        def forward(self, x):
            return x / 0

    with pytest.raises(PredictionError, match="NaN or infinite"):
        sliding_window_logits(Broken(), image(1, *PATCH), PATCH, 1)


def test_the_result_is_an_ordinary_tensor():
    logits = sliding_window_logits(Pointwise(), image(2, 5, 12, 16), PATCH, 3)
    assert not logits.is_inference() and logits.is_contiguous()
    logits.add_(1)


def test_when_the_gpu_is_too_small_sums_are_kept_in_main_memory_and_it_is_said(monkeypatch, caplog):
    blend = sliding_window._blend
    failures = iter([torch.cuda.OutOfMemoryError("no memory")])

    def failing_once(*arguments):
        for error in failures:
            raise error
        return blend(*arguments)

    monkeypatch.setattr(sliding_window, "_blend", failing_once)
    monkeypatch.setattr(
        sliding_window, "sums_places", lambda *arguments: [SumsPlace(CPU, torch.float32) for _ in range(2)]
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    data = image(2, 10, 20, 30)
    with caplog.at_level(logging.WARNING):
        logits = sliding_window_logits(Pointwise(), data, PATCH, 3, mirror_axes=None)
    assert "main memory" in caplog.text
    torch.testing.assert_close(logits[1], data[1] ** 2, rtol=1e-5, atol=1e-5)


CPU = torch.device("cpu")


def test_sums_are_tried_on_the_gpu_in_half_precision_there_and_in_main_memory_last(monkeypatch):
    gpu, data = torch.device("cuda"), image(2, 10, 20, 30)
    halves, floats = 3 * 6000 * 2, 3 * 6000 * 4
    rest = 6000 * 4 + data.nbytes

    def kinds(free, dtype=torch.float32, copies=1):
        monkeypatch.setattr(sums, "free_memory", lambda device: free / 0.75)
        return [(place.device.type, place.dtype) for place in sums.sums_places(gpu, dtype, 3, data, copies)]

    whole, half, last = ("cuda", torch.float32), ("cuda", torch.float16), ("cpu", torch.float32)
    assert kinds(floats + rest + 1) == [whole, half, last]
    assert kinds(floats + rest - 1) == [half, last]
    assert kinds(floats + rest + 1, copies=2) == [half, last]
    assert kinds(halves // 2) == [last]
    assert kinds(halves // 2, torch.float16) == [("cpu", torch.float16)]
    assert [place.device.type for place in sums.sums_places(CPU, torch.float32, 3, data)] == ["cpu"]


@pytest.mark.parametrize("failing", [1, 2])
def test_each_place_that_turns_out_too_small_is_followed_by_the_next(monkeypatch, caplog, failing):
    places = [SumsPlace(CPU, torch.float32), SumsPlace(CPU, torch.float16), SumsPlace(CPU, torch.float32)]
    monkeypatch.setattr(sliding_window, "sums_places", lambda *arguments: places)

    class TooLarge(Pointwise):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls <= failing:
                raise torch.OutOfMemoryError("no memory")
            return super().forward(x)

    data = image(2, 10, 20, 30)
    logits = sliding_window_logits(TooLarge(), data, PATCH, 3, mirror_axes=None)
    kind = places[failing].dtype
    monkeypatch.undo()
    expected = sliding_window_logits(Pointwise(), data, PATCH, 3, mirror_axes=None, accumulation_dtype=kind)
    assert logits.dtype == kind and torch.equal(logits, expected)


def test_sums_of_networks_in_different_places():
    one, other = torch.ones(2, 3), torch.full((2, 3), 2.0, dtype=torch.float16)
    assert sums.sum_of(None, one) is one
    assert torch.equal(sums.sum_of(one, one.clone()), torch.full((2, 3), 2.0)) and one[0, 0] == 2
    assert torch.equal(sums.sum_of(other, one), torch.full((2, 3), 4.0))


@pytest.mark.cuda
def test_cuda_agrees_with_the_cpu(cuda_device):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(8, 3, 3, padding=1))
    data = image(2, 10, 20, 30)
    expected = sliding_window_logits(network, data, PATCH, 3)
    exact = sliding_window_logits(network, data, PATCH, 3, device=cuda_device, autocast_dtype=None)
    fast = sliding_window_logits(network, data, PATCH, 3, device=cuda_device)
    assert exact.device.type == fast.device.type == "cpu"
    torch.testing.assert_close(exact, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fast, expected, rtol=1e-2, atol=1e-2)


def test_the_first_sums_are_gone_when_they_are_begun_again_in_main_memory(monkeypatch):
    made, alive = [], []

    def allocate(shape, dtype):
        alive.append([sums() is not None for sums in made])
        sums = torch.zeros(shape, dtype=dtype)
        made.append(weakref.ref(sums))
        return sums

    class TooLargeOnce(Pointwise):
        def forward(self, x):
            if len(made) == 1:
                raise torch.OutOfMemoryError("no memory")
            return super().forward(x)

    places = [SumsPlace(CPU, torch.float32), SumsPlace(CPU, torch.float32)]
    monkeypatch.setattr(sliding_window, "sums_places", lambda *arguments: places)
    logits = sliding_window_logits(TooLargeOnce(), image(2, 10, 20, 30), PATCH, 3, mirror_axes=None, allocate=allocate)
    assert len(made) == 2 and alive == [[], [False]] and logits.shape == (3, 10, 20, 30)


def test_numbers_too_large_for_half_precision_are_computed_again_without_the_first_ones(caplog):
    seen = []

    def run(precision):
        seen.append((precision, [sums() is not None for sums in earlier]))
        sums = torch.full((2, 3), 1.0 if precision is None else torch.inf)
        earlier.append(weakref.ref(sums))
        yield 1, 1
        if not torch.isfinite(sums).all():
            raise PredictionError("the numbers are too large for float16")
        return sums

    earlier = []
    gpu = torch.device("cuda")
    assert torch.equal(finish(with_float32_as_fallback(run, torch.float16, gpu)), torch.ones(2, 3))
    assert seen == [(torch.float16, []), (None, [False])] and "again in float32" in caplog.text
    with pytest.raises(PredictionError):
        finish(with_float32_as_fallback(run, torch.float16, torch.device("cpu")))


@pytest.mark.parametrize(
    ("patch", "heads", "features", "free", "expected"),
    [
        ((128, 128, 128), 3, 64, 80 * 2**30, 8),
        ((192, 192, 192), 3, 64, 80 * 2**30, 4),  # 2³¹ elements of 64 features
        ((192, 192, 192), 118, 64, 80 * 2**30, 2),
        ((192, 192, 192), 118, 64, 12 * 2**30, 1),  # no memory for more
        ((160, 160, 160), 30, 64, 24 * 2**30, 4),
        ((64, 64, 64), 2, 0, 2**20, 1),
    ],
)
def test_as_many_tiles_at_once_as_fit(patch, heads, features, free, expected):
    assert tiles_at_once(patch, heads, features, free) == expected


def test_a_batch_that_was_too_large_is_not_tried_for_the_next_image(monkeypatch):
    class Small(Pointwise):
        sizes = ()

        def forward(self, x):
            self.sizes = (*self.sizes, len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("no memory")
            return super().forward(x)

    network, known = Small(), TileBatch(8)
    monkeypatch.setattr(sliding_window, "tile_batch", lambda *arguments: known)
    for _ in range(2):
        sliding_window_logits(network, image(2, 10, 20, 30), PATCH, 3)
    assert network.sizes[:3] == (8, 4, 2) and set(network.sizes[2:]) == {2}


def test_float32_on_a_gpu_is_float32_in_convolutions_and_products():
    def settings():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = settings()
    with exact_float32(torch.device("cuda")):
        assert settings() == (False, False)
    assert settings() == before
    with exact_float32(torch.device("cpu")):
        assert settings() == before
