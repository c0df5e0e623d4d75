"""List the trained models of this machine, and the published networks that can be fine-tuned; or one of those in full."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap

from nnssl_adapt.cli.common import EXIT_OK, add_verbose

_ALL = ""
_NARROWEST = 30
"""Columns that the text has at least, on the narrowest terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--installed", action="store_true", help="only those in nnUNet_results")
    which.add_argument(
        "--published",
        "--public",
        nargs="?",
        const=_ALL,
        metavar="ID",
        help="only published networks; with a short name: everything that is known of it, and the command to use",
    )
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.published:
        _show_one(arguments.published)
        return EXIT_OK
    if arguments.published is None:
        _show_installed(required=arguments.installed)
    if not arguments.installed:
        _show_published()
    return EXIT_OK


def _show_installed(required: bool) -> None:
    from nnssl_adapt.paths import results_folder
    from nnssl_adapt.sharing.catalogue import installed_models

    if not required and not os.environ.get("nnUNet_results"):
        print("Trained models: nnUNet_results is not set\n")
        return
    models = installed_models()
    print(f"Trained models in {results_folder()}: {len(models) or 'none'}")
    for model in models:
        origin = f"installed from {model.source}" if model.source else "trained here"
        print(f"  {model.dataset}/{model.path.name}\n    {model.summary}; {origin}")
    print()


def _show_published() -> None:
    from nnssl_adapt.weights.sources.published import published_models

    print("Published networks, for -pc (no network was asked):")
    models = published_models()
    width = max(len(model.id) for model in models)
    for model in models:
        where = model.repo_id or ("" if model.source else "to be downloaded by hand")
        trained = f"{model.method} on {model.data}" if model.data else model.method
        facts = [
            *(model.architecture, trained, model.size, model.terms if model.licence else "licence: see its page"),
            *(*model.needs, where, model.note),
        ]
        _print_wrapped(f"  {model.id:<{width}}  {'; '.join(fact for fact in facts if fact)}", width + 4)
    print("Everything about one, with its command: nnssl-adapt models --published ID")


def _show_one(name: str) -> None:
    from nnssl_adapt.weights.sources.published import known_name

    for line in str(known_name(name)).splitlines():
        _print_wrapped(line, 12)


def _print_wrapped(line: str, indent: int) -> None:
    """On a terminal a long line goes on below where its text began; a command, and all for another program, stays one line."""
    if not sys.stdout.isatty() or line.split(maxsplit=1)[0] == "command":
        print(line)
        return
    width = max(shutil.get_terminal_size().columns, indent + _NARROWEST)
    print(textwrap.fill(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False))
