"""How well predictions agree with reference labels: nnU-Net's numbers in nnU-Net's ``summary.json``."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import MAX_LISTED
from nnssl_adapt.data.endings import files_with
from nnssl_adapt.data.images import (
    ImageGeometry,
    distinct_values,
    geometry_doubts,
    geometry_problems,
    read_geometry,
    read_labels,
    reader_for,
)
from nnssl_adapt.data.labels import LabelOrRegion, LabelScheme
from nnssl_adapt.data.turning import turn_geometry
from nnssl_adapt.data.verifying.grids import grid_distance
from nnssl_adapt.errors import CaseError
from nnssl_adapt.evaluation.measures import Judging, add_measures
from nnssl_adapt.files import write_json
from nnssl_adapt.geometry.orientation import Turn, orientation_code
from nnssl_adapt.machine.workers import over_cases
from nnssl_adapt.text import and_more, lines_and_more, read_json

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
"""``Dice``, ``IoU``, ``TP``, ``FP``, ``FN``, ``TN``, ``n_pred``, ``n_ref``; all but the first two count voxels."""

METRICS = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")
"""nnU-Net's. :data:`nnssl_adapt.evaluation.measures.MEASURES` are ours beside them."""

_SAME_PLACE = 0.01
"""Voxels by which two grids may lie apart: rounding of headers."""

_BYTES_PER_VOXEL = 32
"""Two label maps, the pairs that meet (``np.bincount`` copies them to int64), and a class's masks."""


@dataclass(frozen=True)
class CaseMetrics:
    """One case's metrics.

    Attributes:
        reference_file, prediction_file: what was compared.
        metrics: an entry for each foreground label or region.
        elsewhere: how the prediction lies in another place than its reference, if it does; they were compared voxel by
            voxel anyway.
    """

    reference_file: str
    prediction_file: str
    metrics: dict[LabelOrRegion, Metrics]
    elsewhere: str | None = None


@dataclass(frozen=True)
class Summary:
    """Metrics of a folder of predictions.

    Attributes:
        cases: one entry a case.
        mean: label or region → metric → mean over the cases in which it is defined. Dice and IoU of a class that is
            in neither the reference nor the prediction are undefined (NaN), and left out.
        class_names: names of the labels or regions in ``mean``, in its order.
        judging: how more than nnU-Net's metrics were measured; None: those only.
    """

    cases: tuple[CaseMetrics, ...]
    mean: dict[LabelOrRegion, Metrics]
    class_names: tuple[str, ...]
    judging: Judging | None = None

    @property
    def metric_names(self) -> tuple[str, ...]:
        return METRICS if self.judging is None else (*METRICS, *self.judging.measures)

    @property
    def foreground_mean(self) -> Metrics:
        """Means over the classes of the means over cases; NaN if a class was in no case at all."""
        return {name: float(np.mean([metrics[name] for metrics in self.mean.values()])) for name in self.metric_names}

    @property
    def foreground_mean_dice(self) -> float:
        return self.foreground_mean["Dice"]

    def to_dict(self) -> dict[str, Any]:
        """The content of nnU-Net's ``summary.json``: labels and regions are text there, e.g. ``"1"`` and ``"(1, 2)"``.

        Further metrics stand beside nnU-Net's, which it passes over, and ``nnssl_adapt`` says how they were measured.
        """
        return {
            **({} if self.judging is None else {"nnssl_adapt": self._description()}),
            "foreground_mean": self.foreground_mean,
            "mean": {str(entry): dict(metrics) for entry, metrics in self.mean.items()},
            "metric_per_case": [
                {
                    "metrics": {str(entry): dict(metrics) for entry, metrics in case.metrics.items()},
                    "prediction_file": case.prediction_file,
                    "reference_file": case.reference_file,
                    **({} if case.elsewhere is None else {"geometry_differs": case.elsewhere}),
                }
                for case in self.cases
            ],
        }

    def _description(self) -> dict[str, Any]:
        assert self.judging is not None
        names = {str(entry): name for entry, name in zip(self.mean, self.class_names, strict=True)}
        return {**self.judging.describe(), "class_names": names}

    def save(self, path: str | Path) -> None:
        """Write ``summary.json``. Undefined numbers are written as NaN, as nnU-Net does and reads."""
        write_json(path, self.to_dict(), sort_keys=True)

    def __str__(self) -> str:
        lines = [f"{len(self.cases)} case(s), mean foreground Dice {self.foreground_mean_dice:.4f}"]
        width = max((len(name) for name in self.class_names), default=0)
        for name, metrics in zip(self.class_names, self.mean.values(), strict=True):
            lines.append(f"  {name:<{width}}  Dice {metrics['Dice']:.4f}  IoU {metrics['IoU']:.4f}")
        return "\n".join(lines)


def evaluate_folder(
    predictions: str | Path,
    references: str | Path,
    labels: LabelScheme,
    file_ending: str,
    cases: Sequence[str] | None = None,
    output: str | Path | None = None,
    workers: int = 1,
    judging: Judging | None = None,
    progress: bool = False,
) -> Summary:
    """Compare a folder of predictions with the reference labels of the same names.

    Args:
        predictions: folder with ``CASE<file_ending>``.
        references: folder with the same names.
        labels: which labels or regions to evaluate. Voxels that the reference leaves to ignore don't count.
        file_ending: e.g. ``.nii.gz``.
        cases: identifiers; None: every prediction there is.
        output: where to write ``summary.json``, if anywhere.
        workers: processes, one case each, and no more than fit into memory.
        judging: measure more than nnU-Net does, and refuse what it passes over (see :class:`Judging`).
        progress: whether to draw a progress bar on stderr.

    Raises:
        CaseError: there is nothing to compare; a file is missing or unreadable; a prediction and its reference have
            different shapes (every such case is listed). With ``judging`` also: different spacings, or labels that the
            scheme does not have.
    """
    predictions, references = Path(predictions), Path(references)
    identifiers = list(cases) if cases is not None else cases_in(predictions, file_ending)
    if not identifiers:
        raise CaseError(f"{predictions} has no predictions: expected names like CASE{file_ending}")
    ours, theirs = files_with(predictions, file_ending), files_with(references, file_ending)
    pairs = {
        name: (
            ours.get(name, predictions / f"{name}{file_ending}"),
            theirs.get(name, references / f"{name}{file_ending}"),
        )
        for name in identifiers
    }
    tasks = [(name, (*files, labels, judging)) for name, files in pairs.items()]
    memory = {name: _memory_for(files[0]) for name, files in pairs.items()} if workers > 1 else None
    outcomes = list(over_cases(evaluate_case, tasks, workers, "Evaluating", progress, memory))
    failed = [f"{outcome.identifier}: {outcome.complaint}" for outcome in outcomes if outcome.error is not None]
    if failed:
        listed = lines_and_more(sorted(failed), MAX_LISTED)
        raise CaseError(f"{len(failed)} of {len(tasks)} predictions can't be evaluated:\n{listed}")
    found = {outcome.identifier: outcome.value for outcome in outcomes}
    summary = summarize(tuple(found[name] for name in identifiers), labels, judging)
    if output is not None:
        summary.save(output)
    return summary


def _memory_for(file: Path) -> int:
    """Bytes that judging a case takes at most, by its header; 0 where there is none to read."""
    try:
        return _BYTES_PER_VOXEL * math.prod(read_geometry(file, reader_for([file])).size)
    except CaseError:
        return 0  # it is reported when its turn comes


def cases_in(folder: Path, file_ending: str) -> list[str]:
    """Identifiers of the label files in a folder, sorted; hidden files are passed over. Raises CaseError without one."""
    if not folder.is_dir():
        raise CaseError(f"{folder}: no such folder")
    return list(files_with(folder, file_ending))


def refuse_missing_predictions(predictions: str | Path, references: str | Path, file_ending: str) -> None:
    """Raise CaseError, naming cases, if not every reference has its prediction: a mean over the rest may flatter."""
    wanted, there = cases_in(Path(references), file_ending), set(cases_in(Path(predictions), file_ending))
    missing = [name for name in wanted if name not in there]
    if there and missing:
        raise CaseError(
            f"{predictions} lacks {len(missing)} of the {len(wanted)} cases in {references}: {and_more(missing)}; "
            "predict them, or evaluate only the others with --chill"
        )


def evaluate_case(
    prediction_file: Path, reference_file: Path, labels: LabelScheme, judging: Judging | None = None
) -> CaseMetrics:
    """Compare one prediction with its reference.

    A prediction that is stored in another order of axes, or reversed along some, is turned first, which is exact.
    Raises CaseError if a file is missing or unreadable, or their shapes differ (then it names both); with ``judging`` also
    if their spacings do, or a label is not of the scheme.
    """
    reference, reference_geometry, prediction, geometry = read_pair(reference_file, prediction_file)
    if prediction.shape != reference.shape:
        raise CaseError(
            f"{prediction_file} has shape {prediction.shape[1:]} (Z, Y, X), its reference {reference_file} has "
            f"{reference.shape[1:]}; are they of the same image?"
        )
    problems = list(geometry_problems(reference_geometry, geometry))
    if problems and judging is not None:
        raise CaseError(f"{prediction_file}: {problems[0]} from {reference_file}; are they of the same image?")
    elsewhere = _elsewhere(reference_geometry, geometry)
    if elsewhere is not None:
        logger.warning("%s: %s from %s", prediction_file, elsewhere, reference_file)
    if judging is not None:
        _refuse_strange_labels(prediction, labels.all_labels, prediction_file)
        _refuse_strange_labels(reference, labels.values_in_files, reference_file)
    metrics = compare_labels(prediction, reference, labels.foreground, labels.ignore_label)
    if judging is not None:
        add_measures(metrics, prediction[0], reference[0], reference_geometry.spacing, judging, labels.ignore_label)
    return CaseMetrics(str(reference_file), str(prediction_file), metrics, elsewhere)


def read_pair(
    reference_file: Path, prediction_file: Path
) -> tuple[np.ndarray, ImageGeometry, np.ndarray, ImageGeometry]:
    """Reference and prediction, int16 (1, Z, Y, X), each with its geometry; the prediction turned to lie as the reference.

    Raises CaseError if a file is missing or unreadable.
    """
    reader = reader_for((reference_file, prediction_file))
    reference, reference_geometry = read_labels(reference_file, reader)
    prediction, geometry = read_labels(prediction_file, reader)
    turn = Turn.to(orientation_code(reference_geometry.direction), geometry.direction)
    turned = np.ascontiguousarray(turn.apply(prediction))
    return reference, reference_geometry, turned, turn_geometry(geometry, turn)


def _elsewhere(reference: ImageGeometry, other: ImageGeometry) -> str | None:
    """How two grids of one shape differ by more than rounding, in words."""
    if grid_distance(reference, other) <= _SAME_PLACE:
        return None
    said = "; ".join((*geometry_problems(reference, other), *geometry_doubts(reference, other)))
    return said or "the place of its voxels differs"


def _refuse_strange_labels(labels: np.ndarray, known: Sequence[int], path: Path) -> None:
    strange = sorted(set(distinct_values(labels)) - set(known))
    if strange:
        raise CaseError(
            f"{path} has labels that dataset.json does not name: {', '.join(str(v) for v in strange[:10])} (expected "
            f"{', '.join(str(v) for v in known)})"
        )


def compare_labels(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Sequence[LabelOrRegion],
    ignore_label: int | None = None,
) -> dict[LabelOrRegion, Metrics]:
    """Metrics of each class, a label or a region (the labels it unites).

    Args:
        prediction: int16 of any shape.
        reference: int16 of the same shape.
        classes: what to evaluate.
        ignore_label: voxels with this reference label don't count, whatever was predicted.
    """
    in_reference, in_prediction = distinct_values(reference), distinct_values(prediction)
    together = _count_pairs(reference, prediction, in_reference, in_prediction)
    if ignore_label is not None:
        together[[value == ignore_label for value in in_reference]] = 0
    result = {}
    for entry in classes:
        values = entry if isinstance(entry, tuple) else (entry,)
        rows, columns = np.isin(in_reference, values), np.isin(in_prediction, values)
        result[entry] = _metrics(
            tp=int(together[np.ix_(rows, columns)].sum()),
            fp=int(together[np.ix_(~rows, columns)].sum()),
            fn=int(together[np.ix_(rows, ~columns)].sum()),
            tn=int(together[np.ix_(~rows, ~columns)].sum()),
        )
    return result


def _count_pairs(
    reference: np.ndarray, prediction: np.ndarray, in_reference: Sequence[int], in_prediction: Sequence[int]
) -> np.ndarray:
    """How often each pair of values meets: int64 (values in the reference, values in the prediction).

    One pass over the voxels serves all classes; comparing class by class takes several passes for each.
    """
    rows, columns = (
        _ranks(array, values) for array, values in ((reference, in_reference), (prediction, in_prediction))
    )
    pairs = rows * np.int32(len(in_prediction)) + columns
    counts = np.bincount(pairs.reshape(-1), minlength=len(in_reference) * len(in_prediction))
    return counts.reshape(len(in_reference), len(in_prediction))


def _ranks(array: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Each voxel's place in ``values``, int32."""
    table = np.zeros(1 << 16, np.int32)
    table[np.asarray(values, np.int16).view(np.uint16)] = np.arange(len(values))
    return table[array.astype(np.int16, copy=False).view(np.uint16)]


def _metrics(tp: int, fp: int, fn: int, tn: int) -> Metrics:
    nothing = tp + fp + fn == 0
    return {
        "Dice": float("nan") if nothing else 2 * tp / (2 * tp + fp + fn),
        "IoU": float("nan") if nothing else tp / (tp + fp + fn),
        "FP": fp,
        "TP": tp,
        "FN": fn,
        "TN": tn,
        "n_pred": fp + tp,
        "n_ref": fn + tp,
    }


def summarize(cases: tuple[CaseMetrics, ...], labels: LabelScheme, judging: Judging | None = None) -> Summary:
    """Means over cases, each over those for which the number is defined."""
    wanted = METRICS if judging is None else (*METRICS, *judging.measures)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN is what we want for a class that is in no case
        mean = {
            entry: {name: float(np.nanmean([case.metrics[entry][name] for case in cases])) for name in wanted}
            for entry in labels.foreground
        }
    names = dict(zip(labels.foreground, labels.class_names, strict=True))  # one value may have several names
    return Summary(cases, mean, tuple(names.values()), judging)


def load_summary(path: str | Path) -> dict[str, Any]:
    """Read a ``summary.json``, ours or nnU-Net's, as it is. Raises CaseError if it is none."""
    content: dict[str, Any] = read_json(path, CaseError, "summary.json")
    if not {"mean", "metric_per_case", "foreground_mean"} <= content.keys():
        raise CaseError(
            f"{path} is no summary.json of nnU-Net: mean, metric_per_case or foreground_mean is missing", path=path
        )
    cases = content["metric_per_case"]
    wrong = [key for key in ("mean", "foreground_mean") if not isinstance(content[key], dict)]
    wrong += [
        f"mean[{key!r}]" for key, numbers in (content["mean"] if not wrong else {}).items() if not _is_numbers(numbers)
    ]
    if not isinstance(cases, list):
        wrong.append("metric_per_case")
    else:
        wrong += [f"metric_per_case[{index}]" for index, case in enumerate(cases) if not _is_case(case)]
    if wrong:
        raise CaseError(
            f"{path} is no summary.json of nnU-Net: {and_more(wrong)} is not as nnU-Net writes it", path=path
        )
    return content


def _is_case(case: Any) -> bool:
    if not isinstance(case, dict) or not isinstance(metrics := case.get("metrics"), dict):
        return False
    files = all(isinstance(case.get(key), str) for key in ("prediction_file", "reference_file"))
    return files and all(_is_numbers(numbers) for numbers in metrics.values())


def _is_numbers(entry: Any) -> bool:
    """Whether this is metric → number (NaN where it is not defined)."""
    if not isinstance(entry, dict) or "Dice" not in entry:
        return False
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in entry.values())
