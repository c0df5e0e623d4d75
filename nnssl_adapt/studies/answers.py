"""What a study's finished runs say: a cell for each arm and fraction, with its difference to the reference arm."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import CaseError, ConfigurationError
from nnssl_adapt.evaluation.metrics import evaluate_folder, load_summary
from nnssl_adapt.files import write_json
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.studies.runs import StudyRun
from nnssl_adapt.studies.spec import StudySpec
from nnssl_adapt.studies.statistics import Estimate, PairedDifference, estimate, paired, with_holm

COLUMNS = (
    "metric",
    "arm",
    "fraction",
    "training_cases",
    "runs_done",
    "runs",
    "cases",
    "seeds",
    "mean",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "p_holm",
    "within_noise",
    "gpu_hours",
)


@dataclass(frozen=True)
class Cell:
    """One arm at one fraction, in one metric.

    Attributes:
        metric, arm, fraction: which.
        training_cases: mean number over the folds.
        done, runs: finished runs, and all that there will be.
        value: mean over validation cases and seeds; a case's value is its mean over the classes.
        difference: to the reference arm at the same fraction; None for that arm itself, or without pairs.
        hours: of training, all runs together.
    """

    metric: str
    arm: str
    fraction: float
    training_cases: float
    done: int
    runs: int
    value: Estimate
    difference: PairedDifference | None
    hours: float

    def row(self) -> dict[str, Any]:
        """Plain values under :data:`COLUMNS`; NaN where something is not known."""
        difference = self.difference
        gap = difference.estimate if difference is not None else None
        values = (
            self.metric,
            self.arm,
            self.fraction,
            self.training_cases,
            self.done,
            self.runs,
            self.value.cases,
            self.value.seeds,
            self.value.mean,
            self.value.low,
            self.value.high,
            math.nan if gap is None else gap.mean,
            math.nan if gap is None else gap.low,
            math.nan if gap is None else gap.high,
            math.nan if difference is None else difference.p,
            math.nan if difference is None else difference.p_holm,
            "" if difference is None else difference.within_noise,
            self.hours,
        )
        return dict(zip(COLUMNS, values, strict=True))


def answers(study: StudySpec, runs: Sequence[StudyRun], training_cases: Mapping[float, float]) -> list[Cell]:
    """The cells of a study, metric by metric, small fractions first; unfinished runs are left out and counted.

    Args:
        study: with its metrics.
        runs: all of them.
        training_cases: mean number of a fold's training cases, by fraction.

    Raises ConfigurationError: a class that the study names is not in the dataset; CaseError: a summary can't be read.
    """
    summaries = {run.key: _judged(study, run) for run in runs if run.is_done}
    hours = {run.key: hours_of(run) for run in runs}
    cells: list[Cell] = []
    for metric in study.metrics:
        table: list[Cell] = []
        for fraction in study.fractions:
            found = {arm.name: _values(study, runs, summaries, arm.name, fraction, metric) for arm in study.arms}
            for arm in study.arms:
                mine = [run for run in runs if (run.arm, run.fraction) == (arm.name, fraction)]
                pairs = found[arm.name].keys() & found[study.reference].keys()
                compared = arm.name != study.reference and pairs
                table.append(
                    Cell(
                        metric=metric,
                        arm=arm.name,
                        fraction=fraction,
                        training_cases=training_cases[fraction],
                        done=sum(run.key in summaries for run in mine),
                        runs=len(mine),
                        value=estimate(found[arm.name]),
                        difference=paired(found[arm.name], found[study.reference]) if compared else None,
                        hours=sum(hours[run.key] for run in mine),
                    )
                )
        cells += _corrected(table)
    return cells


def _corrected(cells: Sequence[Cell]) -> list[Cell]:
    """Holm's correction over all differences of a metric."""
    known = [cell.difference for cell in cells if cell.difference is not None]
    corrected = iter(with_holm(known))
    return [
        cell if cell.difference is None else Cell(**{**vars(cell), "difference": next(corrected)}) for cell in cells
    ]


def _values(
    study: StudySpec,
    runs: Sequence[StudyRun],
    summaries: Mapping[str, dict[str, Any]],
    arm: str,
    fraction: float,
    metric: str,
) -> dict[tuple[int, str], float]:
    """(seed, case) → mean over the classes that have a value."""
    values = {}
    for run in runs:
        if (run.arm, run.fraction) != (arm, fraction) or run.key not in summaries:
            continue
        for case, classes in _cases(summaries[run.key], _file_ending(run)):
            chosen = [entry[metric] for name, entry in classes.items() if not study.classes or name in study.classes]
            known = [abs(value) if "Volume" in metric else value for value in chosen if not math.isnan(value)]
            values[run.seed, case] = float(np.mean(known)) if known else math.nan
    return values


def _cases(summary: Mapping[str, Any], ending: str) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    names = summary["nnssl_adapt"]["class_names"]
    for case in summary["metric_per_case"]:
        identifier = Path(str(case["prediction_file"])).name.removesuffix(ending)
        yield identifier, {names[entry]: metrics for entry, metrics in case["metrics"].items()}


def _file_ending(run: StudyRun) -> str:
    return DatasetJson.load(run.fold_folder.parent / "dataset.json").file_ending


def _judged(study: StudySpec, run: StudyRun) -> dict[str, Any]:
    """A run's summary by the study's rule; made once, and kept beside nnU-Net's."""
    folder = run.fold_folder
    path = folder / "validation" / "summary_study.json"
    rule = study.judging.describe()
    if path.is_file():
        content = load_summary(path)
        if {key: content["nnssl_adapt"].get(key) for key in rule} == json.loads(json.dumps(rule)):
            return content
    description = DatasetJson.load(folder.parent / "dataset.json")
    labels = LabelScheme.from_dataset_json(description.raw, folder.parent / "dataset.json")
    unknown = [name for name in study.classes if name not in labels.class_names]
    if unknown:
        raise ConfigurationError(f"classes: no {', '.join(unknown)}: the dataset has {', '.join(labels.class_names)}")
    references = preprocessed_folder() / run.dataset_name / "gt_segmentations"
    summary = evaluate_folder(
        folder / "validation", references, labels, description.file_ending, output=path, judging=study.judging
    )
    return json.loads(json.dumps(summary.to_dict()))  # type: ignore[no-any-return]


def hours_of(run: StudyRun) -> float:
    """Hours that the epochs took so far; 0 before the first one."""
    path = run.fold_folder / "metrics.jsonl"
    if not path.is_file():
        return 0.0
    try:
        epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return sum(float(epoch["seconds"]) for epoch in epochs) / 3600
    except (ValueError, KeyError, TypeError) as error:
        raise CaseError(f"{path} can't be read: {error}", path=path) from error


def save_cells(cells: Sequence[Cell], folder: Path) -> None:
    """Write ``study.csv`` and ``study.json``."""
    from nnssl_adapt.evaluation.tables import write_csv

    rows = [cell.row() for cell in cells]
    write_csv(folder / "study.csv", COLUMNS, ([row[name] for name in COLUMNS] for row in rows))
    write_json(folder / "study.json", rows)
