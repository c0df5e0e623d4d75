"""``nnssl-adapt find-best``, ``ensemble`` and ``postprocess`` as they are typed, one after the other."""

import json
import shlex

import numpy as np
import pytest
from support.crossval_folders import DATASET, LABELS, write_model, write_references

from nnssl_adapt.cli.main import main
from nnssl_adapt.data.images import read_labels
from nnssl_adapt.inference.postprocess import Postprocessing

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
    assert [command[1] for command in commands] == ["predict", "predict", "ensemble"]
    places = {
        "OUTPUT_FOLDER_MODEL_1": results / NAMES[0] / "fold_0" / "validation",
        "OUTPUT_FOLDER_MODEL_2": results / NAMES[1] / "fold_0" / "validation",
        "OUTPUT_FOLDER": tmp_path / "final",
    }
    assert run(*(places.get(word, word) for word in commands[2][1:]), "-np", 1) == 0
    (flag, steps) = commands[2][-2:]
    assert flag == "--postprocess"
    # In one command, or in two: the same.
    assert run(*(places.get(word, word) for word in commands[2][1:-4]), "-o", tmp_path / "plain", "-np", 1) == 0
    assert run("postprocess", "-i", tmp_path / "plain", "--steps", steps, "-o", tmp_path / "then", "-np", 1) == 0
    for name in ("a.nii.gz", "d.nii.gz"):
        once, twice, plain = (read_labels(tmp_path / folder / name)[0] for folder in ("final", "then", "plain"))
        assert np.array_equal(once, twice) and not np.array_equal(once, plain)
    Postprocessing(((4,),)).save(tmp_path / "other.json")
    for words in (
        ("ensemble", places["OUTPUT_FOLDER_MODEL_1"], "--postprocess"),
        ("postprocess", "-i", tmp_path / "plain", "--steps"),
    ):
        assert run(*words, tmp_path / "other.json", "-o", tmp_path / "bad") == 1
        assert "other.json is about label 4, but there are only 1, 2, 3" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


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
        (("postprocess", "-i", "OUT", "--steps", "x.json", "-o", "OUT2"), "OUT: no such folder"),
    ],
)
def test_one_clear_line_for_what_is_wrong(results, words, message, capsys):
    assert run(*words) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
