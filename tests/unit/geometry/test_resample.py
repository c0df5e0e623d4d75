"""What resampling must do without a peer to compare with."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.labels import resample_labels
from nnssl_adapt.geometry.logits import logits_to_labels
from nnssl_adapt.geometry.resample import resample_image, resample_logits

ONE = (1.0, 1.0, 1.0)
sizes = st.tuples(*[st.integers(1, 14)] * 3)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.floats(-1000, 1000), st.sampled_from([0, 1, 3]))
def test_constants_stay(shape, new_shape, value, order):
    image = np.full((1, *shape), value, np.float32)
    np.testing.assert_allclose(resample_image(image, new_shape, ONE, ONE, order), image.flat[0], rtol=1e-5, atol=1e-30)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(0, 99))
def test_nothing_leaves_the_range_or_invents_a_label(shape, new_shape, seed):
    random = np.random.default_rng(seed)
    image = random.normal(size=(1, *shape)).astype(np.float32)
    resampled = resample_image(image, new_shape, (4.0, 1.0, 1.0), ONE)
    assert resampled.min() >= image.min() and resampled.max() <= image.max()
    labels = random.choice([-1, 0, 3, 7], size=(1, *shape)).astype(np.int16)
    assert set(np.unique(resample_labels(labels, new_shape, ONE, ONE))) <= set(np.unique(labels))


def test_a_line_is_kept():
    """Doubling a linear ramp: exact inside, the edge sample continued outside."""
    ramp = np.arange(8, dtype=np.float32)[None, None, None].repeat(3, axis=1).repeat(5, axis=2)
    doubled = resample_image(ramp, (3, 5, 16), ONE, ONE, order=1)
    expected = np.clip(np.arange(16) / 2 - 0.25, 0, 7)
    np.testing.assert_allclose(doubled[0, 1, 2], expected, atol=1e-6)


def test_many_classes_and_the_largest_labels():
    logits = np.zeros((300, 3, 4, 5), np.float16)
    logits[299] = 1
    assert (logits_to_labels(logits, (5, 6, 7), ONE, ONE) == 299).all()
    logits = np.zeros((256, 3, 4, 5), np.float16)
    logits[255] = 1
    assert (logits_to_labels(logits, (5, 6, 7), ONE, ONE) == 255).all()
    labels = np.array([0, 32767], np.int16)[np.random.default_rng(0).integers(0, 2, (1, 3, 4, 5))]
    assert set(np.unique(resample_labels(labels, (5, 6, 7), ONE, ONE))) == {0, 32767}


@pytest.mark.parametrize("values", [(-32768, 32767), (-100, 200), (-1, 40_000)])
def test_labels_far_apart_are_resampled_like_their_ranks(values):
    ranks = np.random.default_rng(3).integers(0, 2, (1, 5, 7, 6))
    kind = np.int64 if max(values) > 32767 else np.int16
    new_shape, spacing, new_spacing = (8, 5, 9), (1, 1, 1), (0.6, 1.4, 0.7)

    found = resample_labels(np.array(values, kind)[ranks], new_shape, spacing, new_spacing)

    expected = resample_labels(ranks.astype(np.int16), new_shape, spacing, new_spacing)
    assert found.dtype == kind
    np.testing.assert_array_equal(found, np.array(values, kind)[expected])


def test_labels_are_the_winners_of_the_logits():
    logits = np.random.default_rng(0).normal(size=(4, 6, 9, 7)).astype(np.float32)
    for new_shape, spacing in (((8, 7, 11), ONE), ((12, 9, 7), (5.0, 1.0, 1.0)), ((6, 9, 7), ONE)):
        winners = resample_logits(logits, new_shape, spacing, ONE).argmax(0)
        assert np.mean(logits_to_labels(logits, new_shape, spacing, ONE) != winners) < 1e-2  # ties of float16


def test_views_and_other_types_are_fine_and_unchanged():
    image = np.random.default_rng(0).integers(0, 1000, (1, 7, 9, 8)).astype(np.uint16)
    view = image.transpose(0, 3, 1, 2)[:, ::-1]
    before = view.copy()
    np.testing.assert_array_equal(
        resample_image(view, (5, 10, 12), ONE, ONE),
        resample_image(view.astype(np.float32).copy(), (5, 10, 12), ONE, ONE),
    )
    assert np.array_equal(view, before)


def test_orders_that_do_not_exist():
    image = np.zeros((1, 2, 3, 4), np.float32)
    with pytest.raises(ConfigurationError, match="order 2"):
        resample_image(image, (3, 3, 3), ONE, ONE, order=2)
    with pytest.raises(ConfigurationError, match="order 3"):
        resample_labels(image.astype(np.int16), (3, 3, 3), ONE, ONE, order=3)
    with pytest.raises(ValueError, match="expected an array"):
        resample_image(image[0], (3, 3, 3), ONE, ONE)
