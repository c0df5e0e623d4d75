import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_fill_holes

from nnssl_adapt.geometry import cropping
from nnssl_adapt.geometry.cropping import fill_holes, nonzero_box


def test_the_box_holds_every_channel():
    image = np.zeros((2, 10, 20, 30), np.float32)
    image[0, 2, 5, 7] = 1
    image[1, 6, 3, 21] = -1
    assert nonzero_box(image) == ((2, 7), (3, 6), (7, 22))


def test_an_empty_image_is_kept_whole():
    assert nonzero_box(np.zeros((1, 4, 5, 6), np.float32)) == ((0, 4), (0, 5), (0, 6))


@pytest.mark.parametrize("few", [0.0, 1.0], ids=["by labelling", "by neighbours"])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), density=st.floats(0.0, 1.0), seed=st.integers(0, 9999))
def test_holes_are_scipys(few, shape, density, seed, monkeypatch):
    monkeypatch.setattr(cropping, "_FEW", few)
    mask = np.random.default_rng(seed).random(shape) < density
    before = mask.copy()
    assert np.array_equal(fill_holes(mask), binary_fill_holes(mask))
    assert np.array_equal(mask, before)


def test_caves_stay_open_and_bubbles_are_filled():
    """A ball with a bubble, a bent cave that starts at its surface, and a pit that is open along the first axis only."""
    z, y, x = np.ogrid[-12:13, -16:17, -20:21]
    ball = (z / 12) ** 2 + (y / 16) ** 2 + (x / 20) ** 2 <= 1
    mask = ball.copy()
    mask[10:13, 14:17, 16:20] = False  # bubble
    mask[12, :20, 24] = mask[12, 19, 24:30] = mask[12:16, 19, 29] = False  # cave
    mask[:9, 18, 14] = False  # pit
    filled = fill_holes(mask)
    assert np.array_equal(filled, binary_fill_holes(mask))
    assert filled[11, 15, 17] and not filled[15, 19, 29] and not filled[8, 18, 14]


@pytest.mark.parametrize("value", [False, True])
def test_the_result_is_a_copy(value):
    mask = np.full((3, 4, 5), value)
    filled = fill_holes(mask)
    assert np.array_equal(filled, mask) and not np.shares_memory(filled, mask)


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 40)] * 3), points=st.integers(0, 4), seed=st.integers(0, 9999))
def test_the_box_is_that_of_all_voxels(shape, points, seed):
    random = np.random.default_rng(seed)
    channels = [np.zeros(shape, np.float32) for _ in range(2)]
    for _ in range(points):
        channels[random.integers(2)][tuple(random.integers(0, n) for n in shape)] = random.choice([-1, np.nan, 5])
    where = np.argwhere((channels[0] != 0) | (channels[1] != 0))
    low, high = ((0, 0, 0), shape) if len(where) == 0 else (where.min(0), where.max(0) + 1)
    assert nonzero_box(channels) == tuple((int(a), int(b)) for a, b in zip(low, high, strict=True))
