"""Labels and probabilities on the image's own grid against nnU-Net's export of the same logits."""

import contextlib
import io

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from support.model_folders import plans_content

pytest.importorskip("nnunetv2")

from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.inference.export import logits_to_probabilities, logits_to_segmentation
from nnssl_adapt.planning.plan import FinetunePlan

LABELS = {"labels": {"background": 0, "a": 1, "b": 2, "c": 3, "d": 4}}
REGIONS = {
    "labels": {"background": 0, "whole": [1, 2, 3, 4], "core": [2, 3], "tip": 3, "other": [4], "last": [1, 4]},
    "regions_class_order": [1, 2, 3, 4, 1],
}
BOX = [[2, 21], [0, 27], [3, 34]]  # transposed axes
WHOLE = (24, 27, 36)


def export_both(content, scheme, shape, spacing, with_probabilities):
    """Logits of a smooth random field, exported by nnU-Net and by us."""
    noise = np.random.default_rng(5).normal(size=(5, *shape))
    logits = torch.from_numpy(10 * gaussian_filter(noise, (0, 1.5, 1.5, 1.5))).half()
    properties = {
        "spacing": list(spacing),
        "shape_before_cropping": WHOLE,
        "bbox_used_for_cropping": BOX,
        "shape_after_cropping_and_before_resampling": tuple(high - low for low, high in BOX),
    }
    peers = PlansManager(content)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.clone(),
            peers,
            peers.get_configuration("3d_fullres"),
            peers.get_label_manager(scheme),
            properties,
            return_probabilities=with_probabilities,
            num_threads_torch=1,
        )
    plan, labels = FinetunePlan(content), LabelScheme.from_dataset_json(scheme)
    export = logits_to_probabilities if with_probabilities else logits_to_segmentation
    return theirs, export(logits, properties, plan, labels)


CASES = {
    "same grid": ((0, 1, 2), (19, 27, 31), (2.0, 1.0, 1.5), (2.0, 1.0, 1.5)),
    "finer, transposed": ((1, 2, 0), (12, 20, 17), (2.0, 1.2, 1.5), (0.9, 1.1, 0.8)),
    "coarser": ((2, 0, 1), (30, 33, 45), (1.0, 0.9, 0.7), (1.2, 1.6, 1.1)),
    "slices apart in the image": ((0, 1, 2), (45, 20, 25), (2.0, 1.2, 1.5), (5.0, 0.9, 1.2)),
    "slices apart in the plan": ((0, 1, 2), (9, 20, 25), (5.0, 1.2, 1.5), (2.0, 0.9, 1.2)),
}


@pytest.mark.parametrize("scheme", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("name", CASES)
def test_labels_are_identical(name, scheme):
    transpose, shape, spacing, own = CASES[name]
    content = plans_content(transpose=transpose, spacing=spacing)
    theirs, ours = export_both(content, scheme, shape, own, False)
    assert len(np.unique(theirs)) > 3
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("scheme", [LABELS, REGIONS], ids=["labels", "regions"])
def test_labels_are_identical_where_images_keep_their_grid(scheme):
    content = plans_content(transpose=(1, 2, 0), keep_grid=True)
    theirs, ours = export_both(content, scheme, (19, 27, 31), (1.0, 2.0, 3.0), False)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("scheme", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("name", ["finer, transposed", "slices apart in the image"])
def test_probabilities_are_close(name, scheme):
    transpose, shape, spacing, own = CASES[name]
    content = plans_content(transpose=transpose, spacing=spacing)
    (their_labels, theirs), (our_labels, ours) = export_both(content, scheme, shape, own, True)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert (our_labels == their_labels).mean() >= 0.9999
