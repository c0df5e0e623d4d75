"""README.md: its commands are those that exist, its Python fits the package, its links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest

import nnssl_adapt as na
from nnssl_adapt.cli import preprocess, train
from nnssl_adapt.cli.main import _COMMANDS, build_parser
from nnssl_adapt.training.recipe.recipe import recipe_names

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return [block.split("```")[0] for block in TEXT.split(f"```{language}\n")[1:]]


def parser_of(module):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser


def commands():
    """The words of every command of ours in the shell blocks."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [words[words.index("&&") + 1 :] if "&&" in words else words for words in lines if words]


def test_the_two_commands_to_begin_with():
    first, second = blocks("bash")[:2]
    assert first == "pip install '.[demo]' && nnssl-adapt demo\n"
    assert second == "pip install -e '.[test]' && pytest\n"


def test_every_command_is_understood():
    parsers = {
        "nnssl-adapt": build_parser(),
        "nnUNetv2_preprocess_like_nnssl": parser_of(preprocess),
        "nnUNetv2_train_pretrained": parser_of(train),
    }
    others = {"pip", "pytest", "export", "git", "cd", "nnUNetv2_predict_from_modelfolder"}
    seen = []
    for program, *words in commands():
        if program not in others:
            parsers[program].parse_args(words)
            seen.append(program)
    assert set(seen) == set(parsers)


def test_every_command_is_in_the_table():
    table = TEXT[TEXT.index("## The commands") :].split("###")[0]
    named = set(re.findall(r"`(?:nnssl-adapt )?([a-z-]+)", table))
    assert set(_COMMANDS) <= named


def test_every_recipe_and_flag_of_the_text_exists():
    paragraph = TEXT[TEXT.index("A recipe holds everything") :].split("```")[0]
    assert set(recipe_names()) <= set(re.findall(r"`([a-z_]+)`", paragraph))
    known = [action for parser in (parser_of(train), parser_of(preprocess)) for action in parser._actions]
    known += [action for words in _COMMANDS.values() for action in parser_of(words[0])._actions]
    options = {option for action in known for option in action.option_strings}
    inline = " ".join(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)))
    flags = set(re.findall(r"(?<!\S)--?[a-z][a-z_-]+", inline))
    assert len(flags) > 14 and flags <= options


def test_the_python_fits_the_signatures():
    calls = [node for node in ast.walk(ast.parse(blocks("python")[0])) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        if re.fullmatch(r"na(\.\w+)+", name):
            function = functools.reduce(getattr, name.split(".")[1:], na)
            inspect.signature(function).bind(*call.args, **{word.arg: word.value for word in call.keywords})
    assert len(calls) >= 6


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)", TEXT))))
def test_every_link_leads_to_a_file(target):
    assert (ROOT / target).is_file()
