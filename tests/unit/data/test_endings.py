"""Endings of files in other letters (``.NII.GZ``) are the same endings, wherever files are listed."""

import shutil

import pytest
from support.synthetic import make_dataset

from nnssl_adapt.data.convert.cases import Target
from nnssl_adapt.data.convert.decathlon import convert_nnunetv1
from nnssl_adapt.data.convert.loose import convert_bids
from nnssl_adapt.data.dataset import RawDataset, find_images
from nnssl_adapt.data.endings import files_with, stem_of
from nnssl_adapt.data.reorient import reorient_dataset
from nnssl_adapt.data.verifying.examine import verify_dataset
from nnssl_adapt.errors import CaseError
from nnssl_adapt.evaluation.metrics import evaluate_folder


@pytest.fixture
def mixed(nnunet_folders):
    """A dataset whose second case ends in .NII.GZ, whose third in .nii.GZ."""
    root = make_dataset(nnunet_folders / "nnUNet_raw", cases=3, shape=(6, 8, 7))
    for case, ending in (("case_01", ".NII.GZ"), ("case_02", ".nii.GZ")):
        for path in (root / "imagesTr" / f"{case}_0000.nii.gz", root / "labelsTr" / f"{case}.nii.gz"):
            path.rename(path.with_name(path.name.removesuffix(".nii.gz") + ending))
    return root


def test_names_without_their_ending(tmp_path):
    assert stem_of("a.nii.gz", ".nii.gz") == stem_of("a.NII.gz", ".nii.gz") == stem_of("a.nii.gz", ".NII.GZ") == "a"
    assert stem_of("a.nii.gz", ".nii") is None and stem_of("a.nii", ".nii.gz") is None
    for name in ("b.NII", "a.nii", "b.nii", ".c.nii", "d.nrrd"):
        (tmp_path / name).touch()
    assert {stem: path.name for stem, path in files_with(tmp_path, ".nii").items()} == {"a": "a.nii", "b": "b.nii"}


def test_a_dataset_has_all_its_cases(mixed):
    dataset = RawDataset.open(mixed)
    assert [case.identifier for case in dataset.cases] == ["case_00", "case_01", "case_02"]
    assert all(path.is_file() for case in dataset.cases for path in case.files)
    assert len(find_images(mixed / "imagesTr", ".nii.gz", 1)) == 3
    verdict = verify_dataset(mixed)
    assert verdict.is_good and verdict.num_cases == 3
    assert [finding.check for finding in verdict.warnings if finding.check == "names"] == ["names"]


def test_a_channel_in_two_files_is_an_error(mixed):
    shutil.copy(mixed / "imagesTr" / "case_01_0000.NII.GZ", mixed / "imagesTr" / "case_01_0000.nii.gz")
    with pytest.raises(CaseError, match="leave one"):
        RawDataset.open(mixed)
    assert any(finding.check == "names" for finding in verify_dataset(mixed).errors)


def test_copies_and_conversions_have_them_too(mixed, tmp_path):
    assert len(reorient_dataset(RawDataset.open(mixed), "LAS", workers=1).cases) == 3
    old = tmp_path / "Task003_Old"
    shutil.copytree(mixed, old)
    labels = '{"0": "background", "1": "core", "2": "rim"}'
    (old / "dataset.json").write_text(f'{{"modality": {{"0": "MR"}}, "labels": {labels}, "numTraining": 3}}')
    converted = convert_nnunetv1(old, Target(mixed.parent / "Dataset992_Old"))
    assert sorted(path.name for path in (converted.folder / "labelsTr").iterdir()) == [
        f"case_0{n}.nii.gz" for n in range(3)
    ]
    bids = tmp_path / "bids"
    for number, ending in enumerate((".nii.gz", ".NII.GZ")):
        for source, target in (
            ("imagesTr/case_00_0000", f"sub-{number}/anat/sub-{number}_T2w"),
            ("labelsTr/case_00", f"derivatives/labels/sub-{number}/anat/sub-{number}_T2w_seg"),
        ):
            place = bids / f"{target}{ending if 'derivatives' not in target else '.nii.gz'}"
            place.parent.mkdir(parents=True)
            shutil.copy(mixed / f"{source}.nii.gz", place)
    assert len(convert_bids(bids, Target(mixed.parent / "Dataset993_Bids"), ["T2w"], "seg").cases) == 2


def test_predictions_and_references_are_found(mixed):
    labels = RawDataset.open(mixed).labels
    summary = evaluate_folder(mixed / "labelsTr", mixed / "labelsTr", labels, ".nii.gz")
    assert len(summary.cases) == 3 and summary.foreground_mean_dice == 1
