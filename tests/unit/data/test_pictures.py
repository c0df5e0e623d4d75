"""Pictures and TIFF stacks: what is refused, and how datasets of them are opened and verified."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from support.pictures import write_picture_dataset

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import read_image, read_labels, write_labels
from nnssl_adapt.data.pictures import NATURAL_2D, TIFF_3D
from nnssl_adapt.data.verifying.examine import examine_dataset
from nnssl_adapt.errors import CaseError, ConfigurationError, DatasetError, OutputError


def test_a_dataset_of_pictures_is_opened_and_verified(tmp_path: Path) -> None:
    folder = write_picture_dataset(tmp_path / "Dataset005_Cells")
    raw = RawDataset.open(folder)
    assert raw.image_reader == NATURAL_2D and {case.reader for case in raw.cases} == {NATURAL_2D}
    assert len(raw.cases[0].images) == 1 and raw.num_channels == 3
    examination = examine_dataset(folder)
    examination.verdict.raise_if_bad()
    assert examination.fingerprint is not None
    assert {tuple(spacing) for spacing in examination.fingerprint.spacings} == {(999.0, 1.0, 1.0)}


def test_mixed_colours_are_named(tmp_path: Path) -> None:
    folder = write_picture_dataset(tmp_path / "Dataset005_Cells")
    path = folder / "imagesTr" / "cell_01_0000.png"
    Image.open(path).convert("L").save(path)
    with pytest.raises(CaseError, match=r"cell_01.*1 channel.*has 3"):
        RawDataset.open(folder)
    errors = examine_dataset(folder).verdict.errors
    assert [(finding.case, finding.check) for finding in errors] == [("cell_01", "channels")]


def test_pictures_of_one_case_must_be_alike(tmp_path: Path) -> None:
    for channel, shape in enumerate([(4, 6), (4, 6, 3)]):
        Image.fromarray(np.ones(shape, np.uint8)).save(tmp_path / f"a_000{channel}.png")
    with pytest.raises(CaseError, match=r"a_0001.png has 3 number"):
        read_image([tmp_path / "a_0000.png", tmp_path / "a_0001.png"], NATURAL_2D)


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_labels_with_colours_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.ones((4, 6, 3), np.uint8)).convert(mode).save(path)
    with pytest.raises(CaseError, match="grey") as caught:
        read_labels(path, NATURAL_2D)
    assert caught.value.path == path


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_truncated_pictures_are_told(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    noise = np.random.default_rng(0).integers(0, 255, (40, 60)).astype(np.uint8)
    if ending == ".tif":
        tifffile.imwrite(path, noise, compression="zlib")
    else:
        Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(CaseError) as caught:
        read_image([path], NATURAL_2D)
    assert caught.value.path == path


def test_lossy_labels_are_refused(tmp_path: Path) -> None:
    folder = write_picture_dataset(tmp_path / "Dataset005_Cells")
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ".jpg"}))
    with pytest.raises(DatasetError, match="JPEG"):
        RawDataset.open(folder)
    image, geometry = read_image([folder / "imagesTr" / "cell_00_0000.png"], NATURAL_2D)
    with pytest.raises(OutputError, match="JPEG"):
        write_labels(tmp_path / "a.jpg", (image[0] > 0).astype(int), geometry)


def test_listed_jpeg_images_have_png_labels(tmp_path: Path) -> None:
    folder = write_picture_dataset(tmp_path / "Dataset005_Cells")
    listing = {}
    for path in sorted((folder / "imagesTr").iterdir()):
        name = path.name.removesuffix("_0000.png")
        Image.open(path).save(path.with_name(f"{name}.jpg"))
        listing[name] = {"images": [f"imagesTr/{name}.jpg"], "label": f"labelsTr/{name}.png"}
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "dataset": listing}))
    raw = RawDataset.open(folder)
    assert read_image(raw.cases[0].images, raw.cases[0].reader)[0].shape[0] == 3
    examine_dataset(folder).verdict.raise_if_bad()


def test_without_the_package_its_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_picture_dataset(tmp_path / "Dataset005_Cells")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ConfigurationError, match="tifffile") as caught:
        RawDataset.open(folder)
    assert caught.value.next_command == "pip install 'nnssl-adapt[pictures]'"


@pytest.mark.parametrize("spacing", [[1, 2], [1, 2, 0], "1 2 3", None])
def test_a_wrong_spacing_beside_a_stack_is_named(tmp_path: Path, spacing: object) -> None:
    tifffile.imwrite(tmp_path / "a_0000.tif", np.zeros((3, 5, 6), np.uint8))
    (tmp_path / "a.json").write_text(json.dumps({"spacing": spacing}))
    with pytest.raises(CaseError) as caught:
        read_image([tmp_path / "a_0000.tif"], TIFF_3D)
    assert caught.value.path == tmp_path / "a.json"


def test_a_stack_is_no_picture(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((7, 5, 6), np.uint8))
    with pytest.raises(CaseError, match=TIFF_3D):
        read_image([tmp_path / "a.tif"], NATURAL_2D)
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((5, 6), np.uint8))
    with pytest.raises(CaseError, match=NATURAL_2D):
        read_image([tmp_path / "b.tif"], TIFF_3D)


def test_the_spacing_beside_a_stack_is_no_stray_file(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset006_Stacks"
    for name, ending in (("imagesTr", "_0000.tif"), ("labelsTr", ".tif")):
        (folder / name).mkdir(parents=True)
        for case in "ab":
            voxels = np.arange(7 * 8 * 9, dtype=np.uint8).reshape(7, 8, 9)
            tifffile.imwrite(folder / name / f"{case}{ending}", voxels if name == "imagesTr" else voxels % 2)
            (folder / name / f"{case}.json").write_text(json.dumps({"spacing": [2, 1, 1]}))
    labels = {"background": 0, "odd": 1}
    content = {"channel_names": {"0": "EM"}, "labels": labels, "numTraining": 2, "file_ending": ".tif"}
    (folder / "dataset.json").write_text(json.dumps(content))
    examination = examine_dataset(folder)
    assert [str(finding) for finding in examination.verdict.findings if finding.check == "names"] == []
    assert examination.fingerprint is not None
    assert {tuple(spacing) for spacing in examination.fingerprint.spacings} == {(2.0, 1.0, 1.0)}
