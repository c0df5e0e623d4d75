"""Every flag of training stands for a field of the recipe, and all mistakes come at once."""

import argparse
import dataclasses

import pytest
from support.tiny_plans import CNN, TRANSFORMER

from nnssl_adapt.cli import finetune, train
from nnssl_adapt.cli.training_flags import FIELD_FLAGS, add_training_flags, recipe_from
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.recipe.recipe import Recipe, configs_folder, recipe_names
from nnssl_adapt.weights.network.architectures import Architecture

SWIN = Architecture("SwinUNETR", {"feature_size": 12, "version": 2, "patch_merging": "old"})


def asked(*words, architecture=CNN, source=None):
    parser = argparse.ArgumentParser()
    add_training_flags(parser)
    parser.set_defaults(source=source)
    return recipe_from(parser.parse_args(["-device", "cpu", *words]), architecture)


EXAMPLES = {  # flag: (what is typed after it, the field's value)
    "--epochs": (["70"], 70),
    "--iters": (["11"], 11),
    "--val-iters": (["7"], 7),
    "--warmup": (["3"], 3),
    "--decoder-warmup": (["9"], 9),
    "--schedule": (["cosine"], "cosine"),
    "--optimizer": (["adam"], "adam"),
    "--lr": (["3e-4"], 3e-4),
    "--encoder-lr": (["1e-5"], 1e-5),
    "--llrd": (["0.8"], 0.8),
    "--weight-decay": (["0.02"], 0.02),
    "--clip": (["2"], 2.0),
    "--accumulate": (["4"], 4),
    "--ema": (["0.99"], 0.99),
    "--freeze": (["stages:2"], "stages:2"),
    "--loss": (["dice_focal"], "dice_focal"),
    "--class-weights": (["lesion=3,a=b=0.5"], {"lesion": 3.0, "a=b": 0.5}),
    "--lora": (["8"], 8),
    "--batch": (["5"], 5),
    "--patch": (["32", "48", "64"], (32, 48, 64)),
    "--augment": (["gpu"], "gpu"),
    "--no-mirror": ([], ()),
    "--deep-supervision": ([], True),
    "--precision": (["bf16"], "bf16"),
    "--compile": (["off"], "off"),
    "--channels-last": ([], True),
    "--fused-norm": (["on"], "on"),
    "--activation-checkpointing": ([], True),
    "--seed": (["17"], 17),
}


def test_every_flag_is_tried_and_stands_for_a_field_of_its_own():
    assert {flag.flag for flag in FIELD_FLAGS} == set(EXAMPLES)
    fields = [flag.field for flag in FIELD_FLAGS]
    assert len(fields) == len(set(fields))
    assert set(fields) <= {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("flag", FIELD_FLAGS, ids=lambda flag: flag.flag)
def test_a_flag_changes_its_field_and_no_other(flag, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # peft is there or not
    words, value = EXAMPLES[flag.flag]
    architecture = TRANSFORMER if flag.field == "lora_rank" else CNN
    before = asked(architecture=architecture)
    after = asked(flag.flag, *words, architecture=architecture)
    assert getattr(after, flag.field) == value != getattr(before, flag.field)
    scaled = {"warmup_epochs": 4} if flag.field == "epochs" else {}  # 50 of 1000, of 70
    assert after == dataclasses.replace(before, **{flag.field: value}, **scaled)


def test_flags_that_may_go_without_a_value():
    assert asked("--ema").ema_decay == 0.999
    assert asked("--compile").compile == "on"


@pytest.mark.parametrize("command", [train, finetune])
def test_both_commands_have_them(command):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    assert {*EXAMPLES, "-tr", "--recipe", "--set", "--from_scratch", "-device", "--npz", "--workers"} <= known


def test_the_last_word_is_a_flags():
    recipe = asked("--recipe", "llrd", "--set", "layer_decay=0.5", "--set", "weight-decay=1", "--llrd", "0.6")
    assert (recipe.name, recipe.layer_decay, recipe.weight_decay) == ("llrd", 0.6, 1.0)


def test_mistakes_of_flags_settings_network_and_device_come_together():
    words = ["--epochs", "ten", "--lr", "-1", "--schedule", "polly", "--precision", "fp16", "--freeze", "encoder"]
    words += ["--set", "lora_alpha", "--set", "sede=3", "--lora", "4"]
    with pytest.raises(ConfigurationError) as caught:
        asked(*words)
    for part in (
        "epochs: expected a whole number, got 'ten'",
        "learning_rate: expected a number above 0, got -1.0",
        "schedule: expected one of poly, cosine, constant, got 'polly' (did you mean 'poly'?)",
        "--set lora_alpha: expected field=value",
        "unknown field 'sede' (did you mean 'seed'?)",
        "freeze encoder and lora_rank 4",
        "lora_rank: adapters go into a transformer's attention",
        "fp16 needs a CUDA device, not cpu",
    ):
        assert part in str(caught.value)
    assert "8 mistakes" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "architecture", "message"),
    [
        (("--lora", "8"), CNN, "this network is a CNN"),
        (("--recipe", "lora"), CNN, "this network is a CNN"),
        (("--deep-supervision",), TRANSFORMER, "has a single output"),
        (("-tr", "nnUNetTrainer"), TRANSFORMER, "has a single output"),
        (("--set", "compile=on", "--device", "mps"), CNN, "not on mps"),
        (("--from_scratch", "--freeze", "encoder"), CNN, "random weights would stay random"),
        (("--from_scratch", "--recipe", "linear_probe"), CNN, "random weights would stay random"),
        (("--recipe", "frozen_encoder", "--encoder-lr", "1e-5"), CNN, "freeze encoder and encoder_learning_rate"),
        (("--set", "compile=off", "--warmup", "1000"), CNN, "warmup_epochs: expected fewer than epochs"),
    ],
)
def test_what_does_not_go_together(words, architecture, message):
    with pytest.raises(ConfigurationError, match=message):
        asked(*words, architecture=architecture)


@pytest.mark.parametrize(
    ("words", "architecture", "good"),
    [
        (("-tr", "nnUNet_Primus_S_Trainer"), CNN, False),
        (("-tr", "nnUNet_Primus_S_Trainer"), Architecture.named("PrimusM"), False),
        (("-tr", "nnUNet_Primus_S_Trainer"), Architecture.named("PrimusS", drop_path_rate=0.1), True),
        (("-tr", "nnUNet_PrimusV3S_Trainer"), Architecture.named("PrimusV2S"), False),
        (("-tr", "STUNetTrainer_small_ft"), CNN, False),
        (("-tr", "STUNetTrainer_base"), Architecture.named("STUNetS"), False),
        (("-tr", "STUNetTrainer_small"), Architecture.named("STUNetS", strides=[[1, 1, 1], *[[1, 2, 2]] * 5]), True),
        (("-tr", "PretrainedTrainer_Primus_150ep"), CNN, False),
        (("-tr", "PretrainedTrainer_Primus_frozenEnc_lr_7e5_wd_3e5"), CNN, False),
        (("-tr", "PretrainedTrainer_Primusx"), TRANSFORMER, True),
        (("--recipe", "primus"), CNN, False),
        (("-tr", "PretrainedTrainer_adam_150ep"), CNN, True),
    ],
)
def test_a_name_that_stands_for_a_network_gets_it_or_is_refused(words, architecture, good):
    if good:
        asked(*words, architecture=architecture)
        return
    with pytest.raises(ConfigurationError) as refused:
        asked(*words, architecture=architecture)
    (mistake,) = refused.value.mistakes
    assert ("STUNet" if "STUNet" in words[1] else "Primus") in mistake and str(architecture) in mistake


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        (("--epochs", "100"), (0, 5)),
        (("--epochs", "2"), (0, 1)),
        (("--epochs", "1"), (0, 0)),
        (("--set", "epochs=100"), (0, 5)),
        (("--epochs", "100", "--warmup", "50"), (0, 50)),
        (("--recipe", "sawtooth", "--epochs", "2"), (0, 1)),
        (("--recipe", "sawtooth", "--epochs", "3"), (1, 1)),
        (("-tr", "PretrainedTrainer_Primus_sawtooth", "--epochs", "1"), (0, 0)),
    ],
)
def test_stages_keep_their_share_of_the_epochs(words, stages):
    architecture = TRANSFORMER if "Primus" in words[1] else CNN
    recipe = asked(*words, architecture=architecture)
    assert (recipe.decoder_warmup_epochs, recipe.warmup_epochs) == stages


def test_nnunets_own_trainers_fine_tune_weights_that_are_named():
    words = ("-tr", "nnUNetTrainer_50epochs")
    assert asked(*words).from_scratch
    named = asked(*words, source="model.zip")
    assert not named.from_scratch and named.trainer_name == "PretrainedTrainer_as_nnUNetTrainer_50epochs"
    assert asked(*words, "--from_scratch", source="model.zip").from_scratch


def test_a_wrong_name_does_not_hide_other_mistakes():
    for words, message in (
        (("-tr", "PretrainedTrainer_151ep"), "did you mean 'PretrainedTrainer_150ep'"),
        (("--recipe", "primsu"), "did you mean 'primus'"),
        (("--recipe", "primus", "-tr", "PretrainedTrainer"), "give one of them"),
    ):
        with pytest.raises(ConfigurationError, match=rf"(?s)3 mistakes.*{message}.*epochs: .*lora_rank: .*CNN"):
            asked(*words, "--epochs", "0", "--lora", "8")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipes_file_is_headed_by_the_command_that_runs_it(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object())  # peft is there or not
    command, *words = (configs_folder() / f"{name}.yaml").read_text().splitlines()[0].removeprefix("# ").split()
    assert command == "nnUNetv2_train_pretrained"
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    arguments = parser.parse_args(words)
    assert (arguments.dataset, arguments.configuration, arguments.fold, arguments.plans) == (
        "41",
        "3d_fullres",
        "0",
        "PLANS",
    )
    special = {"primus": TRANSFORMER, "lora": TRANSFORMER, "swin_unetr": SWIN}
    assert recipe_from(arguments, special.get(name, CNN)) == Recipe.load(name)
