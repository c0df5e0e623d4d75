"""``nnssl-adapt evaluate`` and ``compare`` as they are typed."""

import csv
import json
import shutil

import numpy as np
import pytest
from support.synthetic import write_image

from nnssl_adapt.cli.main import main

SPACING = (3.0, 1.2, 0.8)


@pytest.fixture
def folders(tmp_path):
    """Six references below a raw dataset, and predictions that miss one slice, or two."""
    raw = tmp_path / "raw"
    description = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "cord": 1, "lesion": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    for part in ("raw/labelsTr", "one", "two"):
        (tmp_path / part).mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(description))
    for number, name in enumerate("abcdef"):
        reference = np.zeros((12, 20, 26), np.uint8)
        reference[1:11, 4:12, 5 : 15 + number] = 1
        reference[4:8, 6:9, 8:12] = 2
        write_image(raw / "labelsTr" / f"{name}.nii.gz", reference, SPACING)
        for part, missed in (("one", 1), ("two", 2)):
            prediction = reference.copy()
            prediction[: 1 + missed + number % 2] = 0
            write_image(tmp_path / part / f"{name}.nii.gz", prediction, SPACING)
    return tmp_path


def evaluate(*words):
    return main(["evaluate", "-np", "1", *(str(word) for word in words)])


def test_from_folders_to_a_table_and_files(folders, capsys):
    assert evaluate("-p", folders / "one", "-g", folders / "raw" / "labelsTr", "--tolerance", 3) == 0
    said = capsys.readouterr().out
    assert "cord" in said and "mean of classes" in said and "surface Dice by surface voxels at 3 mm" in said
    assert f"summary: {folders / 'one' / 'summary.json'}" in said
    content = json.loads((folders / "one" / "summary.json").read_text())
    assert content["nnssl_adapt"]["tolerance_mm"] == 3 and content["mean"]["2"]["Dice"] == 1
    with open(folders / "one" / "summary.csv", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 12


def test_lesions_are_counted_and_the_rule_is_written_down(folders, capsys):
    references = folders / "raw" / "labelsTr"
    for part in ("one", "two"):
        words = ("--lesions", "--lesion-overlap", 0.5, "--lesion-min-volume", 20)
        output = folders / "results" / part / "summary.json"
        assert evaluate("-p", folders / part, "-g", references, "-o", output, *words) == 0
    said = capsys.readouterr().out
    assert "lesion F1" in said and "26-connected parts of at least 20 mm³" in said
    content = json.loads((folders / "results" / "one" / "summary.json").read_text())
    assert content["mean"]["2"]["LesionF1"] == 1 and content["nnssl_adapt"]["lesions"]["overlap"] == 0.5
    results = [str(folders / "results" / part) for part in ("two", "one")]
    assert main(["compare", *results, "--metric", "lesionf1", "-o", str(folders / "out")]) == 0
    assert evaluate("-p", folders / "one", "-g", references, "-o", folders / "results" / "one" / "summary.json") == 0
    assert main(["compare", *results, "--metric", "LesionF1", "-o", str(folders / "out")]) == 1
    assert "--lesions" in capsys.readouterr().err


def test_an_option_about_lesions_needs_lesions(folders, capsys):
    assert evaluate("-p", folders / "one", "-g", folders / "raw" / "labelsTr", "--lesion-overlap", 0.5) == 1
    assert "--lesion-overlap: only with --lesions" in capsys.readouterr().err


def test_comparing_two(folders, capsys):
    references = folders / "raw" / "labelsTr"
    for part in ("one", "two"):
        assert evaluate("-p", folders / part, "-g", references, "-o", folders / "results" / part / "summary.json") == 0
    capsys.readouterr()
    words = [str(folders / "results" / part) for part in ("two", "one")]
    assert main(["compare", *words, "-o", str(folders / "out")]) == 0
    said = capsys.readouterr().out
    assert "Dice: one minus two" in said
    cord = next(line for line in said.splitlines() if line.startswith("cord"))
    assert cord.split()[1] == "6" and cord.split()[-2:] == ["6", "0"] and "0.0312" in cord
    assert (folders / "out" / "comparison.png").is_file()
    assert main(["compare", words[0], f"mine={words[1]}", "--metric", "hd95", "-o", str(folders / "out")]) == 0
    assert "HD95: mine minus two" in capsys.readouterr().out


def test_comparing_one_is_refused(folders, capsys):
    assert main(["compare", str(folders)]) == 1
    assert capsys.readouterr().err == "error: give at least two results to compare\n"


def lose_dataset_json(folders):
    (folders / "raw" / "dataset.json").unlink()


def empty(folders):
    shutil.rmtree(folders / "one")
    (folders / "one").mkdir()


def lose_one(folders):
    (folders / "one" / "b.nii.gz").unlink()


def strange_label(folders):
    write_image(folders / "one" / "b.nii.gz", np.full((12, 20, 26), 3, np.uint8), SPACING)


def other_shape(folders):
    write_image(folders / "one" / "b.nii.gz", np.zeros((12, 20, 27), np.uint8), SPACING)


def other_spacing(folders):
    write_image(folders / "one" / "b.nii.gz", np.zeros((12, 20, 26), np.uint8), SPACING[::-1])


def extra(folders):
    write_image(folders / "one" / "x.nii.gz", np.zeros((12, 20, 26), np.uint8), SPACING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_dataset_json, "name it with --dataset-json"),
        (empty, "has no predictions: expected names like CASE.nii.gz"),
        (lose_one, "lacks 1 of the 6 cases in"),
        (strange_label, "b.nii.gz has labels that dataset.json does not name: 3 (expected 0, 1, 2)"),
        (other_shape, "has shape (12, 20, 27) (Z, Y, X)"),
        (other_spacing, "spacing 0.8 × 1.2 × 3 mm"),
        (extra, "x.nii.gz: no such file"),
    ],
)
def test_one_clear_line_for_what_is_wrong(folders, capsys, change, message):
    change(folders)
    assert evaluate("-p", folders / "one", "-g", folders / "raw" / "labelsTr") == 1
    said = capsys.readouterr().err
    assert "error: " in said and message in said and "Traceback" not in said
    assert not (folders / "one" / "summary.json").exists()


def test_chill(folders):
    lose_one(folders)
    assert evaluate("-p", folders / "one", "-g", folders / "raw" / "labelsTr", "--chill", "--empty", "1") == 0
    content = json.loads((folders / "one" / "summary_empty_1.json").read_text())
    assert not (folders / "one" / "summary.json").exists()
    assert len(content["metric_per_case"]) == 5 and content["nnssl_adapt"]["empty"] == "1"


def test_what_is_stored_in_another_orientation_is_turned_and_what_lies_elsewhere_is_marked(folders, capsys):
    import SimpleITK as sitk

    for path in sorted((folders / "one").glob("*.nii.gz")):
        sitk.WriteImage(
            sitk.DICOMOrient(sitk.ReadImage(str(folders / "raw" / "labelsTr" / path.name)), "SAR"), str(path)
        )
    image = sitk.ReadImage(str(folders / "one" / "b.nii.gz"))
    image.SetOrigin([value + 7 for value in image.GetOrigin()])
    sitk.WriteImage(image, str(folders / "one" / "b.nii.gz"))
    assert evaluate("-p", folders / "one", "-g", folders / "raw" / "labelsTr") == 0
    assert "b" in capsys.readouterr().out
    content = json.loads((folders / "one" / "summary.json").read_text())
    assert content["foreground_mean"]["Dice"] == 1
    with open(folders / "one" / "summary.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["case"] for row in rows if row["geometry_differs"]} == {"b"} and len(rows) == 12
    assert all("origin" in row["geometry_differs"] for row in rows if row["case"] == "b")
