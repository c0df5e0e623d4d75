"""Flags of ``evaluate`` and ``report`` about lesions that are counted one by one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl_adapt.evaluation.lesions import LesionRule


def add_lesion_flags(parser: argparse.ArgumentParser) -> None:
    lesions = parser.add_argument_group("lesions", "connected parts of a class, counted one by one")
    lesions.add_argument(
        "--lesions", action="store_true", help="add detection F1, sensitivity, PPV, Dice per lesion, counts"
    )
    lesions.add_argument(
        "--lesion-connectivity", type=int, choices=(6, 18, 26), default=None, help="what belongs together (default 26)"
    )
    lesions.add_argument(
        "--lesion-min-volume", type=float, default=None, metavar="MM3", help="smaller parts don't count (default 0)"
    )
    lesions.add_argument(
        "--lesion-overlap",
        type=float,
        default=None,
        metavar="FRACTION",
        help="from which a lesion is found (default 0.1)",
    )
    lesions.add_argument(
        "--lesion-matching",
        choices=("one-to-one", "any"),
        default=None,
        help="pairs by intersection over union (one-to-one, default), or any parts that cover the fraction",
    )


def lesion_rule(arguments: argparse.Namespace) -> LesionRule | None:
    """The rule that was asked for. An option about lesions without ``--lesions`` is a mistake, not to be ignored."""
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.evaluation.lesions import LesionRule

    names = ("connectivity", "min_volume", "overlap", "matching")
    given = {name: value for name in names if (value := getattr(arguments, f"lesion_{name}")) is not None}
    if arguments.lesions:
        return LesionRule(**given)
    if given:
        flags = ", ".join(f"--lesion-{name.replace('_', '-')}" for name in given)
        raise ConfigurationError(f"{flags}: only with --lesions")
    return None
