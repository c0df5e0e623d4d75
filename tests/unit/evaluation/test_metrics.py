"""Metrics of label maps whose overlaps can be counted by hand."""

import json
import math

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import write_image

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import CaseError
from nnssl_adapt.evaluation.measures import Judging
from nnssl_adapt.evaluation.metrics import compare_labels, evaluate_folder, load_summary
from nnssl_adapt.evaluation.tables import summary_table

SCHEME = LabelScheme.from_dataset_json({"labels": {"background": 0, "cord": 1, "lesion": 2}})


def test_counts_of_one_label():
    reference = np.array([0, 1, 1, 1, 2, 0], np.int16)
    prediction = np.array([0, 1, 1, 2, 1, 1], np.int16)
    metrics = compare_labels(prediction, reference, [1])[1]
    assert metrics == {
        "Dice": pytest.approx(4 / 7),
        "IoU": pytest.approx(2 / 5),
        "TP": 2,
        "FP": 2,
        "FN": 1,
        "TN": 1,
        "n_pred": 4,
        "n_ref": 3,
    }


def test_a_region_unites_its_labels():
    reference = np.array([0, 1, 2, 3, 3], np.int16)
    prediction = np.array([0, 2, 1, 3, 0], np.int16)
    metrics = compare_labels(prediction, reference, [(1, 2), (2, 3), 3])
    assert metrics[(1, 2)]["Dice"] == 1
    assert metrics[(2, 3)]["TP"] == 1 and metrics[(2, 3)]["FP"] == 1 and metrics[(2, 3)]["FN"] == 2
    assert metrics[3]["Dice"] == pytest.approx(2 / 3)


def test_ignored_voxels_count_nowhere():
    reference = np.array([1, 1, 9, 9, 0], np.int16)
    prediction = np.array([1, 0, 1, 0, 0], np.int16)
    metrics = compare_labels(prediction, reference, [1], ignore_label=9)[1]
    assert (metrics["TP"], metrics["FP"], metrics["FN"], metrics["TN"]) == (1, 0, 1, 1)


def test_labels_beyond_the_scheme_and_below_zero_are_just_other_labels():
    reference = np.array([1, 1, -1, 300], np.int16)
    prediction = np.array([1, 300, 1, 300], np.int16)
    metrics = compare_labels(prediction, reference, [1])[1]
    assert (metrics["TP"], metrics["FP"], metrics["FN"], metrics["TN"]) == (1, 1, 1, 1)


def test_a_class_in_neither_is_undefined_and_one_only_predicted_is_zero():
    empty = np.zeros((2, 3, 4), np.int16)
    assert math.isnan(compare_labels(empty, empty, [1])[1]["Dice"])
    assert compare_labels(empty + 1, empty, [1])[1]["Dice"] == 0


@pytest.fixture
def folders(tmp_path):
    """Case a is right; case b misses the cord by half; neither has a lesion but b's prediction."""
    for part in ("prediction", "reference"):
        (tmp_path / part).mkdir()
    for name in "ab":
        reference = np.zeros((10, 20, 30), np.uint8)
        reference[2:6, 5:15, 10:20] = 1
        prediction = reference.copy()
        if name == "b":
            prediction[2:4] = 0
            prediction[8, 0, :5] = 2
        write_image(tmp_path / "prediction" / f"{name}.nii.gz", prediction, (3, 1, 0.5))
        write_image(tmp_path / "reference" / f"{name}.nii.gz", reference, (3, 1, 0.5))
    return tmp_path / "prediction", tmp_path / "reference"


def test_means_leave_out_what_is_undefined(folders, tmp_path):
    summary = evaluate_folder(*folders, SCHEME, ".nii.gz", output=tmp_path / "summary.json")
    assert summary.mean[1]["Dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary.mean[2]["Dice"] == 0  # only case b counts: case a has no lesion anywhere
    assert summary.foreground_mean_dice == pytest.approx(5 / 12)
    assert "cord" in str(summary) and "0.4167" in str(summary)
    content = load_summary(tmp_path / "summary.json")
    assert content["mean"]["1"]["n_ref"] == 400
    assert math.isnan(content["metric_per_case"][0]["metrics"]["2"]["Dice"])
    assert content["metric_per_case"][1]["prediction_file"] == str(folders[0] / "b.nii.gz")
    assert json.loads(json.dumps(summary.to_dict()))["foreground_mean"] == content["foreground_mean"]


def test_a_value_with_two_names_is_judged_once(folders):
    twice = LabelScheme.from_dataset_json({"labels": {"background": 0, "cord": 1, "also_cord": 1}})
    assert str(evaluate_folder(*folders, twice, ".nii.gz")).count("cord") == 1


def test_cases_may_be_chosen_and_worked_on_in_processes(folders):
    assert evaluate_folder(*folders, SCHEME, ".nii.gz", cases=["a"]).mean[1]["Dice"] == 1
    alone, together = (evaluate_folder(*folders, SCHEME, ".nii.gz", workers=n) for n in (1, 2))
    assert str(alone) == str(together)
    assert [case.prediction_file for case in alone.cases] == [case.prediction_file for case in together.cases]


def test_another_shape_names_both_files(folders):
    write_image(folders[0] / "b.nii.gz", np.zeros((10, 20, 31), np.uint8), (3, 1, 0.5))
    with pytest.raises(CaseError) as caught:
        evaluate_folder(*folders, SCHEME, ".nii.gz")
    assert str(folders[0] / "b.nii.gz") in str(caught.value) and str(folders[1] / "b.nii.gz") in str(caught.value)
    assert "(10, 20, 31)" in str(caught.value)


def test_what_is_missing_is_named(folders, tmp_path):
    with pytest.raises(CaseError, match=r"c\.nii\.gz: no such file"):
        evaluate_folder(*folders, SCHEME, ".nii.gz", cases=["a", "c"])
    with pytest.raises(CaseError, match="no predictions"):
        evaluate_folder(*folders, SCHEME, ".nrrd")
    with pytest.raises(CaseError, match="no such folder"):
        evaluate_folder(tmp_path / "nowhere", folders[1], SCHEME, ".nii.gz")
    with pytest.raises(CaseError, match="there is no summary.json"):
        load_summary(tmp_path / "summary.json")


def folders_of_one_case(tmp_path, change):
    """A prediction that equals its reference, but for what ``change`` does to the stored image."""
    labels = np.zeros((6, 9, 12), np.uint8)
    labels[1:3, 2:7, 3:5], labels[4, 1:4, 8:11] = 1, 2
    for folder in ("predictions", "references"):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / folder / "a.nii.gz", labels, (3.0, 1.2, 0.8))
    path = tmp_path / "predictions" / "a.nii.gz"
    sitk.WriteImage(change(sitk.ReadImage(str(path))), str(path))
    return tmp_path / "predictions", tmp_path / "references", SCHEME, ".nii.gz"


@pytest.mark.parametrize("judging", [None, Judging()])
@pytest.mark.parametrize("code", ["LPS", "RAS", "SLP", "AIR"])
def test_another_order_of_voxels_at_the_same_place_is_undone(tmp_path, code, judging):
    arguments = folders_of_one_case(tmp_path, lambda image: sitk.DICOMOrient(image, code))
    summary = evaluate_folder(*arguments, judging=judging)
    assert summary.foreground_mean_dice == 1
    assert "geometry_differs" not in summary.to_dict()["metric_per_case"][0]


def test_another_place_is_marked_in_the_json_and_the_table(tmp_path):
    def moved(image):
        image.SetOrigin((5.0, 0.0, 0.0))
        return image

    summary = evaluate_folder(*folders_of_one_case(tmp_path, moved), judging=Judging())
    assert "origin" in summary.to_dict()["metric_per_case"][0]["geometry_differs"]
    assert "1 case(s) do not lie where their references do" in summary_table(summary)
