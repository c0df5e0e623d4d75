"""The parser of every command: flags are what they are spelled, never guessed from a part of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser that takes no part of a flag for the flag.

    argparse would read ``--pre`` as ``--precision`` and, worse, nnU-Net's ``-chk best`` as ``-c hk``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """``allow_abbrev`` leaves guesses for flags with one dash alone; nothing is guessed for them either."""
        return []


class Refused(argparse.Action):
    """A flag of nnU-Net's command that this one does not have: usage error with the reason."""

    def __init__(self, option_strings: Sequence[str], dest: str, reason: str = "", **options: Any) -> None:
        super().__init__(option_strings, dest, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.reason = reason

    def __call__(self, parser: argparse.ArgumentParser, *others: Any) -> None:
        parser.error(f"{others[-1]}: {self.reason}")


class Needless(argparse.Action):
    """A flag of nnU-Net's command that changes nothing here: accepted, and said."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, reason: str = "", nargs: int | str = 0, **options: Any
    ) -> None:
        super().__init__(option_strings, dest, nargs=nargs, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.reason = reason

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *others: Any) -> None:
        notes = list(getattr(namespace, NOTES, ()))
        setattr(namespace, NOTES, [*notes, f"{others[-1]} changes nothing: {self.reason}"])


class Only(argparse.Action):
    """A flag of nnU-Net's command of which one value is known; any other is a usage error with the reason."""

    def __init__(self, option_strings: Sequence[str], dest: str, known: str = "", reason: str = "", **options: Any):
        super().__init__(option_strings, dest, nargs="+", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.known, self.reason = known, reason

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *others: Any) -> None:
        values, flag = others
        unknown = [value for value in values if value != self.known]
        if unknown:
            parser.error(f"{flag} {' '.join(unknown)}: {self.reason}")


NOTES = "notes_on_flags"
"""Where a parsed command line keeps what is to be said of its flags."""
