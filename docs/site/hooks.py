"""Pages of the site that are made from the code: the commands from their parsers, the recipe's fields from its docstring."""

from __future__ import annotations

import argparse
import html
import inspect
import re
from dataclasses import fields

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import nnssl_adapt
from nnssl_adapt.cli.main import build_parser
from nnssl_adapt.training.recipe.recipe import Recipe


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, content in (
        ("reference/commands.md", commands()),
        ("reference/recipe.md", recipe_fields()),
        ("reference/python.md", python()),
    ):
        files.append(File.generated(config, path, content=content))
    return files


def commands() -> str:
    """A section a command: what it does, and a table of its options."""
    parser = build_parser()
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = [
        "# Commands\n\nEach is `nnssl-adapt COMMAND`; `nnssl-adapt COMMAND -h` shows the same. Three have names of their own, as "
        "commands of nnU-Net have: `nnUNetv2_preprocess_like_nnssl` is `nnssl-adapt preprocess`, `nnUNetv2_train_pretrained` is "
        "`nnssl-adapt train`, and `nnUNetv2_plan_like_dynamic` is `nnssl-adapt preprocess --keep-topology`."
    ]
    for name, command in subparsers.choices.items():
        parts.append(f"## {name}\n\n{_escaped(command.description or '')}")
        rows = [_row(action) for action in command._actions if action.help is not argparse.SUPPRESS]
        parts.append("| option | what |\n|---|---|\n" + "\n".join(row for row in rows if row))
    return "\n\n".join(parts) + "\n"


def _row(action: argparse.Action) -> str:
    if isinstance(action, argparse._HelpAction):
        return ""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    takes = ""
    if action.option_strings and action.nargs != 0:
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
        takes = f" `{' '.join(value) if isinstance(value, tuple) else value}`"
    text = (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
    return f"| {names}{takes} | {_escaped(text)} |"


def _escaped(text: str) -> str:
    """Text as it stands, in a cell of a table; what is in double backticks as code."""
    text = html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")
    for character in "*_[]":
        text = text.replace(character, f"\\{character}")
    return re.sub(r"``(.+?)``", r"<code>\1</code>", text)


def recipe_fields() -> str:
    """A table of the recipe's fields, with their defaults."""
    meanings = _attributes(inspect.getdoc(Recipe) or "")
    rows = [f"| `{f.name}` | `{f.default!r}` | {_escaped(meanings.get(f.name, ''))} |" for f in fields(Recipe)]
    return (
        "# Recipe fields\n\nA recipe is a YAML file of these fields (`--recipe FILE`), or one that comes with the package by its "
        "name. Any field is also `--set field=value`. Fields that are not given have these defaults.\n\n"
        "| field | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _attributes(docstring: str) -> dict[str, str]:
    """Name → text of the entries below ``Attributes:``, some of which name several fields."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.partition("Attributes:")[2].splitlines():
        entry = re.match(r"    ((?:\w+, )*\w+): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2]))
        elif line.startswith("        "):
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def python() -> str:
    """Every public name, with its docstring."""
    parts = ["# Python\n\nThe names of `import nnssl_adapt as na`. Each is loaded when it is first used."]
    for name in sorted(nnssl_adapt.__all__):
        home = nnssl_adapt._HOME.get(name)
        if home is not None:
            parts.append(f"::: {home}.{name}")
    return "\n\n".join(parts) + "\n"
