import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_fill_holes

from nnssl_adapt.geometry.cropping import fill_holes, nonzero_box


def test_the_box_holds_every_channel():
    image = np.zeros((2, 10, 20, 30), np.float32)
    image[0, 2, 5, 7] = 1
    image[1, 6, 3, 21] = -1
    assert nonzero_box(image) == ((2, 7), (3, 6), (7, 22))


def test_an_empty_image_is_kept_whole():
    assert nonzero_box(np.zeros((1, 4, 5, 6), np.float32)) == ((0, 4), (0, 5), (0, 6))


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.floats(0.3, 1.0), st.integers(0, 9999))
def test_holes_are_scipys(shape, density, seed):
    mask = np.random.default_rng(seed).random(shape) < density
    before = mask.copy()
    assert np.array_equal(fill_holes(mask), binary_fill_holes(mask))
    assert np.array_equal(mask, before)


@pytest.mark.parametrize("value", [False, True])
def test_the_result_is_a_copy(value):
    mask = np.full((3, 4, 5), value)
    filled = fill_holes(mask)
    assert np.array_equal(filled, mask) and not np.shares_memory(filled, mask)
