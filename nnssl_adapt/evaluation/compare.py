"""Whether one model is better than another: differences case by case, with their uncertainty.

For each class the mean difference over the cases that both have, its 95% confidence interval (percentile bootstrap over
cases, seeded) and Wilcoxon's signed-rank test, corrected over the classes by Holm.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.data.endings import stem_of
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import CaseError, ConfigurationError
from nnssl_adapt.evaluation.metrics import load_summary

logger = logging.getLogger(__name__)

ALL = "all classes"
LOWER_IS_BETTER = ("HD95", "ASSD", "VolumeError", "RelativeVolumeError")
LESIONS = ("LesionF1", "LesionSensitivity", "LesionPPV", "LesionDice", "LesionwiseDice")
COMPARABLE = ("Dice", "IoU", "Precision", "Recall", "NSD", *LESIONS, *LOWER_IS_BETTER)

_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
_RESAMPLES = 10_000
_ENOUGH = 5
_AT_ONCE = 1 << 22
"""Drawn case numbers that are in memory together."""

CaseValues = dict[str, dict[str, float]]
"""Case → class → value."""


@dataclass(frozen=True)
class Results:
    """One model's results.

    Attributes:
        name: what it is called in tables.
        values: case → class → the metric; volume errors without their sign.
        voxels: case → class → voxels of the reference, by which references are known to be the same.
        rule: how the metric was measured, as far as that can be chosen: what an empty class counts, and NSD's tolerance.
    """

    name: str
    values: CaseValues
    voxels: CaseValues
    rule: str = ""


@dataclass(frozen=True)
class Difference:
    """One class.

    Attributes:
        name: of the class, or ``all classes``: every case's mean over the classes that both results have a value for.
        cases: how many have a value in both.
        first: mean of the first results over these.
        second: of the second.
        mean: of the differences, second minus first.
        low, high: 95% confidence interval of it; NaN for fewer than five cases.
        p: of Wilcoxon's signed-rank test, two-sided; 1 where nothing differs, NaN for fewer than two cases.
        p_holm: corrected for the number of classes; ``all classes`` is one question of its own and is not corrected.
        better: cases in which the second is better.
        worse: in which it is worse.
    """

    name: str
    cases: int
    first: float
    second: float
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    better: int
    worse: int


@dataclass(frozen=True)
class Comparison:
    """Second results against first ones.

    Attributes:
        first, second: their names.
        metric: what is compared.
        differences: ``all classes``, then each class.
        per_case: class → case → difference.
        only_first, only_second: cases left out, since the other lacks them.
        one_sided: class → cases left out since only one of the two has a value, for instance a distance to a class that
            the other missed.
    """

    first: str
    second: str
    metric: str
    differences: tuple[Difference, ...]
    per_case: dict[str, dict[str, float]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    one_sided: dict[str, tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)


def load_results(path: str | Path, metric: str = "Dice", name: str | None = None) -> Results:
    """Read a ``summary.json``, ours or nnU-Net's; or those that lie in a folder.

    Of a model folder only the validated folds count; :func:`compare` leaves out what the other does not have.

    Args:
        path: the file; a folder with it; a fold's folder; or a model folder, whose validated folds are taken together.
        metric: one of :data:`COMPARABLE`.
        name: for tables; None: the path.

    Raises:
        ConfigurationError: no such metric.
        CaseError: there is no summary, it lacks the metric, a case is in two folds, or folds were evaluated differently.
    """
    if metric not in COMPARABLE:
        raise ConfigurationError(f"metric {metric!r}: expected one of {', '.join(COMPARABLE)}")
    values: CaseValues = {}
    voxels: CaseValues = {}
    rule = None
    for file in _summaries(Path(path)):
        content = load_summary(file)
        names = _class_names(content, file)
        if rule not in (None, _rule(content, metric)):
            raise CaseError(
                f"{path}: folds were evaluated differently ({rule}; {_rule(content, metric)}): evaluate them again"
            )
        rule = _rule(content, metric)
        for case in content["metric_per_case"]:
            identifier = _identifier(str(case["prediction_file"]))
            if identifier in values:
                raise CaseError(f"{path}: {identifier} is in two summaries: choose one of the folds")
            classes = {names.get(entry, entry): metrics for entry, metrics in case["metrics"].items()}
            if any(metric not in metrics for metrics in classes.values()):
                flag = " --lesions" if metric in LESIONS else ""
                command = f"nnssl-adapt evaluate -p {file.parent} -g LABELS{flag}"
                raise CaseError(f"{file} has no {metric}: run {command}", path=file, next_command=command)
            sign = abs if metric in ("VolumeError", "RelativeVolumeError") else float
            values[identifier] = {entry: float(sign(metrics[metric])) for entry, metrics in classes.items()}
            voxels[identifier] = {entry: metrics.get("n_ref", math.nan) for entry, metrics in classes.items()}
    return Results(name or str(path), values, voxels, rule or "")


def _rule(content: Mapping[str, Any], metric: str) -> str:
    """How the metric was measured, in words. nnU-Net's own summaries know one rule."""
    own = content.get("nnssl_adapt")
    own = own if isinstance(own, dict) else {}
    rule = f"empty classes: {own.get('empty', 'nan')}"
    if metric == "NSD" and "tolerance_mm" in own:
        tolerance = own["tolerance_mm"]
        shown = f"{tolerance:g}" if isinstance(tolerance, (int, float)) else str(tolerance)
        rule += f", tolerance {shown} mm, by {own.get('surface', 'voxels')}"
    lesions = own.get("lesions")
    if metric in LESIONS and isinstance(lesions, dict):
        rule += f", {lesions.get('means')}"
    return rule


def _summaries(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for places in ("summary.json", "validation/summary.json", "fold_*/validation/summary.json"):
        found = sorted(path.glob(places))
        numbered = [file for file in found if "fold_all" not in file.parts]
        if found:
            return numbered or found
    if not path.exists():
        raise CaseError(f"{path}: no such file or folder")
    if (path / "plans.json").is_file() or any(path.glob("fold_*")):
        raise CaseError(f"{path}: no fold of this model has been validated (no fold_*/validation/summary.json)")
    raise CaseError(f"{path} has no summary.json: make it with nnssl-adapt evaluate -p {path} -g LABELS")


def _class_names(content: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Label or region as text → its name, from the summary or from a dataset.json near it."""
    own = content.get("nnssl_adapt")
    if isinstance(own, dict) and isinstance(own.get("class_names"), dict):
        return {str(entry): str(name) for entry, name in own["class_names"].items()}
    for folder in (file.parent, *file.resolve().parents[1:4]):
        path = folder / "dataset.json"
        if path.is_file():
            labels = LabelScheme.from_dataset_json(DatasetJson.load(path).raw, path)
            return {str(entry): name for entry, name in zip(labels.foreground, labels.class_names, strict=True)}
    return {}


def _identifier(prediction_file: str) -> str:
    name = prediction_file.replace("\\", "/").rsplit("/", 1)[-1]
    return next((stem for ending in _ENDINGS if (stem := stem_of(name, ending)) is not None), name)


def compare(first: Results, second: Results, metric: str = "Dice", seed: int = 0) -> Comparison:
    """Compare two models on the cases that both were evaluated on.

    Args:
        first: the baseline.
        second: what is held against it.
        metric: that the results were read with.
        seed: of the bootstrap; the same seed gives the same intervals.

    Raises:
        CaseError: no case in common, no class in common, or evaluated by different rules or against different labels.
    """
    if first.rule != second.rule:
        raise CaseError(
            f"{first.name} and {second.name} were evaluated by different rules ({first.rule}; {second.rule}): "
            "evaluate both again with the same options"
        )
    common = sorted(first.values.keys() & second.values.keys())
    if not common:
        shown = (next(iter(sorted(results.values)), "none") for results in (first, second))
        raise CaseError(f"{first.name} and {second.name} have no case in common (e.g. {' and '.join(shown)})")
    classes = _common_classes(first, second, common)
    per_case: dict[str, dict[str, float]] = {ALL: {}} if len(classes) > 1 else {}
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in (*per_case, *classes)}
    one_sided: dict[str, tuple[str, ...]] = {}
    for case in common:
        _refuse_other_reference(first, second, case, classes)
        both = {name: (first.values[case][name], second.values[case][name]) for name in classes}
        known = {name: pair for name, pair in both.items() if not any(math.isnan(value) for value in pair)}
        if known and len(classes) > 1:
            known[ALL] = tuple(np.mean(list(known.values()), axis=0).tolist())
        for name, pair in both.items():
            if math.isnan(pair[0]) != math.isnan(pair[1]):
                one_sided[name] = (*one_sided.get(name, ()), case)
        for name, (a, b) in known.items():
            pairs[name].append((a, b))
            per_case.setdefault(name, {})[case] = b - a
    lower = metric in LOWER_IS_BETTER
    found = [_difference(name, np.asarray(values).reshape(-1, 2), lower, seed) for name, values in pairs.items()]
    return Comparison(
        first=first.name,
        second=second.name,
        metric=metric,
        differences=tuple(_corrected(found)),
        per_case=per_case,
        only_first=tuple(sorted(first.values.keys() - second.values.keys())),
        only_second=tuple(sorted(second.values.keys() - first.values.keys())),
        one_sided=one_sided,
    )


def _common_classes(first: Results, second: Results, cases: Sequence[str]) -> list[str]:
    ours, theirs = ({name: None for case in cases for name in r.values[case]} for r in (first, second))
    common = [name for name in ours if name in theirs]
    if not common:
        raise CaseError(
            f"no class in common: {first.name} has {', '.join(ours)}; {second.name} has {', '.join(theirs)}"
        )
    for results, names in ((first, ours), (second, theirs)):
        only = [name for name in names if name not in common]
        if only:
            logger.warning("only %s has %s: left out", results.name, ", ".join(only))
    return common


def _refuse_other_reference(first: Results, second: Results, case: str, classes: Sequence[str]) -> None:
    for name in classes:
        a, b = first.voxels[case][name], second.voxels[case][name]
        if a != b and not (math.isnan(a) or math.isnan(b)):
            raise CaseError(
                f"{case} was evaluated against different labels: {name} has {a:g} voxels in {first.name}'s reference and "
                f"{b:g} in {second.name}'s; evaluate both again with the same labels"
            )


def _difference(name: str, pairs: np.ndarray, lower_is_better: bool, seed: int) -> Difference:
    """``pairs``: float64 (cases, 2)."""
    if len(pairs) == 0:
        unknown = math.nan
        return Difference(name, 0, unknown, unknown, unknown, unknown, unknown, unknown, unknown, 0, 0)
    differences = pairs[:, 1] - pairs[:, 0]
    gains = -differences if lower_is_better else differences
    low, high = bootstrap_interval(differences, seed)
    return Difference(
        name=name,
        cases=len(pairs),
        first=float(pairs[:, 0].mean()),
        second=float(pairs[:, 1].mean()),
        mean=float(differences.mean()),
        low=low,
        high=high,
        p=signed_rank_p(differences),
        p_holm=math.nan,
        better=int((gains > 0).sum()),
        worse=int((gains < 0).sum()),
    )


def bootstrap_interval(values: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean: 10,000 times as many values are drawn again, with replacement.

    NaN for fewer than five values, of which too few different samples can be drawn.
    """
    if len(values) < _ENOUGH:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    rows = max(1, _AT_ONCE // len(values))
    means = [
        values[random.integers(len(values), size=(min(rows, _RESAMPLES - start), len(values)))].mean(1)
        for start in range(0, _RESAMPLES, rows)
    ]
    outside = 100 * (1 - level) / 2
    low, high = np.percentile(np.concatenate(means), [outside, 100 - outside])
    return float(low), float(high)


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; ties with zero are left out, as Wilcoxon did.

    Differences of rounding errors (1e-12) are zero. 1 where nothing differs; NaN for fewer than two cases.
    """
    if len(differences) < 2:
        return math.nan
    different = differences[np.abs(differences) > 1e-12]
    if len(different) == 0:
        return 1.0
    from scipy.stats import wilcoxon  # a second's import

    return float(wilcoxon(different).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the given order; NaN stays NaN and does not count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


def _corrected(differences: Sequence[Difference]) -> list[Difference]:
    classes = [d for d in differences if d.name != ALL]
    corrected = dict(zip((d.name for d in classes), holm([d.p for d in classes]), strict=True))
    return [Difference(**{**asdict(d), "p_holm": corrected.get(d.name, d.p)}) for d in differences]
