"""Which largest components are kept, on cases where it is plain what helps."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import write_image

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import CaseError
from nnssl_adapt.evaluation.postprocessing import determine_postprocessing

SCHEME = LabelScheme.from_dataset_json({"labels": {"background": 0, "cord": 1, "lesion": 2}})
SPACING = (3.0, 1.2, 0.8)


@pytest.fixture
def folders(tmp_path):
    """Cords in one piece with a false one far away; lesions in two pieces by nature, both found."""
    truth, predicted = tmp_path / "truth", tmp_path / "predicted"
    for folder in (truth, predicted):
        folder.mkdir()
    for number, name in enumerate("abc"):
        reference = np.zeros((9, 16, 20 + number), np.uint8)
        reference[1:5, 2:9, 3:12] = 1
        reference[2, 4, 5:8] = 2
        reference[4, 6, 9:11] = 2
        prediction = reference.copy()
        prediction[7, 13:15, 15:19] = 1
        write_image(truth / f"{name}.nii.gz", reference, SPACING)
        write_image(predicted / f"{name}.nii.gz", prediction, SPACING)
    return predicted, truth


@pytest.mark.parametrize("workers", [1, 2])
def test_what_helps_is_kept_and_done(folders, workers):
    decision = determine_postprocessing(*folders, SCHEME, ".nii.gz", workers)
    assert decision.postprocessing.steps == ((1, 2),)
    assert decision.before.mean[1]["Dice"] < decision.after.mean[1]["Dice"] == 1 and decision.after.mean[2]["Dice"] == 1
    predicted, truth = folders
    for name in "abc":
        done, wanted = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{name}.nii.gz")))
            for folder in (predicted / "postprocessed", truth)
        )
        assert np.array_equal(done, wanted)
    summary = json.loads((predicted / "postprocessed" / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] == 1
    assert summary["metric_per_case"][1]["prediction_file"] == str(predicted / "postprocessed" / "b.nii.gz")


def test_a_second_time_other_cases(folders):
    determine_postprocessing(*folders, SCHEME, ".nii.gz")
    (folders[0] / "b.nii.gz").unlink()
    decision = determine_postprocessing(*folders, SCHEME, ".nii.gz")
    assert len(decision.after.cases) == 2
    assert sorted(p.name for p in (folders[0] / "postprocessed").glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]


def test_what_hurts_is_left(folders):
    predicted, truth = folders
    for name in "abc":
        (predicted / f"{name}.nii.gz").write_bytes((truth / f"{name}.nii.gz").read_bytes())
    decision = determine_postprocessing(*folders, SCHEME, ".nii.gz")
    assert decision.postprocessing.steps == () and decision.after == decision.before
    assert len(list((predicted / "postprocessed").glob("*.nii.gz"))) == 3


def test_bad_folders(folders, tmp_path):
    predicted, truth = folders
    write_image(truth / "b.nii.gz", np.zeros((3, 4, 5), np.uint8), SPACING)
    with pytest.raises(CaseError, match="b: .*different shapes"):
        determine_postprocessing(predicted, truth, SCHEME, ".nii.gz")
    (truth / "b.nii.gz").unlink()
    with pytest.raises(CaseError, match=r"b: .*b\.nii\.gz: no such file"):
        determine_postprocessing(predicted, truth, SCHEME, ".nii.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaseError, match="has no predictions"):
        determine_postprocessing(tmp_path / "empty", truth, SCHEME, ".nii.gz")
