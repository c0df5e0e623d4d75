"""The winner at every voxel, on the grid that the logits already have: numpy's argmax, whatever the signs."""

import numpy as np
import pytest

from nnssl_adapt.geometry.logits import logits_to_labels

ONE = (1.0, 1.0, 1.0)
SHAPE = (5, 7, 11)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("classes", [1, 2, 9, 300])
@pytest.mark.parametrize("offset", [-3.0, 0.0, 3.0])
def test_it_is_the_argmax(dtype, classes, offset):
    logits = (np.random.default_rng(classes).normal(size=(classes, *SHAPE)) + offset).astype(dtype)
    labels = logits_to_labels(logits, SHAPE, ONE, ONE, rounding=None)
    assert np.array_equal(labels, logits.argmax(0))
    assert labels.dtype == (np.uint8 if classes < 256 else np.uint16)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_negative_and_positive_zero_are_equal(dtype):
    random = np.random.default_rng(0)
    values = np.array([0.0, -0.0, -1.0, -np.finfo(dtype).smallest_subnormal, np.finfo(dtype).smallest_subnormal], dtype)
    logits = random.choice(values, (4, *SHAPE))
    assert np.array_equal(logits_to_labels(logits, SHAPE, ONE, ONE, rounding=None), logits.argmax(0))


def test_many_slabs():
    shape = (40, 41, 43)
    logits = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
    assert np.array_equal(logits_to_labels(logits, shape, ONE, ONE), logits.astype(np.float16).argmax(0))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 50.0, 4e4])
def test_float32_logits_are_compared_as_float16(scale):
    """Many ties after rounding, negative and tiny numbers, and numbers that float16 has not."""
    rng = np.random.default_rng(3)
    logits = (scale * rng.normal(size=(5, 10, 20, 30))).astype(np.float32)
    logits[3] = logits[1] * np.float32(1.0002)  # often equal when rounded, and then the lower class wins
    logits[:, :2] = -np.abs(logits[:, :2])
    with np.errstate(over="ignore"):
        expected = logits.astype(np.float16).argmax(0)
    assert np.array_equal(logits_to_labels(logits, (10, 20, 30), (1, 1, 1), (1, 1, 1)), expected)
    if scale == 1.0:
        assert not np.array_equal(expected, logits.argmax(0))
