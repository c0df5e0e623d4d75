"""docs/training.md says what the code does: every field, flag, recipe and trainer name, with its figures."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from nnssl_adapt.cli import train
from nnssl_adapt.cli.training_flags import FIELD_FLAGS
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.recipe.recipe import Recipe, recipe_names
from nnssl_adapt.training.recipe.trainer_names import STOCK_ALIASES, TRAINER_ALIASES, resolve

TEXT = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")


def rows_after(heading):
    """Cells of the first table below a heading, without its header."""
    lines = TEXT[TEXT.index(heading) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table[0], table[2:]


def value_of(text, field):
    """What a cell says, read as the recipe reads it."""
    return getattr(Recipe().override(**{field: text}), field)


def test_every_recipe_is_in_the_table_with_its_figures():
    header, rows = rows_after("## The recipes")
    assert {row[0].strip("`") for row in rows} == set(recipe_names())
    for row in rows:
        recipe = Recipe.load(row[0].strip("`"))
        for field, text in list(zip(header, row, strict=True))[1:-1]:
            assert float(getattr(recipe, field)) == float(text) if text[0].isdigit() else getattr(recipe, field) == text


def test_every_field_is_in_the_table_with_its_flag_and_default():
    _, rows = rows_after("## Every field")
    fields = [field.name for field in dataclasses.fields(Recipe)]
    assert [row[0].strip("`") for row in rows] == fields
    flags = {flag.field: flag.flag for flag in FIELD_FLAGS} | {"from_scratch": "--from_scratch"}
    for name, flag, default, _ in rows:
        name, flag = name.strip("`"), flag.strip("`")
        assert flag.split(" ")[0] == flags.get(name, ""), name
        assert value_of(default.strip("`"), name) == getattr(Recipe(), name), name


def test_every_trainer_name_is_in_the_table_with_its_recipe():
    _, rows = rows_after("### Names of nnU-Net's trainers")
    documented = {}
    for names, recipes, _ in rows:
        for name in re.findall(r"`([^`]+)`", names):
            documented[name] = re.findall(r"`([^`]+)`", recipes)
    assert {*TRAINER_ALIASES, *STOCK_ALIASES} <= set(documented)
    for name, recipes in documented.items():
        assert resolve(name)[0] in recipes, name


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"(?<=`)--[a-z_-]+", TEXT))))
def test_every_flag_in_the_text_exists(flag):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    elsewhere = {"--keep-topology", "--fit-gpu", "--preset"}  # of the preprocessing command
    assert flag in elsewhere | {option for action in parser._actions for option in action.option_strings}


def test_the_recipe_of_your_own_loads(tmp_path):
    block = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1]
    path = tmp_path / "my.yaml"
    path.write_text(block)
    recipe = Recipe.load(path)
    assert recipe.name == "my" and set(yaml.safe_load(block)) < {field.name for field in dataclasses.fields(Recipe)}
    assert (recipe.epochs, recipe.layer_decay) == (300, 0.8)


def test_the_contradiction_of_the_text_is_one():
    with pytest.raises(ConfigurationError, match="freeze encoder and encoder_learning_rate"):
        Recipe(freeze="encoder", encoder_learning_rate=1e-5)
