"""The two networks of a cascade: where the first leaves its segmentations, and whether they suit the second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnssl_adapt.data.previous_stage import FOLDER, PreviousStage
from nnssl_adapt.data.splits import Split
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.text import and_more
from nnssl_adapt.training.run.folder import RunFolder


def next_stage(model: Path, configuration: str) -> PreviousStage:
    """What a model leaves for ``configuration``, the next stage."""
    return PreviousStage(model / FOLDER / configuration)


def previous_stage(plan: FinetunePlan, trainer_name: str, results: str | Path | None = None) -> PreviousStage | None:
    """What the plan's previous stage left, trained by the trainer of the same name; None where it is no cascade."""
    if plan.previous_stage is None:
        return None
    first = RunFolder.of(plan.seen_through(plan.previous_stage), trainer_name, 0, results)
    return next_stage(first.model, plan.configuration)


def check_previous_stage(
    stage: PreviousStage | None, plan: FinetunePlan, fold: int | str, cases: Sequence[str], splits: Sequence[Split]
) -> None:
    """Raise ConfigurationError unless every case was segmented by a first network that was not trained on it.

    Args:
        stage: of the plan; None where it is no cascade.
        plan: seen through the cascade.
        fold: that is trained; ``all`` takes what any fold segmented.
        cases: of the fold, for training and validation.
        splits: of the dataset.
    """
    if stage is None:
        return
    validated = {case: number for number, split in enumerate(splits) for case in split["val"]}
    words = f"train -d {plan.dataset_name} -c {plan.previous_stage} -p {plan.plans_name}"
    missing = [case for case in cases if not stage.has(case)]
    if missing:
        folds = sorted({validated[case] for case in missing if case in validated})
        named = f" (validation cases of fold {and_more(folds, limit=10)})" if folds else ""
        raise ConfigurationError(
            f"{plan.configuration} needs the segmentations of {plan.previous_stage}, and {stage.folder} has none of "
            f"{and_more(missing)}{named}{_elsewhere(stage)}. Train and validate all folds of {plan.previous_stage} with the same "
            f"trainer and plans first, once the cases of {plan.configuration} are preprocessed (a trained fold is only "
            "validated, with --val)",
            path=stage.folder,
            next_command=f"nnssl-adapt {words} -f {folds[0] if folds else 0}",
        )
    by_others: dict[Any, list[str]] = {}
    for case in cases if fold != "all" else ():
        predicted_by = stage.fold_of(case)
        if predicted_by is not None and predicted_by != validated.get(case, predicted_by):
            by_others.setdefault(predicted_by, []).append(case)
    if by_others:
        shown = "; ".join(f"{and_more(names)} by fold {number}" for number, names in by_others.items())
        wanted = sorted({validated[case] for names in by_others.values() for case in names})
        raise ConfigurationError(
            f"{stage.folder}: segmented by networks of other folds, which were trained on these cases: {shown}. Validate fold "
            f"{and_more(wanted, limit=10)} of {plan.previous_stage} again (train … --val)",
            path=stage.folder,
            next_command=f"nnssl-adapt {words} -f {wanted[0]} --val",
        )


def _elsewhere(stage: PreviousStage) -> str:
    """Models by other trainers that have what is missing, for those who changed the recipe between the stages."""
    model = stage.folder.parents[1]
    _, _, rest = model.name.partition("__")
    others = sorted(
        path.parents[1].name.partition("__")[0]
        for path in model.parent.glob(f"*__{rest}/{FOLDER}/{stage.folder.name}")
        if path != stage.folder
    )
    return f" (there are some of trainer {and_more(others)}: --set trainer_name=NAME)" if others else ""
