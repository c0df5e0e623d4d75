"""How images lie: turned to how the training images lay, and segmentations back."""

import json
import logging

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import make_case, write_image

from nnssl_adapt.errors import CaseError, ModelFolderError, PredictionError
from nnssl_adapt.geometry.orientation import opposite
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.inference.predictor import Predictor

SPACING = (3.0, 1.2, 0.8)


@pytest.fixture
def scans(tmp_path):
    """The same image stored in three orientations, in two formats."""
    folder = tmp_path / "scans"
    folder.mkdir()
    image, _ = make_case(np.random.default_rng(3), (14, 30, 40), 1, 3)
    write_image(tmp_path / "x.nii.gz", image[0].astype(np.int16), SPACING)
    stored = sitk.ReadImage(str(tmp_path / "x.nii.gz"))
    for name, code in (("a_0000.nii.gz", "RPI"), ("b_0000.nii.gz", "LAS"), ("c_0000.nrrd", "SPL")):
        sitk.WriteImage(sitk.DICOMOrient(stored, opposite(code)), str(folder / name))
    return folder


def read_as(path, code):
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), opposite(code))
    return sitk.GetArrayFromImage(image)


def test_the_same_anatomy_gets_the_same_labels_however_it_is_stored(make_model, scans, tmp_path, caplog):
    model, out = make_model(labels={"image_orientation": "RPI"}), tmp_path / "out"
    predictor = Predictor(model, device="cpu", tta=False)
    with caplog.at_level(logging.INFO):
        predictor.predict(scans, out, save_probabilities=True)
    assert "turned to RPI" in caplog.text
    expected = read_as(out / "a.nii.gz", "RPI")
    assert set(np.unique(expected)) == {0, 1, 2}
    for name, source in (("b", "b_0000.nii.gz"), ("c", "c_0000.nrrd")):
        assert np.array_equal(read_as(out / f"{name}.nii.gz", "RPI"), expected)
        written, image = sitk.ReadImage(str(out / f"{name}.nii.gz")), sitk.ReadImage(str(scans / source))
        assert written.GetSize() == image.GetSize() and written.GetOrigin() == pytest.approx(image.GetOrigin())
        assert written.GetDirection() == pytest.approx(image.GetDirection())
        labels = sitk.GetArrayFromImage(written)
        assert np.array_equal(np.load(out / f"{name}.npz")["probabilities"].argmax(0), labels)
        turned_in_memory = predictor.predict(image)
        assert np.array_equal(sitk.GetArrayFromImage(turned_in_memory), labels)


def test_as_they_lie_when_asked_to_or_not_known(make_model, scans, tmp_path, caplog):
    model, out = make_model(labels={"image_orientation": "RPI"}), tmp_path / "out"
    keep = Predictor(model, device="cpu", tta=False, keep_orientation=True)
    keep.predict(scans, out)
    assert not np.array_equal(read_as(out / "a.nii.gz", "RPI"), read_as(out / "b.nii.gz", "RPI"))
    turning = Predictor(model, device="cpu", tta=False)
    turning.predict(scans, out, overwrite=False)  # made with another setting: done again
    assert np.array_equal(read_as(out / "a.nii.gz", "RPI"), read_as(out / "b.nii.gz", "RPI"))
    content = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if k != "image_orientation"}))
    caplog.clear()
    silent = Predictor(model, device="cpu", tta=False)
    silent.predict(scans, tmp_path / "silent")
    assert caplog.text.count("images lie differently") == 1 and "RPI (1)" in caplog.text
    caplog.clear()
    silent.predict(scans / "a_0000.nii.gz", tmp_path / "one.nii.gz")
    assert not caplog.records


def test_an_orientation_that_is_none(make_model):
    model = make_model(labels={"image_orientation": "RPX"})
    with pytest.raises(ModelFolderError, match="RPX"):
        _ = ModelFolder.open(model).image_orientation


def test_the_plan_counts_where_dataset_json_says_otherwise(make_model, caplog):
    """Planning read it off the images."""
    model = make_model(labels={"image_orientation": "RPI"})
    plans = json.loads((model / "plans.json").read_text())
    (model / "plans.json").write_text(json.dumps({**plans, "image_orientation": "LAS"}))
    assert ModelFolder.open(model).image_orientation == "LAS" and "RPI in dataset.json and LAS" in caplog.text


def test_channels_that_lie_elsewhere_are_refused_and_the_others_go_on(make_model, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    image, _ = make_case(np.random.default_rng(3), (14, 30, 40), 2, 3)
    for name in "ab":
        for channel in range(2):
            write_image(folder / f"{name}_000{channel}.nii.gz", image[channel].astype(np.int16), SPACING)
    moved = sitk.ReadImage(str(folder / "a_0001.nii.gz"))
    moved.SetOrigin((5.0, 0.0, 0.0))
    sitk.WriteImage(moved, str(folder / "a_0001.nii.gz"))
    predictor = Predictor(make_model(channels=2), device="cpu", tta=False)
    with pytest.raises(PredictionError, match=r"1 of 2 .*\n  a: .*a_0001\.nii\.gz does not lie where"):
        predictor.predict(folder, tmp_path / "out")
    assert (tmp_path / "out" / "b.nii.gz").is_file()
    with pytest.raises(CaseError) as caught:
        predictor.predict([folder / "a_0000.nii.gz", folder / "a_0001.nii.gz"])
    assert caught.value.path == folder / "a_0001.nii.gz"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_empty_image_is_predicted_with_a_warning(make_model, tmp_path, caplog, workers):
    folder = tmp_path / "scans"
    folder.mkdir()
    write_image(folder / "e_0000.nii.gz", np.zeros((14, 30, 40), np.int16), SPACING)
    Predictor(make_model(), device="cpu", tta=False).predict(folder, tmp_path / "out", workers=workers)
    assert "e: the image is 0 everywhere" in caplog.text and (tmp_path / "out" / "e.nii.gz").is_file()


def test_headers_that_contradict_themselves_are_told_once(make_model, tmp_path, caplog, capfd):
    import nibabel

    folder = tmp_path / "scans"
    folder.mkdir()
    for name in "ab":
        image = nibabel.Nifti1Image(np.random.default_rng(1).normal(size=(18, 20, 22)).astype(np.float32), None)
        image.header.set_sform(np.diag([2.0, 2.4, 6.0, 1.0]), 1)
        image.header.set_qform(np.diag([1.0, 1.2, 3.0, 1.0]), 1)
        nibabel.save(image, folder / f"{name}_0000.nii.gz")
    Predictor(make_model(), device="cpu", tta=False).predict(folder, tmp_path / "out", workers=1)
    told = [record.message for record in caplog.records if "sform" in record.message]
    assert len(told) == 1 and "a_0000" in told[0] and "b_0000" in told[0]
    assert "NiftiImageIO" not in capfd.readouterr().err
