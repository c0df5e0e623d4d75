"""Files are paired by their names; what doesn't fit is refused by name, and the rest goes on."""

import json

import numpy as np
import pytest
from support.synthetic import write_image

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.errors import DatasetJsonError
from nnssl_adapt.inference.pairing import channel_order, pair_files, pair_folder

TWO = ("T1", "T2")


def touch(root, *names):
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return paths


def names(pairing):
    return {case.identifier: [path.name for path in case.images] for case in pairing.cases}


def test_the_order_of_files_does_not_matter(tmp_path):
    found = pair_files(touch(tmp_path, "p_0001.nii.gz", "p_0000.nii.gz"), TWO)
    assert names(found) == {"p": ["p_0000.nii.gz", "p_0001.nii.gz"]} and not found.refused


@pytest.mark.parametrize(
    ("given", "cases", "refused"),
    [
        (("p_0000.nii.gz", "q_0000.nii.gz"), set(), {"p": "p_0001", "q": "q_0001"}),
        (("p_0000.nii.gz", "q_0001.nii.gz"), set(), {"p": "p_0001", "q": "q_0000"}),
        (("p_0000.nii.gz", "p_0001.nii.gz", "q_0001.nii.gz"), {"p"}, {"q": "q_0000"}),
        (("p_0000.nii.gz", "p_0001.nii.gz", "p_0002.nii.gz"), set(), {"p": "no channel _0002"}),
        (("p_0000.nii.gz", "p_0000.nii", "p_0001.nii"), set(), {"p": "several files for the same channel"}),
        (("A/c_0000.nii.gz", "A/c_0001.nii.gz", "B/c_0000.nii.gz", "B/c_0001.nii.gz"), set(), {"c": "--keep-folders"}),
        (("p_0000.nii.gz", "p_0001.nii.gz", "q.nii.gz"), {"p"}, {"q": "does not say which channel"}),
        (("p_0000.nii.gz", "p.nii.gz"), set(), {"p": "several files"}),
        (("T1/p_0000.nii.gz", "T2/p_0001.nii.gz"), {"p"}, {}),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, given, cases, refused):
    found = pair_files(touch(tmp_path, *given), TWO)
    assert {case.identifier for case in found.cases} == cases and found.refused.keys() == refused.keys()
    for name, word in refused.items():
        assert word in str(found.refused[name]) and found.refused[name].path is not None


def test_folders_keep_cases_apart(tmp_path):
    files = touch(tmp_path, "x/A/c_0000.nii.gz", "y/A/c_0000.nii.gz", "y/A/c_0001.nii.gz", "x/A/c_0001.nii.gz")
    found = pair_files(files, TWO, keep_folders=True)
    assert names(found) == {f"{f}/A/c": ["c_0000.nii.gz", "c_0001.nii.gz"] for f in "xy"} and not found.refused
    assert {path.parent for path in found.cases[0].images} == {tmp_path / "x" / "A"}


def test_files_without_numbers_where_nothing_is_ambiguous(tmp_path, caplog):
    files = touch(tmp_path, "t1.nii.gz", "t2.nii.gz")
    assert names(pair_files(files, ("T1",))) == {"t1": ["t1.nii.gz"], "t2": ["t2.nii.gz"]}
    assert names(pair_files(files, TWO)) == {"t1": ["t1.nii.gz", "t2.nii.gz"]}
    assert "T1 = t1.nii.gz, T2 = t2.nii.gz" in caplog.text
    assert not pair_files(files[:1], TWO).cases
    assert pair_files(touch(tmp_path, "p_0001.nii.gz"), ("T1",)).refused.keys() == {"p"}


def test_a_file_with_all_channels_is_an_image(tmp_path):
    import SimpleITK as sitk

    volume = sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32))
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(tmp_path / "b_0000.nii.gz"))
    found = pair_files([tmp_path / "a.nii.gz", tmp_path / "b_0000.nii.gz"], TWO)
    assert names(found) == {"a": ["a.nii.gz"], "b": ["b_0000.nii.gz"]}


def test_a_folder_of_several_formats(tmp_path):
    write_image(tmp_path / "x_0000.nii", np.ones((4, 5, 6), np.int16), (1.0, 1.0, 1.0))
    files = [tmp_path / "x_0000.nii", *touch(tmp_path, "y_0000.NII.GZ", "z_0000.nrrd", "odd.nii.gz", "w_0001.mha")]
    found = pair_folder(tmp_path, files, ("T1",))
    assert [case.identifier for case in found.cases] == ["x", "y", "z"]
    assert found.refused.keys() == {"odd.nii.gz", "w"}


def describe(folder, *channels):
    content = {"channel_names": {str(i): name for i, name in enumerate(channels)}, "labels": {"background": 0, "a": 1}}
    (folder / "dataset.json").write_text(json.dumps(content | {"numTraining": 1, "file_ending": ".nii.gz"}))


@pytest.mark.parametrize(
    ("there", "taken", "warned"),
    [
        (("T1w", "t2"), ["c_0000.nii.gz", "c_0001.nii.gz"], None),
        (("T2", "T1"), ["c_0001.nii.gz", "c_0000.nii.gz"], "T1 = _0001, T2 = _0000"),
        (("FLAIR", "T2", "T1"), ["c_0002.nii.gz", "c_0001.nii.gz"], "T1 = _0002, T2 = _0001"),
        (("T1", "FLAIR"), ["c_0000.nii.gz", "c_0001.nii.gz"], "taken by number"),
        (("image_0", "image_1"), ["c_0000.nii.gz", "c_0001.nii.gz"], None),
    ],
)
def test_channels_go_by_their_names_where_a_dataset_json_says_them(tmp_path, caplog, there, taken, warned):
    folder = tmp_path / "imagesTs"
    files = touch(folder, *(f"c_{number:04d}.nii.gz" for number in range(len(there))))
    describe(tmp_path, *there)
    order = channel_order(folder, TWO)
    found = order.applied(pair_folder(folder, files, order.names))
    assert names(found) == {"c": taken} and not found.refused
    assert (warned or "") in caplog.text and bool(caplog.text) == (warned is not None)


def test_a_file_with_all_channels_in_another_order_is_refused(tmp_path):
    import SimpleITK as sitk

    volume = sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32))
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(tmp_path / "b_0000.nii.gz"))
    describe(tmp_path, "T2", "T1")
    order = channel_order(tmp_path, TWO)
    found = order.applied(pair_folder(tmp_path, [tmp_path / "b_0000.nii.gz"], order.names))
    assert not found.cases and "another order" in str(found.refused["b"])


def test_names_in_dataset_json_count_by_their_number(tmp_path):
    describe(tmp_path, "x")
    content = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"channel_names": {"1": "T2", "0": "T1"}}))
    assert channel_order(tmp_path, TWO).is_the_models
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"channel_names": {"T1": "0"}}))
    with pytest.raises(DatasetJsonError, match="channel numbers"):
        DatasetJson.load(tmp_path / "dataset.json")
