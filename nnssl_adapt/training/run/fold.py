"""Which cases a fold trains on, and which it validates on."""

from __future__ import annotations

from pathlib import Path

from nnssl_adapt.data.splits import load_or_make_splits, load_splits, split_for_fold
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.planning.plan import FinetunePlan


def cases_of_fold(
    plan: FinetunePlan, store: CaseStore, fold: int | str, file_ending: str, splits_file: str | Path | None = None
) -> tuple[int | str, list[str], list[str]]:
    """The fold in its plain form, its training and its validation cases, all of them preprocessed.

    ``splits_file`` is used instead of the dataset's own splits.
    """
    stored = store.identifiers
    if not stored:
        raise ConfigurationError(
            f"{store.folder} has no preprocessed cases: run nnUNetv2_preprocess_like_nnssl (or, for nnU-Net's plans, "
            "nnUNetv2_preprocess) first"
        )
    references = plan.dataset_folder / "gt_segmentations"
    known = sorted(p.name.removesuffix(file_ending) for p in references.glob(f"*{file_ending}")) or stored
    splits = (
        load_or_make_splits(plan.dataset_folder, known)
        if splits_file is None
        else load_splits(Path(splits_file), known)
    )
    fold = _checked_fold(fold, len(splits))
    training, validation = split_for_fold(splits, fold, stored)
    if not training or not validation:
        raise ConfigurationError(f"fold {fold} has {len(training)} training and {len(validation)} validation cases")
    store.require([*training, *validation])
    return fold, training, validation


def _checked_fold(fold: int | str, folds: int) -> int | str:
    if fold == "all":
        return fold
    if str(fold).isdigit() and int(fold) < folds:
        return int(fold)
    known = [str(number) for number in range(folds)]
    raise ConfigurationError(f"fold {fold} does not exist: the dataset's folds are {', '.join([*known, 'all'])}")
