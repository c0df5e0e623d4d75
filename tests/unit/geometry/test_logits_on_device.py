"""Labels where the logits are: the CPU path's, voxel by voxel, by the same arithmetic on tensors of the CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnssl_adapt.geometry.logits import logits_to_labels
from nnssl_adapt.geometry.logits_on_device import labels_on_device, rounded_once

SIZES = st.tuples(*[st.integers(1, 9)] * 3)
SPACINGS = st.sampled_from([(1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (0.9, 6.0, 1.1)])
KINDS = ("smooth", "ties", "near", "tiny")


def made(kind, classes, shape, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(classes, *shape)).astype(np.float32) * 5
    if kind == "ties":  # few values: exact ties at many places, and weights such as 1/2 make more
        logits = rng.integers(-2, 3, size=(classes, *shape)).astype(np.float32) / 4
    elif kind == "near":  # differences of about float16's resolution
        logits = (8 + rng.normal(size=(1, *shape)) + 0.004 * rng.normal(size=(classes, *shape))).astype(np.float32)
    elif kind == "tiny":
        logits = logits * np.float32(1e-7)
    return logits.astype(dtype)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 6), SIZES, SIZES, SPACINGS, SPACINGS, st.integers(0, 9999), st.booleans())
def test_labels_are_those_of_the_cpu_path(kind, classes, old, new, spacing, new_spacing, seed, half):
    logits = made(kind, classes, old, seed, np.float16 if half else np.float32)
    expected = logits_to_labels(logits, new, spacing, new_spacing)
    found = labels_on_device(torch.from_numpy(logits), new, spacing, new_spacing, slab=1 + seed % 200)
    assert found.shape == new and np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("classes", [2, 300])
def test_on_the_same_grid(classes):
    logits = made("near", classes, (6, 7, 11), 3)
    found = labels_on_device(torch.from_numpy(logits), (6, 7, 11), (1, 1, 1), (1, 1, 1))
    assert np.array_equal(found.numpy(), logits.astype(np.float16).argmax(0))
    assert found.dtype == (torch.uint8 if classes < 256 else torch.int16)


def test_the_logits_stay_as_they_are_and_need_not_be_contiguous():
    logits = torch.from_numpy(made("smooth", 3, (12, 10, 8), 5))
    kept, view = logits.clone(), logits[:, 1:9, 2:, ::1]
    for shape in ((8, 8, 8), (16, 9, 5)):
        found = labels_on_device(view, shape, (1, 1, 1), (1, 1, 1))
        expected = logits_to_labels(view.contiguous().numpy(), shape, (1, 1, 1), (1, 1, 1))
        assert np.array_equal(found.numpy(), expected)
    assert torch.equal(logits, kept)


@given(st.floats(-7e4, 7e4, allow_nan=False), st.integers(-3, 3))
def test_rounding_is_numpys(value, steps):
    half = np.float16(np.clip(value, -6e4, 6e4)).astype(np.float64)
    between = half + np.spacing(np.float16(half)).astype(np.float64) / 2
    for number in (value, between, np.nextafter(between, np.inf * (steps or 1)), np.nextafter(half, -np.inf)):
        with np.errstate(over="ignore"):
            expected = np.float64(number).astype(np.float16)
        found = rounded_once(torch.tensor([number], dtype=torch.float64))
        assert found.numpy().astype(np.float16)[0] == expected, number


@pytest.mark.cuda
@pytest.mark.parametrize("new", [(40, 50, 60), (61, 47, 83)])
def test_on_a_gpu(new, cuda_device):
    logits = made("near", 7, (40, 50, 60), 8)
    found = labels_on_device(torch.from_numpy(logits).to(cuda_device), new, (1, 1, 1), (1, 1, 1), slab=20_000)
    assert np.array_equal(found.cpu().numpy(), logits_to_labels(logits, new, (1, 1, 1), (1, 1, 1)))
