"""Paths and case names are taken out, and nothing else."""

import json

import pytest
from support.model_folders import write_model_folder

from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.sharing.anonymous import Cleaner
from nnssl_adapt.sharing.contents import write_contents

CLEANER = Cleaner(("sub-amu01", "0012", "case_01", "smith", "adam"), ("/data/my study/raw",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("results in /home/jane/nnUNet_results/x/fold_0", "results in fold_0"),
        ("from ~/weights/mae.pth, then", "from mae.pth, then"),
        (r"from C:\Users\Jane\mae.pth", "from mae.pth"),
        (r"from \\server\share\mae.pth", "from mae.pth"),
        ("/data/my study/raw/Dataset001_A", "Dataset001_A"),
        ("https://huggingface.co/AnonRes/MAE/tree/main", "https://huggingface.co/AnonRes/MAE/tree/main"),
        ("1.5 mm/voxel and/or 3/4, epoch 1/8", "1.5 mm/voxel and/or 3/4, epoch 1/8"),
        ("torch.nn.modules.conv.Conv3d", "torch.nn.modules.conv.Conv3d"),
        ("sub-amu01 and sub-amu01_0000.nii.gz, sub-amu012", "case and case_0000.nii.gz, sub-amu012"),
        ("predicting 0012\nlr 0.0012 step 0012", "predicting case\nlr 0.0012 step 0012"),
        ("epoch 0012 validation loss 1.4", "epoch 0012 validation loss 1.4"),
        ("validating smith (1/6), blacksmith", "validating case (1/6), blacksmith"),
        ("predicting adam\noptimizer adam", "predicting case\noptimizer adam"),
    ],
)
def test_texts(text, expected):
    assert CLEANER.text(text) == expected


def test_json():
    content = {
        "file": "/data/my study/raw/a b.json",
        "training_cases": ["sub-amu01", "case_01"],
        "hostname": "mri-3",
        "case": "smith",
        "optimizer": "adam",
        "deep": [{"case_01": "see /a/b/c.txt", "n": 1.5, "none": None}],
    }
    assert CLEANER.json(content) == {
        "file": "a b.json",
        "number_of_training_cases": 2,
        "case": "case",
        "optimizer": "adam",
        "deep": [{"case": "see c.txt", "n": 1.5, "none": None}],
    }
    assert content["hostname"] == "mri-3"  # a copy
    assert CLEANER.json({"hostname": 1, "case_01": "/a/b/c"}, keep_keys=True) == {"hostname": 1, "case_01": "c"}


def test_labels_and_channels_keep_every_letter(tmp_path):
    """Even when they are called like what is taken out elsewhere."""
    labels = {"background": 0, "process": 1, "host": 2}
    folder = write_model_folder(
        tmp_path, labels={"labels": labels, "training": [{"image": "./imagesTr/sub-01.nii.gz"}]}
    )
    (folder / "fold_0" / "debug.json").write_text(
        json.dumps({"training_cases": ["MR0", "process", "sub-01", "smith", "7"]})
    )
    model = ModelFolder.open(folder)
    cleaner = Cleaner.of_model(model)
    assert cleaner.case_names == ("sub-01", "smith")
    packaged = write_contents(model, (0,), tmp_path, "RPI", cleaner)
    written = json.loads((packaged.folder / "dataset.json").read_text())
    assert written["labels"] == labels and written["channel_names"] == {"0": "MR0"} and "training" not in written
    assert (
        json.loads((packaged.folder / "plans.json").read_text())["configurations"]
        == model.plan.content["configurations"]
    )


def test_leaks_are_found():
    assert CLEANER.leaks_in("predicting sub-amu01") == ["sub-amu01"]
    assert CLEANER.leaks_in("in /data/my study/raw") == ["/data/my study/raw"]
    assert CLEANER.leaks_in("sub-amu012, 0012, case_012") == []
