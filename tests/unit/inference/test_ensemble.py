"""Means of saved probabilities, worked out by hand; and bad files."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_adapt.data.images import ImageGeometry
from nnssl_adapt.errors import CaseError, ConfigurationError, DatasetJsonError, PredictionError
from nnssl_adapt.inference.ensemble import ensemble_folders
from nnssl_adapt.inference.export import write_probabilities

LABELS = {"labels": {"background": 0, "cord": 1, "lesion": 2}}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
GEOMETRY = ImageGeometry((3.0, 1.0, 0.5), (1.0, -2.0, 3.0), (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0), (2, 3, 4))


def write_folder(folder, scheme, cases, ending=".nii.gz"):
    folder.mkdir(exist_ok=True)
    content = {"channel_names": {"0": "MR"}, "numTraining": 1, "file_ending": ending, **scheme}
    (folder / "dataset.json").write_text(json.dumps(content))
    for name, probabilities in cases.items():
        write_probabilities(folder / name, probabilities, GEOMETRY.to_properties())
    return folder


def everywhere(*values, dtype=np.float32):
    """Probabilities (K, 2, 3, 4) that are the same in every voxel."""
    return np.broadcast_to(np.array(values, dtype)[:, None, None, None], (len(values), 2, 3, 4)).copy()


def read(path):
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image), image


def test_the_mean_decides_and_not_the_majority(tmp_path):
    first, second = everywhere(0.5, 0.45, 0.05), everywhere(0.1, 0.0, 0.9)
    first[:, 1, 2, 3] = (0.4, 0.6, 0.0)
    second[:, 1, 2, 3] = (0.2, 0.2, 0.6)
    second[:, 0, 0, 1] = (0.5, 0.5, 0.0)
    folders = [write_folder(tmp_path / str(n), LABELS, {"a": p}) for n, p in enumerate((first, second))]
    (written,) = ensemble_folders(folders, tmp_path / "out", save_probabilities=True)
    labels, image = read(written)
    expected = np.full((2, 3, 4), 2)
    expected[1, 2, 3] = 1
    expected[0, 0, 1] = 0
    assert np.array_equal(labels, expected)
    assert image.GetSpacing() == (0.5, 1.0, 3.0) and image.GetOrigin() == (1.0, -2.0, 3.0)
    assert image.GetDirection() == GEOMETRY.direction
    with np.load(tmp_path / "out" / "a.npz") as saved:
        np.testing.assert_array_equal(saved["probabilities"], (first + second) / 2)
    assert (tmp_path / "out" / "dataset.json").is_file()


def test_equal_probabilities_are_the_lower_label(tmp_path):
    folders = [write_folder(tmp_path / str(n), LABELS, {"a": everywhere(0.2, 0.4, 0.4)}) for n in range(2)]
    labels, _ = read(ensemble_folders(folders, tmp_path / "out", dataset_json=folders[1] / "dataset.json")[0])
    assert (labels == 1).all()


def test_regions_are_decided_one_by_one(tmp_path):
    first, second = everywhere(0.9, 0.2), everywhere(0.2, 0.7)
    first[:, 0, 1, 2] = (0.5, 0.9)
    second[:, 0, 1, 2] = (0.5, 0.2)
    folders = [write_folder(tmp_path / str(n), REGIONS, {"a": p}) for n, p in enumerate((first, second))]
    labels, _ = read(ensemble_folders(folders, tmp_path / "out")[0])
    expected = np.full((2, 3, 4), 1)
    expected[0, 1, 2] = 2
    assert np.array_equal(labels, expected)


def test_any_float_and_any_order_of_memory(tmp_path):
    random = np.random.default_rng(0).dirichlet(np.ones(3), (2, 3, 4)).transpose(3, 0, 1, 2)
    plain = write_folder(tmp_path / "plain", LABELS, {"a": np.ascontiguousarray(random)})
    columns = write_folder(tmp_path / "columns", LABELS, {"a": np.asfortranarray(random)})
    half = write_folder(tmp_path / "half", LABELS, {"a": random.astype(np.float16)})
    result = [read(ensemble_folders([f, f], tmp_path / f"out_{f.name}")[0])[0] for f in (plain, columns, half)]
    assert np.array_equal(result[0], random.argmax(0))
    assert all(np.array_equal(result[0], other) for other in result[1:])


def test_processes_and_a_single_folder(tmp_path):
    cases = {name: everywhere(*np.roll([0.2, 0.5, 0.3], shift)) for shift, name in enumerate("abc")}
    folder = write_folder(tmp_path / "in", LABELS, cases)
    for path in ensemble_folders([folder, folder], tmp_path / "out", workers=2):
        assert (read(path)[0] == cases[path.name[0]].argmax(0)[0, 0, 0]).all()


def test_a_bad_case_is_named_and_the_others_are_done(tmp_path):
    cases = {name: everywhere(0.2, 0.5, 0.3) for name in "abcd"}
    first, second = (write_folder(tmp_path / name, LABELS, cases) for name in ("first", "second"))
    whole = (second / "a.npz").read_bytes()
    (second / "a.npz").write_bytes(whole[: len(whole) // 2])
    write_probabilities(second / "b", everywhere(0.2, 0.5, 0.3)[:, :1], GEOMETRY.to_properties())
    (first / "c.pkl").unlink()
    with pytest.raises(PredictionError) as caught:
        ensemble_folders([first, second], tmp_path / "out")
    said = str(caught.value)
    assert "3 of 4 cases failed" in said
    assert "a.npz can't be read as probabilities" in said and "(3, 1, 3, 4)" in said and "c.pkl" in said
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["d.nii.gz"]


def test_a_flipped_bit_is_noticed(tmp_path):
    folder = write_folder(tmp_path / "in", LABELS, {"a": everywhere(0.2, 0.5, 0.3)})
    np.savez(folder / "a.npz", probabilities=everywhere(0.2, 0.5, 0.3).repeat(10_000, axis=3))
    content = bytearray((folder / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "a.npz").write_bytes(content)
    with pytest.raises(PredictionError, match=r"a\.npz is damaged \(Bad CRC-32"):
        ensemble_folders([folder], tmp_path / "out")


def test_what_is_refused(tmp_path):
    cases = {name: everywhere(0.2, 0.5, 0.3) for name in "ab"}
    first, second = (write_folder(tmp_path / name, LABELS, cases) for name in ("first", "second"))
    with pytest.raises(ConfigurationError, match="no folder"):
        ensemble_folders([], tmp_path / "out")
    with pytest.raises(ConfigurationError, match="choose another one for the result"):
        ensemble_folders([first, second], second)
    (second / "b.npz").unlink()
    with pytest.raises(CaseError, match=r"second lacks b\.npz, which another folder has"):
        ensemble_folders([first, second], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaseError, match=r"empty.*\.npz.*--save-probabilities"):
        ensemble_folders([first, tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(CaseError, match="no such folder"):
        ensemble_folders([first, tmp_path / "nowhere"], tmp_path / "out")
    shutil.rmtree(second)
    write_folder(second, {"labels": {"background": 0, "cord": 2, "lesion": 1, "bone": 3}}, cases)
    with pytest.raises(ConfigurationError, match="bone") as caught:
        ensemble_folders([first, second], tmp_path / "out")
    assert caught.value.path == second / "dataset.json"
    (first / "dataset.json").unlink()
    with pytest.raises(DatasetJsonError, match=r"first/dataset\.json is missing"):
        ensemble_folders([first, second], tmp_path / "out")
    write_folder(first, {"labels": {"background": 0, "cord": 1}}, {})
    with pytest.raises(PredictionError, match=r"\(2, Z, Y, X\).*\(3, 2, 3, 4\)"):
        ensemble_folders([first], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_folds_validation_has_its_models_labels(tmp_path):
    model = write_folder(tmp_path / "model", LABELS, {})
    (model / "fold_0").mkdir()
    validation = write_folder(model / "fold_0" / "validation", LABELS, {"a": everywhere(0.2, 0.5, 0.3)})
    (validation / "dataset.json").unlink()
    assert len(ensemble_folders([validation], tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "order"),
    [
        (LABELS, {"labels": {"background": 0, "Lesion": 1, "CORD": 2}}, (0, 2, 1)),
        (
            {
                "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3},
                "regions_class_order": [1, 2, 3],
            },
            {
                "labels": {"background": 0, "tip": 3, "whole": [1, 2, 3], "core": [2, 3]},
                "regions_class_order": [3, 1, 2],
            },
            (1, 2, 0),
        ),
    ],
)
def test_outputs_are_paired_by_the_names_of_their_labels(tmp_path, ours, theirs, order):
    random = np.random.default_rng(5).dirichlet(np.ones(3), (2, 3, 4)).transpose(3, 0, 1, 2).astype(np.float32)
    first = write_folder(tmp_path / "first", ours, {"a": random})
    second = write_folder(tmp_path / "second", theirs, {"a": random[np.argsort(order)]})
    alone = read(ensemble_folders([first], tmp_path / "alone")[0])[0]
    (written,) = ensemble_folders([first, second], tmp_path / "out", save_probabilities=True)
    assert np.array_equal(read(written)[0], alone) and len(np.unique(alone)) > 2
    with np.load(tmp_path / "out" / "a.npz") as saved:
        np.testing.assert_allclose(saved["probabilities"], random, rtol=1e-6)
    (back,) = ensemble_folders([second, first], tmp_path / "back")
    assert json.loads((tmp_path / "back" / "dataset.json").read_text())["labels"] == theirs["labels"]
    if ours is LABELS:  # the first folder's values are written
        assert np.array_equal(read(back)[0], np.array([0, 2, 1])[alone])


def test_labels_are_not_averaged_with_regions(tmp_path):
    first = write_folder(tmp_path / "first", {"labels": {"background": 0, "whole": 1}}, {"a": everywhere(0.2, 0.8)})
    second = write_folder(tmp_path / "second", REGIONS, {"a": everywhere(0.2, 0.8)})
    with pytest.raises(ConfigurationError, match="regions") as caught:
        ensemble_folders([first, second], tmp_path / "out")
    assert str(first) in str(caught.value) and str(second) in str(caught.value)
