"""NIfTI files as nnU-Net's nibabel readers take them: other units, sheared and turned affines; read and written the same."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from support.model_folders import write_model_folder
from support.nnunet_prediction import predict_by_nnunet

from nnssl_adapt.data.dataset import RawCase
from nnssl_adapt.data.images import NIFTI_READERS, ImageGeometry, read_geometry, read_image, read_labels, write_labels
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.preprocess import preprocess_case
from nnssl_adapt.inference.predictor import Predictor

pytest.importorskip("nnunetv2")
from support.peer_preprocessing import plans_of, settings

SHAPE = (5, 7, 6)  # x, y, z


def affine(kind: str) -> np.ndarray:
    matrix = np.diag([1.25, 0.75, 2.5, 1.0])
    matrix[:3, 3] = (10, -20, 30.5)
    if kind == "sheared":
        matrix[0, 1] = 0.3
    if kind == "turned":  # oblique, axes in another order, one of them reversed
        angle = np.deg2rad(20)
        turn = np.array([[0, np.cos(angle), np.sin(angle)], [0, -np.sin(angle), np.cos(angle)], [-1, 0, 0]])
        matrix[:3, :3] = turn @ matrix[:3, :3]
    return matrix


def write(path: Path, kind: str, dtype: type, slope: float | None = None) -> Path:
    voxels = np.random.default_rng(3).integers(0, 3, SHAPE).astype(dtype)
    image = nibabel.Nifti1Image(voxels, affine(kind))
    if kind == "micrometres":
        image = nibabel.Nifti1Image(voxels, np.diag([50.0, 60.0, 80.0, 1.0]))
        image.header.set_xyzt_units("micron")
    if slope is not None:
        image.header.set_slope_inter(slope, -3.0)
    nibabel.save(image, str(path))
    return path


def peer_reader(name: str):
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    return recursive_find_reader_writer_by_name(name)()


@pytest.mark.parametrize("kind", ["plain", "turned", "sheared", "micrometres"])
@pytest.mark.parametrize("reader", NIFTI_READERS)
def test_read_and_written_as_by_nnunet(tmp_path: Path, reader: str, kind: str) -> None:
    if (reader, kind) == ("SimpleITKIO", "sheared"):
        pytest.skip("SimpleITK can't read it")
    path = write(tmp_path / "a_0000.nii.gz", kind, np.int16)
    peer = peer_reader(reader)
    expected, properties = peer.read_images((str(path),))
    image, geometry = read_image([path], reader)
    np.testing.assert_array_equal(image, expected)
    assert image.dtype == expected.dtype and geometry.reader == reader
    assert geometry == read_geometry(path, reader) == ImageGeometry.from_properties(properties, geometry.size)
    ours = geometry.to_properties()
    assert list(ours["spacing"]) == list(properties["spacing"]) and ours.keys() == properties.keys()
    for key, value in properties.get("nibabel_stuff", {}).items():
        np.testing.assert_array_equal(ours["nibabel_stuff"][key], value)
    labels, label_geometry = read_labels(path, reader)
    np.testing.assert_array_equal(labels, peer.read_seg(str(path))[0])
    write_labels(tmp_path / "ours.nii.gz", labels[0], label_geometry)
    peer.write_seg(expected[0], str(tmp_path / "theirs.nii.gz"), properties)
    one, other = (nibabel.load(str(tmp_path / f"{who}.nii.gz")) for who in ("ours", "theirs"))
    np.testing.assert_array_equal(one.affine, other.affine)
    np.testing.assert_array_equal(one.get_fdata(), other.get_fdata())
    assert one.get_data_dtype() == other.get_data_dtype() == np.uint8


@pytest.mark.parametrize("reader", NIFTI_READERS[1:])
def test_scaled_intensities(tmp_path: Path, reader: str) -> None:
    path = write(tmp_path / "a_0000.nii", "turned", np.float32, slope=0.37)
    expected, _ = peer_reader(reader).read_images((str(path),))
    np.testing.assert_array_equal(read_image([path], reader)[0], expected)


@pytest.mark.parametrize("reader", NIFTI_READERS[1:])
def test_preprocessed_as_by_nnunet(tmp_path: Path, reader: str) -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    image = write(tmp_path / "a_0000.nii.gz", "sheared", np.float32)
    label = write(tmp_path / "a.nii.gz", "sheared", np.uint8)
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "core": 1, "rim": 2}, "numTraining": 1}
    content["file_ending"] = ".nii.gz"
    wanted = settings()
    plans = PlansManager({**plans_of(wanted), "image_reader_writer": reader})
    data, seg, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(image)], str(label), plans, plans.get_configuration("3d_fullres"), content
    )
    ours = preprocess_case(RawCase("a", (image,), label, reader), wanted, LabelScheme.from_dataset_json(content))
    np.testing.assert_allclose(ours.data, data, atol=1e-5)
    np.testing.assert_array_equal(ours.seg, seg)
    assert list(ours.properties["spacing"]) == list(properties["spacing"])


@pytest.mark.parametrize("reader", NIFTI_READERS[1:])
@pytest.mark.parametrize("kind", ["sheared", "micrometres"])
def test_predicted_as_by_nnunet(tmp_path: Path, reader: str, kind: str) -> None:
    folder = write_model_folder(tmp_path / "model")
    plans = json.loads((folder / "plans.json").read_text())
    (folder / "plans.json").write_text(
        json.dumps({**plans, "image_reader_writer": reader, "foreground_intensity_properties_per_channel": {"0": {}}})
    )
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "a_0000.nii.gz"
    big = np.random.default_rng(5).normal(100, 30, (30, 26, 24)).astype(np.float32)
    big[8:20, 6:18, 6:16] += 200
    image = nibabel.Nifti1Image(big, affine("sheared"))
    if kind == "micrometres":
        image = nibabel.Nifti1Image(big, np.diag([1.5, 1.2, 1.8, 1.0]))
        image.header.set_xyzt_units("micron")
    nibabel.save(image, str(path))
    predict_by_nnunet(folder, tmp_path / "images", tmp_path / "theirs")
    Predictor(folder, folds=(0,), device="cpu", accumulation_dtype=torch.float16).predict(
        path, tmp_path / "ours" / "a.nii.gz"
    )
    one, other = (nibabel.load(str(tmp_path / who / "a.nii.gz")) for who in ("ours", "theirs"))
    np.testing.assert_array_equal(one.affine, other.affine)
    differ = (one.get_fdata() != other.get_fdata()).mean()
    assert differ <= 1e-4 and len(np.unique(other.get_fdata())) > 1
