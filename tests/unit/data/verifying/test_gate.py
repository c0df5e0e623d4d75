from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import make_dataset, write_image

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.verifying.gate import verify_dataset
from nnssl_adapt.errors import DatasetError

SHAPE = (8, 12, 10)
SPACING = (2.0, 1.0, 1.3)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_good_dataset_has_no_problems(tmp_path: Path, workers: int) -> None:
    dataset = RawDataset.open(make_dataset(tmp_path, cases=3, channels=2, shape=SHAPE, ignore=True))
    report = verify_dataset(dataset, workers=workers)
    assert report.problems == () and report.warnings == () and report.num_cases == 3
    report.raise_if_bad()


def test_everything_wrong_is_reported_at_once(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=9, shape=SHAPE, spacing=SPACING)
    images, labels = root / "imagesTr", root / "labelsTr"
    write_image(labels / "case_00.nii.gz", np.zeros((8, 12, 11), np.uint8), SPACING)
    write_image(labels / "case_01.nii.gz", np.zeros((9, 13, 11), np.uint8), (2.0, 1.0, 1.4))
    wrong = sitk.GetArrayFromImage(sitk.ReadImage(str(labels / "case_02.nii.gz")))
    wrong[3, 4, 5:7] = (9, 7)
    write_image(labels / "case_02.nii.gz", wrong, SPACING)
    broken = sitk.GetArrayFromImage(sitk.ReadImage(str(images / "case_03_0000.nii.gz"))).astype(np.float32)
    broken[1, 1, 1] = np.nan
    write_image(images / "case_03_0000.nii.gz", broken, SPACING)
    content = (images / "case_04_0000.nii.gz").read_bytes()
    (images / "case_04_0000.nii.gz").write_bytes(content[: len(content) // 2])
    (labels / "case_05.nii.gz").write_text("no image")
    write_image(labels / "case_06.nii.gz", np.full(SHAPE, 0.5), SPACING)
    report = verify_dataset(RawDataset.open(root))
    found = {(problem.case, problem.file.name): problem.message for problem in report.problems}
    assert "shape 8 × 12 × 11" in found["case_00", "case_00.nii.gz"]
    assert "spacing 2 × 1 × 1.4 mm" in found["case_01", "case_01.nii.gz"]
    assert "label value(s) 7, 9; dataset.json has 0, 1, 2" in found["case_02", "case_02.nii.gz"]
    assert "1 voxels are NaN" in found["case_03", "case_03_0000.nii.gz"]
    assert "truncated" in found["case_04", "case_04_0000.nii.gz"]
    assert "can't be read" in found["case_05", "case_05.nii.gz"]
    assert "whole numbers" in found["case_06", "case_06.nii.gz"]
    assert {case for case, _ in found} == {f"case_{n:02d}" for n in range(7)}
    for (_, file), message in found.items():
        assert file in message
    with pytest.raises(DatasetError, match=r"7 of 9 cases can't be used"):
        report.raise_if_bad()


def test_what_may_be_meant_so_is_a_warning(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=3, shape=SHAPE, spacing=SPACING)
    write_image(root / "labelsTr" / "case_00.nii.gz", np.zeros(SHAPE, np.uint8), SPACING)
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(root / "labelsTr" / "case_01.nii.gz")))
    write_image(root / "labelsTr" / "case_01.nii.gz", label, SPACING, origin=(1, -2, 8))
    write_image(root / "imagesTr" / "case_02_0000.nii.gz", np.zeros((10, 14, 12), np.int16), SPACING)
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "numTraining": 4}))
    report = verify_dataset(RawDataset.open(root))
    assert not report.problems
    text = "\n".join(report.warnings)
    assert "'numTraining' is 4, but there are 3 cases" in text
    assert "case_00.nii.gz has no foreground" in text
    assert "case_01.nii.gz: origin 1 × -2 × 8 mm" in text
    assert "case_02_0000.nii.gz is zero everywhere" in text
    assert len(report.warnings) == 4


def test_only_the_first_problems_are_listed(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=23, shape=(3, 4, 5))
    for path in (root / "labelsTr").iterdir():
        path.write_text("no image")
    with pytest.raises(DatasetError) as caught:
        verify_dataset(RawDataset.open(root)).raise_if_bad()
    assert len(str(caught.value).splitlines()) == 22
    assert "... and 3 more problems" in str(caught.value)


def test_a_label_whose_image_is_missing_is_a_problem(tmp_path):
    folder = make_dataset(tmp_path, cases=3)
    (folder / "imagesTr" / "case_01_0000.nii.gz").unlink()
    report = verify_dataset(RawDataset.open(folder))
    assert [problem.case for problem in report.problems] == ["case_01"]
    assert "has no image" in str(report)
