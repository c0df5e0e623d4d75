"""What comes in and what goes out: shapes, types, nothing to do, nothing modified."""

import numpy as np
import pytest
import torch

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.labels import resample_labels
from nnssl_adapt.geometry.logits import logits_to_labels
from nnssl_adapt.geometry.resample import resample_image, resample_logits
from nnssl_adapt.geometry.spacing import checked_spacing, resampled_shape

ONE = (1.0, 1.0, 1.0)
SHAPE = (10, 20, 30)
NEW_SHAPE = (13, 18, 31)


def image():
    return np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)


def labels():
    return np.random.default_rng(1).choice([-1, 0, 5, 300], size=(1, *SHAPE)).astype(np.int16)


@pytest.mark.parametrize("spacing", [ONE, (5.0, 1.0, 0.9)])
def test_the_same_shape_is_the_identity(spacing):
    assert np.array_equal(resample_image(image(), SHAPE, spacing, ONE), image())
    assert np.array_equal(resample_labels(labels(), SHAPE, spacing, ONE), labels())
    half = image().astype(np.float16)
    assert np.array_equal(resample_logits(half, SHAPE, spacing, ONE), half.astype(np.float32))
    assert np.array_equal(logits_to_labels(half, SHAPE, spacing, ONE), half.argmax(0))


@pytest.mark.parametrize("spacing", [ONE, (5.0, 1.0, 0.9), (1.0, 0.9, 5.0)])
@pytest.mark.parametrize("new_shape", [NEW_SHAPE, (10, 20, 17), (21, 20, 30)])
def test_inputs_can_be_read_only(spacing, new_shape):
    for function, array in (
        (resample_image, image()),
        (resample_labels, labels()),
        (resample_logits, image()),
        (logits_to_labels, image().astype(np.float16)),
    ):
        array.flags.writeable = False
        assert function(array, new_shape, spacing, ONE).shape[-3:] == new_shape


def test_labels_in_any_memory_order():
    turned = labels().transpose(0, 3, 1, 2)[:, ::-1]
    copied = np.ascontiguousarray(turned)
    for spacing in (ONE, (1.0, 5.0, 1.0)):
        expected = resample_labels(copied, (25, 12, 22), spacing, ONE)
        assert np.array_equal(resample_labels(turned, (25, 12, 22), spacing, ONE), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_as_tensors(dtype):
    tensor = torch.from_numpy(image()).to(dtype).requires_grad_()
    array = tensor.detach().float().numpy()
    assert np.array_equal(resample_logits(tensor, NEW_SHAPE, ONE, ONE), resample_logits(array, NEW_SHAPE, ONE, ONE))
    assert np.array_equal(logits_to_labels(tensor, NEW_SHAPE, ONE, ONE), logits_to_labels(array, NEW_SHAPE, ONE, ONE))


@pytest.mark.cuda
def test_logits_on_a_gpu(cuda_device):
    half = image().astype(np.float16)
    ours = logits_to_labels(torch.from_numpy(half).to(cuda_device), NEW_SHAPE, ONE, ONE)
    assert np.array_equal(ours, logits_to_labels(half, NEW_SHAPE, ONE, ONE))


def test_classes_are_compared_in_float16_unless_told_otherwise():
    """Two classes that differ by less than float16 can tell: the lowest wins, resampled or not."""
    logits = np.stack([np.full(SHAPE, 100.0), np.full(SHAPE, 100.001)]).astype(np.float32)
    for shape in (SHAPE, NEW_SHAPE):
        assert (logits_to_labels(logits, shape, ONE, ONE) == 0).all()
        assert (logits_to_labels(logits, shape, ONE, ONE, rounding=None) == 1).all()


@pytest.mark.parametrize("function", [resample_image, resample_labels, resample_logits, logits_to_labels])
@pytest.mark.parametrize("new_shape", [(3, 3), (3, 0, 3)])
def test_impossible_shapes_are_refused(function, new_shape):
    with pytest.raises(ValueError, match="expected an array"):
        function(np.zeros((1, 2, 3, 4), np.float32), new_shape, ONE, ONE)


@pytest.mark.parametrize("spacing", [(1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, float("inf"), 1.0), (1.0, 1.0), "abc"])
def test_impossible_spacings_are_refused(spacing):
    with pytest.raises(ConfigurationError, match="three positive numbers"):
        checked_spacing(spacing)
    for pair in ((spacing, ONE), (ONE, spacing)):
        with pytest.raises(ConfigurationError, match="three positive numbers"):
            resampled_shape(SHAPE, *pair)
