"""Logits to labels against the real nnunetv2, voxel by voxel; and what decides ties in the last bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom

from nnssl_adapt.geometry.interpolation import linear_taps
from nnssl_adapt.geometry.logits import logits_to_labels

pytest.importorskip("nnunetv2")
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

ONE = (1.0, 1.0, 1.0)
SPACINGS = [ONE, (5.0, 1.0, 1.1), (1.0, 6.0, 0.9), (0.9, 1.0, 4.0)]
sizes = st.tuples(*[st.integers(1, 12)] * 3)


def peers_labels(logits, new_shape, spacing):
    return resample_data_or_seg_to_shape(logits, new_shape, spacing, ONE, False, 1, 0, None).argmax(0)


def logits_of(kind, classes, shape, seed):
    random = np.random.default_rng(seed)
    size = (classes, *shape)
    return {
        "noise": lambda: random.normal(size=size),
        # A common offset much larger than the differences: classes that differ in the source tie once rounded.
        "offset": lambda: 0.02 * random.normal(size=size) + random.normal(0, 40, (1, *shape)),
        # Exact ties, and values halfway between two float16 numbers.
        "integers": lambda: random.integers(-4, 5, size).astype(float),
        "octaves": lambda: random.integers(1, 9, size) * np.exp2(random.integers(-4, 6, size)),
        "subnormal": lambda: 1e-6 * random.normal(size=size),
    }[kind]()


@pytest.mark.parametrize("kind", ["noise", "offset", "integers", "octaves", "subnormal"])
@settings(max_examples=25, deadline=None)
@given(
    shape=sizes,
    new_shape=sizes,
    spacing=st.sampled_from(SPACINGS),
    classes=st.integers(1, 5),
    seed=st.integers(0, 9999),
)
def test_identical_labels(kind, shape, new_shape, spacing, classes, seed):
    half = logits_of(kind, classes, shape, seed).astype(np.float16)
    before = half.copy()
    assert np.array_equal(logits_to_labels(half, new_shape, spacing, ONE), peers_labels(half, new_shape, spacing))
    assert np.array_equal(half, before)
    single = logits_of(kind, classes, shape, seed).astype(np.float32)
    theirs = peers_labels(single, new_shape, spacing)
    assert np.array_equal(logits_to_labels(single, new_shape, spacing, ONE, rounding=None), theirs)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_views_and_tensors(spacing):
    half = logits_of("noise", 4, (8, 13, 10), 0).astype(np.float16).transpose(0, 2, 3, 1)[:, ::-1]
    new_shape = (12, 9, 17)
    theirs = peers_labels(half, new_shape, spacing)
    assert np.array_equal(logits_to_labels(half, new_shape, spacing, ONE), theirs)
    assert np.array_equal(logits_to_labels(torch.from_numpy(half.copy()), new_shape, spacing, ONE), theirs)


def test_more_voxels_than_are_settled_at_a_time():
    """Noise of five classes: nearly every output voxel is settled, in several chunks."""
    half = logits_of("noise", 5, (20, 30, 25), 1).astype(np.float16)
    new_shape = (41, 50, 33)
    ours = logits_to_labels(half, new_shape, (1.0, 1.3, 1.1), ONE)
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, peers_labels(half, new_shape, (1.0, 1.3, 1.1)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 9999))
def test_linear_taps_are_scipys_to_the_last_bit(n_in, n_out, seed):
    """Beyond the edges too, where two fractions of the same sample add up."""
    line = np.random.default_rng(seed).normal(size=n_in)
    taps = linear_taps(n_in, n_out)
    ours = line[taps.low] * taps.weight_low + line[taps.high] * taps.weight_high
    assert np.array_equal(ours, zoom(line, n_out / n_in, order=1, mode="nearest", grid_mode=True))
