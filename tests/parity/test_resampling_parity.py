"""Resampling against the real nnunetv2: intensities within float32's rounding, labels voxel by voxel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from nnssl_adapt.geometry.cropping import fill_holes, nonzero_box
from nnssl_adapt.geometry.labels import resample_labels
from nnssl_adapt.geometry.logits import logits_to_labels
from nnssl_adapt.geometry.resample import resample_image, resample_logits
from nnssl_adapt.geometry.spacing import median_spacing, resampled_shape, separate_z_axis

pytest.importorskip("nnunetv2")
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from nnunetv2.preprocessing.resampling.default_resampling import (
    compute_new_shape,
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)

CASES = [
    # shape, spacing, new spacing
    ((10, 20, 30), (1.3, 0.9, 1.1), (1.0, 1.0, 1.0)),
    ((13, 22, 17), (0.7, 1.5, 1.0), (1.0, 1.0, 1.0)),
    ((9, 20, 26), (5.0, 0.9, 0.7), (1.0, 1.0, 1.0)),  # separate z from the source, axis 0
    ((20, 9, 26), (0.9, 5.0, 0.7), (2.0, 2.0, 2.0)),  # axis 1
    ((20, 26, 9), (0.9, 0.7, 5.0), (0.8, 0.8, 3.0)),  # axis 2
    ((20, 26, 14), (1.0, 1.0, 1.0), (4.0, 1.0, 1.2)),  # from the target
    ((20, 12, 14), (0.3, 1.2, 1.2), (1.0, 1.0, 1.0)),  # two equally coarse axes: together
    ((1, 24, 20), (1.0, 0.8, 1.3), (1.0, 1.0, 1.0)),  # an axis of one voxel
    ((7, 1, 1), (1.0, 1.0, 1.0), (0.4, 0.5, 1.0)),
    ((12, 14, 16), (5.0, 1.0, 1.0), (5.0, 0.7, 0.9)),  # separate z, whose number of slices stays
    ((12, 14, 16), (5.0, 1.0, 1.0), (2.0, 1.0, 1.0)),  # only the number of slices changes
    ((12, 14, 16), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),  # nothing changes
]


def image_of(shape, channels=2, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(100, 30, (channels, *shape)).astype(np.float32)


def labels_of(shape, classes=5, seed=0, lowest=-1, smooth=1.5):
    random = np.random.default_rng(seed)
    field = gaussian_filter(random.normal(size=shape), smooth)
    edges = np.quantile(field, np.linspace(0, 1, classes + 1)[1:-1])
    return (np.digitize(field, edges) + lowest)[None].astype(np.int16)


@pytest.mark.parametrize(("shape", "spacing", "new_spacing"), CASES)
@pytest.mark.parametrize("force", [None, False, True])
def test_image(shape, spacing, new_spacing, force):
    image = image_of(shape)
    before = image.copy()
    new_shape = resampled_shape(shape, spacing, new_spacing)
    assert list(new_shape) == list(compute_new_shape(shape, spacing, new_spacing))
    ours = resample_image(image, new_shape, spacing, new_spacing, force_separate_z=force)
    theirs = resample_data_or_seg_to_shape(image, new_shape, spacing, new_spacing, False, 3, 0, force)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    # float32 products of values around 100: 1e-5 of a standard deviation once z-scored
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * 30)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(("order", "order_z"), [(0, 0), (1, 0), (1, 1), (3, 1)])
@pytest.mark.parametrize(("shape", "spacing", "new_spacing"), CASES[:6])
def test_other_orders(shape, spacing, new_spacing, order, order_z):
    image = image_of(shape)
    new_shape = resampled_shape(shape, spacing, new_spacing)
    ours = resample_image(image, new_shape, spacing, new_spacing, order, order_z)
    theirs = resample_data_or_seg_to_shape(image, new_shape, spacing, new_spacing, False, order, order_z, None)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * 30)


@pytest.mark.parametrize(("shape", "spacing", "new_spacing"), CASES)
@pytest.mark.parametrize("order", [0, 1])
def test_labels(shape, spacing, new_spacing, order):
    labels = labels_of(shape)
    before = labels.copy()
    new_shape = resampled_shape(shape, spacing, new_spacing)
    ours = resample_labels(labels, new_shape, spacing, new_spacing, order)
    theirs = resample_data_or_seg_to_shape(labels, new_shape, spacing, new_spacing, True, order, 0, None)
    assert ours.dtype == labels.dtype
    assert np.array_equal(ours, theirs)
    assert np.array_equal(labels, before)


@pytest.mark.parametrize(("shape", "spacing", "new_spacing"), CASES)
@pytest.mark.parametrize("force", [False, True])
def test_labels_with_and_without_slices_apart(shape, spacing, new_spacing, force):
    labels = labels_of(shape, smooth=0)
    arguments = (resampled_shape(shape, spacing, new_spacing), spacing, new_spacing)
    theirs = resample_data_or_seg_to_shape(labels, *arguments, True, 1, 0, force)
    assert np.array_equal(resample_labels(labels, *arguments, force_separate_z=force), theirs)


@pytest.mark.parametrize("values", [(-1, 0, 200), (0, 254), (-1, 254), (0, 255, 1000), (3, 3)])
def test_labels_of_any_size(values):
    labels = np.asarray(values, np.int16)[labels_of((9, 12, 11), len(values), lowest=0)]
    arguments = ((12, 10, 14), (1.0, 1.0, 1.0), (0.8, 1.2, 0.8))
    assert np.array_equal(
        resample_labels(labels, *arguments), resample_data_or_seg_to_shape(labels, *arguments, True, 1)
    )


small = st.integers(1, 12)
millimetres = st.floats(0.2, 6.0)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(small, small, small), st.tuples(small, small, small), st.tuples(*[millimetres] * 3), st.integers(0, 9999)
)
def test_random_volumes(shape, new_shape, spacing, seed):
    """Noise is the hardest: nearly every voxel lies between labels, and doubling and halving make exact ties."""
    labels = labels_of(shape, 4, seed, smooth=0)
    new_spacing = (1.0, 1.0, 1.0)
    theirs = resample_data_or_seg_to_shape(labels, new_shape, spacing, new_spacing, True, 1, 0, None)
    assert np.array_equal(resample_labels(labels, new_shape, spacing, new_spacing), theirs)
    image = image_of(shape, 1, seed)
    theirs = resample_data_or_seg_to_shape(image, new_shape, spacing, new_spacing, False, 3, 0, None)
    np.testing.assert_allclose(resample_image(image, new_shape, spacing, new_spacing), theirs, rtol=0, atol=1e-5 * 30)


@pytest.mark.parametrize(("shape", "spacing", "new_spacing"), CASES)
@pytest.mark.parametrize("classes", [2, 7])
def test_logits(shape, spacing, new_spacing, classes):
    random = np.random.default_rng(classes)
    logits = gaussian_filter(random.normal(size=(classes, *shape)), (0, 1, 1, 1)).astype(np.float16)
    new_shape = resampled_shape(shape, spacing, new_spacing)
    theirs = resample_data_or_seg_to_shape(logits, new_shape, spacing, new_spacing, False, 1, 0, None)
    ours = logits_to_labels(logits, new_shape, spacing, new_spacing)
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, theirs.argmax(0))
    np.testing.assert_allclose(
        resample_logits(logits, new_shape, spacing, new_spacing), theirs.astype(np.float32), rtol=1e-3, atol=1e-3
    )


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(*[st.sampled_from([0.5, 1.0, 1.5, 3.0, 3.01, 6.0])] * 3),
    st.tuples(*[st.sampled_from([1.0, 2.0, 3.5])] * 3),
)
def test_separate_z_axis(spacing, new_spacing):
    for force in (None, True, False):
        separate, axis = determine_do_sep_z_and_axis(force, spacing, new_spacing)
        assert separate_z_axis(spacing, new_spacing, force) == (axis if separate else None)


def test_cropping():
    random = np.random.default_rng(0)
    image = np.zeros((2, 12, 15, 18), np.float32)
    image[0, 2:9, 3:12, 1:15] = random.random((7, 9, 14)) > 0.3
    image[1, 4:10, 5:13, 4:16] = random.random((6, 8, 12)) > 0.5
    box = nonzero_box(image)
    cut = tuple(slice(*limits) for limits in box)
    mask = (image != 0).any(axis=0)[cut]
    assert np.array_equal(fill_holes(mask), create_nonzero_mask(image)[cut])
    hollow = np.ones((5, 6, 7), bool)
    hollow[1:3, 2:4, 3:6] = False
    assert fill_holes(hollow).all() and not hollow.all()
    hollow[2, 2, :] = False  # open to the outside
    assert np.array_equal(fill_holes(hollow), hollow)


def test_median_spacing():
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    random = np.random.default_rng(1)
    for number in range(30):
        spacings = random.uniform(0.5, 2.0, (6, 3)) * np.where(np.arange(3) == number % 4, random.uniform(1, 6), 1)
        shapes = random.integers(20, 300, (6, 3))
        if number % 2:
            shapes[:, number % 4 % 3] = random.integers(5, 30, 6)
        planner = ExperimentPlanner.__new__(ExperimentPlanner)
        planner.overwrite_target_spacing, planner.anisotropy_threshold = None, 3
        planner.dataset_fingerprint = {"spacings": spacings.tolist(), "shapes_after_crop": shapes.tolist()}
        assert median_spacing(spacings, shapes) == pytest.approx(
            tuple(planner.determine_fullres_target_spacing()), abs=0
        )
