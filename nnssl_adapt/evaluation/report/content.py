"""What the files of a trained model folder say, gathered for a report. Whatever is missing is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.data.endings import stem_of
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import CaseError, NnsslAdaptError
from nnssl_adapt.evaluation.metrics import load_summary
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.text import read_record
from nnssl_adapt.weights.transfer.report import TransferReport

NOT_KNOWN = "–"


@dataclass(frozen=True)
class CaseResult:
    """One validation case.

    Attributes:
        name: its identifier.
        fold: where it was validated.
        metrics: class name → nnU-Net's metrics; Dice is NaN where a class is in neither reference nor prediction.
        reference, prediction: label files, as they were when they were evaluated.
    """

    name: str
    fold: str
    metrics: dict[str, Mapping[str, float]]
    reference: Path
    prediction: Path

    @property
    def mean_dice(self) -> float:
        """Over the classes that it is defined for; NaN if there are none."""
        return mean(metrics["Dice"] for metrics in self.metrics.values())


@dataclass(frozen=True)
class FoldResult:
    """One fold's files.

    Attributes:
        name: ``0``, …, ``all``.
        folder: of the fold.
        debug: what was run, with which versions, where (``debug.json``); empty where there is none of ours.
        epochs: one entry an epoch (``metrics.jsonl``).
        transfer: what became of every tensor.
        cases: its validation.
        progress: ``progress.png``.
    """

    name: str
    folder: Path
    debug: dict[str, Any]
    epochs: list[dict[str, Any]]
    transfer: TransferReport | None
    cases: tuple[CaseResult, ...]
    progress: bytes | None

    @property
    def hours(self) -> float:
        """That its epochs took."""
        seconds = (epoch.get("seconds") for epoch in self.epochs)
        known = (float(s) for s in seconds if isinstance(s, (int, float)) and abs(s) < 1e9)
        return sum(known) / 3600


def gather_folds(model: ModelFolder) -> list[FoldResult]:
    """The trained folds of a model folder, ours or nnU-Net's, in order."""
    return [_fold(model.path / f"fold_{fold}", str(fold), model.labels, model.file_ending) for fold in model.folds]


def _fold(folder: Path, name: str, labels: LabelScheme, ending: str) -> FoldResult:
    debug = read_record(folder / "debug.json")
    try:
        transfer = TransferReport.load(folder / "transfer_report.json")
    except NnsslAdaptError:
        transfer = None
    picture = folder / "progress.png"
    return FoldResult(
        name=name,
        folder=folder,
        debug=debug if "nnssl_adapt" in debug else {},  # nnU-Net's own has other entries
        epochs=_epochs(folder / "metrics.jsonl"),
        transfer=transfer,
        cases=tuple(_cases(folder, name, labels, ending)),
        progress=picture.read_bytes() if picture.is_file() else None,
    )


def _cases(folder: Path, fold: str, labels: LabelScheme, ending: str) -> Iterable[CaseResult]:
    try:
        summary = load_summary(folder / "validation" / "summary.json")
    except CaseError:
        return
    names = {str(entry): name for entry, name in zip(labels.foreground, labels.class_names, strict=True)}
    for case in summary["metric_per_case"]:
        prediction = Path(case["prediction_file"])
        moved = folder / "validation" / prediction.name  # the folder may have been carried to another machine
        yield CaseResult(
            name=stem_of(prediction.name, ending) or prediction.name,
            fold=fold,
            metrics=_by_name(case["metrics"], names),
            reference=Path(case["reference_file"]),
            prediction=moved if moved.is_file() else prediction,
        )


def _by_name(metrics: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Mapping[str, float]]:
    """In the order of the classes: JSON keeps label 10 before label 2. What is no class of the model comes last."""
    ordered = [*(entry for entry in names if entry in metrics), *(entry for entry in metrics if entry not in names)]
    return {names.get(entry, entry): metrics[entry] for entry in ordered}


def mean(values: Iterable[float]) -> float:
    """Of the values that are defined; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def deviation(values: Iterable[float]) -> float:
    """Standard deviation (of a sample) of the values that are defined; NaN for fewer than two."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        return math.nan
    centre = sum(known) / len(known)
    return math.sqrt(sum((value - centre) ** 2 for value in known) / (len(known) - 1))


def number(value: float) -> str:
    """Three digits after the point; a dash for what is not known."""
    return NOT_KNOWN if math.isnan(value) else f"{value:.3f}"


def worst_first(cases: Iterable[CaseResult]) -> list[CaseResult]:
    """By mean Dice, then by name; cases without a value come last."""
    return sorted(cases, key=lambda case: (math.inf if math.isnan(case.mean_dice) else case.mean_dice, case.name))


def worst_median_best(cases: Iterable[CaseResult]) -> list[tuple[str, CaseResult]]:
    """Up to three different cases by their mean Dice, each with what it is."""
    ranked = worst_first(c for c in cases if not math.isnan(c.mean_dice))
    if not ranked:
        return []
    chosen = {"worst": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "best": ranked[-1]}
    shown: dict[str, tuple[str, CaseResult]] = {}
    for what in ("worst", "best", "median"):
        shown.setdefault(chosen[what].name, (what, chosen[what]))
    return sorted(shown.values(), key=lambda entry: entry[1].mean_dice)


def _epochs(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError):
        return []
    return [line for line in lines if isinstance(line, dict)]
