"""Recipes: where they come from, what may be changed, and that all mistakes come at once."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training import recipe as recipes
from nnssl_adapt.training.recipe import TRAINER_ALIASES, Recipe, recipe_names


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


@pytest.mark.parametrize("alias", TRAINER_ALIASES)
def test_aliases(alias):
    assert Recipe.for_trainer_name(alias).epochs in (150, 1000)


def test_aliases_keep_their_names_except_where_nnunet_has_a_trainer_of_that_name():
    for alias in TRAINER_ALIASES:
        expected = "PretrainedTrainer_from_scratch" if alias == "nnUNetTrainer" else alias
        assert Recipe.for_trainer_name(alias).trainer_name == expected
    primus = Recipe.for_trainer_name("PretrainedTrainer_Primus_150ep")
    assert (primus.optimizer, primus.epochs, primus.warmup_epochs) == ("adamw", 150, 15)
    many = Recipe.for_trainer_name("nnUNetTrainer_250epochs")
    assert (many.epochs, many.from_scratch, many.learning_rate) == (250, True, 1e-2)


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
        Recipe().override(epoch=3, epochs=10, learning_rate="fast", optimizer="adam", seed=-1, patch_size="1,2")
    message = str(caught.value)
    for part in (
        "unknown field 'epoch' (did you mean 'epochs'?)",
        "learning_rate: expected a number, got 'fast'",
        "patch_size: expected 3 of: a whole number or none",
        "'adam' (did you mean 'adamw'?)",
        "warmup_epochs: expected 0 or more and fewer than epochs (10), got 50",
        "seed: expected 0 to 4294967295, got -1",
    ):
        assert part in message
    assert "6 mistakes" in message


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
        ("augmentation", "gpu"),
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
