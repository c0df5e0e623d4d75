"""Both ways in which nnU-Net's users name a run, and flags that override a recipe."""

import argparse
import errno
from types import SimpleNamespace

import pytest
from support.tiny_plans import CNN, TRANSFORMER

from nnssl_adapt.cli import finetune, main, train
from nnssl_adapt.cli.common import checked_workers, run_command, source_options
from nnssl_adapt.cli.training_flags import recipe_from
from nnssl_adapt.errors import ConfigurationError, TrainingStopped


def parse(*words):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args([*words, "-p", "ptPlans__mae"])


@pytest.mark.parametrize(
    "words",
    [
        ("-d", "41", "-c", "3d_fullres", "-f", "0"),
        ("41", "3d_fullres", "0"),
        ("-d", "41", "-f", "0"),
    ],
)
def test_a_run_can_be_named_both_ways(words):
    assert train._dataset_configuration_fold(parse(*words)) == ("41", "3d_fullres", 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("41", "3d_fullres"), "expected DATASET CONFIGURATION FOLD"),
        (("41", "3d_fullres", "0", "-f", "1"), "use one way or the other"),
        (("-d", "41"), "missing -f"),
        ((), "missing -d and -f"),
        (("41", "3d_fullres", "zero"), "fold 'zero'"),
    ],
)
def test_a_run_that_is_not_named(words, message):
    with pytest.raises(ConfigurationError, match=message):
        train._dataset_configuration_fold(parse(*words))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("41", "3d_fullres", "0"), None),
        (("41", "3d_fullres", "0", "--c"), "yes"),
        (("--c", "41", "3d_fullres", "0"), "yes"),
        (("41", "3d_fullres", "0", "--c", "auto"), "auto"),
        (("--c", "auto", "-d", "41", "-f", "0"), "auto"),
        (("--c", "-d", "41", "-f", "0"), "yes"),
    ],
)
def test_going_on_has_two_ways(words, expected):
    arguments = parse(*words)
    assert train._dataset_configuration_fold(arguments) == ("41", "3d_fullres", 0)
    assert arguments.resume == expected


def test_how_to_read_the_source_can_be_said_in_training_too():
    words = [
        "-d",
        "41",
        "-f",
        "0",
        "-pc",
        "x",
        "--fold-of-source",
        "mean",
        "--file",
        "a.pth",
        "--stem",
        "3",
        "--axes",
        "xyz",
    ]
    assert source_options(parse(*words)) == {"filename": "a.pth", "fold": "mean", "stem": "3", "axes": "xyz"}
    assert source_options(parse("-d", "41", "-f", "0")) == {}


def test_a_time_limit_counts_from_the_commands_start(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "9000")
    assert train.deadline_of(parse("--time-limit", "10"), started=1000.0).at == 1600
    assert train.deadline_of(parse(), started=1000.0).at == 9000
    assert train.deadline_of(parse("--time-limit", "none"), started=1000.0) is None


def test_what_was_stopped_exits_with_a_code_of_its_own(capsys):
    def run(arguments):
        raise TrainingStopped("stopped by SIGTERM; run the same command with --c to go on")

    assert run_command(argparse.ArgumentParser(), run, []) == 75
    assert capsys.readouterr().err == "stopped by SIGTERM; run the same command with --c to go on\n"


def test_a_closed_terminal_changes_no_exit_code(monkeypatch):
    def run(arguments):
        raise TrainingStopped("stopped by SIGHUP")

    def write(text):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=write, flush=lambda: None))
    assert run_command(argparse.ArgumentParser(), run, []) == 75


def test_flags_override_the_recipe():
    words = (
        "--epochs",
        "30",
        "--lr",
        "5e-4",
        "--patch",
        "16",
        "24",
        "32",
        "--set",
        "weight_decay=1e-3",
        "--warmup",
        "3",
    )
    recipe = recipe_from(parse("-d", "1", "-f", "all", *words), CNN)
    assert (recipe.epochs, recipe.learning_rate, recipe.patch_size) == (30, 5e-4, (16, 24, 32))
    assert (recipe.weight_decay, recipe.warmup_epochs, recipe.optimizer) == (1e-3, 3, "sgd")


def test_without_a_choice_the_networks_family_decides():
    assert recipe_from(parse("-d", "1", "-f", "0"), TRANSFORMER).optimizer == "adamw"
    assert recipe_from(parse("-d", "1", "-f", "0", "-tr", "PretrainedTrainer_150ep"), CNN).epochs == 150


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "weight_decay"), "expected field=value"),
        (("--set", "wieght_decay=1"), "weight_decay"),
        (("--recipe", "nosuch"), "nosuch"),
        (("-tr", "NoSuchTrainer"), "NoSuchTrainer"),
        (("-tr", "PretrainedTrainer", "--recipe", "default"), "give one of them"),
    ],
)
def test_wrong_recipes(words, message):
    with pytest.raises(ConfigurationError, match=message):
        recipe_from(parse("-d", "1", "-f", "0", *words), CNN)


def test_all_mistakes_at_once():
    with pytest.raises(ConfigurationError, match="(?s)epochs.*learning_rate"):
        recipe_from(parse("-d", "1", "-f", "0", "--epochs", "0", "--lr", "-1"), CNN)


def test_every_command_explains_itself(capsys):
    for command in main._COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main.main([command, "--help"])
        assert stopped.value.code == 0
        assert command in capsys.readouterr().out


def test_finetune_shares_the_training_flags():
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    arguments = parser.parse_args(["-d", "41", "-pc", "x", "--epochs", "2", "--warmup", "0"])
    assert recipe_from(arguments, CNN).epochs == 2


def test_settings_and_flags_are_checked_together():
    recipe = recipe_from(parse("-d", "1", "-f", "0", "--set", "epochs=9", "--warmup", "2"), CNN)
    assert (recipe.epochs, recipe.warmup_epochs) == (9, 2)


def test_no_process_is_too_few():
    with pytest.raises(ConfigurationError, match="-np 0"):
        checked_workers(0)
    assert checked_workers(3) == 3 and checked_workers(None) >= 1
