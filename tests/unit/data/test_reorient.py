"""Reoriented copies: the same voxels at the same places, in another order, and nothing of the original touched."""

import hashlib
import itertools
import json
import os

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import make_dataset

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import read_geometry, read_image
from nnssl_adapt.data.reorient import FileCopy, reorient_dataset, reorient_file
from nnssl_adapt.errors import CaseError, ConfigurationError, DatasetError, PreprocessingError
from nnssl_adapt.geometry.orientation import is_oriented, orientation_code
from nnssl_adapt.paths import free_dataset_id

OBLIQUE = [0.96, -0.25, 0.12, 0.2686, 0.9456, -0.1833, -0.0676, 0.2082, 0.9757]


def orthonormal(matrix):
    u, _, v = np.linalg.svd(np.reshape(matrix, (3, 3)))
    return (u @ v).ravel().tolist()


def write_volume(path, shape=(4, 5, 6), dtype="int16", direction=None, seed=0):
    voxels = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.7, 1.1, 2.3))
    image.SetOrigin((-11, 5, 31))
    image.SetDirection(orthonormal(OBLIQUE) if direction is None else direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return sitk.ReadImage(str(path))  # as stored, in the file's precision


def places(image):
    """Position in space (rounded to 0.01 mm) → voxel."""
    array = sitk.GetArrayFromImage(image)
    found = {}
    for z, y, x in itertools.product(*map(range, array.shape)):
        point = image.TransformIndexToPhysicalPoint((x, y, z))
        found[tuple(np.round(point, 2) + 0.0)] = array[z, y, x]
    return found


def digests(folder):
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def lie_differently(folder):
    """Give the cases of a dataset orientations that differ, as data from several hospitals have."""
    for number, directions in enumerate(itertools.permutations(np.diag([1.0, -1.0, -1.0]))):
        for path in folder.glob(f"*Tr/case_{number:02d}*"):
            image = sitk.ReadImage(str(path))
            image.SetDirection(np.array(directions).T.ravel().tolist())
            sitk.WriteImage(image, str(path))


@pytest.fixture
def raw(nnunet_folders):
    folder = make_dataset(nnunet_folders / "nnUNet_raw", name="Dataset041_Cord", channels=2, cases=4)
    lie_differently(folder)
    write_volume(folder / "imagesTs" / "new_0000.nii.gz", seed=3)
    write_volume(folder / "imagesTs" / "new_0001.nii.gz", seed=4)
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_00"], "val": ["case_01"]}]))
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "licence": "CC0", "nested": {"kept": [1, 2]}}))
    return RawDataset.open(folder)


@pytest.mark.parametrize("code", ["RPI", "AIR", "SLP", "LPI"])
@pytest.mark.parametrize("dtype", ["int16", "uint8", "float32", "float64", "uint16"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_every_voxel_stays_at_its_place(tmp_path, code, dtype, ending):
    source = tmp_path / "raw" / "imagesTr" / f"a{ending}"
    before = write_volume(source, dtype=dtype)
    copy = FileCopy(source, tmp_path / "copy" / "imagesTr" / f"a{ending}")
    reorient_file(copy, code)
    after = sitk.ReadImage(str(copy.target))
    assert orientation_code(after.GetDirection()) == code
    assert after.GetPixelID() == before.GetPixelID()
    assert places(after) == places(before)
    assert copy.is_done(code) and not copy.is_done("SAR")


def test_rpi_arrays_run_from_inferior_posterior_right(tmp_path):
    """Written out by hand: an LPS array (z up, y back, x left) as RPI is turned in y only."""
    source = tmp_path / "raw" / "imagesTr" / "a.nii.gz"
    before = write_volume(source, direction=np.eye(3).ravel().tolist())
    copy = FileCopy(source, tmp_path / "copy" / "imagesTr" / "a.nii.gz")
    reorient_file(copy, "RPI")
    turned = sitk.GetArrayFromImage(sitk.ReadImage(str(copy.target)))
    assert np.array_equal(turned, sitk.GetArrayFromImage(before)[:, ::-1, :])


@pytest.mark.parametrize("code", ["RPI", "AIR", "SLP"])
def test_there_and_back(tmp_path, code):
    paths = [tmp_path / name / "imagesTr" / "a.nii.gz" for name in ("raw", "there", "back")]
    before = write_volume(paths[0], dtype="float32")
    reorient_file(FileCopy(paths[0], paths[1]), code)
    reorient_file(FileCopy(paths[1], paths[2]), orientation_code(before.GetDirection()))
    after = sitk.ReadImage(str(paths[2]))
    assert np.array_equal(sitk.GetArrayFromImage(after), sitk.GetArrayFromImage(before))
    assert np.allclose(after.GetOrigin(), before.GetOrigin(), atol=1e-4)
    assert np.allclose(after.GetDirection(), before.GetDirection(), atol=1e-6)
    assert np.allclose(after.GetSpacing(), before.GetSpacing())


def test_volumes_of_a_4d_file(tmp_path):
    source = tmp_path / "raw" / "imagesTr" / "a.nii.gz"
    volumes = [write_volume(tmp_path / f"{i}.nii.gz", seed=i) for i in range(3)]
    sitk.WriteImage(sitk.JoinSeries(volumes), str(source.parent.mkdir(parents=True) or source))
    copy = FileCopy(source, tmp_path / "copy" / "imagesTr" / "a.nii.gz")
    reorient_file(copy, "PIR")
    after = sitk.ReadImage(str(copy.target))
    assert after.GetSize()[3] == 3
    for index, volume in enumerate(volumes):
        assert places(after[..., index]) == places(volume)


def test_numbers_that_the_header_scales(tmp_path):
    source = tmp_path / "raw" / "imagesTr" / "a.nii"
    source.parent.mkdir(parents=True)
    image = nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.diag([1.0, 2, 3, 1]))
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, source)
    copy = FileCopy(source, tmp_path / "copy" / "imagesTr" / "a.nii")
    reorient_file(copy, "RPI")
    before, _ = read_image([source])
    after, _ = read_image([copy.target])
    assert sorted(before.ravel()) == sorted(after.ravel())
    assert np.array_equal(after[0, :, :, ::-1], before[0])  # nibabel's RAS is LPI here


def test_a_dataset(raw, nnunet_folders):
    before = digests(raw.folder)
    copy = reorient_dataset(raw, "RPI", workers=1)
    assert digests(raw.folder) == before
    assert copy.name == "Dataset541_Cord_RPI"
    assert copy.folder.parent == nnunet_folders / "nnUNet_raw"
    assert [case.identifier for case in copy.cases] == [case.identifier for case in raw.cases]
    for old, new in zip(raw.cases, copy.cases, strict=True):
        for one, other in zip(old.files, new.files, strict=True):
            assert is_oriented(read_geometry(other).direction, "RPI")
            assert places(sitk.ReadImage(str(one))) == places(sitk.ReadImage(str(other)))
    assert is_oriented(read_geometry(copy.folder / "imagesTs" / "new_0001.nii.gz").direction, "RPI")
    content = copy.json.raw
    assert content["image_orientation"] == "RPI"
    assert content["nnssl_adapt"] == {"reoriented_from": "Dataset041_Cord", "orientation": "RPI"}
    assert {key: content[key] for key in raw.json.raw} == raw.json.raw
    assert (copy.folder / "splits_final.json").read_text() == (raw.folder / "splits_final.json").read_text()


def test_the_second_time_only_what_changed_is_done(raw):
    copy = reorient_dataset(raw, "RPI", workers=1)
    first = digests(copy.folder)
    assert reorient_dataset(raw, "rpi", workers=1).folder == copy.folder
    assert digests(copy.folder) == first
    changed, broken = raw.cases[1].images[0], copy.folder / "imagesTr" / "case_02_0001.nii.gz"
    os.utime(changed, ns=(1, 10**18))
    broken.write_bytes(broken.read_bytes()[:-20])
    (copy.folder / "labelsTr" / "case_03.nii.gz").unlink()
    reorient_dataset(raw, "RPI", workers=1)
    again = digests(copy.folder)
    redone = {path.name for path in again if again[path] != first.get(path) and path.name.endswith(".nii.gz")}
    assert redone == {"case_01_0000.nii.gz", "case_02_0001.nii.gz", "case_03.nii.gz"}
    assert {path: value[0] for path, value in again.items() if ".nnssl_adapt" not in path.parts} == {
        path: value[0] for path, value in first.items() if ".nnssl_adapt" not in path.parts
    }


def test_an_interrupted_copy_is_found_and_finished(raw, monkeypatch):
    from nnssl_adapt.data import reorient

    done = []

    def stop_at_the_fourth(copy, code):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(copy)
        reorient_file(copy, code)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reorient, "reorient_file", stop_at_the_fourth)
        reorient_dataset(raw, "RPI", workers=1)
    folder = raw.folder.parent / "Dataset541_Cord_RPI"
    assert not (folder / "dataset.json").exists()  # so that nothing takes it for a dataset
    first = digests(folder)
    assert reorient_dataset(raw, "RPI", workers=1).folder == folder
    again = digests(folder)
    assert all(again[copy.target] == first[copy.target] for copy in done)


def test_a_case_that_was_taken_out_is_not_trained_on(raw):
    copy = reorient_dataset(raw, "RPI", workers=1)
    for path in raw.cases[2].files:
        path.unlink()
    again = reorient_dataset(RawDataset.open(raw.folder), "RPI", workers=1)
    assert again.folder == copy.folder
    assert "case_02" not in {case.identifier for case in again.cases}


def test_other_orientations_are_other_datasets_and_ids_that_are_taken_are_not_used(raw, nnunet_folders):
    (nnunet_folders / "nnUNet_preprocessed" / "Dataset541_Other").mkdir()
    one, other = reorient_dataset(raw, "RPI", workers=1), reorient_dataset(raw, "LAS", workers=1)
    assert (one.name, other.name) == ("Dataset542_Cord_RPI", "Dataset543_Cord_LAS")


def test_ids_beyond_the_last_one(nnunet_folders):
    folders = nnunet_folders / "nnUNet_raw", nnunet_folders / "nnUNet_results"
    assert [free_dataset_id(wish) for wish in (7, 999, 1499, 0)] == [7, 999, 999, 1]
    for number in (7, 8, 998, 999):
        (folders[number % 2] / f"Dataset{number:03d}_Taken").mkdir()
    assert [free_dataset_id(wish) for wish in (7, 998, 1499)] == [9, 997, 997]
    for number in range(1, 1000):
        (folders[0] / f"Dataset{number:03d}_Taken").mkdir(exist_ok=True)
    with pytest.raises(ConfigurationError, match="all dataset ids from 1 to 999 are taken"):
        free_dataset_id(3)


def test_links_are_followed(raw, tmp_path):
    """Raw datasets are often folders of links to where the images really are."""
    linked = raw.folder.parent / "Dataset043_Linked_Images"
    linked.mkdir()
    for part in ("imagesTr", "labelsTr"):
        (linked / part).mkdir()
        for path in (raw.folder / part).iterdir():
            (linked / part / path.name).symlink_to(path)
    (linked / "dataset.json").write_text((raw.folder / "dataset.json").read_text())
    before = digests(raw.folder)
    copy = reorient_dataset(RawDataset.open(linked), "RPI", workers=1)
    assert copy.name == "Dataset543_Linked_Images_RPI"
    assert not any(path.is_symlink() for case in copy.cases for path in case.files)
    assert digests(raw.folder) == before


def test_explicit_lists_of_files(raw, tmp_path):
    listing = {
        f"subject{i}": {"images": [str(path) for path in case.images], "label": str(case.label)}
        for i, case in enumerate(raw.cases)
    }
    folder = raw.folder.parent / "Dataset042_Listed"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps({**raw.json.raw, "dataset": listing}))
    copy = reorient_dataset(RawDataset.open(folder), "RPI", workers=1)
    assert [case.identifier for case in copy.cases] == ["subject0", "subject1", "subject2", "subject3"]
    assert "dataset" not in copy.json.raw
    assert copy.cases[2].images[1] == copy.folder / "imagesTr" / "subject2_0001.nii.gz"
    assert places(sitk.ReadImage(str(copy.cases[2].images[1]))) == places(sitk.ReadImage(str(raw.cases[2].images[1])))


def test_a_truncated_image_stops_it_with_its_name(raw):
    path = raw.cases[1].images[0]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PreprocessingError, match=r"1 of 14 files.*\n.*case_01_0000.*truncated or damaged"):
        reorient_dataset(raw, "RPI", workers=1)
    folder = raw.folder.parent / "Dataset541_Cord_RPI"
    assert not (folder / "dataset.json").exists()
    assert not (folder / "imagesTr" / "case_01_0000.nii.gz").exists()
    assert not [path for path in folder.rglob("*") if "unfinished" in path.name]


def test_what_is_no_orientation(raw):
    with pytest.raises(ConfigurationError, match="three letters"):
        reorient_dataset(raw, "RPX", workers=1)


def test_two_files_of_one_name(raw):
    case = raw.cases[0]
    twice = RawDataset(
        raw.folder, raw.json, raw.labels, (case, *raw.cases[1:], type(case)("case_00", raw.cases[1].images))
    )
    with pytest.raises(DatasetError, match="would both become case_00_0000"):
        reorient_dataset(twice, "RPI", workers=1)


def test_no_image(tmp_path):
    path = tmp_path / "raw" / "imagesTr" / "a.nii.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nothing")
    with pytest.raises(CaseError, match="a.nii.gz"):
        reorient_file(FileCopy(path, tmp_path / "copy" / "imagesTr" / "a.nii.gz"), "RPI")
