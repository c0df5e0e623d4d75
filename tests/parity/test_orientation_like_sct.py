"""An installed package segments as the Spinal Cord Toolbox does with it: turn, stock nnunetv2, turn back."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.model_folders import write_model_folder
from support.nnunet_prediction import predict_by_nnunet
from support.synthetic import make_case, write_image

import nnssl_adapt as na
from nnssl_adapt.geometry.orientation import opposite

pytest.importorskip("nnunetv2")

CODES = ("LAS", "AIR")
"""How the same anatomy is stored. The last one permutes all axes and reverses two."""


def turned(image, code):
    return sitk.DICOMOrient(image, opposite(code))  # SimpleITK names the sides that axes lead to


@pytest.fixture
def model(tmp_path):
    folder = write_model_folder(tmp_path / "model", labels={"image_orientation": "RPI"})
    plans = json.loads((folder / "plans.json").read_text())
    plans["foreground_intensity_properties_per_channel"] = {"0": {}}
    (folder / "plans.json").write_text(json.dumps(plans))
    return folder


@pytest.fixture
def images(tmp_path):
    voxels, _ = make_case(np.random.default_rng(3), (14, 26, 30), 1, 3)
    write_image(tmp_path / "x.nii.gz", voxels[0].astype(np.int16), (3.0, 1.2, 0.8))
    stored = sitk.ReadImage(str(tmp_path / "x.nii.gz"))
    given, upright = tmp_path / "given", tmp_path / "upright"
    for folder in (given, upright):
        folder.mkdir()
    for code in CODES:
        image = turned(stored, code)
        sitk.WriteImage(image, str(given / f"{code}_0000.nii.gz"))
        sitk.WriteImage(turned(image, "RPI"), str(upright / f"{code}_0000.nii.gz"))
    return given, upright


def stock(model, folder, output):
    predict_by_nnunet(model, folder, output)
    return {code: sitk.ReadImage(str(output / f"{code}.nii.gz")) for code in CODES}


def test_predict_agrees_with_the_toolbox_and_not_with_stock_nnunet(model, images, tmp_path):
    given, upright = images
    predictor = na.Predictor(model, device="cpu", accumulation_dtype=torch.float16)
    predictor.predict(given, tmp_path / "ours")
    toolbox = stock(model, upright, tmp_path / "toolbox")
    plain = stock(model, given, tmp_path / "stock")
    for code in CODES:
        ours = sitk.ReadImage(str(tmp_path / "ours" / f"{code}.nii.gz"))
        theirs = turned(toolbox[code], code)
        assert ours.GetDirection() == pytest.approx(theirs.GetDirection())
        assert ours.GetOrigin() == pytest.approx(theirs.GetOrigin(), abs=1e-4)
        labels, expected = sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs)
        assert len(np.unique(labels)) == 3
        assert np.count_nonzero(labels != expected) <= 1, code
        assert np.count_nonzero(labels != sitk.GetArrayFromImage(plain[code])) > 100
