"""``nnssl-adapt find-best``, ``ensemble`` and ``postprocess`` as they are typed, one after the other."""

import json
import shlex

import pytest
from crossval_folders import DATASET, LABELS, write_model, write_references

from nnssl_adapt.cli.main import main

NAMES = ("nnUNetTrainer__nnUNetPlans__3d_fullres", "nnUNetTrainer__otherPlans__3d_fullres")


@pytest.fixture
def results(nnunet_folders):
    references = write_references(nnunet_folders)
    for seed, name in enumerate(NAMES, start=1):
        write_model(nnunet_folders, name, LABELS, references, [1.0] * 4, seed, islands=(2,))
    return nnunet_folders / "nnUNet_results" / DATASET


def run(*words):
    return main([str(word) for word in words])


def test_what_is_printed_can_be_typed(results, tmp_path, capsys):
    assert run("find-best", "-d", 991, "-np", 1) == 0
    said = capsys.readouterr().out
    assert "*    ensemble of 1 and 2" in said and "1  nnUNetTrainer__nnUNetPlans__3d_fullres" in said
    information = json.loads((results / "inference_information.json").read_text())
    assert len(information["all_results"]) == 3
    assert (results / "inference_instructions.txt").read_text() in said
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("  nnssl-adapt")]
    assert [command[1] for command in commands] == ["predict", "predict", "ensemble", "postprocess"]
    places = {
        "OUTPUT_FOLDER_MODEL_1": results / NAMES[0] / "fold_0" / "validation",
        "OUTPUT_FOLDER_MODEL_2": results / NAMES[1] / "fold_0" / "validation",
        "OUTPUT_FOLDER": tmp_path / "ensemble",
        "OUTPUT_FOLDER_PP": tmp_path / "final",
    }
    for command in commands[2:]:
        assert run(*(places.get(word, word) for word in command[1:]), "-np", 1) == 0
    assert sorted(path.name for path in (tmp_path / "final").glob("*.nii.gz")) == ["a.nii.gz", "d.nii.gz"]


def test_steps_are_found_for_any_folder(results, tmp_path, capsys):
    validation = results / NAMES[0] / "fold_0" / "validation"
    truth = results.parents[1] / "nnUNet_raw" / DATASET / "labelsTr"
    assert run("postprocess", "-i", validation, "-g", truth, "-np", 1) == 0
    assert "largest component of 1+2+3" in capsys.readouterr().out
    assert (validation / "postprocessing.pkl").is_file()
    assert run("postprocess", "-i", validation, "--steps", validation / "postprocessing.pkl", "-o", tmp_path / "o") == 0
    assert run("postprocess", "-i", validation, "--steps", validation / "postprocessing.pkl") == 1
    assert "-o goes with --steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("find-best", "-d", "78"), "no dataset '78'"),
        (("find-best", "-d", "991", "-tr", "Other"), "no model with -tr Other; there is: nnUNetTrainer"),
        (("find-best", "-d", "991", "-f", "3"), "folds that were not trained and validated"),
        (("find-best", "-d", "991", "-np", "0"), "-np 0"),
        (("ensemble", "-o", "OUT"), "no folder of predictions was given"),
        (("ensemble", "OUT", "-o", "OUT2"), "OUT: no such folder"),
        (("postprocess", "-i", "OUT", "--steps", "x.json", "-o", "OUT2"), "OUT/dataset.json is missing"),
    ],
)
def test_one_clear_line_for_what_is_wrong(results, words, message, capsys):
    assert run(*words) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
