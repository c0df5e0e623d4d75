from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import make_dataset, write_image

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.nifti import open_nifti
from nnssl_adapt.data.verifying.examine import examine_dataset, fingerprint_dataset, verify_dataset
from nnssl_adapt.data.verifying.look import CaseLook, LookRequest, look_at_case
from nnssl_adapt.errors import DatasetError

SHAPE = (8, 12, 10)
SPACING = (2.0, 1.0, 1.3)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_good_dataset_has_no_findings(tmp_path: Path, workers: int) -> None:
    root = make_dataset(tmp_path, cases=3, channels=2, shape=SHAPE, ignore=True)
    examination = examine_dataset(root, workers=workers)
    assert examination.verdict.findings == () and examination.verdict.num_cases == 3
    assert examination.fingerprint is not None and set(examination.fingerprint.intensity) == {"0", "1"}
    examination.verdict.raise_if_bad()


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
    examination = examine_dataset(root)
    errors = {finding.case: finding.message for finding in examination.verdict.errors}
    expected = {
        "case_00": ("case_00.nii.gz", "shape 8 × 12 × 11"),
        "case_01": ("case_01.nii.gz", "spacing 2 × 1 × 1.4 mm"),
        "case_02": ("case_02.nii.gz", "7, 9"),
        "case_03": ("case_03_0000.nii.gz", "1 voxels are NaN"),
        "case_04": ("case_04_0000.nii.gz", "truncated"),
        "case_05": ("case_05.nii.gz", "can't be read"),
        "case_06": ("case_06.nii.gz", "whole numbers"),
    }
    assert errors.keys() == expected.keys() and examination.fingerprint is None
    for case, words in expected.items():
        assert all(word in errors[case] for word in words), errors[case]
    with pytest.raises(DatasetError) as caught:
        examination.verdict.raise_if_bad()
    assert caught.value.path == root and len(caught.value.mistakes) == 7
    assert "7 of 9 cases" in str(caught.value) and caught.value.next_command == f"nnssl-adapt verify -d {root.name}"


def test_what_may_be_intended_is_a_warning(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=3, shape=SHAPE, spacing=SPACING)
    write_image(root / "labelsTr" / "case_00.nii.gz", np.zeros(SHAPE, np.uint8), SPACING)
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(root / "labelsTr" / "case_01.nii.gz")))
    write_image(root / "labelsTr" / "case_01.nii.gz", label, SPACING, origin=(1, -2, 8))
    write_image(root / "imagesTr" / "case_02_0000.nii.gz", np.zeros((10, 14, 12), np.int16), SPACING)
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "numTraining": 4}))
    verdict = verify_dataset(root)
    assert verdict.is_good
    assert {(finding.case, finding.check) for finding in verdict.warnings} == {
        ("-", "numTraining"),
        ("case_00", "labels"),
        ("case_01", "geometry"),
        ("case_02", "constant"),
    }
    assert "origin 1 × -2 × 8 mm" in str(verdict)


def test_only_the_first_errors_are_listed(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=23, shape=(3, 4, 5))
    for path in (root / "labelsTr").iterdir():
        path.write_text("no image")
    with pytest.raises(DatasetError) as caught:
        verify_dataset(root).raise_if_bad()
    assert len(str(caught.value).splitlines()) == 22 and len(caught.value.mistakes) == 23
    assert "and 3 more" in str(caught.value)


def test_a_label_whose_image_is_missing_is_an_error(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=3)
    (root / "imagesTr" / "case_01_0000.nii.gz").unlink()
    (error,) = verify_dataset(root).errors
    assert error.case == "case_01" and "case_01_0000.nii.gz is missing" in error.message
    with pytest.raises(DatasetError):
        fingerprint_dataset(RawDataset.open(root))


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdict and fingerprint come out of one pass."""
    root = make_dataset(tmp_path, cases=2, channels=2, shape=SHAPE)
    read: list[Path] = []

    def noting(path, shape):
        read.append(path)
        return open_nifti(path, shape)

    monkeypatch.setattr("nnssl_adapt.data.voxels.open_nifti", noting)
    assert examine_dataset(root).fingerprint is not None
    assert sorted(read) == sorted(root.glob("*Tr/*"))


def test_what_was_seen_is_kept_with_what_was_asked(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=1, shape=SHAPE)
    case = RawDataset.open(root).cases[0]
    parts = tmp_path / "parts"
    asked = LookRequest((0, 1, 2), draws=50)
    look = look_at_case(case, asked, parts)
    (kept,) = parts.iterdir()
    made_of = str(np.load(kept)["made_of"])
    again = CaseLook.load(kept, made_of)
    assert again is not None and again.digest == look.digest and again.orientation == look.orientation
    assert again.measures is not None and look.measures is not None
    np.testing.assert_equal(again.measures.intensities, look.measures.intensities)
    assert CaseLook.load(kept, made_of + " ") is None
    strict = look_at_case(case, LookRequest((0, 1), draws=50), parts)
    assert [finding.check for finding in strict.findings] == ["labels"] and strict.measures is None
