"""A study's answer in words: what the table says, what it does not, and a paragraph of methods for a paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from nnssl_adapt.evaluation.tables import text_table
from nnssl_adapt.planning.plan import CONFIGURATION
from nnssl_adapt.studies.answers import Cell
from nnssl_adapt.studies.spec import StudySpec
from nnssl_adapt.studies.statistics import Estimate

HEADER = ("fraction", "arm", "runs", "mean", "95% interval", "difference", "95% interval", "p (Holm)", "hours")


def study_table(study: StudySpec, cells: Sequence[Cell]) -> str:
    """One table a metric, with what the numbers rest on."""
    parts = []
    for metric in study.metrics:
        rows = [table_row(cell) for cell in cells if cell.metric == metric]
        parts.append(f"{metric}, compared with {study.reference}\n{text_table(HEADER, rows)}")
    return "\n\n".join([*parts, *findings(study, cells)])


def table_row(cell: Cell) -> list[str]:
    """A cell as text, under :data:`HEADER`."""
    gap = cell.difference.estimate if cell.difference is not None else None
    p = "–" if cell.difference is None or math.isnan(cell.difference.p_holm) else f"{cell.difference.p_holm:.3g}"
    return [
        f"{cell.fraction:g} ({cell.training_cases:g})",
        cell.arm,
        f"{cell.done}/{cell.runs}",
        _number(cell.value.mean),
        _interval(cell.value),
        "–" if gap is None else _number(gap.mean, "+"),
        "–" if gap is None else _interval(gap, "+"),
        p,
        f"{cell.hours:.2f}",
    ]


def findings(study: StudySpec, cells: Sequence[Cell]) -> Iterator[str]:
    """One sentence a comparison of the first metric, and what can't be concluded."""
    metric = study.metrics[0]
    unfinished = sum(cell.runs - cell.done for cell in cells if cell.metric == metric)
    if unfinished:
        yield f"{unfinished} run(s) are not finished: what follows may change."
    for cell in cells:
        if cell.metric != metric or cell.difference is None:
            continue
        gap = cell.difference.estimate
        where = f"With {cell.fraction:g} of the training cases, {cell.arm} against {study.reference}"
        if math.isnan(gap.low):
            yield f"{where}: {gap.mean:+.4f} {metric} on {gap.cases} case(s), too few for an interval."
        elif cell.difference.within_noise:
            yield (
                f"{where}: the difference of {gap.mean:+.4f} {metric} ({_interval(gap, '+')}, corrected p "
                f"{cell.difference.p_holm:.2g}) is within noise."
            )
        else:
            yield f"{where}: {gap.mean:+.4f} {metric} ({_interval(gap, '+')}, corrected p {cell.difference.p_holm:.2g})."
    if len(study.seeds) == 1:
        yield "One seed: the intervals say nothing about how much another seed would change."


def methods(study: StudySpec, cells: Sequence[Cell], facts: Mapping[str, str]) -> str:
    """A paragraph for a paper's methods section, with the numbers filled in.

    Args:
        study: with everything that was varied.
        cells: for what was done.
        facts: ``dataset``, ``version`` (of the package), ``torch``.
    """
    done = sum(cell.done for cell in cells if cell.metric == study.metrics[0])
    runs = sum(cell.runs for cell in cells if cell.metric == study.metrics[0])
    arms = "; ".join(_arm_words(study, arm.name) for arm in study.arms)
    fractions = ", ".join(f"{100 * fraction:g} %" for fraction in study.fractions)
    lesions = f" Lesions were counted by this rule: {study.judging.lesions}." if study.judging.lesions else ""
    tolerance = f" at a tolerance of {study.judging.tolerance:g} mm" if "NSD" in study.metrics else ""
    return (
        f"On {facts['dataset']} we compared {len(study.arms)} ways to train: {arms}. Each was trained on fold(s) "
        f"{_listed(study.folds)} of the dataset with {len(study.seeds)} random seed(s) on {fractions} of the training cases "
        "(nested subsets, drawn by subject), with nnssl_adapt "
        f"{facts['version']} and PyTorch {facts['torch']}; {done} of {runs} runs are included. Whole validation images were "
        f"predicted with a sliding window and evaluated by {_listed(study.metrics)}{tolerance}, averaged over "
        f"{'the classes ' + _listed(study.classes) if study.classes else 'all classes'}.{lesions} Intervals are 95 % "
        "percentile intervals of 10,000 bootstrap samples over validation cases and seeds. Differences are paired by case and "
        f"seed with {study.reference} as reference and tested by Wilcoxon's signed-rank test over cases, corrected by Holm's "
        "method over all comparisons of a metric."
    )


def _arm_words(study: StudySpec, name: str) -> str:
    arm = study.arm(name)
    start = f"weights of {arm.weights}"
    if arm.from_scratch:
        network = "nnU-Net's network" if arm.network is None else f"the network of {arm.network}"
        start = f"random weights in {network}"
    if arm.configuration != CONFIGURATION:
        start += f", configuration {arm.configuration}"
    how = arm.trainer or arm.recipe or "the default recipe"
    changes = f" with {', '.join(f'{key} {value}' for key, value in arm.settings)}" if arm.settings else ""
    return f"{name} ({start}, spacing {arm.spacing_mode}, {how}{changes})"


def _listed(items: Sequence[object]) -> str:
    return ", ".join(str(item) for item in items)


def _number(value: float, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{sign}.4f}"


def _interval(found: Estimate, sign: str = "") -> str:
    return "–" if math.isnan(found.low) else f"{found.low:{sign}.4f} to {found.high:{sign}.4f}"
