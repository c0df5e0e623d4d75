"""Undoing what preprocessing did: resampling, cropping, the order of axes."""

import numpy as np
import pytest
import torch
from support.model_folders import plans_content

from nnssl_adapt.data.images import ImageGeometry
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.preprocess import preprocess_arrays
from nnssl_adapt.data.properties import load_properties
from nnssl_adapt.errors import PlanError
from nnssl_adapt.inference.export import logits_to_probabilities, logits_to_segmentation, write_probabilities
from nnssl_adapt.planning.plan import FinetunePlan

SCHEME = LabelScheme.from_dataset_json({"labels": {"background": 0, "cord": 1, "lesion": 2}})
REGIONS = LabelScheme.from_dataset_json(
    {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
)
GEOMETRY = ImageGeometry((3.0, 1.2, 0.8), (1.0, -2.0, 3.0), (1.0, 0, 0, 0, 1, 0, 0, 0, 1), (20, 30, 40))


def case(plan, scheme=SCHEME):
    """An image with a border of zeros, different on each side; its labels (Z, Y, X), and both preprocessed."""
    labels = np.zeros(GEOMETRY.size, np.int16)
    labels[5:15, 8:25, 6:30] = 1
    labels[8:12, 12:20, 10:18] = 2
    image = np.zeros((1, *GEOMETRY.size), np.float32)
    image[:, 2:17, 3:28, 1:35] = 100
    image += 50 * labels * (image > 0)
    return labels, preprocess_arrays(image, labels[None], GEOMETRY, plan.settings, scheme)


def one_hot(seg):
    return torch.nn.functional.one_hot(torch.from_numpy(seg[0].clip(0)).long(), 3).movedim(-1, 0).float() * 4 - 2


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_without_resampling_labels_come_back_exactly_where_they_were(transpose):
    plan = FinetunePlan(plans_content(transpose=transpose, keep_grid=True))
    labels, preprocessed = case(plan)
    result = logits_to_segmentation(one_hot(preprocessed.seg), preprocessed.properties, plan, SCHEME)
    assert result.dtype == np.uint8 and result.flags.c_contiguous
    assert np.array_equal(result, labels)
    again, probabilities = logits_to_probabilities(one_hot(preprocessed.seg), preprocessed.properties, plan, SCHEME)
    assert np.array_equal(again, labels)
    assert probabilities.shape == (3, *GEOMETRY.size) and probabilities.dtype == np.float32
    assert np.array_equal(probabilities.argmax(0), labels)
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-6)
    assert np.array_equal(probabilities[:, 0, 0, 0], [1, 0, 0])


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0)])
def test_resampling_is_undone(transpose):
    plan = FinetunePlan(plans_content(transpose=transpose, spacing=(1.5, 1.0, 1.1)))
    labels, preprocessed = case(plan)
    assert preprocessed.data.shape[1:] != preprocessed.properties["shape_after_cropping_and_before_resampling"]
    result = logits_to_segmentation(one_hot(preprocessed.seg), preprocessed.properties, plan, SCHEME)
    assert result.shape == labels.shape
    assert (result == labels).mean() > 0.97
    # Labels don't depend on whether probabilities are asked for, which takes another way.
    again, probabilities = logits_to_probabilities(one_hot(preprocessed.seg), preprocessed.properties, plan, SCHEME)
    assert np.array_equal(again, result)
    assert np.array_equal(probabilities.argmax(0), result)


def test_regions_are_written_over_each_other():
    plan = FinetunePlan(plans_content(keep_grid=True))
    labels, preprocessed = case(plan, REGIONS)
    seg = torch.from_numpy(preprocessed.seg[0])
    logits = torch.stack([seg >= 1, seg >= 2]).float() * 6 - 3
    assert np.array_equal(logits_to_segmentation(logits, preprocessed.properties, plan, REGIONS), labels)
    again, probabilities = logits_to_probabilities(logits, preprocessed.properties, plan, REGIONS)
    assert np.array_equal(again, labels)
    assert np.array_equal(probabilities[:, 0, 0, 0], [0, 0])


def test_a_rule_other_than_the_usual_is_followed():
    content = plans_content(transpose=(0, 1, 2), spacing=(1.5, 1.0, 1.1))
    usual = FinetunePlan(content)
    _, preprocessed = case(usual)
    logits = one_hot(preprocessed.seg)
    chosen = plans_content(transpose=(0, 1, 2), spacing=(1.5, 1.0, 1.1))
    chosen["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"]["order"] = 3
    cubic = FinetunePlan(chosen)
    results = [logits_to_probabilities(logits, preprocessed.properties, plan, SCHEME)[1] for plan in (usual, cubic)]
    assert np.abs(results[0] - results[1]).max() > 0.01
    labels = logits_to_segmentation(logits, preprocessed.properties, cubic, SCHEME)
    assert np.array_equal(labels, results[1].argmax(0))


def test_more_than_254_labels_need_two_bytes():
    scheme = LabelScheme.from_dataset_json({"labels": {"background": 0, **{f"l{i}": i for i in range(1, 301)}}})
    plan = FinetunePlan(plans_content(transpose=(0, 1, 2), keep_grid=True))
    logits = torch.zeros(301, 2, 3, 4)
    logits[300, 1, 2, 3] = 1
    properties = {
        "spacing": [1, 1, 1],
        "shape_before_cropping": (2, 3, 4),
        "bbox_used_for_cropping": [[0, 2], [0, 3], [0, 4]],
        "shape_after_cropping_and_before_resampling": (2, 3, 4),
    }
    result = logits_to_segmentation(logits, properties, plan, scheme)
    assert result.dtype == np.uint16 and result[1, 2, 3] == 300 and np.count_nonzero(result) == 1


def test_logits_of_another_image_are_refused_where_nothing_is_resampled():
    plan = FinetunePlan(plans_content(keep_grid=True))
    _, preprocessed = case(plan)
    with pytest.raises(PlanError, match="keeps each image's grid"):
        logits_to_segmentation(torch.zeros(3, 4, 5, 6), preprocessed.properties, plan, SCHEME)


def test_probability_files_are_nnunets(tmp_path):
    probabilities = np.random.default_rng(0).random((3, 4, 5, 6), np.float32)
    write_probabilities(tmp_path / "sub-01.5", probabilities, {"spacing": [3.0, 1.0, 0.5]})
    assert np.array_equal(np.load(tmp_path / "sub-01.5.npz")["probabilities"], probabilities)
    assert load_properties(tmp_path / "sub-01.5.pkl") == {"spacing": [3.0, 1.0, 0.5]}
    assert len(list(tmp_path.iterdir())) == 2
