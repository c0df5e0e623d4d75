"""Which postprocessing helps: decided on cross-validation's predictions by nnU-Net's rule.

First the largest component of the whole foreground, taken if the mean Dice rises and no class's falls; then, on top of
that, of each class or region in turn, taken if its own Dice rises.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.data.endings import files_with
from nnssl_adapt.data.labels import LabelOrRegion, LabelScheme
from nnssl_adapt.errors import CaseError
from nnssl_adapt.evaluation.metrics import CaseMetrics, Summary, cases_in, compare_labels, read_pair, summarize
from nnssl_adapt.files import atomic_path
from nnssl_adapt.inference.postprocess import Postprocessing, memory_of, postprocess_folder
from nnssl_adapt.machine.workers import over_cases

logger = logging.getLogger(__name__)

POSTPROCESSED = "postprocessed"
FILE = "postprocessing.json"

_BYTES_PER_VOXEL = 48


@dataclass(frozen=True)
class Decision:
    """What helps.

    Attributes:
        postprocessing: the steps taken; maybe none.
        before: how good the predictions are as they are.
        after: with the steps.
    """

    postprocessing: Postprocessing
    before: Summary
    after: Summary


@dataclass(frozen=True)
class _Folder:
    """Predictions, references, and how to go over them."""

    predictions: Path
    references: Path
    labels: LabelScheme
    file_ending: str
    workers: int
    progress: bool

    def judge(self, candidates: Sequence[Postprocessing]) -> list[Summary]:
        """One summary for each candidate; every file is read once."""
        names = cases_in(self.predictions, self.file_ending)
        predictions, references = (files_with(f, self.file_ending) for f in (self.predictions, self.references))
        tasks = [
            (
                name,
                (
                    predictions[name],
                    references.get(name, self.references / f"{name}{self.file_ending}"),
                    self.labels,
                    tuple(candidates),
                ),
            )
            for name in names
        ]
        memory = {name: memory_of(files[0], _BYTES_PER_VOXEL) for name, files in tasks} if self.workers > 1 else None
        outcomes = list(over_cases(judge_candidates, tasks, self.workers, "Trying", self.progress, memory))
        for outcome in outcomes:
            if outcome.error is not None:
                raise CaseError(f"{outcome.identifier}: {outcome.complaint}") from outcome.error
        found = {outcome.identifier: outcome.value for outcome in outcomes}
        return [summarize(tuple(found[name][i] for name in names), self.labels) for i in range(len(candidates))]


def judge_candidates(
    prediction_file: Path, reference_file: Path, labels: LabelScheme, candidates: Sequence[Postprocessing]
) -> list[CaseMetrics]:
    """Metrics of one case after each candidate."""
    reference, _, prediction, _ = read_pair(reference_file, prediction_file)
    if prediction.shape != reference.shape:
        raise CaseError(f"{prediction_file} and {reference_file} have different shapes")
    return [
        CaseMetrics(
            str(reference_file),
            str(prediction_file),
            compare_labels(candidate.apply(prediction[0]), reference[0], labels.foreground, labels.ignore_label),
        )
        for candidate in candidates
    ]


def determine_postprocessing(
    predictions: str | Path,
    references: str | Path,
    labels: LabelScheme,
    file_ending: str,
    workers: int = 1,
    progress: bool = False,
) -> Decision:
    """Find out which postprocessing improves the Dice of a folder of predictions.

    Writes, as nnU-Net does, ``postprocessing.json`` and ``.pkl`` into the folder and the processed predictions with their
    ``summary.json`` into ``postprocessed`` in it.

    Args:
        predictions: folder of cross-validation's predictions, best of all training cases.
        references: folder of the labels.
        labels: what they mean.
        file_ending: of both.
        workers: processes, one case each.
        progress: whether to draw progress bars on stderr.

    Raises:
        CaseError: there is nothing to evaluate, or a file is bad.
    """
    predictions, references = Path(predictions), Path(references)
    if not cases_in(predictions, file_ending):
        raise CaseError(f"{predictions} has no predictions: expected names like CASE{file_ending}")
    folder = _Folder(predictions, references, labels, file_ending, workers, progress)
    chosen = Postprocessing()
    everything = chosen.then(labels.foreground_labels)
    before, whole = folder.judge([chosen, everything])
    after = before
    if _helps_all(before, whole):
        chosen, after = everything, whole
        _tell("the whole foreground", before.foreground_mean_dice, whole.foreground_mean_dice)
    for group in _independent(labels):
        chosen, after = _try_classes(folder, group, chosen, after)
    decision = Decision(chosen, before, after)
    _write(decision, folder)
    return decision


def _independent(labels: LabelScheme) -> list[Sequence[LabelOrRegion]]:
    """Classes that can be tried in one go: labels don't touch each other, regions overlap and come one after the other.

    A single class is the foreground, which was tried.
    """
    if len(labels.foreground) < 2:
        return []
    return [[entry] for entry in labels.foreground] if labels.has_regions else [labels.foreground]


def _try_classes(
    folder: _Folder, classes: Sequence[LabelOrRegion], chosen: Postprocessing, current: Summary
) -> tuple[Postprocessing, Summary]:
    """Add a step for each of the classes whose own Dice rises with it."""
    values = {entry: entry if isinstance(entry, tuple) else (entry,) for entry in classes}
    tried = dict(zip(classes, folder.judge([chosen.then(values[entry]) for entry in classes]), strict=True))
    helpful = [entry for entry in classes if tried[entry].mean[entry]["Dice"] > current.mean[entry]["Dice"]]
    for entry in helpful:
        chosen = chosen.then(values[entry])
        _tell(f"class {entry}", current.mean[entry]["Dice"], tried[entry].mean[entry]["Dice"])
    if len(helpful) == 1:
        return chosen, tried[helpful[0]]
    return chosen, folder.judge([chosen])[0] if helpful else current


def _helps_all(before: Summary, after: Summary) -> bool:
    """Whether the mean rises and no class falls; comparisons with undefined means (NaN) are false, as nnU-Net's are."""
    worse = any(after.mean[entry]["Dice"] < before.mean[entry]["Dice"] for entry in after.mean)
    return after.foreground_mean_dice > before.foreground_mean_dice and not worse


def _tell(what: str, before: float, after: float) -> None:
    logger.info("keeping only the largest component of %s: Dice %.5f -> %.5f", what, before, after)


def _write(decision: Decision, folder: _Folder) -> None:
    target = folder.predictions / POSTPROCESSED
    files = postprocess_folder(
        folder.predictions, target, decision.postprocessing, folder.file_ending, folder.workers, folder.progress
    )
    moved = {str(folder.predictions / file.name): str(file) for file in files}
    cases = tuple(
        CaseMetrics(case.reference_file, moved[case.prediction_file], case.metrics) for case in decision.after.cases
    )
    Summary(cases, decision.after.mean, decision.after.class_names).save(target / "summary.json")
    results: dict[str, Any] = {}
    for name, summary in (("input_folder", decision.before), ("postprocessed", decision.after)):
        content = summary.to_dict()
        results[name] = {key: content[key] for key in ("foreground_mean", "mean")}
    decision.postprocessing.save(folder.predictions / FILE, results)
    # Files of cases that are no longer predicted would be taken for results.
    for path in target.glob(f"*{folder.file_ending}"):
        if path not in files:
            path.unlink()
    with atomic_path(target / FILE) as temporary:
        temporary.write_bytes((folder.predictions / FILE).read_bytes())
