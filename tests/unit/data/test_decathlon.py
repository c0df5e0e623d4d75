"""``convert msd`` and ``nnunetv1`` given folders that are not quite right (right ones: the parity tests)."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import write_image

from nnssl_adapt.data.convert.cases import Target
from nnssl_adapt.data.convert.decathlon import convert_msd, convert_nnunetv1
from nnssl_adapt.errors import DatasetError

SHAPE, SPACING = (3, 5, 4), (2.0, 1.0, 1.3)


@pytest.fixture
def task(tmp_path, nnunet_folders):
    """A Decathlon task with two cases."""
    root = tmp_path / "Task07_Tiny"
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
        for name in ("a", "b"):
            write_image(root / part / f"{name}.nii.gz", np.arange(60).reshape(SHAPE).astype(np.uint8) % 3, SPACING)
    write_json(root)
    return root


def write_json(root, **changed):
    labels = {"0": "background", "1": "core", "2": "rim"}
    (root / "dataset.json").write_text(
        json.dumps({"modality": {"0": "MR"}, "labels": labels, "numTraining": 2, **changed})
    )


def four_volumes(root):
    image = sitk.ReadImage(str(root / "imagesTr/a.nii.gz"))
    sitk.WriteImage(sitk.JoinSeries([image] * 4), str(root / "imagesTr/a.nii.gz"))


def broken_link(root):
    for path in sorted(root.glob("*/a.nii.gz")):
        path.unlink()
        path.symlink_to("/nowhere/a.nii.gz")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda root: (root / "labelsTr/a.nii.gz").unlink(), "imagesTr/a.nii.gz has no label"),
        (lambda root: (root / "imagesTr/a.nii.gz").unlink(), "labelsTr/a.nii.gz has no image"),
        (broken_link, "git annex get"),
        (four_volumes, r"1 channel\(s\), but .*a.nii.gz gives channel\(s\) 0, 1, 2, 3"),
        (lambda root: write_json(root, labels={"0": "background", "1": "core", "2": "core"}), "the same name"),
        (lambda root: write_json(root, labels=["background", "core"]), "must map numbers to names"),
        (lambda root: write_json(root, channel_names={"0": "MR"}), "nnU-Net 2's format already"),
        (lambda root: (root / "dataset.json").write_text("{}"), "key 'labels' is missing"),
        (lambda root: (root / "dataset.json").unlink(), "there is no dataset.json"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_copied(task, spoil, problem):
    spoil(task)
    target = Target.named(7, "Tiny")
    with pytest.raises(DatasetError, match=problem):
        convert_msd(task, target)
    assert not target.folder.exists()


def test_a_wrong_number_of_cases_is_corrected(task, caplog):
    write_json(task, numTraining=484)
    dataset = convert_msd(task, Target.named(7, "Tiny"))
    assert dataset.json.num_training == len(dataset.cases) == 2
    assert "'numTraining' is 484, but there are 2 cases" in caplog.text


def test_a_decathlon_task_is_no_task_of_nnunet_1(task):
    with pytest.raises(DatasetError, match="nnssl-adapt convert msd"):
        convert_nnunetv1(task, Target.named(7, "Tiny"))


def test_a_channel_that_is_missing_in_the_middle(task):
    for path in sorted((task / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0001.nii.gz")))
    with pytest.raises(DatasetError, match=r"gives channel\(s\) 1"):
        convert_nnunetv1(task, Target.named(7, "Tiny"))
