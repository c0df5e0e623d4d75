"""Lesions counted one by one, with panoptica as the oracle where it is installed."""

import math

import numpy as np
import pytest
from scipy import ndimage

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.evaluation.lesions import LesionRule, lesion_measures
from nnssl_adapt.evaluation.measures import Judging
from nnssl_adapt.evaluation.surface import area_dice, surface_distances

SPACING = (3.0, 1.0, 0.5)


def empty():
    return np.zeros((9, 14, 17), bool)


def blobs(seed, shape=(13, 22, 27), threshold=0.45):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.1)
    return smooth > threshold * smooth.max()


def test_found_missed_and_invented_lesions_are_counted():
    reference, prediction = empty(), empty()
    reference[1:3, 1:3, 1:3] = reference[5, 5, 5:9] = reference[7:9, 10:12, 1] = True
    prediction[1:3, 1:3, 1:4] = True  # 8 of 12 voxels are right
    prediction[0, 13, 16] = True
    found = lesion_measures(prediction, reference, SPACING, LesionRule())
    assert found["LesionsReference"] == 3 and found["LesionsPredicted"] == 2
    assert found["LesionSensitivity"] == pytest.approx(1 / 3) and found["LesionPPV"] == 0.5
    assert found["LesionF1"] == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))
    assert found["LesionDice"] == pytest.approx(16 / 20)
    assert found["LesionwiseDice"] == pytest.approx(16 / 20 / 4)  # one pair, two missed, one invented


def test_connectivity_decides_what_is_one_lesion():
    reference = empty()
    reference[2, 2, 2] = reference[2, 3, 3] = reference[3, 4, 4] = True  # an edge apart, then a corner
    counts = [
        lesion_measures(reference, reference, SPACING, LesionRule(connectivity=c))["LesionsReference"]
        for c in (6, 18, 26)
    ]
    assert counts == [3, 2, 1]


def test_small_parts_are_no_lesions_on_either_side():
    reference, prediction = empty(), empty()
    reference[1, 1, 1:5] = prediction[1, 1, 1:5] = True  # 4 voxels of 1.5 mm³: 6 mm³
    reference[6, 6, 6] = prediction[8, 12, 12] = True
    found = lesion_measures(prediction, reference, SPACING, LesionRule(min_volume=6.0))
    assert (found["LesionsReference"], found["LesionsPredicted"], found["LesionF1"]) == (1, 1, 1.0)
    assert lesion_measures(prediction, reference, SPACING, LesionRule(min_volume=6.1))["LesionsReference"] == 0


def test_matching_one_to_one_against_any():
    """One large prediction over two lesions finds one of them, or both."""
    reference, prediction = empty(), empty()
    reference[2, 2, 1:5] = reference[2, 2, 6:9] = True
    prediction[2, 2, 1:9] = True
    alone = lesion_measures(prediction, reference, SPACING, LesionRule(overlap=0.2))
    assert alone["LesionSensitivity"] == 0.5 and alone["LesionPPV"] == 1
    both = lesion_measures(prediction, reference, SPACING, LesionRule(overlap=0.2, matching="any"))
    assert both["LesionSensitivity"] == 1 and both["LesionPPV"] == 1
    strict = LesionRule(overlap=0.9, matching="any")
    assert lesion_measures(prediction, reference, SPACING, strict)["LesionPPV"] == 0  # 7 of its 8 voxels are real


def test_nothing_to_find():
    some = empty()
    some[1, 2, 3] = True
    neither = lesion_measures(empty(), empty(), SPACING, LesionRule())
    assert math.isnan(neither["LesionF1"]) and neither["LesionsReference"] == 0
    missed = lesion_measures(empty(), some, SPACING, LesionRule())
    assert missed["LesionF1"] == 0 and missed["LesionSensitivity"] == 0 and math.isnan(missed["LesionPPV"])
    invented = lesion_measures(some, empty(), SPACING, LesionRule())
    assert invented["LesionF1"] == 0 and math.isnan(invented["LesionSensitivity"]) and invented["LesionwiseDice"] == 0


def test_all_mistakes_of_a_rule_are_told_together():
    with pytest.raises(ConfigurationError) as caught:
        LesionRule(connectivity=8, min_volume=-1, overlap=0, matching="best")
    assert len(caught.value.mistakes) == 4


@pytest.mark.parametrize("overlap", [0.1, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_panoptica_finds_the_same(seed, overlap):
    panoptica = pytest.importorskip("panoptica", reason="the oracle is installed where NumPy is old enough for it")
    reference = blobs(seed)
    prediction = (np.roll(reference, 1, axis=2) | blobs(seed + 100, threshold=0.7)) & ~blobs(seed + 200, threshold=0.6)
    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=overlap),
        instance_metrics=[panoptica.Metric.DSC],
    )
    theirs = evaluator.evaluate(prediction.astype(np.uint8), reference.astype(np.uint8), verbose=False)["ungrouped"]
    ours = lesion_measures(prediction, reference, SPACING, LesionRule(overlap=overlap))
    assert ours["LesionsReference"] == theirs.n_ref_instances and ours["LesionsPredicted"] == theirs.n_pred_instances
    assert ours["LesionF1"] == pytest.approx(theirs.rq)
    assert ours["LesionSensitivity"] * ours["LesionsReference"] == pytest.approx(theirs.tp)
    assert theirs.tp == 0 or ours["LesionDice"] == pytest.approx(theirs.sq_dsc)
    assert overlap > 0.1 or theirs.tp > 0


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.2])
@pytest.mark.parametrize("seed", range(3))
def test_surface_dice_by_area_is_that_of_surface_distance(seed, tolerance):
    pytest.importorskip("monai")
    oracle = pytest.importorskip("surface_distance")
    reference, prediction = blobs(seed), blobs(seed, threshold=0.5) | blobs(seed + 50, threshold=0.8)
    theirs = oracle.compute_surface_distances(reference, prediction, SPACING)
    expected = oracle.compute_surface_dice_at_tolerance(theirs, tolerance)
    ours = area_dice(prediction, reference, SPACING, tolerance)
    assert ours == pytest.approx(expected, abs=1e-6)
    assert ours != pytest.approx(surface_distances(prediction, reference, SPACING).dice_at(tolerance), abs=1e-3)


def test_without_monai_the_area_is_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "monai.metrics.utils", None)
    with pytest.raises(ConfigurationError) as caught:
        Judging(surface="area")
    assert "nnssl-adapt[monai]" in caught.value.next_command
