"""Labels such as 0.99999: repaired in a copy, never in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import make_dataset

from nnssl_adapt.data.convert.cases import Target, training_case
from nnssl_adapt.data.convert.conversion import convert_cases
from nnssl_adapt.data.convert.repair import repair_dataset
from nnssl_adapt.data.images import read_and_repair_labels, read_labels
from nnssl_adapt.data.verifying.examine import verify_dataset
from nnssl_adapt.data.voxels import FractionalLabels
from nnssl_adapt.errors import DatasetError


def add_error(path: Path, by: float) -> bytes:
    """Make the foreground of a label file ``by`` too large; return the file's bytes."""
    image = sitk.ReadImage(str(path), sitk.sitkFloat32)
    inexact = sitk.GetImageFromArray(np.where(sitk.GetArrayFromImage(image) > 0, sitk.GetArrayFromImage(image) + by, 0))
    inexact.CopyInformation(image)
    sitk.WriteImage(sitk.Cast(inexact, sitk.sitkFloat32), str(path))
    return path.read_bytes()


@pytest.fixture
def root(nnunet_folders: Path) -> Path:
    root = make_dataset(nnunet_folders / "nnUNet_raw", cases=3, shape=(6, 9, 8))
    (root / "splits_final.json").write_text('[{"train": ["case_00", "case_02"], "val": ["case_01"]}]')
    (root / "imagesTs").mkdir()
    (root / "imagesTs" / "new_0000.nii.gz").write_bytes((root / "imagesTr" / "case_00_0000.nii.gz").read_bytes())
    return root


def test_a_copy_is_repaired_and_the_original_stays(root: Path) -> None:
    label = root / "labelsTr" / "case_01.nii.gz"
    exact = read_labels(label)[0]
    before = add_error(label, -1e-5)
    with pytest.raises(FractionalLabels, match="rounding"):
        read_labels(label)
    repaired, _, count = read_and_repair_labels(label)
    assert np.array_equal(repaired, exact) and count == (exact > 0).sum()
    verdict = verify_dataset(root)
    assert [(finding.case, finding.check) for finding in verdict.errors] == [("case_01", "rounding")]
    copy = repair_dataset(verdict)
    assert copy.name.endswith("_repaired") and copy.folder != root and label.read_bytes() == before
    np.testing.assert_array_equal(read_labels(copy.folder / "labelsTr" / "case_01.nii.gz")[0], exact)
    assert verify_dataset(copy.folder).findings == ()
    for name in ("splits_final.json", "imagesTs/new_0000.nii.gz", "labelsTr/case_00.nii.gz"):
        assert (copy.folder / name).read_bytes() == (root / name).read_bytes()
    assert repair_dataset(verdict).folder == copy.folder  # again: the same copy, brought up to date


def test_interpolated_labels_are_not_repaired(root: Path) -> None:
    add_error(root / "labelsTr" / "case_01.nii.gz", 0.3)
    with pytest.raises(DatasetError) as caught:
        repair_dataset(verify_dataset(root))
    assert len(caught.value.mistakes) == 1 and "interpolation" in caught.value.mistakes[0]
    assert not list(root.parent.glob("*_repaired"))


@pytest.mark.parametrize("link", [None, "symbolic"])
def test_a_conversion_repairs_its_copy(root: Path, link: str | None) -> None:
    label = root / "labelsTr" / "case_01.nii.gz"
    exact = read_labels(label)[0]
    before = add_error(label, 2e-5)
    case = training_case("a", [root / "imagesTr" / "case_01_0000.nii.gz"], label, ".nii.gz")
    target = Target(root.parent / "Dataset992_Copy", link)
    assert convert_cases("pairs", "x", target, [case]) == {"a": [0, 1, 2]}
    np.testing.assert_array_equal(read_labels(target.folder / "labelsTr" / "a.nii.gz")[0], exact)
    assert label.read_bytes() == before
