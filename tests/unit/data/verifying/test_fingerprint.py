from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import make_dataset, write_image

import nnssl_adapt.data.verifying.fingerprint as fingerprint_module
import nnssl_adapt.data.verifying.look as look_module
from nnssl_adapt.data.dataset import RawCase, RawDataset
from nnssl_adapt.data.verifying.examine import fingerprint_dataset
from nnssl_adapt.data.verifying.fingerprint import (
    DatasetFingerprint,
    changed_cases,
    remember_sources,
)
from nnssl_adapt.data.verifying.measures import memory_to_measure
from nnssl_adapt.errors import DatasetError
from nnssl_adapt.planning.dataset_files import load_or_make_fingerprint


def test_shapes_spacings_and_statistics(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=2, shape=(10, 20, 30), spacing=(3.0, 1.5, 0.5))
    image = np.zeros((10, 20, 30), np.int16)
    image[1:7, 2:17, 5:25] = 10
    labels = np.zeros((10, 20, 30), np.uint8)
    labels[2, 3, 6:10] = 1
    image[2, 3, 6:10] = (100, 200, 300, 400)
    labels[9, 19, 29] = 2  # outside the crop: not drawn
    write_image(root / "imagesTr" / "case_00_0000.nii.gz", image, (3.0, 1.5, 0.5))
    write_image(root / "labelsTr" / "case_00.nii.gz", labels, (3.0, 1.5, 0.5))
    for part in ("imagesTr/case_01_0000", "labelsTr/case_01"):
        (root / f"{part}.nii.gz").unlink()
    fingerprint = fingerprint_dataset(RawDataset.open(root))
    assert fingerprint.spacings == ((3.0, 1.5, 0.5),)
    assert fingerprint.shapes_after_crop == ((6, 15, 20),)
    assert fingerprint.median_relative_size_after_cropping == 6 * 15 * 20 / 6000
    statistics = fingerprint.intensity["0"]
    assert statistics["min"] == statistics["percentile_00_5"] == 100
    assert statistics["max"] == statistics["percentile_99_5"] == 400
    assert abs(statistics["mean"] - 250) < 2 and abs(statistics["std"] - np.sqrt(12500)) < 2


@pytest.mark.parametrize("total", [1, 2, 5, 40, 1001])
def test_percentiles_of_counted_values_are_numpys(total: int) -> None:
    for seed in range(60):  # to the last bit, which only some draws tell
        random = np.random.default_rng((total, seed))
        drawn = random.choice(random.normal(100, 50, 40).astype(np.float32), total)
        values, counts = np.unique(drawn, return_counts=True)
        statistics = fingerprint_module._statistics([(values, counts)])
        for name, percent in (("percentile_00_5", 0.5), ("median", 50.0), ("percentile_99_5", 99.5)):
            assert statistics[name] == np.percentile(drawn, np.array([percent]))[0], name
        np.testing.assert_allclose(statistics["mean"], drawn.mean(dtype=np.float64))
        np.testing.assert_allclose(statistics["std"], drawn.std(dtype=np.float64), atol=1e-9)


def test_files_come_back(tmp_path: Path) -> None:
    dataset = RawDataset.open(make_dataset(tmp_path, cases=3, channels=2, shape=(6, 9, 8)))
    fingerprint = fingerprint_dataset(dataset)
    fingerprint.save(tmp_path / "dataset_fingerprint.json")
    assert DatasetFingerprint.load(tmp_path / "dataset_fingerprint.json") == fingerprint


def test_an_interrupted_run_goes_on_with_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_dataset(tmp_path, cases=3, channels=2, shape=(6, 9, 8))
    undisturbed = fingerprint_dataset(RawDataset.open(root))
    read: list[str] = []
    original = look_module.read_labels
    stop_at: str | None = "case_02"

    def noting(path: Path, reader: Any) -> Any:
        case = path.name.removesuffix(".nii.gz")
        if case == stop_at:
            raise KeyboardInterrupt
        read.append(case)
        return original(path, reader)

    monkeypatch.setattr(look_module, "read_labels", noting)
    with pytest.raises(KeyboardInterrupt):
        fingerprint_dataset(RawDataset.open(root), parts=tmp_path / "parts")
    assert read == ["case_00", "case_01"]
    stop_at = None
    read.clear()
    assert fingerprint_dataset(RawDataset.open(root), parts=tmp_path / "parts") == undisturbed
    assert read == ["case_02"]
    read.clear()
    # A damaged part, and a case whose image has changed since.
    (tmp_path / "parts" / "case_00.npz").write_bytes((tmp_path / "parts" / "case_00.npz").read_bytes()[:-40])
    os.utime(root / "imagesTr" / "case_01_0001.nii.gz", (5, 5))
    assert fingerprint_dataset(RawDataset.open(root), parts=tmp_path / "parts") == undisturbed
    assert read == ["case_00", "case_01"]


def test_bad_cases_are_listed(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=3, shape=(6, 9, 8))
    (root / "imagesTr" / "case_01_0000.nii.gz").write_text("no image")
    write_image(root / "labelsTr" / "case_02.nii.gz", np.zeros((3, 4, 5), np.uint8), (1, 1, 1))
    with pytest.raises(DatasetError) as caught:
        fingerprint_dataset(RawDataset.open(root))
    first, second = caught.value.mistakes
    assert "case_01_0000.nii.gz" in first and "case_02.nii.gz" in second and "shape" in second


def test_a_dataset_without_foreground(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=1, shape=(6, 9, 8))
    write_image(root / "labelsTr" / "case_00.nii.gz", np.zeros((6, 9, 8), np.uint8), (2.0, 1.0, 1.3))
    with pytest.raises(DatasetError, match="no label file has a foreground voxel"):
        fingerprint_dataset(RawDataset.open(root))


@pytest.mark.parametrize(
    "text, message", [("{", "delete it"), ("{}", "key 'spacings' is missing"), ("[]", "delete it")]
)
def test_a_file_that_is_no_fingerprint(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "dataset_fingerprint.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        DatasetFingerprint.load(path)


def test_memory_is_foreseen_of_all_channels_however_they_are_stored(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, cases=1, channels=3, shape=(6, 9, 7), spacing=(2.0, 1.0, 1.5))
    case = RawDataset.open(root).cases[0]
    together = root / "imagesTr" / "all_0000.nii.gz"
    write_channels_together(together, case.images)
    apart, one = (memory_to_measure(RawCase("a", files, case.label), 100) for files in (case.images, (together,)))
    few, many = (memory_to_measure(case, draws) for draws in (100, 378))
    assert apart == one == few < many
    (tmp_path / "no_0000.nii.gz").write_text("no image")
    assert memory_to_measure(RawCase("b", (tmp_path / "no_0000.nii.gz",)), 100) == 0


def write_channels_together(path: Path, channels: Sequence[Path]) -> None:
    images = [sitk.ReadImage(str(channel)) for channel in channels]
    sitk.WriteImage(sitk.JoinSeries(images), str(path))


# -- a dataset that changes ----------------------------------------------------------------------------------------------


def test_a_changed_dataset_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One image replaced: as many cases as before, and other intensities and shapes."""
    root = make_dataset(tmp_path / "raw", cases=3, shape=(6, 9, 7), spacing=(2.0, 1.0, 1.5))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    path = tmp_path / "preprocessed" / root.name / "dataset_fingerprint.json"
    first = load_or_make_fingerprint(RawDataset.open(root), workers=1)
    assert changed_cases(path, RawDataset.open(root)) == []
    for kind in ("imagesTr/case_01_0000", "labelsTr/case_01"):
        write_image(root / f"{kind}.nii.gz", np.full((5, 8, 4), 1, np.int16), (2.0, 1.0, 1.5))
    assert changed_cases(path, RawDataset.open(root)) == ["case_01"]
    with caplog.at_level(logging.WARNING):
        second = load_or_make_fingerprint(RawDataset.open(root), workers=1)
    assert "out of date (these cases have changed since: case_01" in caplog.text
    assert second.shapes_after_crop[1] == (5, 8, 4) != first.shapes_after_crop[1]
    assert DatasetFingerprint.load(path) == second
    assert changed_cases(path, RawDataset.open(root)) == []


def test_another_number_of_cases_is_told_beside_a_fingerprint_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_dataset(tmp_path / "raw", cases=2, shape=(6, 9, 7), spacing=(2.0, 1.0, 1.5))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    load_or_make_fingerprint(RawDataset.open(root), workers=1)
    path = root / "dataset.json"
    path.write_text(path.read_text().replace('"numTraining": 2', '"numTraining": 7'))
    caplog.clear()
    load_or_make_fingerprint(RawDataset.open(root), workers=1)
    assert "'numTraining' 7" in caplog.text and "2 cases" in caplog.text


def test_of_nnunets_own_fingerprint_nothing_is_known(tmp_path: Path) -> None:
    dataset = RawDataset.open(make_dataset(tmp_path / "raw", cases=2, shape=(6, 9, 7), spacing=(2.0, 1.0, 1.5)))
    path = tmp_path / "dataset_fingerprint.json"
    fingerprint_dataset(dataset).save(path)
    assert changed_cases(path, dataset) == []
    remember_sources(path, dataset)
    (dataset.cases[0].label or Path()).touch()
    assert changed_cases(path, dataset) == ["case_00"]
    path.write_text(path.read_text() + "\n")  # another program wrote it anew
    assert changed_cases(path, dataset) == []
