"""Random shapes, spacings, orders of axes and voxel types: the same preprocessed arrays as from nnunetv2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.peer_preprocessing import assert_same_locations, plans_of
from support.peer_preprocessing import settings as preprocess_settings

nnunetv2 = pytest.importorskip("nnunetv2")

from nnssl_adapt.data.images import ImageGeometry  # noqa: E402
from nnssl_adapt.data.labels import LabelScheme  # noqa: E402
from nnssl_adapt.data.preprocess import preprocess_arrays  # noqa: E402

DATASET = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1, "b": 2, "c": 3}, "file_ending": ".nii.gz"}
ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]

sizes = st.tuples(*[st.one_of(st.integers(1, 3), st.integers(4, 24))] * 3)
# Ratios on both sides of 3, where nnU-Net resamples slices apart.
spacings = st.tuples(*[st.sampled_from([0.45, 0.7, 1.0, 1.3, 2.0, 2.9, 3.1, 5.0])] * 3)


def image_and_labels(shape: tuple[int, ...], dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image with a border of zeros in places, and labels of blobs."""
    random = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij")
    distance = sum(axis**2 for axis in axes)
    image = 200 + 150 * np.sin(3 * axes[0] + 5 * axes[1]) * np.cos(4 * axes[2]) + 5 * random.normal(size=shape)
    image = np.where(distance < random.uniform(0.8, 4), image, 0)
    labels = np.where(distance < 0.7, 1 + random.integers(0, 2) + (axes[1] > 0), 0)
    labels = np.where(random.random(shape) < 0.02, random.integers(0, 4, shape), labels)
    return image[None].astype(dtype), labels[None].astype(np.uint8)


def theirs(image: np.ndarray, labels: np.ndarray, spacing: tuple[float, ...], chosen: Any) -> tuple[Any, Any, Any]:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(plans_of(chosen))
    properties = {"spacing": list(spacing)}
    return DefaultPreprocessor(verbose=False).run_case_npy(
        image.astype(np.float32),  # as its reader hands it over
        labels.astype(np.int8),
        properties,
        plans,
        plans.get_configuration("3d_fullres"),
        DATASET,
    )


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    shape=sizes,
    spacing=spacings,
    target=st.one_of(st.none(), spacings),
    order=st.sampled_from(ORDERS),
    dtype=st.sampled_from(["uint8", "int16", "uint16", "float32"]),
    masked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_image_is_preprocessed_as_by_nnunet(shape, spacing, target, order, dtype, masked, seed):
    image, labels = image_and_labels(shape, dtype, seed)
    chosen = preprocess_settings(transpose_forward=order, spacing=target, use_mask_for_norm=(masked,))
    geometry = ImageGeometry(size=shape, spacing=spacing, origin=(0.0, 0.0, 0.0), direction=tuple(np.eye(3).ravel()))
    ours = preprocess_arrays(image, labels, geometry, chosen, LabelScheme.from_dataset_json(DATASET))
    # Where nothing is left of an axis, nnU-Net fails; the test of resampled_shape says what we do.
    cropped = ours.properties["shape_after_cropping_and_before_resampling"]
    extent = [n * spacing[axis] for n, axis in zip(cropped, order, strict=True)]
    assume(target is None or all(round(length / step) >= 1 for length, step in zip(extent, target, strict=True)))
    data, seg, properties = theirs(image, labels, spacing, chosen)
    assert ours.seg is not None
    assert ours.data.shape == data.shape
    np.testing.assert_allclose(ours.data, data, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(ours.seg, seg)
    assert ours.properties["bbox_used_for_cropping"] == properties["bbox_used_for_cropping"]
    assert_same_locations(ours.properties["class_locations"], properties["class_locations"])
