"""Our converters make, file by file, what nnunetv2's own make."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import write_image

from nnssl_adapt.cli.main import main

pytest.importorskip("nnunetv2")
SPACING = (2.0, 1.0, 1.3)


def old_json(channels, **more):
    return {
        "name": "Tiny",
        "modality": {str(c): f"MR{c}" for c in range(channels)},
        "labels": {"0": "background", "1": "core", "2": "rim"},
        "numTraining": 2,
        "numTest": 1,
        "tensorImageSize": "4D",
        "training": [],
        "test": [],
        **more,
    }


def write_4d(path, voxels):
    volumes = []
    for volume in voxels:
        image = sitk.GetImageFromArray(volume)
        image.SetSpacing(SPACING[::-1])
        image.SetOrigin((1.0, -2.0, 3.0))
        volumes.append(image)
    sitk.WriteImage(sitk.JoinSeries(volumes), str(path), True)


def assert_same_folders(ours, theirs):
    names = sorted(str(p.relative_to(theirs)) for p in theirs.rglob("*") if p.is_file())
    extra = {str(p.relative_to(ours)) for p in ours.rglob("*") if p.is_file() and ".nnssl_adapt" not in p.parts}
    assert extra - set(names) == {"conversion.json", "conversion.csv"} and set(names) <= extra
    for name in names:
        if name.endswith(".json"):
            assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())
            continue
        mine, peer = sitk.ReadImage(str(ours / name)), sitk.ReadImage(str(theirs / name))
        assert mine.GetPixelID() == peer.GetPixelID() and mine.GetSpacing() == peer.GetSpacing()
        assert mine.GetOrigin() == peer.GetOrigin() and mine.GetDirection() == peer.GetDirection()
        assert np.array_equal(sitk.GetArrayFromImage(mine), sitk.GetArrayFromImage(peer))


@pytest.fixture
def raw(tmp_path, monkeypatch):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(folder if name == "nnUNet_raw" else tmp_path / name))
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_msd(tmp_path, raw, monkeypatch, channels):
    from nnunetv2.dataset_conversion import convert_MSD_dataset as peer
    from nnunetv2.utilities import dataset_name_id_conversion as ids

    source = tmp_path / "Task07_Tiny"
    for part in ("imagesTr", "imagesTs", "labelsTr"):
        (source / part).mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, name in (("Tr", "a_1"), ("Tr", "b_2"), ("Ts", "c_3")):
        voxels = random.integers(-9, 900, (channels, 4, 5, 6)).astype(np.int16)
        if channels == 1:
            write_image(source / f"images{part}" / f"{name}.nii.gz", voxels[0], SPACING)
        else:
            write_4d(source / f"images{part}" / f"{name}.nii.gz", voxels)
        if part == "Tr":
            write_image(source / "labelsTr" / f"{name}.nii.gz", (voxels[0] % 3).astype(np.uint8), SPACING)
    (source / "imagesTr" / "._a_1.nii.gz").write_text("macOS")
    (source / "dataset.json").write_text(json.dumps(old_json(channels)))
    assert main(["convert", "msd", str(source), "-np", "1"]) == 0
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    monkeypatch.setattr(peer, "nnUNet_raw", str(theirs))
    monkeypatch.setattr(peer, "find_candidate_datasets", lambda number: [])
    assert ids
    peer.convert_msd_dataset(str(source), None, 1)
    assert_same_folders(raw / "Dataset007_Tiny", theirs / "Dataset007_Tiny")


def test_old_tasks_with_2d_data_too(tmp_path, raw, monkeypatch):
    from nnunetv2.dataset_conversion import convert_raw_dataset_from_old_nnunet_format as peer

    source = tmp_path / "Task120_Roads"
    random = np.random.default_rng(1)
    for part in ("Tr", "Ts", "Val"):
        for kind in ("images", "labels"):
            (source / f"{kind}{part}").mkdir(parents=True)
        for name in ("a_1", "b_2"):
            voxels = random.integers(0, 900, (2, 1, 7, 6)).astype(np.int16)  # one slice: 2D data in version 1
            for channel in range(2):
                path = source / f"images{part}" / f"{name}_{channel:04d}.nii.gz"
                write_image(path, voxels[channel], (999, 1, 1))
            label = (voxels[0] % 3).astype(np.uint8)
            write_image(source / f"labels{part}" / f"{name}.nii.gz", label, (999, 1, 1))
    (source / "dataset.json").write_text(json.dumps(old_json(2)))
    assert main(["convert", "nnunetv1", str(source), "-np", "1"]) == 0
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    monkeypatch.setattr(peer, "nnUNet_raw", str(theirs))
    peer.convert(str(source), "Dataset120_Roads")
    assert_same_folders(raw / "Dataset120_Roads", theirs / "Dataset120_Roads")
    shutil.rmtree(theirs)
