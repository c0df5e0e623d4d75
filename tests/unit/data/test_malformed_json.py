"""Any JSON of any type at any place of the files that a dataset has: it is used, or refused by one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.malformed import used_or_refused, variants
from support.synthetic import make_dataset

from nnssl_adapt.data.convert.cases import Target, training_case
from nnssl_adapt.data.convert.conversion import convert_cases
from nnssl_adapt.data.dataset import DatasetJson, RawDataset
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.reorient import reorient_dataset
from nnssl_adapt.data.splits import load_or_make_splits, split_for_fold
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.data.verifying.examine import verify_dataset
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint, changed_cases, remember_sources
from nnssl_adapt.errors import DatasetError, DatasetJsonError
from nnssl_adapt.geometry.spacing import choose_spacing

DATASET = {
    "channel_names": {"0": "T1"},
    "labels": {"background": 0, "core": 1, "rim": [1, 2], "ignore": 3},
    "regions_class_order": [1, 2],
    "numTraining": 2,
    "file_ending": ".nii.gz",
    "overwrite_image_reader_writer": "SimpleITKIO",
    "dataset": {"a": {"images": ["imagesTr/case_00_0000.nii.gz"], "label": "labelsTr/case_00.nii.gz"}},
}


def test_dataset_json(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=2, shape=(4, 6, 5))
    path = root / "dataset.json"
    used = 0
    for text in variants(DATASET, seed=1, most=200):
        path.write_text(text, encoding="utf-8")
        used += used_or_refused(lambda: LabelScheme.from_dataset_json(DatasetJson.load(path).raw), text)
        used_or_refused(lambda: RawDataset.open(root), text)
    assert used > 5
    for text in variants({key: value for key, value in DATASET.items() if key != "dataset"}, seed=2, most=25):
        path.write_text(text, encoding="utf-8")
        used_or_refused(lambda: verify_dataset(root), text)


def test_splits(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    for text in variants([{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}], seed=3):
        path.write_text(text, encoding="utf-8")
        used_or_refused(
            lambda: split_for_fold(load_or_make_splits(tmp_path, ["a", "b", "c"]), 0, ["a", "b", "c"]), text
        )


def test_fingerprint_and_its_sources(tmp_path: Path) -> None:
    statistics = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    content = {
        "spacings": [[1.0, 2.0, 3.0]] * 2,
        "shapes_after_crop": [[10, 20, 30]] * 2,
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "median_relative_size_after_cropping": 0.5,
    }
    path = tmp_path / "dataset_fingerprint.json"

    def plan_from_it() -> None:
        known = DatasetFingerprint.load(path)
        choose_spacing("median", pretrained=None, spacings=known.spacings, shapes=known.shapes_after_crop)

    for text in variants(content, seed=4):
        path.write_text(text, encoding="utf-8")
        used_or_refused(plan_from_it, text)
    dataset = RawDataset.open(make_dataset(tmp_path / "raw", cases=2, shape=(4, 6, 5)))
    path.write_text(json.dumps(content))
    remember_sources(path, dataset)
    record = tmp_path / ".nnssl_adapt" / "fingerprint_sources.json"
    for text in variants(json.loads(record.read_text()), seed=5, most=80):
        record.write_text(text, encoding="utf-8")
        used_or_refused(lambda: changed_cases(path, dataset), text)


def test_the_records_of_a_store(tmp_path: Path) -> None:
    records = tmp_path / ".nnssl_adapt"
    (records / "cases").mkdir(parents=True)
    for name in ("a.b2nd", "a_seg.b2nd", "a.pkl"):
        (tmp_path / name).write_bytes(b"1234")
    outputs = dict.fromkeys(("a.b2nd", "a_seg.b2nd", "a.pkl"), 4)
    case = {
        "digest": "d",
        "sources": [{"name": "a"}],
        "outputs": outputs,
        "crc32": outputs,
        "made_with": {"numpy": "1"},
    }
    store = CaseStore(tmp_path)

    def look() -> None:
        _ = (
            store.identifiers,
            store.is_complete("a", "d", [{"name": "a"}], read_all=True),
            str(store),
            store.digests(["a"]),
        )

    for file, content in (
        (records / "cases" / "a.json", case),
        (records / "settings.json", {"digest": "d", "settings": {}}),
    ):
        for text in variants(content, seed=6, most=120):
            file.write_text(text, encoding="utf-8")
            used_or_refused(look, text)


def test_the_notes_of_conversions(nnunet_folders: Path) -> None:
    root = make_dataset(nnunet_folders / "nnUNet_raw", cases=1, shape=(4, 6, 5))
    case = training_case("a", [root / "imagesTr/case_00_0000.nii.gz"], root / "labelsTr/case_00.nii.gz", ".nii.gz")
    target = Target(nnunet_folders / "nnUNet_raw" / "Dataset992_Copy")
    convert_cases("pairs", "x", target, [case])
    note = target.folder / ".nnssl_adapt" / "converted" / "Tr_a.json"
    for text in variants(json.loads(note.read_text()), seed=7, most=40):
        note.write_text(text, encoding="utf-8")
        assert used_or_refused(lambda: convert_cases("pairs", "x", target, [case]), text)
        note.with_name("Tr_gone.json").write_text(text, encoding="utf-8")
        assert used_or_refused(lambda: convert_cases("pairs", "x", target, [case]), text)
    copy = reorient_dataset(RawDataset.open(root), "RAS", workers=1)
    record = copy.folder / ".nnssl_adapt" / "imagesTr" / "case_00_0000.nii.gz.json"
    for text in variants(json.loads(record.read_text()), seed=8, most=30):
        record.write_text(text, encoding="utf-8")
        assert used_or_refused(lambda: reorient_dataset(RawDataset.open(root), "RAS", workers=1), text)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ('{"background": 0, "ignore": 1, "core": 2}', "'ignore' is 1, in the middle"),
        ('{"background": 0, "core": 1, "ignore": 1}', "'ignore' and 'core' share the value 1"),
        ('{"background": 0, "ignore": 1, "ignore": 2}', "'ignore' stands twice"),
        ('{"background": 0, "core": 1, "ignore": 7}', "highest value, expected 2"),
    ],
)
def test_the_cause_is_named_where_ignore_is_wrong(tmp_path: Path, labels: str, words: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(
        f'{{"channel_names": {{"0": "T1"}}, "labels": {labels}, "numTraining": 1, "file_ending": ".nii.gz"}}'
    )
    with pytest.raises(DatasetJsonError) as caught:
        DatasetJson.load(path)
    assert words in str(caught.value)


def test_a_byte_order_mark_is_read_and_a_key_twice_is_not(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text("\ufeff" + json.dumps(DATASET), encoding="utf-8")
    assert DatasetJson.load(path).raw == DATASET
    path.write_text('{"spacings": [], "spacings": []}')
    with pytest.raises(DatasetError) as caught:
        DatasetFingerprint.load(path)
    assert caught.value.path == path and "'spacings' stands twice" in str(caught.value)
