"""nnU-Net's own flags: every option of the installed nnunetv2 is known here, does what it says, or is refused with a reason."""

import argparse
import importlib
from importlib.metadata import entry_points

import pytest

from nnssl_adapt.cli.common import default_processes
from nnssl_adapt.cli.main import build_parser, main
from nnssl_adapt.cli.nnunet_words import dataset_of, folders_of, part_of, processes_of, say_ignored_variables
from nnssl_adapt.cli.parser import NOTES
from nnssl_adapt.errors import ConfigurationError

COUNTERPARTS = {
    "nnUNetv2_predict": ("predict",),
    "nnUNetv2_predict_from_modelfolder": ("predict",),
    "nnUNetv2_train": ("train",),
    "nnUNetv2_extract_fingerprint": ("preprocess",),
    "nnUNetv2_plan_experiment": ("preprocess",),
    "nnUNetv2_preprocess": ("preprocess",),
    "nnUNetv2_plan_and_preprocess": ("preprocess",),
    "nnUNetv2_evaluate_folder": ("evaluate",),
    "nnUNetv2_evaluate_simple": ("evaluate",),
    "nnUNetv2_find_best_configuration": ("find-best",),
    "nnUNetv2_ensemble": ("ensemble",),
    "nnUNetv2_determine_postprocessing": ("postprocess",),
    "nnUNetv2_apply_postprocessing": ("postprocess",),
    "nnUNetv2_export_model_to_zip": ("package",),
    "nnUNetv2_install_pretrained_model_from_zip": ("install",),
    "nnUNetv2_download_pretrained_model_by_url": ("install",),
    "nnUNetv2_convert_MSD_dataset": ("convert", "msd"),
    "nnUNetv2_convert_old_nnUNet_dataset": ("convert", "nnunetv1"),
}
WITHOUT = {
    "nnUNetv2_accumulate_crossval_results",
    "nnUNetv2_move_plans_between_datasets",
    "nnUNetv2_plot_overlay_pngs",
}
"""Commands that have no counterpart: their work is a part of another command here, or not done."""


def ours(*words):
    """The parser of one of our commands."""
    parser = build_parser()
    for word in words:
        action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = action.choices[word]
    return parser


def theirs(name, monkeypatch):
    """The parser that a command of nnunetv2 makes, taken from it before it parses."""
    pytest.importorskip("nnunetv2")
    found = []

    class Taken(Exception):
        pass

    def take(parser, *_args, **_options):
        found.append(parser)
        raise Taken

    (entry,) = entry_points(group="console_scripts", name=name)
    module, _, function = entry.value.partition(":")
    command = getattr(importlib.import_module(module), function)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", take)
        with pytest.raises(Taken):
            command()
    return found[0]


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_every_option_of_nnunet_is_known(name, monkeypatch):
    known = ours(*COUNTERPARTS[name])._option_string_actions
    options = theirs(name, monkeypatch)._option_string_actions
    assert [option for option in options if option not in known] == []


@pytest.mark.parametrize("name", [name for name, ours in COUNTERPARTS.items() if ours == ("preprocess",)])
def test_finetune_takes_the_words_of_preprocessing_too(name, monkeypatch):
    """Fine-tuning plans and preprocesses as well."""
    known = ours("finetune")._option_string_actions
    assert [option for option in theirs(name, monkeypatch)._option_string_actions if option not in known] == []


def test_no_command_of_nnunet_is_forgotten():
    pytest.importorskip("nnunetv2")
    installed = {e.name for e in entry_points(group="console_scripts") if e.value.startswith("nnunetv2.")}
    assert installed == COUNTERPARTS.keys() | WITHOUT


def parse(*words):
    return build_parser().parse_args(words)


def test_predict_takes_nnunets_words():
    words = (
        "predict -i a -o b -d 41 -c 3d_fullres -p nnUNetPlans -tr nnUNetTrainer -f 0 1 -chk checkpoint_best.pth "
        "-step_size 0.4 --disable_tta --save_probabilities --continue_prediction -num_parts 4 -part_id 3 -npp 2 -nps 5 "
        "--disable_progress_bar -device cpu"
    )
    parsed = parse(*words.split())
    assert (parsed.checkpoint, parsed.step_size, parsed.no_tta) == ("best", 0.4, True)
    assert parsed.save_probabilities and parsed.keep_finished and parsed.disable_progress_bar
    assert part_of(parsed) == "4/4" and processes_of(parsed) == 5
    assert parse("predict", "-i", "a", "-o", "b", "-m", "c").checkpoint == "final"


@pytest.mark.parametrize("words", ["-num_parts 4 -part_id 4", "-num_parts 2 --part 1/2", "-part_id 1"])
def test_parts_that_make_no_sense_are_refused(words):
    with pytest.raises(ConfigurationError, match="part"):
        part_of(parse("predict", "-i", "a", "-o", "b", "-m", "c", *words.split()))


def test_preprocess_takes_the_words_of_nnunets_integration_and_of_its_planner():
    words = (
        "preprocess -d 41 --pretraining_name mae --pretrained_checkpoint w --adaptation_mode fixed --override_spacing 3 2 1 "
        "--plans_identifier nnUNetPlans -overwrite_plans_name mine -gpu_memory_target 24 -npfp 3 --no_pbar "
        "--verify_dataset_integrity --clean -c 3d_fullres -fpe DatasetFingerprintExtractor"
    )
    parsed = parse(*words.split())
    assert (parsed.name, parsed.source, parsed.mode, parsed.spacing) == ("mae", "w", "fixed", [3, 2, 1])
    assert (parsed.base_plans, parsed.plans_name, parsed.fit_gpu) == ("nnUNetPlans", "mine", "24")
    assert parsed.fingerprint_processes == 3 and parsed.no_pbar
    assert len(getattr(parsed, NOTES)) == 2


@pytest.mark.parametrize(
    "words",
    [
        "preprocess -d 41 -n mae -pc w -overwrite_target_spacing 1 1 1",
        "evaluate -p a -g b -l 1 2",
        "package model -o out -d 41",
        "convert msd folder -i other",
    ],
)
def test_what_is_refused_says_why(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*words.split())
    assert caught.value.code == 2
    reason = capsys.readouterr().err.splitlines()[-1]
    assert "unrecognized" not in reason and len(reason.split(": ", 2)[2]) > 20


@pytest.mark.parametrize(
    "words",
    [
        "predict -i a -o b -m c -chkk best",
        "predict -i a -o b -m c --prec fp32",
        "predict -i a -o b -m c -dev cpu",
        "preprocess -d 41 -n mae -pc w --norm zscore",
        "convert msd folder --li",
    ],
)
def test_no_flag_is_guessed_from_a_part_of_it(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words.split())
    assert "unrecognized" in capsys.readouterr().err


def test_folders_and_dataset_as_nnunet_has_them():
    assert folders_of(parse("evaluate", "labels", "predictions", "-pfile", "plans.json")) == ("predictions", "labels")
    assert folders_of(parse("evaluate", "-p", "a", "-g", "b")) == ("a", "b")
    for words in (["a"], ["a", "b", "-p", "c"], ["-g", "b"]):
        with pytest.raises(ConfigurationError):
            folders_of(parse("evaluate", *words))
    assert dataset_of(parse("find-best", "41")) == dataset_of(parse("find-best", "-d", "41")) == "41"
    for words in ([], ["41", "-d", "42"]):
        with pytest.raises(ConfigurationError, match="-d"):
            dataset_of(parse("find-best", *words))


def test_nnunets_numbers_of_processes_are_heeded(monkeypatch):
    monkeypatch.setenv("nnUNet_def_n_proc", "3")
    monkeypatch.setenv("nnUNet_nps", "7")
    assert default_processes() == 3
    assert processes_of(parse("predict", "-i", "a", "-o", "b", "-m", "c")) == 7
    assert processes_of(parse("predict", "-i", "a", "-o", "b", "-m", "c", "-np", "1")) == 1
    monkeypatch.setenv("nnUNet_def_n_proc", "many")
    with pytest.raises(ConfigurationError, match="nnUNet_def_n_proc"):
        default_processes()


def test_classes_of_trainers_elsewhere_are_said_to_be_ignored(monkeypatch, caplog):
    say_ignored_variables()
    assert not caplog.records
    monkeypatch.setenv("nnUNet_extTrainer", "/my/trainers")
    with caplog.at_level("INFO", logger="nnssl_adapt"):
        say_ignored_variables()
    assert "/my/trainers" in caplog.text


def test_what_changes_nothing_is_said(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path), str(tmp_path), "-pfile", "plans.json"]) == 1
    assert "-pfile changes nothing" in capsys.readouterr().out
