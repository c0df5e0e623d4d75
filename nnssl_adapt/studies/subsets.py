"""Smaller training sets: nested, by subject, drawn once and written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nnssl_adapt.data.splits import Split, load_splits
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.files import write_json

_SEED = 20240607
"""Of the order in which subjects are taken. Not a choice: the same dataset always has the same subsets."""


def nested_subsets(
    splits: Sequence[Split], fractions: Sequence[float], owner: Callable[[str], str | None]
) -> dict[float, list[Split]]:
    """Splits with fewer training cases; every smaller subset of a fold is part of the larger ones.

    Subjects are put into a random order once for each fold. A fraction takes the first ones, as many as come closest to
    its share of the cases without exceeding it, but at least one. Validation cases stay as they are.

    Args:
        splits: of the dataset.
        fractions: above 0 to 1; 1 is the fold as it is.
        owner: the subject of a case's name; None where the case is a subject of its own.
    """
    return {
        fraction: [
            {"train": _subset(split["train"], fraction, owner, fold), "val": list(split["val"])}
            for fold, split in enumerate(splits)
        ]
        for fraction in fractions
    }


def _subset(cases: Sequence[str], fraction: float, owner: Callable[[str], str | None], fold: int) -> list[str]:
    if fraction == 1:
        return list(cases)
    subjects: dict[str, list[str]] = {}
    for case in sorted(cases):
        subjects.setdefault(owner(case) or case, []).append(case)
    names = sorted(subjects)
    order = np.random.default_rng((_SEED, fold)).permutation(len(names))
    wanted = math.floor(fraction * len(cases) + 1e-9)
    taken: list[str] = []
    for index in order:
        more = subjects[names[index]]
        if taken and len(taken) + len(more) > wanted:
            break
        taken += more
    return sorted(taken)


def write_subsets(
    folder: Path, splits: Sequence[Split], fractions: Sequence[float], owner: Callable[[str], str | None]
) -> dict[float, Path]:
    """Write one splits file for each fraction and return where; those that are there already are kept.

    Raises:
        ConfigurationError: a file that is there is not what would be drawn now, since the dataset's splits have changed.
        OutputError: a file can't be written.
    """
    paths: dict[float, Path] = {}
    known = sorted({case for split in splits for part in ("train", "val") for case in split[part]})
    for fraction, subset in nested_subsets(splits, fractions, owner).items():
        path = paths[fraction] = folder / f"splits_{fraction:g}.json"
        if not path.is_file():
            write_json(path, subset)
        elif load_splits(path, known) != subset:
            raise ConfigurationError(
                f"{path} was drawn from other splits than the dataset has now: give the study another name, or restore the "
                "splits that it began with",
                path=path,
            )
    return paths
