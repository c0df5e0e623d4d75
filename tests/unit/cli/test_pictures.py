"""Pictures (PNG, TIF) where volumes are expected: refused by every command, in a line that says so."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.model_folders import write_model_folder

from nnssl_adapt.cli.main import main

CHECKPOINT = str(Path(__file__).parents[2] / "data" / "nnssl_checkpoints" / "small_resenc")


@pytest.fixture
def pictures(nnunet_folders):
    """A dataset 303 of pictures, a Decathlon task and a BIDS folder of them, and a model said to have seen them."""
    label = sitk.GetImageFromArray(np.eye(20, 30, dtype=np.uint8))
    places = [f"nnUNet_raw/Dataset303_Roads/{name}.png" for name in ("imagesTr/a_0000", "labelsTr/a")]
    places += ["Task03_Roads/imagesTr/a.png", "Task03_Roads/labelsTr/a.png", "bids/sub-1/anat/sub-1_T2w.png"]
    places += ["bids/derivatives/labels/sub-1/anat/sub-1_T2w_seg.png"]
    for place in places:
        path = nnunet_folders / place
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(label, str(path))
    content = {
        "channel_names": {"0": "red"},
        "labels": {"background": 0, "road": 1},
        "numTraining": 1,
        "file_ending": ".png",
    }
    (nnunet_folders / "nnUNet_raw/Dataset303_Roads/dataset.json").write_text(json.dumps(content))
    old = {"modality": {"0": "red"}, "labels": {"0": "background", "1": "road"}}
    (nnunet_folders / "Task03_Roads/dataset.json").write_text(json.dumps(old))
    write_model_folder(nnunet_folders, labels={"file_ending": ".png"})
    return nnunet_folders


UNSUPPORTED = "2D pictures are not supported"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("convert msd Task03_Roads", UNSUPPORTED),
        ("convert nnunetv1 Task03_Roads", UNSUPPORTED),
        ("convert bids bids --suffix T2w --label-suffix seg -d 5 --name R", UNSUPPORTED),
        (
            "convert pairs --images Task03_Roads/imagesTr/*.png --labels Task03_Roads/labelsTr/*.png -d 5 --name R",
            UNSUPPORTED,
        ),
        ("convert reorient -d 303 --to RPI", "don't say how they lie"),
        (f"preprocess -d 303 -n roads -pc {CHECKPOINT}", "with -c 2d"),
        (f"preprocess -d 303 -n roads -pc {CHECKPOINT} -c 2d", "a 3D network"),
        (
            "predict -i nnUNet_raw/Dataset303_Roads/imagesTr -o out -m Dataset991_Tiny/nnUNetTrainer__nnUNetPlans__3d_fullres "
            "-device cpu",
            "trained on 3D images",
        ),
    ],
)
def test_pictures_are_refused(pictures, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(pictures)
    assert main(words.split()) == 1
    error = capsys.readouterr().err
    assert reason in error and "bug" not in error
    assert [path.name for path in (pictures / "nnUNet_raw").iterdir()] == ["Dataset303_Roads"]
    assert not list((pictures / "nnUNet_preprocessed").rglob("*Plans*.json")) and not list(pictures.glob("out/*.png"))
