from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.synthetic import make_dataset, write_image

from nnssl_adapt.data.dataset import DatasetJson, RawDataset, find_images
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import CaseError, DatasetError, DatasetJsonError, DatasetNotFound


def scheme(labels: dict[str, Any], order: list[int] | None = None) -> LabelScheme:
    content: dict[str, Any] = {"labels": labels}
    if order is not None:
        content["regions_class_order"] = order
    return LabelScheme.from_dataset_json(content)


def test_plain_labels_are_sorted_by_value() -> None:
    labels = scheme({"tumour": 2, "background": 0, "organ": 1})
    assert labels.all_labels == (0, 1, 2)
    assert labels.foreground == labels.foreground_labels == (1, 2)
    assert labels.class_names == ("organ", "tumour")
    assert not labels.has_regions and labels.regions == () and labels.ignore_label is None
    assert labels.num_heads == 3
    assert labels.sampled_classes == (1, 2)
    assert labels.values_in_files == (0, 1, 2)


def test_regions_and_ignore() -> None:
    labels = scheme({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "hot": 3, "ignore": 4}, [1, 2, 3])
    assert labels.has_regions and labels.num_heads == 3
    assert labels.regions == labels.foreground == ((1, 2, 3), (2, 3), 3)
    assert labels.class_names == ("whole", "core", "hot")
    assert labels.ignore_label == 4 and labels.all_labels == (0, 1, 2, 3)
    assert labels.values_in_files == (0, 1, 2, 3, 4)
    assert labels.sampled_classes == ((1, 2, 3), (2, 3), 3, (-1, 0, 1, 2, 3))


@pytest.mark.parametrize(
    "labels, order, message",
    [
        ({"organ": 1}, None, "'background': 0, it is missing"),
        ({"background": 1, "organ": 0}, None, "'background': 0, got 1"),
        ({"background": 0, "organ": 2}, None, r"without gaps, got \[0, 2\]"),
        ({"background": 0, "organ": 1, "ignore": 1}, None, "'ignore' and 'organ' share the value 1"),
        ({"background": 0, "organ": 1, "ignore": 5}, None, "expected 2, got 5"),
        ({"background": 0, "organ": 1, "ignore": [2]}, None, "'ignore' must be one number"),
        ({"background": 0, "all": [1, 2], "core": 2}, None, "'regions_class_order' is needed"),
        ({"background": 0, "all": [1, 2], "core": 2}, [1], "each of the 2 regions, got 1"),
        ({"background": 0, "all": [1, 2], "core": 2}, ["1", "2"], "list of whole numbers"),
        ({"background": 0, "organ": 1.5}, None, "'organ' must be a whole number"),
        ({"background": 0, "organ": []}, None, "'organ' must be a whole number"),
        ({"0": "background", "1": "organ"}, None, "as nnU-Net 1 did"),
        ({}, None, "must map names to numbers"),
    ],
)
def test_bad_labels_name_file_key_and_expectation(labels: Any, order: Any, message: str) -> None:
    with pytest.raises(DatasetJsonError, match=message) as caught:
        LabelScheme.from_dataset_json({"labels": labels, "regions_class_order": order}, "some/dataset.json")
    assert str(caught.value).startswith("some/dataset.json: '")


def test_heads_become_labels() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    labels = scheme({"background": 0, "a": 1, "b": 2}).heads_to_labels(logits)
    assert isinstance(labels, np.ndarray) and labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, logits.argmax(0))


def test_later_regions_overwrite_earlier_ones() -> None:
    regions = scheme({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    logits = torch.tensor([[5.0, 5.0, -5.0, -5.0], [-5.0, 5.0, 5.0, -5.0]])
    labels = regions.heads_to_labels(logits)
    assert isinstance(labels, torch.Tensor)
    assert labels.tolist() == [1, 2, 2, 0]
    with pytest.raises(ValueError, match="expected 2"):
        regions.heads_to_labels(torch.zeros(3, 4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"file_ending": None}, "'file_ending' must be an ending"),
        ({"file_ending": "nii.gz"}, "'file_ending' must be an ending"),
        ({"channel_names": ["T1"]}, "'channel_names' must be channel numbers with names"),
        ({"channel_names": {}}, "'channel_names' must be"),
        ({"labels": "organ"}, "'labels' must be names with numbers"),
        ({"numTraining": "many"}, "'numTraining' must be the number of training cases; got 'many'"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    root = make_dataset(tmp_path, cases=1, shape=(6, 8, 7))
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DatasetJsonError, match=message) as caught:
        DatasetJson.load(path)
    assert str(path) in str(caught.value)


def test_all_missing_keys_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text("{}")
    with pytest.raises(DatasetJsonError, match=r"channel_names.*labels.*file_ending"):
        DatasetJson.load(path)


@pytest.mark.parametrize(
    "text, message", [(None, "is missing"), ("{", "not a dataset.json"), ("[]", "expected an object")]
)
def test_unreadable_dataset_json(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "dataset.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DatasetJsonError, match=message):
        DatasetJson.load(path)


def test_raw_content_is_kept_and_modality_accepted(tmp_path: Path) -> None:
    content = {
        "modality": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "organ": 1},
        "file_ending": ".nii.gz",
        "image_orientation": "RPI",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    read = DatasetJson.load(tmp_path / "dataset.json")
    assert read.raw == content
    assert read.channel_names == {"0": "T1", "1": "T2"}


def test_open_by_folder_id_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_dataset(tmp_path, channels=2, cases=3, shape=(6, 8, 7))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    for way in (root, str(root), 991, "991", "Dataset991_Tiny"):
        dataset = RawDataset.open(way)
        assert dataset.name == "Dataset991_Tiny"
        assert [case.identifier for case in dataset.cases] == ["case_00", "case_01", "case_02"]
        assert [path.name for path in dataset.cases[1].images] == ["case_01_0000.nii.gz", "case_01_0001.nii.gz"]
        assert dataset.cases[1].label == root / "labelsTr" / "case_01.nii.gz"
        assert dataset.num_channels == 2 and dataset.channel_names == ("MR0", "MR1")
    with pytest.raises(DatasetNotFound, match="Dataset991_Tiny"):
        RawDataset.open(7)
    with pytest.raises(DatasetNotFound, match="no such dataset folder"):
        RawDataset.open(tmp_path / "Dataset001_None")


def test_missing_files_are_listed_together(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, channels=2, cases=3, shape=(6, 8, 7))
    (root / "imagesTr" / "case_00_0001.nii.gz").unlink()
    (root / "labelsTr" / "case_02.nii.gz").unlink()
    with pytest.raises(CaseError) as caught:
        RawDataset.open(root)
    message = str(caught.value)
    assert "case_00_0001.nii.gz is missing" in message
    assert f"{root / 'labelsTr' / 'case_02.nii.gz'} is missing" in message
    assert "case_01" not in message


def test_superfluous_channels_and_bad_names_are_refused(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=2, shape=(6, 8, 7))
    extra = root / "imagesTr" / "case_01_0001.nii.gz"
    extra.write_bytes(b"")
    with pytest.raises(CaseError, match=r"case_01_0001\.nii\.gz is not one of the 1 channels"):
        RawDataset.open(root)
    extra.rename(root / "imagesTr" / "case_01.nii.gz")
    with pytest.raises(CaseError, match=r"case_01\.nii\.gz.*CASE_0000\.nii\.gz"):
        RawDataset.open(root)
    (root / "imagesTr" / "case_01.nii.gz").rename(root / "imagesTr" / "._case_01_0000.nii.gz")
    assert len(RawDataset.open(root).cases) == 2


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_missing_folders(tmp_path: Path, folder: str) -> None:
    root = make_dataset(tmp_path, cases=1, shape=(6, 8, 7))
    (root / folder).rename(root / "elsewhere")
    with pytest.raises(CaseError, match=f"no folder {folder}"):
        RawDataset.open(root)


def test_explicit_lists_with_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_dataset(tmp_path, cases=2, shape=(6, 8, 7))
    path = root / "dataset.json"
    content = json.loads(path.read_text())
    monkeypatch.setenv("SOMEWHERE", str(root))
    content["dataset"] = {
        "b": {"images": ["imagesTr/case_01_0000.nii.gz"], "label": "labelsTr/case_01.nii.gz"},
        "a": {"images": ["$SOMEWHERE/imagesTr/case_00_0000.nii.gz"], "label": "./labelsTr/case_00.nii.gz"},
    }
    path.write_text(json.dumps(content))
    dataset = RawDataset.open(root)
    assert [case.identifier for case in dataset.cases] == ["b", "a"]
    assert dataset.cases[1].images == (root / "imagesTr" / "case_00_0000.nii.gz",)
    content["dataset"]["a"] = {"images": []}
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetJsonError, match="'dataset': 'a' must be"):
        RawDataset.open(root)


def test_one_4d_file_may_hold_all_channels(tmp_path: Path) -> None:
    import SimpleITK as sitk

    root = make_dataset(tmp_path, cases=1, channels=2, shape=(6, 8, 7))
    (root / "imagesTr" / "case_00_0001.nii.gz").unlink()
    stack = sitk.GetImageFromArray(np.zeros((2, 6, 8, 7), np.float32), isVector=False)
    sitk.WriteImage(stack, str(root / "imagesTr" / "case_00_0000.nii.gz"))
    assert len(RawDataset.open(root).cases[0].images) == 1


@pytest.mark.parametrize("key, value", [("file_ending", ".gif"), ("overwrite_image_reader_writer", "MyReader")])
def test_unsupported_kinds_say_so(tmp_path: Path, key: str, value: str) -> None:
    root = make_dataset(tmp_path, cases=1, shape=(6, 8, 7))
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DatasetError, match=r"not (supported|read)"):
        RawDataset.open(root)


def test_find_images_to_predict(tmp_path: Path) -> None:
    for name in ("b_0000", "a_0000", "a_0001", "b_0001"):
        write_image(tmp_path / f"{name}.nii.gz", np.zeros((3, 4, 5), np.int16), (1, 2, 3))
    cases = find_images(tmp_path, ".nii.gz", 2)
    assert [case.identifier for case in cases] == ["a", "b"]
    assert cases[0].label is None and len(cases[0].images) == 2
    (tmp_path / "b_0001.nii.gz").unlink()
    with pytest.raises(CaseError, match=r"b_0001\.nii\.gz is missing"):
        find_images(tmp_path, ".nii.gz", 2)
    with pytest.raises(CaseError, match=r"CASE_0000\.nrrd"):
        find_images(tmp_path, ".nrrd", 1)
    with pytest.raises(CaseError, match="no such folder"):
        find_images(tmp_path / "gone", ".nrrd", 1)
