"""Further metrics and the rules for empty classes, on cases that can be worked out by hand."""

import csv
import json
import math

import numpy as np
import pytest
from support.synthetic import write_image

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import CaseError, ConfigurationError
from nnssl_adapt.evaluation.measures import Judging
from nnssl_adapt.evaluation.metrics import METRICS, evaluate_case, evaluate_folder, refuse_missing_predictions
from nnssl_adapt.evaluation.tables import summary_table, write_summary_csv

SPACING = (3.0, 1.0, 0.5)
SCHEME = LabelScheme.from_dataset_json({"labels": {"background": 0, "cord": 1, "lesion": 2, "rare": 3}})
REGIONS = LabelScheme.from_dataset_json(
    {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
)
DIAGONAL = math.sqrt((9 * 3) ** 2 + 19**2 + (29 * 0.5) ** 2)


@pytest.fixture
def files(tmp_path):
    """One case: cord one slice too high, lesion missed, nothing rare. Returns prediction and reference file."""
    reference = np.zeros((10, 20, 30), np.uint8)
    prediction = reference.copy()
    reference[2:4, 5:8, 10:14] = 1
    prediction[3:5, 5:8, 10:16] = 1
    reference[8, 1, 1:5] = 2
    paths = []
    for part, labels in (("prediction", prediction), ("reference", reference)):
        (tmp_path / part).mkdir()
        paths.append(tmp_path / part / "a.nii.gz")
        write_image(paths[-1], labels, SPACING)
    return paths


def test_of_one_case(files):
    cord = evaluate_case(*files, SCHEME, Judging(tolerance=1.0)).metrics[1]
    assert cord["Precision"] == pytest.approx(12 / 36) and cord["Recall"] == pytest.approx(12 / 24)
    assert cord["VolumeError"] == pytest.approx(12 * 1.5 / 1000)  # ml: 12 voxels too many of 1.5 mm³
    assert cord["RelativeVolumeError"] == pytest.approx(0.5)
    # Of 36 voxels predicted 12 are right, 6 lie 0.5 or 1 mm beside, 12 a slice above, 6 above and beside.
    above = [math.hypot(3, beside) for beside in (0.5, 1.0)] * 3
    beside = [0.5, 1.0] * 3
    assert cord["ASSD"] == pytest.approx((sum(beside) + 12 * 3 + sum(above) + 12 * 3) / (36 + 24))
    assert cord["HD95"] == pytest.approx(math.hypot(3, 1))
    assert cord["NSD"] == pytest.approx((12 + 6 + 12) / 60)
    assert set(METRICS) < set(cord)


@pytest.mark.parametrize(
    ("empty", "missed", "absent"),
    [
        ("nan", (0, 0, math.nan, math.nan), (math.nan, math.nan, math.nan, math.nan)),
        ("1", (0, 0, DIAGONAL, DIAGONAL), (1, 1, 0, 0)),
        ("0", (0, 0, DIAGONAL, DIAGONAL), (0, 0, DIAGONAL, DIAGONAL)),
    ],
)
def test_the_rule_for_empty_classes(files, empty, missed, absent):
    metrics = evaluate_case(*files, SCHEME, Judging(empty=empty)).metrics
    for entry, expected in ((2, missed), (3, absent)):
        got = [metrics[entry][name] for name in ("Dice", "NSD", "HD95", "ASSD")]
        assert got == pytest.approx(list(expected), nan_ok=True), entry
    assert metrics[2]["Recall"] == 0 and math.isnan(metrics[2]["Precision"]) == (empty == "nan")
    assert metrics[2]["VolumeError"] == pytest.approx(-4 * 1.5 / 1000)


def test_without_judging_nothing_but_nnunets_numbers(files):
    assert set(evaluate_case(*files, SCHEME).metrics[1]) == set(METRICS)


def test_regions_and_what_nobody_annotated(tmp_path):
    reference = np.zeros((10, 20, 30), np.uint8)
    reference[2:4, 5:8, 10:14] = 1
    reference[3, 6, 11:13] = 2
    prediction = np.where(reference > 0, 1, 0).astype(np.uint8)
    reference[8:, :, :] = 3  # ignored
    prediction[9, 19, 29] = 2
    prediction[3, 6, 11] = 2
    paths = [tmp_path / "p.nii.gz", tmp_path / "r.nii.gz"]
    for path, labels in zip(paths, (prediction, reference), strict=True):
        write_image(path, labels, SPACING)
    metrics = evaluate_case(*paths, REGIONS, Judging()).metrics
    assert metrics[(1, 2)]["Dice"] == metrics[(1, 2)]["NSD"] == 1 and metrics[(1, 2)]["HD95"] == 0
    assert metrics[2]["Recall"] == 0.5 and metrics[2]["Precision"] == 1
    assert metrics[2]["ASSD"] == pytest.approx(0.5 / 3)


def test_what_is_written_and_shown(files, tmp_path):
    summary = evaluate_folder(
        files[0].parent,
        files[1].parent,
        SCHEME,
        ".nii.gz",
        output=tmp_path / "summary.json",
        judging=Judging(tolerance=2.5),
    )
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["nnssl_adapt"]["tolerance_mm"] == 2.5 and content["nnssl_adapt"]["empty"] == "nan"
    assert content["nnssl_adapt"]["class_names"] == {"1": "cord", "2": "lesion", "3": "rare"}
    assert content["mean"]["1"]["HD95"] == pytest.approx(math.hypot(3, 1))
    shown = summary_table(summary)
    assert "cord" in shown and "at 2.5 mm" in shown
    assert "lesion: missed in 1 case(s), invented in 0" in shown and "rare: missed" not in shown
    write_summary_csv(tmp_path / "summary.csv", summary, ".nii.gz")
    with open(tmp_path / "summary.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["case"], row["class"], row["label"]) for row in rows] == [
        ("a", "cord", "1"),
        ("a", "lesion", "2"),
        ("a", "rare", "3"),
    ]
    assert float(rows[0]["ASSD"]) == summary.mean[1]["ASSD"] and rows[2]["Dice"] == ""


def test_in_processes_the_same(files):
    folders = files[0].parent, files[1].parent
    for name in "bc":
        for file in files:
            file.with_name(f"{name}.nii.gz").write_bytes(file.read_bytes())
    alone, together = (evaluate_folder(*folders, SCHEME, ".nii.gz", workers=n, judging=Judging()) for n in (1, 2))
    assert summary_table(alone) == summary_table(together)


def test_what_is_refused(files):
    folders = files[0].parent, files[1].parent
    write_image(files[0], np.full((10, 20, 30), 7, np.uint8), SPACING)
    evaluate_folder(*folders, SCHEME, ".nii.gz")  # nnU-Net does not mind
    with pytest.raises(CaseError, match=r"a\.nii\.gz.*dataset\.json.*7"):
        evaluate_folder(*folders, SCHEME, ".nii.gz", judging=Judging())
    write_image(files[0], np.zeros((10, 20, 30), np.uint8), (3.0, 1.0, 0.6))
    with pytest.raises(CaseError, match="spacing 3 × 1 × 0.6 mm"):
        evaluate_folder(*folders, SCHEME, ".nii.gz", judging=Judging())
    files[0].rename(files[0].with_name("other.nii.gz"))
    with pytest.raises(CaseError, match="lacks 1 of the 1 cases .* a; predict them"):
        refuse_missing_predictions(*folders, ".nii.gz")


@pytest.mark.parametrize("arguments", [{"tolerance": -1}, {"tolerance": math.nan}, {"empty": "2"}])
def test_senseless_settings(arguments):
    with pytest.raises(ConfigurationError):
        Judging(**arguments)
