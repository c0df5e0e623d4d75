"""The largest component, the files that say what to do, and a folder that it is done with."""

import io
import json
import pickle
import pickletools

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import write_image

from nnssl_adapt.errors import CaseError, ConfigurationError, PredictionError, UnsafeCheckpoint
from nnssl_adapt.inference.postprocess import Postprocessing, keep_largest_component, postprocess_folder

FUNCTION = "remove_all_but_largest_component_from_segmentation"


def pieces():
    """Label 1 in pieces of 6, 2 and 1 voxels, 2 in pieces of 4 and 3; the 2 and 1 touch at a corner."""
    labels = np.zeros((4, 8, 10), np.uint8)
    labels[0, 0, :6] = 1
    labels[3, 7, :2] = 1
    labels[2, 6, 2] = 1
    labels[1:3, 3, 8:] = 2
    labels[0, 7, 6:9] = 2
    return labels


def test_voxels_that_touch_at_a_corner_belong_together():
    labels = pieces()
    labels[0, 0, :6] = 0
    kept = keep_largest_component(labels, [1])
    assert (kept == 1).sum() == 3 and (kept == 2).sum() == 7


def test_smaller_parts_go_and_other_labels_stay():
    labels = pieces()
    before = labels.copy()
    kept = keep_largest_component(labels, [1])
    assert (kept == 1).sum() == 6 and np.array_equal(kept == 2, labels == 2)
    assert np.array_equal(labels, before)
    assert (keep_largest_component(labels, [1, 2]) > 0).sum() == 6
    assert np.array_equal(keep_largest_component(labels, [5]), labels)


def test_of_equally_large_parts_all_stay():
    labels = np.zeros((3, 4, 9), np.uint8)
    labels[1, 1, :2] = labels[1, 1, 4:6] = 1
    labels[2, 3, 8] = 1
    assert (keep_largest_component(labels, [1]) == 1).sum() == 4


def test_steps_follow_each_other():
    steps = Postprocessing().then([1, 2]).then([2])
    assert steps.steps == ((1, 2), (2,)) and str(steps) == "largest component of 1+2, then of 2"
    labels = pieces()
    assert np.array_equal(steps.apply(labels), keep_largest_component(keep_largest_component(labels, [1, 2]), [2]))
    assert np.array_equal(Postprocessing().apply(labels), labels) and str(Postprocessing()) == "no postprocessing"


@pytest.mark.parametrize("steps", [(), ((1,),), ((1, 2, 300), (2,), (1, 3))])
def test_files_come_back_as_they_were(steps, tmp_path):
    postprocessing = Postprocessing(steps)
    postprocessing.save(tmp_path / "postprocessing.json", {"input_folder": {"mean": {}}})
    assert Postprocessing.load(tmp_path / "postprocessing.json") == postprocessing
    assert Postprocessing.load(tmp_path / "postprocessing.pkl") == postprocessing
    assert json.loads((tmp_path / "postprocessing.json").read_text())["postprocessing_fns"] == [FUNCTION] * len(steps)
    pickletools.dis((tmp_path / "postprocessing.pkl").read_bytes(), out=io.StringIO())  # raises if it is malformed


def test_the_unions_that_nnunet_writes(tmp_path):
    path = tmp_path / "postprocessing.json"
    arguments = [{"labels_or_regions": [1, 2]}, {"labels_or_regions": 3}, {"labels_or_regions": [[2, 3], 4]}]
    path.write_text(json.dumps({"postprocessing_fns": [FUNCTION] * 3, "postprocessing_kwargs": arguments}))
    assert Postprocessing.load(path).steps == ((1, 2), (3,), (2, 3, 4))


class Harm:
    def __reduce__(self):
        return (open, ("harm.txt", "w"))


def test_a_pickle_that_names_anything_else_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(([Harm()], [{}])))
    with pytest.raises(UnsafeCheckpoint, match="nothing was run"):
        Postprocessing.load(tmp_path / "bad.pkl")
    assert not (tmp_path / "harm.txt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "postprocessing_fns"),
        ("[", "postprocessing"),
        ('{"postprocessing_fns": ["grow"], "postprocessing_kwargs": [{}]}', "asks for grow"),
        (f'{{"postprocessing_fns": ["{FUNCTION}"], "postprocessing_kwargs": []}}', "arguments for 0"),
        (
            f'{{"postprocessing_fns": ["{FUNCTION}"], "postprocessing_kwargs": [{{"labels_or_regions": 1, "x": 2}}]}}',
            "not supported",
        ),
        (f'{{"postprocessing_fns": ["{FUNCTION}"], "postprocessing_kwargs": [{{}}]}}', "labels_or_regions"),
    ],
)
def test_bad_files(content, message, tmp_path):
    (tmp_path / "postprocessing.json").write_text(content)
    with pytest.raises(CaseError, match=message):
        Postprocessing.load(tmp_path / "postprocessing.json")
    with pytest.raises(CaseError, match="No such file"):
        Postprocessing.load(tmp_path / "missing.pkl")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder(workers, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "dataset.json").write_text("{}")
    for name in "ab":
        write_image(source / f"{name}.nii.gz", pieces(), (3, 1, 0.5))
    written = postprocess_folder(source, tmp_path / "out", Postprocessing(((1,),)), ".nii.gz", workers)
    assert [path.name for path in written] == ["a.nii.gz", "b.nii.gz"]
    image = sitk.ReadImage(str(written[1]))
    assert np.array_equal(sitk.GetArrayFromImage(image), keep_largest_component(pieces(), [1]))
    assert image.GetSpacing() == (0.5, 1, 3) and image.GetOrigin() == (1, -2, 3)
    assert (tmp_path / "out" / "dataset.json").is_file()


def test_bad_folders(tmp_path):
    steps, source = Postprocessing(((1,),)), tmp_path / "in"
    with pytest.raises(CaseError, match="no such folder"):
        postprocess_folder(source, tmp_path / "out", steps, ".nii.gz")
    source.mkdir()
    with pytest.raises(CaseError, match="has no segmentations"):
        postprocess_folder(source, tmp_path / "out", steps, ".nii.gz")
    write_image(source / "a.nii.gz", pieces(), (3, 1, 0.5))
    (source / "b.nii.gz").write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match="would be overwritten"):
        postprocess_folder(source, tmp_path / "in" / ".." / "in", steps, ".nii.gz")
    with pytest.raises(PredictionError, match="1 of 2 cases failed; the others are in"):
        postprocess_folder(source, tmp_path / "out", steps, ".nii.gz")
    assert (tmp_path / "out" / "a.nii.gz").is_file()
