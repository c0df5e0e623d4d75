"""``nnssl-adapt convert bids`` and ``pairs``, and ``nnssl-adapt verify``: good and wrong input."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import make_dataset, write_image

from nnssl_adapt.cli.main import main

SHAPE, SPACING = (4, 6, 5), (2.0, 1.0, 1.3)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(folder if name == "nnUNet_raw" else tmp_path / name))
    return folder


def write_case(image_path, label_path, seed):
    voxels = np.random.default_rng(seed).integers(1, 900, SHAPE).astype(np.int16)
    for path in (image_path, label_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_image(image_path, voxels, SPACING)
    write_image(label_path, (voxels % 2).astype(np.uint8), SPACING)


@pytest.fixture
def bids(tmp_path):
    root = tmp_path / "bids"
    for number in range(12):
        name = f"sub-{number // 2:02d}_ses-{number % 2}"
        inner = f"sub-{number // 2:02d}/ses-{number % 2}/anat"
        label = root / "derivatives/labels" / inner / f"{name}_T2w_seg.nii.gz"
        write_case(root / inner / f"{name}_T2w.nii.gz", label, number)
    return root


def convert_bids(bids, *words):
    flags = ["--suffix", "T2w", "--label-suffix", "seg", "-d", "990", "--name", "Cord", "-np", "1"]
    return main(["convert", "bids", str(bids), *flags, *words])


def contents(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_bids_keeps_subjects_together_and_the_source_as_it_was(bids, raw):
    before = contents(bids)
    assert convert_bids(bids) == 0
    assert contents(bids) == before
    folder = raw / "Dataset990_Cord"
    splits = json.loads((folder / "splits_final.json").read_text())
    assert len(splits) == 5
    for split in splits:
        sides = [{name[:6] for name in split[part]} for part in ("train", "val")]
        assert not sides[0] & sides[1] and len(split["train"]) + len(split["val"]) == 12
    table = json.loads((folder / "conversion.json").read_text())["files"]
    assert len(table) == 24 and {row["subject"] for row in table} == {f"sub-{n:02d}" for n in range(6)}
    assert main(["verify", "-d", "990", "-np", "1"]) == 0


def test_a_second_run_does_only_what_is_missing(bids, raw):
    assert convert_bids(bids) == 0
    folder = raw / "Dataset990_Cord"
    before = {p: p.stat().st_mtime_ns for p in (folder / "imagesTr").iterdir()}
    gone = folder / "imagesTr/sub-03_ses-1_0000.nii.gz"
    gone.unlink()
    shutil.rmtree(bids / "sub-05")
    assert convert_bids(bids) == 0
    after = {p: p.stat().st_mtime_ns for p in (folder / "imagesTr").iterdir()}
    assert {p for p in after if after[p] != before[p]} == {gone}
    assert {p.name[:6] for p in before.keys() - after.keys()} == {"sub-05"}


def test_unlabelled_images_are_an_error_unless_waived(bids, raw, capsys):
    (bids / "derivatives/labels/sub-01/ses-0/anat/sub-01_ses-0_T2w_seg.nii.gz").unlink()
    assert convert_bids(bids) == 1
    assert "sub-01_ses-0; leave them out with --unlabelled skip" in capsys.readouterr().err
    assert not (raw / "Dataset990_Cord").exists()
    assert convert_bids(bids, "--unlabelled", "test") == 0
    assert [p.name for p in (raw / "Dataset990_Cord/imagesTs").iterdir()] == ["sub-01_ses-0_0000.nii.gz"]


def test_bids_with_two_suffixes_finds_the_label_of_either(bids, raw, capsys):
    for path in sorted(bids.glob("sub-*/**/*_T2w.nii.gz")):
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        write_image(path.with_name(path.name.replace("T2w", "T1w")), voxels + 1000, SPACING)
    assert convert_bids(bids, "--suffix", "T1w,T2w") == 0
    folder = raw / "Dataset990_Cord"
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "T1w", "1": "T2w"}
    first, second = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"imagesTr/sub-03_ses-1_000{channel}.nii.gz")))
        for channel in range(2)
    )
    assert np.array_equal(first, second + 1000)
    sources = {row["target"]: row["source"] for row in json.loads((folder / "conversion.json").read_text())["files"]}
    assert sources["labelsTr/sub-03_ses-1.nii.gz"].endswith("sub-03_ses-1_T2w_seg.nii.gz")
    next(bids.glob("sub-03/ses-1/*/*_T1w.nii.gz")).unlink()
    assert convert_bids(bids, "--suffix", "T1w,T2w") == 1
    assert "every case: sub-03_ses-1 has no _T1w image" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["sub-03/ses-1/*/*_T2w.nii.gz", "derivatives/**/sub-03_ses-1_T2w_seg.nii.gz"])
def test_links_to_missing_files_are_no_cases_to_be_left_out_unseen(bids, raw, capsys, pattern):
    path = next(bids.glob(pattern))
    path.unlink()
    path.symlink_to("/nowhere/annexed.nii.gz")
    assert convert_bids(bids, "--unlabelled", "skip") == 1
    error = capsys.readouterr().err
    assert str(path) in error and "git annex get" in error
    assert not (raw / "Dataset990_Cord").exists()
    images, labels = (
        bids / "sub-03/ses-1/anat/*_T2w.nii.gz",
        bids / "derivatives/labels/sub-03/ses-1/anat/*_T2w_seg.nii.gz",
    )
    assert main(["convert", "pairs", "--images", str(images), "--labels", str(labels), "-d", "3", "--name", "P"]) == 1
    assert str(path) in capsys.readouterr().err


def test_folders_that_are_links_are_looked_into(bids, raw):
    (bids / "sub-03/ses-1").rename(bids.parent / "elsewhere")
    (bids / "sub-03/ses-1").symlink_to(bids.parent / "elsewhere")
    (bids / "sub-04").rename(bids.parent / "subject")
    (bids / "sub-04").symlink_to(bids.parent / "subject")
    assert convert_bids(bids) == 0
    assert len(list((raw / "Dataset990_Cord/imagesTr").iterdir())) == 12


def test_all_unreadable_images_are_listed_before_anything_is_copied(bids, raw, capsys):
    for name in ("sub-00/ses-1", "sub-03/ses-0"):
        next((bids / name).glob("*/*_T2w.nii.gz")).write_text("text")
    assert convert_bids(bids) == 1
    error = capsys.readouterr().err
    assert "2 images can't be used" in error and "sub-00_ses-1_T2w" in error and "sub-03_ses-0_T2w" in error
    assert not (raw / "Dataset990_Cord").exists()


@pytest.mark.parametrize("link", [None, "symbolic", "hard"])
def test_pairs_copies_or_links(tmp_path, raw, link):
    for number in range(3):
        write_case(tmp_path / f"x/p{number}.nii.gz", tmp_path / f"x/p{number}_mask.nii.gz", number)
    words = ["convert", "pairs", "--images", f"{tmp_path}/x/*.nii.gz", "--labels", f"{tmp_path}/x/*_mask.nii.gz"]
    words += ["-d", "7", "--name", "P", "-np", "1", "--label-names", "cord=1"]
    assert main([*words, *(["--link", link] if link else [])]) == 0
    image = raw / "Dataset007_P/imagesTr/p1_0000.nii.gz"
    assert image.is_symlink() == (link == "symbolic")
    assert image.samefile(tmp_path / "x/p1.nii.gz") == (link is not None)
    assert json.loads((raw / "Dataset007_P/dataset.json").read_text())["labels"] == {"background": 0, "cord": 1}


def test_pairs_lists_what_has_no_partner_and_bad_grids(tmp_path, raw, capsys):
    for number in range(3):
        write_case(tmp_path / f"i/p{number}.mha", tmp_path / f"l/p{number}_m.nrrd", number)
    (tmp_path / "l/p0_m.nrrd").unlink()
    words = ["convert", "pairs", "--images", f"{tmp_path}/i/*.mha", "--labels", f"{tmp_path}/l/*_m.nrrd"]
    words += ["-d", "7", "--name", "P", "-np", "1"]
    assert main(words) == 1
    assert "p0.mha (case p0) has no label" in capsys.readouterr().err
    (tmp_path / "i/p0.mha").unlink()
    write_image(tmp_path / "l/p2_m.nrrd", np.zeros((4, 6, 6), np.uint8), SPACING)
    assert main(words) == 1
    assert "1 of 2 cases could not be converted" in capsys.readouterr().err
    assert not (raw / "Dataset007_P/dataset.json").exists()
    write_case(tmp_path / "i/p2.mha", tmp_path / "l/p2_m.nrrd", 2)
    assert main(words) == 0
    names = sorted(p.name for p in (raw / "Dataset007_P/imagesTr").iterdir())
    assert names == ["p1_0000.nii.gz", "p2_0000.nii.gz"]  # rewritten: the two formats differ


def test_masks_of_255_are_renumbered_when_they_are_named(tmp_path, raw, capsys):
    for number in range(2):
        write_case(tmp_path / f"i/p{number}.nii.gz", tmp_path / f"l/p{number}.nii.gz", number)
        mask = np.zeros(SHAPE, np.uint8)
        mask[1, 2:4, 3], mask[2, 1, 1] = 255, 10
        write_image(tmp_path / f"l/p{number}.nii.gz", mask, SPACING)
    before = contents(tmp_path / "l")
    words = ["convert", "pairs", "--images", f"{tmp_path}/i/*.nii.gz", "--labels", f"{tmp_path}/l/*.nii.gz"]
    words += ["-d", "7", "--name", "P", "-np", "1", "--link"]
    assert main(words) == 1
    assert "hold the values 0, 10, 255" in (error := capsys.readouterr().err)
    assert "--label-names label_1=10 label_2=255" in error
    assert main([*words[:-1], "--label-names", "lesion=255"]) == 1
    assert "10 without a name" in capsys.readouterr().err
    assert main([*words, "symbolic", "--label-names", "lesion=255", "cord=10"]) == 0
    folder = raw / "Dataset007_P"
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, "cord": 1, "lesion": 2}
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr/p1.nii.gz")))
    assert np.array_equal(written, np.select([mask == 10, mask == 255], [1, 2]))
    assert contents(tmp_path / "l") == before and (folder / "imagesTr/p1_0000.nii.gz").is_symlink()
    assert main(["verify", "-d", "7", "-np", "1"]) == 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["bg=0", "cord=1"], "value 0 must be called background, not 'bg'"),
        (["cord=1", "lesion=1"], "'cord' and 'lesion' have the same value 1"),
        (["cord"], "expected NAME=VALUE"),
    ],
)
def test_wrong_label_names_are_told_before_anything_is_copied(bids, raw, capsys, words, problem):
    assert convert_bids(bids, "--label-names", *words) == 1
    assert problem in capsys.readouterr().err and not (raw / "Dataset990_Cord").exists()


def test_the_same_relative_patterns_elsewhere_are_another_conversion(tmp_path, raw, monkeypatch, capsys):
    words = [
        "convert",
        "pairs",
        "--images",
        "i/*.nii.gz",
        "--labels",
        "l/*.nii.gz",
        "-d",
        "7",
        "--name",
        "P",
        "-np",
        "1",
    ]
    for place, case in (("here", "a"), ("there", "b")):
        write_case(tmp_path / place / f"i/{case}.nii.gz", tmp_path / place / f"l/{case}.nii.gz", 0)
    monkeypatch.chdir(tmp_path / "here")
    assert main(words) == 0
    monkeypatch.chdir(tmp_path / "there")
    assert main(words) == 1
    assert "was not made by this conversion" in capsys.readouterr().err
    assert [path.name for path in (raw / "Dataset007_P/imagesTr").iterdir()] == ["a_0000.nii.gz"]


def test_brackets_in_a_folders_name_are_no_wildcards(tmp_path, raw):
    write_case(tmp_path / "study [1]/i/a.nii.gz", tmp_path / "study [1]/l/a.nii.gz", 0)
    write_case(tmp_path / "study 1/i/b.nii.gz", tmp_path / "study 1/l/b.nii.gz", 0)
    words = ["convert", "pairs", "-d", "7", "--name", "P", "-np", "1"]
    for flag, part in (("--images", "i"), ("--labels", "l")):
        words += [flag, f"{tmp_path}/study [1]/{part}/*.nii.gz"]
    assert main(words) == 0
    assert [path.name for path in (raw / "Dataset007_P/labelsTr").iterdir()] == ["a.nii.gz"]


def test_reorienting_is_a_conversion_too(raw):
    make_dataset(raw, "Dataset041_Other", cases=2, shape=SHAPE, spacing=SPACING)
    assert main(["convert", "reorient", "-d", "41", "--to", "RPI", "-np", "1"]) == 0
    assert json.loads((raw / "Dataset541_Other_RPI/dataset.json").read_text())["image_orientation"] == "RPI"


def test_wrong_targets_and_pictures(tmp_path, raw, capsys):
    make_dataset(raw, "Dataset041_Other", cases=2, shape=SHAPE)
    write_case(tmp_path / "i/p0.nii", tmp_path / "l/p0.nii", 0)
    words = ["convert", "pairs", "--images", f"{tmp_path}/i/*.nii", "--labels", f"{tmp_path}/l/*.nii", "--name", "P"]
    for number, name, problem in (
        ("41", "P", "taken by Dataset041_Other"),
        ("0", "P", "from 1 to 999"),
        ("5", "a/b", "dataset name 'a/b'"),
        ("41", "Other", "was not made by this conversion"),
    ):
        assert main([*words[:-1], name, "-d", number]) == 1
        assert problem in capsys.readouterr().err
    (tmp_path / "i/p0.png").write_bytes(b"x")
    assert main(["convert", "pairs", "--images", f"{tmp_path}/i/*.png", *words[4:], "-d", "5"]) == 1
    assert "2D pictures are not supported" in capsys.readouterr().err


def test_verify_lists_everything(raw, capsys):
    root = make_dataset(raw, cases=7, shape=SHAPE, spacing=SPACING)
    images, labels = root / "imagesTr", root / "labelsTr"
    shutil.copy(images / "case_00_0000.nii.gz", images / "case_03_0000.nii.gz")
    (labels / "case_01.nii.gz").unlink()
    write_image(images / "case_02_0000.nii.gz", np.full((6, 8, 7), 3, np.int16), (2.0, 4.0, 1.3))
    broken = np.ones((5, 7, 6), np.float32)
    broken[1, 2, 3] = np.inf
    write_image(images / "case_04_0000.nii.gz", broken, SPACING)
    image = sitk.ReadImage(str(images / "case_05_0000.nii.gz"))
    sitk.WriteImage(sitk.DICOMOrient(image, "RAS"), str(images / "case_05_0000.nii.gz"))
    split = {"train": ["case_00", "case_02"], "val": ["case_03", "case_99"]}
    (root / "splits_final.json").write_text(json.dumps([split]))
    assert main(["verify", "-d", "991", "-np", "1", "--subject", "0(?=[03])", "--csv", str(raw / "t.csv")]) == 1
    out = capsys.readouterr().out
    for text in (
        "the same image as case_03",
        "case_01.nii.gz is missing",
        "is 3 everywhere",
        "spacing 2 × 4 × 1.3 mm",
        "1 infinite",
        "images lie in different ways",
        "subjects on both sides: 0",
        "missing or incomplete: case_99",
    ):
        assert text in out, text
    assert (raw / "t.csv").read_text().startswith("level,case,check,message,fix\n")


def test_fix_geometry_mends_rounding_only_and_keeps_voxels(raw, capsys):
    root = make_dataset(raw, cases=2, shape=SHAPE, spacing=SPACING)
    near, far = (root / f"labelsTr/case_0{n}.nii.gz" for n in (0, 1))
    voxels = [sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (near, far)]
    write_image(near, voxels[0], SPACING, origin=(1.0004, -2, 3))
    write_image(far, voxels[1], SPACING, origin=(1.4, -2, 3))
    kept = far.read_bytes()
    main(["verify", "-d", "991", "-np", "1"])
    assert "rounding only: --fix-geometry" in capsys.readouterr().out
    assert main(["verify", "-d", "991", "-np", "1", "--fix-geometry"]) == 0
    mended = sitk.ReadImage(str(near))
    assert mended.GetOrigin() == sitk.ReadImage(str(root / "imagesTr/case_00_0000.nii.gz")).GetOrigin()
    assert np.array_equal(sitk.GetArrayFromImage(mended), voxels[0]) and mended.GetPixelID() == sitk.sitkUInt8
    assert far.read_bytes() == kept
