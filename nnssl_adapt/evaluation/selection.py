"""Which of several trained models, or of their ensembles by two, is the best: nnU-Net's choice, by cross-validation."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_adapt.data.labels import LabelOrRegion, LabelScheme
from nnssl_adapt.data.names import pair_labels
from nnssl_adapt.errors import CaseError, ConfigurationError, ModelFolderError
from nnssl_adapt.evaluation.crossval import (
    TrainedModel,
    accumulate,
    description_of_references,
    ensemble_crossval,
    folds_name,
    reference_folder,
)
from nnssl_adapt.evaluation.metrics import Summary, cases_in
from nnssl_adapt.evaluation.postprocessing import Decision, determine_postprocessing
from nnssl_adapt.files import write_json, write_text
from nnssl_adapt.inference.ensemble import saved_probabilities
from nnssl_adapt.inference.heads import order_of_heads
from nnssl_adapt.paths import find_dataset_name, results_folder

logger = logging.getLogger(__name__)

_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
"""nnU-Net's, in the order in which it tries them; with equal results the first one wins."""


@dataclass(frozen=True)
class Candidate:
    """A model or an ensemble of two, and how good it was in cross-validation.

    Attributes:
        name: nnU-Net's: the model folder's, or ``ensemble___<model>___<model>___<folds>``.
        models: one or two.
        folder: its predictions of all cases, with summary.json.
        summary: of these.
        score: mean Dice over the classes, see :func:`find_best`.
    """

    name: str
    models: tuple[TrainedModel, ...]
    folder: Path
    summary: Summary
    score: float


@dataclass(frozen=True)
class Selection:
    """The result of :func:`find_best`; ``best`` is the first with the highest score."""

    dataset: str
    folds: tuple[int, ...]
    models: tuple[TrainedModel, ...]
    candidates: tuple[Candidate, ...]
    best: Candidate
    ensembles: bool
    decision: Decision


def find_models(
    dataset: int | str,
    plans: Sequence[str] | None = None,
    configurations: Sequence[str] | None = None,
    trainers: Sequence[str] | None = None,
) -> list[TrainedModel]:
    """Trained models of a dataset, in nnU-Net's order: by trainer, configuration, plans, each in the order given.

    Args:
        dataset: id or name.
        plans: names; None: all that there are, as for the next two.
        configurations: likewise.
        trainers: likewise.

    Raises:
        DatasetNotFound, ConfigurationError: no such dataset, or ``nnUNet_results`` is not set.
        ModelFolderError: there is no model, or none with one of the names.
    """
    folder = results_folder() / find_dataset_name(dataset)
    models = [TrainedModel(path.parent) for path in sorted(folder.glob("*__*__*/plans.json"))]
    if not models:
        raise ModelFolderError(f"{folder} has no trained models: train some first")
    there = [list(dict.fromkeys(model.parts[index] for model in models)) for index in range(3)]
    there[2].sort(key=lambda name: _CONFIGURATIONS.index(name) if name in _CONFIGURATIONS else len(_CONFIGURATIONS))
    wanted = []
    for flag, given, known in zip(("-tr", "-p", "-c"), (trainers, plans, configurations), there, strict=True):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            raise ModelFolderError(f"{folder} has no model with {flag} {unknown[0]}; there is: {', '.join(known)}")
        wanted.append(list(given or known))
    by_parts = {model.parts: model for model in models}
    order = [(t, p, c) for t, c, p in itertools.product(wanted[0], wanted[2], wanted[1])]
    found = [by_parts[parts] for parts in order if parts in by_parts]
    if not found:
        listed = ", ".join(model.name for model in models)
        raise ModelFolderError(f"{folder} has no model with this trainer, plans and configuration; there is: {listed}")
    if trainers or plans or configurations:
        for parts in order:
            if parts not in by_parts:
                logger.info("not trained, so not compared: %s", "__".join(parts))
    return found


def find_best(
    dataset: int | str,
    plans: Sequence[str] | None = None,
    configurations: Sequence[str] | None = None,
    trainers: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    ensembles: bool = True,
    workers: int = 1,
    progress: bool = False,
) -> Selection:
    """Compare models, and ensembles of every two, by their cross-validation, and choose the best and its postprocessing.

    What is compared is the mean over classes of the mean Dice over cases; of equal ones the first wins, and single models
    come first. A class that is in no case has no Dice; then the mean of the others is compared, and a warning says so.

    Writes what nnU-Net does: ``crossval_results_folds_…`` into each model folder, ``ensembles/…`` and
    ``inference_information.json`` into the dataset's results, ``postprocessing.json`` (``.pkl``) where the best one's are.

    Args:
        dataset: id or name.
        plans: names to compare; None for all, as for the next two.
        configurations: of the plans.
        trainers: names, as model folders begin with them.
        folds: None: those that the models have.
        ensembles: whether to try ensembles, for which every model must have saved probabilities.
        workers: processes, one case each.
        progress: whether to draw progress bars on stderr.

    Raises:
        ModelFolderError: a model, or a fold of one, is missing.
        ConfigurationError: models have different labels, or number them differently; the dataset's references do.
        CaseError: models were validated on different cases; probabilities are missing; a file is bad.
    """
    name = find_dataset_name(dataset)
    models = find_models(name, plans, configurations, trainers)
    chosen = _folds_of(models, folds, name)
    _refuse_different(models, chosen, ensembles)
    _refuse_other_references(models, name)
    references = reference_folder(name)
    candidates = []
    for model in models:
        folder, summary = accumulate(model, chosen, references, workers=workers, progress=progress)
        candidates.append(Candidate(model.name, (model,), folder, summary, score_of(summary)))
    for pair in itertools.combinations(models, 2) if ensembles else ():
        title = "___".join(("ensemble", *(model.name for model in pair), folds_name(chosen)))
        folder = results_folder() / name / "ensembles" / title
        summary = ensemble_crossval(pair, chosen, references, folder, workers, progress)
        candidates.append(Candidate(title, pair, folder, summary, score_of(summary)))
    best = _best(candidates)
    decision = determine_postprocessing(
        best.folder, references, models[0].labels, models[0].description.file_ending, workers, progress
    )
    return Selection(name, tuple(chosen), tuple(models), tuple(candidates), best, ensembles, decision)


def _best(candidates: Sequence[Candidate]) -> Candidate:
    known = [candidate for candidate in candidates if not math.isnan(candidate.score)]
    if not known:
        raise CaseError("no class of dataset.json is in any case: there is nothing to choose by")
    return max(known, key=lambda candidate: candidate.score)  # the first of equal ones


def score_of(summary: Summary) -> float:
    """Mean Dice over the classes; over those that are in some case, if others are in none."""
    if not math.isnan(summary.foreground_mean_dice):
        return summary.foreground_mean_dice
    values = [metrics["Dice"] for metrics in summary.mean.values()]
    defined = [value for value in values if not math.isnan(value)]
    absent = [n for n, value in zip(summary.class_names, values, strict=True) if math.isnan(value)]
    logger.warning("in no case: %s; the other classes' mean is compared", ", ".join(absent))
    return sum(defined) / len(defined) if defined else math.nan


def _folds_of(models: Iterable[TrainedModel], given: Sequence[int] | None, dataset: str) -> list[int]:
    """The folds asked for, or all that any model has; every model must have them."""
    models = list(models)
    folds = list(dict.fromkeys(given)) if given else sorted({fold for model in models for fold in model.folds})
    if not folds:
        raise ModelFolderError(f"no model of {dataset} was validated: train folds 0 1 2 3 4 first")
    missing = [f"{model.name}: {fold}" for model in models for fold in folds if fold not in model.folds]
    if missing:
        raise ModelFolderError(
            f"folds that were not trained and validated: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; train "
            "them, or choose folds with -f, or models with -tr, -p and -c"
        )
    if len(folds) == 1:
        logger.warning("only fold %d is compared: a choice by one fold's few cases is uncertain", folds[0])
    return folds


def _refuse_different(models: Sequence[TrainedModel], folds: Sequence[int], ensembles: bool) -> None:
    """Find out in the beginning what would stop us in the end: other labels, other cases, no probabilities."""
    first = models[0]
    cases = _validated(first, folds)
    for model in models:
        if model.description.file_ending != first.description.file_ending:
            endings = f"{model.description.file_ending} and {first.description.file_ending}"
            raise ConfigurationError(f"{model.name} and {first.name} have other file endings, {endings}")
        order = order_of_heads(first.labels, first.name, model.labels, model.name)
        _refuse_renumbered(first.name, first.labels, model.name, model.labels, order)
        different = sorted(_validated(model, folds) ^ cases)
        if different:
            raise CaseError(
                f"{model.name} and {first.name} were not validated on the same cases ({', '.join(different[:5])}"
                f"{' …' if len(different) > 5 else ''} in only one of them): their results can't be compared"
            )
    if ensembles and len(models) > 1:
        for model, fold in itertools.product(models, folds):
            try:
                saved_probabilities(model.validation(fold))
            except CaseError as error:
                raise CaseError(f"{error}; or compare without ensembles: --disable_ensembling") from None


def _refuse_other_references(models: Sequence[TrainedModel], dataset: str) -> None:
    """Labels must be numbered as in the references, whose numbers dataset.json beside them gives."""
    known = description_of_references(dataset)
    if known is None:
        return
    path, labels = known
    for model in models:
        order = pair_labels(labels.head_names, model.labels.head_names)
        _refuse_renumbered(str(path), labels, model.name, model.labels, order)


def _refuse_renumbered(
    one: str, ours: LabelScheme, other: str, theirs: LabelScheme, order: Sequence[int | None]
) -> None:
    """Segmentations hold numbers: those of the same name must be equal. ``order``: for each of our outputs theirs."""
    for name, (entry, value), number in zip(ours.head_names, _written(ours), order, strict=True):
        if number is None:
            continue
        their_entry, their_value = _written(theirs)[number]
        if (entry, value) != (their_entry, their_value):
            raise ConfigurationError(
                f"{name} is label {entry} in {one} and {their_entry} in {other}: their segmentations can't be compared. "
                "Choose models with -tr, -p and -c; 'nnssl-adapt ensemble' averages such models by the names of their labels"
            )


def _written(labels: LabelScheme) -> list[tuple[LabelOrRegion, int]]:
    """For each output what it stands for, and the value that it is written as."""
    if labels.has_regions:
        return list(zip(labels.regions, labels.regions_class_order, strict=True))
    return [(value, value) for value in labels.all_labels]


def _validated(model: TrainedModel, folds: Sequence[int]) -> set[str]:
    ending = model.description.file_ending
    return {name for fold in folds for name in cases_in(model.validation(fold), ending)}


# -- what to do with it ------------------------------------------------------------------------------------------------


def information(selection: Selection) -> dict[str, object]:
    """What nnU-Net keeps in ``inference_information.json``, with its keys."""
    best = selection.best

    def named(model: TrainedModel, key: str) -> dict[str, str]:
        trainer, plans, configuration = model.parts
        return {key: plans, "configuration": configuration, "trainer": trainer}

    return {
        "folds": list(selection.folds),
        "dataset_name_or_id": selection.dataset,
        "considered_models": [named(model, "plans") for model in selection.models],
        "ensembling_allowed": selection.ensembles,
        "all_results": {candidate.name: candidate.score for candidate in selection.candidates},
        "best_model_or_ensemble": {
            "result_on_crossval_pre_pp": best.score,
            "result_on_crossval_post_pp": score_of(selection.decision.after),
            "postprocessing_file": str(best.folder / "postprocessing.pkl"),
            "some_plans_file": str(best.folder / "plans.json"),
            "selected_model_or_models": [named(model, "plans_identifier") for model in best.models],
        },
    }


def save_selection(selection: Selection, instructions: str) -> Path:
    """Write ``inference_information.json`` and ``inference_instructions.txt`` into the dataset's results; return them."""
    folder = results_folder() / selection.dataset
    write_json(folder / "inference_information.json", information(selection))
    write_text(folder / "inference_instructions.txt", instructions)
    return folder / "inference_information.json"
