"""Recipes: where they come from, what may be changed, and that all mistakes come at once."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from support.tiny_plans import CNN, TRANSFORMER

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.recipe import recipe as recipes
from nnssl_adapt.training.recipe.recipe import Recipe, recipe_names
from nnssl_adapt.training.recipe.trainer_names import STOCK_ALIASES, TRAINER_ALIASES
from nnssl_adapt.weights.families.nnunet import PRIMUS_TRAINERS, STU_NET_TRAINERS


def test_the_published_figures():
    default, primus, short, scratch = (Recipe.load(n) for n in ("default", "primus", "short", "from_scratch"))
    assert (default.optimizer, default.learning_rate, default.momentum) == ("sgd", 1e-3, 0.99)
    assert (default.weight_decay, default.gradient_clip) == (3e-5, 12)
    assert (default.epochs, default.warmup_epochs, default.iterations_per_epoch) == (1000, 50, 250)
    assert (primus.optimizer, primus.learning_rate, primus.betas) == ("adamw", 1e-4, (0.9, 0.98))
    assert (primus.weight_decay, primus.gradient_clip) == (5e-2, 1)
    assert (short.epochs, short.warmup_epochs) == (150, 15)
    assert (scratch.learning_rate, scratch.warmup_epochs, scratch.from_scratch) == (1e-2, 0, True)


@pytest.mark.parametrize("name", recipe_names())
def test_every_config_loads_and_says_how_it_is_used(name):
    assert Recipe.load(name).name == name
    text = (recipes.configs_folder() / f"{name}.yaml").read_text()
    first = text.splitlines()[0]
    assert first.startswith("# nnUNetv2_train_pretrained ")
    assert set(yaml.safe_load(text)) <= {field.name for field in dataclasses.fields(Recipe)}


def test_default_yaml_is_what_the_class_says():
    assert Recipe.load("default") == Recipe()


def test_an_installed_package_has_its_configs_inside(tmp_path, monkeypatch):
    package = tmp_path / "nnssl_adapt"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "mine.yaml").write_text("epochs: 3\nwarmup_epochs: 0\n")
    monkeypatch.setattr(recipes.resources, "files", lambda name: package)
    assert recipe_names() == ["mine"]
    assert Recipe.load("mine").epochs == 3


# What a name stands for: (optimizer, learning rate, weight decay, gradient clip, epochs, warm-up). Figures of nnU-Net's trainers.
SGD, ADAMW = ("sgd", 1e-3, 3e-5, 12.0), ("adamw", 1e-4, 5e-2, 1.0)
PUBLISHED = {
    "PretrainedTrainer": (*SGD, 1000, 50),
    "PretrainedTrainer_150ep": (*SGD, 150, 15),
    "PretrainedTrainer_300ep": (*SGD, 300, 15),
    "PretrainedTrainer_nomirroring": (*SGD, 1000, 50),
    "PretrainedTrainer_150ep_nomirroring": (*SGD, 150, 15),
    "PretrainedTrainer_smallerlr": ("sgd", 3e-5, 5e-2, 12.0, 1000, 50),
    "PretrainedTrainer_150ep_50i": (*SGD, 150, 15),
    "PretrainedTrainer_100ep_50i": (*SGD, 100, 10),
    "PretrainedTrainer_adam_150ep": (*ADAMW, 150, 15),
    "PretrainedTrainer_adam_150ep_nomirroring": (*ADAMW, 150, 15),
    "PretrainedTrainer_adam__nomirroring": (*ADAMW, 1000, 50),
    "DynamicPretrainedTrainer": (*SGD, 1000, 50),
    "DynamicPretrainedTrainer_nomirroring": (*SGD, 1000, 50),
    "DynamicPretrainedTrainer_adam_150ep": ("adamw", 1e-4, 3e-5, 12.0, 150, 15),
    "DynamicPretrainedTrainer_adam_150ep_nomirroring": ("adamw", 1e-4, 3e-5, 12.0, 150, 15),
    "PretrainedTrainer_Primus": (*ADAMW, 1000, 50),
    "PretrainedTrainer_Primus_150ep": (*ADAMW, 150, 15),
    "PretrainedTrainer_Primusx": (*ADAMW, 1000, 50),
    "PretrainedTrainer_Primusx_30ep": (*ADAMW, 30, 3),
    "PretrainedTrainer_Primusx_150ep": (*ADAMW, 150, 15),
    "PretrainedTrainer_Primusx_300ep": (*ADAMW, 300, 15),
    "PretrainedTrainer_Primusx_smallerlr": ("adamw", 3e-5, 5e-2, 1.0, 1000, 50),
    "PretrainedTrainer_Primusx_150ep_lr3e4": ("adamw", 3e-4, 5e-2, 1.0, 150, 50),
    "PretrainedTrainer_Primusx_150ep_small_debug": (*ADAMW, 150, 15),
    "PretrainedTrainer_Primusx_nomirroring": (*ADAMW, 1000, 50),
    "PretrainedTrainer_Primusx_150ep_nomirroring": (*ADAMW, 150, 15),
    "PretrainedTrainer_sawtooth": (*SGD, 1000, 50),
    "PretrainedTrainer_sawtooth_150ep": (*SGD, 150, 15),
    "PretrainedTrainer_Primus_sawtooth": (*ADAMW, 1000, 50),
    "PretrainedTrainer_Primus_sawtooth_150ep": (*ADAMW, 150, 50),
    "PretrainedTrainer_Primus_frozenEnc": (*ADAMW, 150, 15),
    "PretrainedTrainer_Primus_frozenEnc_lr_7e5_wd_3e5": ("adamw", 7e-5, 3e-5, 1.0, 150, 15),
    "PretrainedTrainer_Primus_frozenEnc_noWarmUp_lr_3e5_wd_0": ("adamw", 3e-5, 0.0, 1.0, 150, 0),
    "PretrainedTrainer_from_scratch": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainer": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainer_1epoch": ("sgd", 1e-2, 3e-5, 12.0, 1, 0),
    "nnUNetTrainer_250epochs": ("sgd", 1e-2, 3e-5, 12.0, 250, 0),
    "nnUNetTrainer_4000epochs_NoMirroring": ("sgd", 1e-2, 3e-5, 12.0, 4000, 0),
    "nnUNetTrainerNoDeepSupervision": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainerNoMirroring": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainer_onlyMirror01": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainerNoDA": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainerCosAnneal": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainer_warmup": ("sgd", 1e-2, 3e-5, 12.0, 1000, 50),
    "nnUNetTrainerDiceLoss": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainerCELoss": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainerCELoss_5epochs": ("sgd", 1e-2, 3e-5, 12.0, 5, 0),
    "nnUNetTrainer_Loss_CE": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainerDiceTopK10Loss": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainerDiceCELoss_noSmooth": ("sgd", 1e-2, 3e-5, 12.0, 1000, 0),
    "nnUNetTrainerDiceCELoss_noSmooth_4000epochs": ("sgd", 1e-2, 3e-5, 12.0, 4000, 0),
    "nnUNetTrainerVanillaAdam": ("adam", 1e-2, 3e-5, 12.0, 1000, 0),
    **dict.fromkeys(PRIMUS_TRAINERS.values(), ("adamw", 3e-4, 5e-2, 1.0, 1000, 50)),
    "nnUNet_Primus_M_Trainer_BS8": ("adamw", 3e-4, 5e-2, 1.0, 1000, 50),
    "nnUNet_Primus_M_Trainer_BS8_2e4": ("adamw", 2e-4, 5e-2, 1.0, 1000, 50),
    **{name: ("sgd", 1e-3 if name.endswith("_ft") else 1e-2, 3e-5, 12.0, 1000, 0) for name in STU_NET_TRAINERS},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_trainer_name_has_the_published_figures(name):
    recipe = Recipe.for_trainer_name(name)
    figures = (recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.gradient_clip)
    assert (*figures, recipe.epochs, recipe.warmup_epochs) == PUBLISHED[name]
    flips = {"onlyMirror01": (0, 1), "NoDA": ()}.get(name.removeprefix("nnUNetTrainer").lstrip("_"), (0, 1, 2))
    assert recipe.mirror_axes == (() if "nomirroring" in name.lower() else flips)


def test_the_table_of_figures_has_every_name():
    assert {*TRAINER_ALIASES, *STOCK_ALIASES} <= set(PUBLISHED)


def test_what_else_names_stand_for():
    saw, short = (Recipe.for_trainer_name(f"PretrainedTrainer_sawtooth{end}") for end in ("", "_150ep"))
    assert (saw.decoder_warmup_epochs, saw.warmup_fraction, saw.decoder_warmup_learning_rate) == (50, 0.5, None)
    assert (short.decoder_warmup_epochs, short.warmup_fraction) == (15, 0.5)
    primus = Recipe.for_trainer_name("PretrainedTrainer_Primus_sawtooth")
    assert (primus.decoder_warmup_epochs, primus.decoder_warmup_learning_rate) == (50, 1e-6)
    assert Recipe.for_trainer_name("PretrainedTrainer_Primus_frozenEnc").freeze == "encoder"
    assert Recipe.for_trainer_name("PretrainedTrainer_Primusx_150ep_small_debug").patch_size == (48, 48, 48)
    assert Recipe.for_trainer_name("PretrainedTrainer_100ep_50i").iterations_per_epoch == 50
    assert Recipe.for_trainer_name("nnUNetTrainerCosAnneal").schedule == "cosine"
    assert Recipe.for_trainer_name("nnUNetTrainerNoDA").augmentation == "none"
    assert Recipe.for_trainer_name("nnUNetTrainerDiceCELoss_noSmooth_4000epochs").dice_smooth == 0
    assert Recipe.for_trainer_name("nnUNet_Primus_M_Trainer_BS8").batch_size == 8
    assert Recipe.for_trainer_name("STUNetTrainer_large_ft").network == "STUNetL"
    assert Recipe.for_trainer_name("nnUNetTrainerCELoss").loss == "ce"
    assert Recipe.for_trainer_name("nnUNetTrainerDiceTopK10Loss").loss == "dice_topk"
    for name in ("nnUNetTrainerDA5", "nnUNetTrainerDiceCELoss_noSmooth_4000epochs_DA5"):
        with pytest.raises(ConfigurationError, match="DA5"):  # not another augmentation under its name
            Recipe.for_trainer_name(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_name_has_a_folder_of_its_own_that_nnunet_does_not_take_for_its(name):
    recipe = Recipe.for_trainer_name(name)
    if name.startswith("PretrainedTrainer_adam__"):
        assert recipe.trainer_name == "PretrainedTrainer_adam_nomirroring"  # two underscores separate it from the plan
    elif name.startswith(("nnUNet", "STUNet")):
        assert recipe.from_scratch and recipe.trainer_name == f"PretrainedTrainer_as_{name}_from_scratch"
    else:
        assert recipe.trainer_name == name


def test_nnunets_own_trainers_fine_tune_weights_that_are_given():
    scratch, given = (Recipe.for_trainer_name("nnUNetTrainer_250epochs", pretrained) for pretrained in (False, True))
    assert (scratch.from_scratch, given.from_scratch) == (True, False)
    assert scratch.deep_supervision and given.deep_supervision
    assert given.trainer_name == "PretrainedTrainer_as_nnUNetTrainer_250epochs"
    guide = Recipe.load("supervised_transfer")  # the same run, under its own name
    assert guide == given.override(name=guide.name, trainer_name=guide.trainer_name)


def test_an_unknown_trainer_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"did you mean 'PretrainedTrainer_150ep'.*PretrainedTrainer_Primus"):
        Recipe.for_trainer_name("PretrainedTrainer_150epp")


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"did you mean 'primus'.*tiny_cpu"):
        Recipe.load("primsu")


def test_override_returns_a_copy_and_reads_text():
    recipe = Recipe()
    changed = recipe.override(
        learning_rate="1e-4", patch_size="96,64x32", mirror_axes="[0 2]", batch_size="none", from_scratch="yes"
    )
    assert recipe == Recipe()
    assert (changed.learning_rate, changed.patch_size, changed.mirror_axes) == (1e-4, (96, 64, 32), (0, 2))
    assert (changed.batch_size, changed.from_scratch) == (None, True)


def test_settings_as_on_the_command_line():
    assert Recipe().with_settings(["weight-decay=0.5", "mirror_axes="]).mirror_axes == ()
    with pytest.raises(ConfigurationError, match="expected field=value"):
        Recipe().with_settings(["seed"])


def test_all_mistakes_at_once():
    with pytest.raises(ConfigurationError) as caught:
        Recipe().override(
            epoch=3, epochs=10, learning_rate="fast", optimizer="adan", seed=-1, schedule="poly ", patch_size="1,2"
        )
    message = str(caught.value)
    for part in (
        "unknown field 'epoch' (did you mean 'epochs'?)",
        "learning_rate: expected a number, got 'fast'",
        "patch_size: expected 3 of: a whole number or none",
        "optimizer: expected one of sgd, adamw, adam, got 'adan' (did you mean 'adam'?)",
        "schedule: expected one of poly, cosine, constant, got 'poly ' (did you mean 'poly'?)",
        "warmup_epochs: expected fewer than epochs (10), got 50 (change it with --warmup)",
        "seed: expected 0 to 4294967295, got -1",
    ):
        assert part in message
    assert "7 mistakes" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("epochs", True),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("momentum", 1.0),
        ("momentum", 0.0),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("weight_decay", -1e-5),
        ("warmup_epochs", 1000),
        ("foreground_fraction", 1.5),
        ("batch_size", 0),
        ("patch_size", (32, 0, 32)),
        ("mirror_axes", (0, 0)),
        ("mirror_axes", (3,)),
        ("precision", "fp8"),
        ("augmentation", "tpu"),
        ("optimizer", "SGD"),
        ("schedule", "linear"),
        ("freeze", "decoder"),
        ("compile", "yes"),
        ("encoder_learning_rate", 0),
        ("decoder_warmup_learning_rate", -1e-6),
        ("warmup_fraction", 0),
        ("warmup_fraction", 1.01),
        ("layer_decay", 0),
        ("layer_decay", 1.5),
        ("accumulate", 0),
        ("ema_decay", 1.0),
        ("ema_decay", 0),
        ("decoder_warmup_epochs", -1),
        ("warmup_epochs", -1),
        ("lora_rank", -1),
        ("channels_last", "maybe"),
        ("trainer_name", "a__b"),
        ("trainer_name", "../up"),
        ("trainer_name", 7),
        ("from_scratch", 1),
        ("seed", 2**32),
    ],
)
def test_values_out_of_range(field, value):
    with pytest.raises(ConfigurationError, match=field):
        Recipe(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"warmup_epochs": 600, "decoder_warmup_epochs": 400},
            r"fewer than epochs \(1000\), got 1000 .*--decoder-warmup",
        ),
        ({"decoder_warmup_learning_rate": 1e-4}, "means nothing without decoder_warmup_epochs"),
        ({"lora_alpha": 8}, "lora_alpha: means nothing without adapters"),
        ({"freeze": "encoder", "lora_rank": 4}, "freeze encoder and lora_rank 4"),
        ({"freeze": "encoder", "encoder_learning_rate": 1e-4}, "freeze encoder and encoder_learning_rate"),
        ({"freeze": "all_but_head", "layer_decay": 0.8}, "freeze all_but_head and layer_decay"),
        ({"freeze": "encoder", "decoder_warmup_epochs": 5}, "never thaws; use warmup_epochs"),
        ({"freeze": "encoder", "from_scratch": True}, "random weights would stay random"),
        ({"lora_rank": 4, "from_scratch": True}, "random weights would stay random"),
    ],
)
def test_values_that_contradict_each_other(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        Recipe(**fields)


def test_contradictions_are_reported_with_everything_else():
    with pytest.raises(ConfigurationError, match="(?s)3 mistakes.*seed.*lora_rank 2.*layer_decay"):
        Recipe(freeze="encoder", lora_rank=2, layer_decay=0.5, seed=-1)


def test_settings_that_are_no_assignments_are_reported_with_the_others():
    with pytest.raises(ConfigurationError, match=r"(?s)3 mistakes.*--set seed: expected field=value.*sede.*epochs"):
        Recipe().with_settings(["seed", "sede=3"], epochs=0)


def test_what_the_network_or_the_device_cannot_do():
    wanted = Recipe(lora_rank=4, precision="fp16")
    with pytest.raises(
        ConfigurationError, match=r"(?s)2 mistakes.*lora_rank.*CNN.*precision: fp16 needs a CUDA device, not cpu"
    ):
        wanted.check_against(CNN, "cpu")
    with pytest.raises(ConfigurationError, match=r"precision"):
        wanted.check_against(TRANSFORMER, "cpu")
    with pytest.raises(ConfigurationError, match="deep_supervision: a Primus has a single output"):
        Recipe(deep_supervision=True).check_against(TRANSFORMER)
    with pytest.raises(ConfigurationError, match="compile: not on mps"):
        Recipe(compile="on").check_against(CNN, "mps")
    Recipe(deep_supervision=True, precision="fp16", compile="on").check_against(CNN, "cuda")


def test_adapters_without_peft_are_noticed_before_anything_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'nnssl-adapt\[lora\]'"):
        Recipe(lora_rank=4).check_against(TRANSFORMER)


def test_yaml_says_on_and_off_its_own_way(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("compile: off\nchannels_last: on\nfreeze: none\nema_decay: none\n")  # YAML 1.1: off is false
    recipe = Recipe.load(path)
    assert (recipe.compile, recipe.channels_last, recipe.freeze, recipe.ema_decay) == ("off", True, "none", None)


def test_the_log_says_what_is_on_and_nothing_of_what_is_off():
    assert len(str(Recipe()).splitlines()) == 4
    shown = str(Recipe.load("sawtooth").override(ema_decay=0.99, layer_decay=0.8, accumulate=3, schedule="cosine"))
    for part in (
        "the decoder alone for 50 epochs, then warm-up over 50 epochs, then cosine",
        "0.8 per",
        "0.99",
        "3 batches",
    ):
        assert part in shown


def test_a_recipe_goes_through_yaml_and_back(tmp_path):
    recipe = Recipe(name="mine", patch_size=(16, 32, 48), mirror_axes=(), betas=(0.8, 0.9))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert Recipe.load(path) == recipe


@pytest.mark.parametrize("text", ["- a list", "epochs: [1", "\xff\xfe"])
def test_files_that_are_no_recipe(tmp_path, text):
    path = Path(tmp_path / "bad.yaml")
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"bad\.yaml"):
        Recipe.load(path)


def test_numbers_without_a_dot_are_numbers(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("learning_rate: 1e-3\n")  # YAML 1.1 reads this as text
    assert Recipe.load(path).learning_rate == 1e-3
