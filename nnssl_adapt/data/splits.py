"""Which cases are trained on and which are kept for validation: nnU-Net's folds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from nnssl_adapt.errors import ConfigurationError, DatasetError
from nnssl_adapt.files import write_json
from nnssl_adapt.text import and_more, read_json

logger = logging.getLogger(__name__)

Split: TypeAlias = dict[str, list[str]]
"""``{"train": [identifier, ...], "val": [identifier, ...]}``."""

SPLITS_FILE = "splits_final.json"

_SEED = 12345
"""nnU-Net's, so that the same dataset has the same folds."""


def crossval_splits(identifiers: Sequence[str], seed: int = _SEED, folds: int = 5) -> list[Split]:
    """Split cases into folds as nnU-Net does, that is as scikit-learn's shuffled ``KFold``.

    Args:
        identifiers: the cases; nnU-Net sorts them first.
        seed: of the shuffling.
        folds: how many.

    Returns:
        One split a fold. Sizes differ by one at most, the larger ones first; both lists keep the given order.

    Raises:
        DatasetError: fewer cases than folds.
    """
    count = len(identifiers)
    if not 2 <= folds <= count:
        raise DatasetError(f"{count} cases can't be split into {folds} folds")
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)
    splits = []
    for part in np.array_split(order, folds):  # as KFold: the first count % folds parts are one longer
        held_out = set(part.tolist())
        splits.append(
            {
                "train": [identifiers[i] for i in range(count) if i not in held_out],
                "val": [identifiers[i] for i in range(count) if i in held_out],
            }
        )
    return splits


def load_or_make_splits(folder: Path, identifiers: Sequence[str], raw_folder: Path | None = None) -> list[Split]:
    """Return the splits of a dataset, from the first of: ``folder``, the raw dataset, nnU-Net's own five folds.

    The last two are written to ``folder`` as ``splits_final.json``, where nnU-Net looks for it. With fewer than five cases
    there are as many folds as cases (nnU-Net fails there); a single case can't be split and leaves an empty list.

    Args:
        folder: the dataset's preprocessed folder.
        identifiers: all training cases.
        raw_folder: the raw dataset's folder; a ``splits_final.json`` in it is the author's and honoured.

    Raises:
        DatasetError: a splits file is not one, or names cases that don't exist. (Cases in no fold are only warned of.)
        OutputError: the file can't be written.
    """
    path = folder / SPLITS_FILE
    given = raw_folder / SPLITS_FILE if raw_folder is not None else None
    known = sorted(identifiers)
    if path.is_file():
        splits = _load(path, known)
        if given is not None and given.is_file() and _load(given, known) != splits:
            logger.warning("%s differs from %s; the former is used. Delete it to take the latter", path, given)
        return splits
    if given is not None and given.is_file():
        splits = _load(given, known)
        logger.info("using the splits of %s", given)
    elif len(known) < 2:
        logger.warning("one case can't be split into training and validation: only fold 'all' can be trained")
        return []
    else:
        folds = min(5, len(known))
        if folds < 5:
            logger.warning("only %d cases: making %d folds instead of 5", len(known), folds)
        splits = crossval_splits(known, folds=folds)
    write_json(path, splits)
    return splits


def count_folds(folder: Path, identifiers: Sequence[str], raw_folder: Path) -> int:
    """How many folds :func:`load_or_make_splits` finds or makes; nothing is written. 0: only ``all`` can be trained."""
    for path in (folder / SPLITS_FILE, raw_folder / SPLITS_FILE):
        if path.is_file():
            return len(read_splits(path))
    return min(5, len(identifiers)) if len(identifiers) > 1 else 0


def load_splits(path: Path, identifiers: Sequence[str]) -> list[Split]:
    """Read a splits file. Raises DatasetError: it is none, or names cases that are not among ``identifiers``."""
    return _load(path, sorted(identifiers))


def split_for_fold(
    splits: Sequence[Split], fold: int | str, identifiers: Sequence[str], where: str | Path = SPLITS_FILE
) -> tuple[list[str], list[str]]:
    """Return the training and the validation cases of a fold.

    Fold ``"all"`` trains and validates on every case. For a fold that the splits don't have nnU-Net makes a random 80:20 split
    on the spot. It is refused here: most often it is a typing error, and its validation cases are also those of other folds, so
    that no cross-validation could count them.

    Args:
        splits: of the dataset.
        fold: number or ``"all"``.
        identifiers: all cases.
        where: the splits file, for the message.

    Raises:
        ConfigurationError: the splits have no such fold.
    """
    if fold == "all":
        return list(identifiers), list(identifiers)
    if str(fold).isdecimal() and int(fold) < len(splits):
        split = splits[int(fold)]
        return list(split["train"]), list(split["val"])
    known = f"0 to {len(splits) - 1}, and all" if splits else "all only, since one case can't be split"
    raise ConfigurationError(
        f"fold {fold} does not exist: {where} has the folds {known}. nnU-Net would make a random 80:20 split; "
        "to train on one, add it to that file",
        path=where,
    )


def read_splits(path: Path) -> list[Split]:
    """Read a splits file, without asking whether its cases exist. Raises DatasetError if it is not one."""
    content = read_json(path, DatasetError, "splits file", list)
    if not _is_splits(content):
        raise DatasetError(
            f'{path}: expected a list of {{"train": [case, ...], "val": [case, ...]}}, one for each fold', path=path
        )
    return [{"train": list(split["train"]), "val": list(split["val"])} for split in content]


def _load(path: Path, known: Sequence[str]) -> list[Split]:
    splits = read_splits(path)
    existing = set(known)
    for fold, split in enumerate(splits):
        for part in ("train", "val"):
            unknown = sorted(set(split[part]) - existing)
            if unknown:
                raise DatasetError(
                    f"{path}: fold {fold} {part!r} names {and_more(unknown)}, which the dataset does not have; correct the "
                    "file, or delete it to get nnU-Net's own folds"
                )
        both = sorted(set(split["train"]) & set(split["val"]))
        if both:
            logger.warning("%s: fold %d trains on validation cases: %s", path, fold, and_more(both))
    used = {name for split in splits for name in (*split["train"], *split["val"])}
    unused = sorted(existing - used)
    if unused:
        logger.warning("%s: in no fold: %s (added later? delete the file to get new folds)", path, and_more(unused))
    return splits


def _is_splits(content: object) -> bool:
    return isinstance(content, list) and all(
        isinstance(split, dict)
        and all(
            isinstance(split.get(part), list) and all(isinstance(n, str) for n in split[part])
            for part in ("train", "val")
        )
        for split in content
    )
