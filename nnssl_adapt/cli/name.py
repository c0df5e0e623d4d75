"""Make or check the name of a model's repository, by ivadomed's convention."""

from __future__ import annotations

import argparse

from nnssl_adapt.cli.common import EXIT_FAILED, EXIT_OK, add_verbose

_FIELDS = ("task", "anatomy", "animal", "pathology", "condition", "contrast", "architecture")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a name to read; without it, one is made of the flags")
    for field in _FIELDS:
        parser.add_argument(f"--{field}", nargs="+", metavar="VALUE")
    parser.add_argument("--new-values", action="store_true", help="allow values that the convention does not list")
    parser.add_argument(
        "--strict", action="store_true", help="with a name: exit with 1 when it departs from the convention"
    )
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.sharing.naming import build_name, read_name

    given = {field: getattr(arguments, field) for field in _FIELDS if getattr(arguments, field)}
    if arguments.name is None:
        print(build_name(arguments.new_values, **given))
        return EXIT_OK
    if given:
        raise ConfigurationError("give a name to read, or flags to make one of, not both")
    read = read_name(arguments.name)
    for field, values in read.values.items():
        print(f"{field:<13} {', '.join(values) or 'none'}")
    for note in read.notes:
        print(f"note: {note}")
    print(f"by the convention: {read}")
    return EXIT_FAILED if arguments.strict and str(read) != arguments.name else EXIT_OK
