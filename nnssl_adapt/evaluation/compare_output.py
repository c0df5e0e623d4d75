"""Comparisons for people: a table, a picture, and files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnssl_adapt.evaluation.compare import LOWER_IS_BETTER, Comparison, Difference
from nnssl_adapt.evaluation.tables import text_table, write_csv
from nnssl_adapt.files import atomic_path, make_folder, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNITS = {"HD95": " (mm)", "ASSD": " (mm)", "VolumeError": " (ml)"}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito: for all kinds of eyes
_ENOUGH = 6
"""Pairs from which on Wilcoxon's test can say p < 0.05 at all."""


def comparison_table(comparison: Comparison) -> str:
    """Differences of every class, and what is left out."""
    lines = [f"{comparison.metric}: {comparison.second} minus {comparison.first}"]
    header = ["class", "cases", "first", "second", "difference", "95% interval", "p", "p (Holm)", "better", "worse"]
    lines.append(text_table(header, [_row(difference) for difference in comparison.differences]))
    direction = "lower" if comparison.metric in LOWER_IS_BETTER else "higher"
    lines.append(f"{direction} is better; interval: bootstrap over cases; p: Wilcoxon's signed-rank test")
    if max(difference.cases for difference in comparison.differences) < _ENOUGH:
        lines.append(f"fewer than {_ENOUGH} pairs can't give p < 0.05, whatever they are")
    for name, missing in ((comparison.second, comparison.only_first), (comparison.first, comparison.only_second)):
        if missing:
            more = " …" if len(missing) > 5 else ""
            lines.append(f"left out, since {name} lacks them: {len(missing)} case(s): {', '.join(missing[:5])}{more}")
    for name, cases in comparison.one_sided.items():
        lines.append(
            f"left out of {name}: {len(cases)} case(s) in which only one of the two has a value, because the class was missed "
            "or invented there; to count them, evaluate both with nnssl-adapt evaluate --empty 1"
        )
    return "\n".join(lines)


def _row(difference: Difference) -> list[str]:
    return [
        difference.name,
        str(difference.cases),
        _number(difference.first),
        _number(difference.second),
        _number(difference.mean, "+"),
        "–" if math.isnan(difference.low) else f"{_number(difference.low, '+')} to {_number(difference.high, '+')}",
        _p(difference.p),
        _p(difference.p_holm),
        str(difference.better),
        str(difference.worse),
    ]


def _number(value: float, sign: str = "") -> str:
    if math.isnan(value):
        return "–"
    return f"{value:{sign}.4f}" if abs(value) < 10 else f"{value:{sign}.2f}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


def save_comparisons(comparisons: Sequence[Comparison], folder: str | Path) -> Path:
    """Write ``comparison.json``, ``comparison.csv`` (a row for each case and class) and ``comparison.png``."""
    folder = make_folder(folder)
    write_json(folder / "comparison.json", [comparison.to_dict() for comparison in comparisons])
    write_csv(
        folder / "comparison.csv",
        ["first", "second", "metric", "class", "case", "difference"],
        (row for comparison in comparisons for row in _case_rows(comparison)),
    )
    draw_comparisons(comparisons, folder / "comparison.png")
    return folder


def _case_rows(comparison: Comparison) -> Iterator[list[object]]:
    for name, cases in comparison.per_case.items():
        for case, difference in cases.items():
            yield [comparison.first, comparison.second, comparison.metric, name, case, difference]


def draw_comparisons(comparisons: Sequence[Comparison], path: str | Path) -> None:
    """Draw every case's difference as a dot, the mean with its interval over them, a row for each class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(d.name for comparison in comparisons for d in comparison.differences))
    height = 0.32 + 0.26 * len(comparisons)
    figure = Figure(figsize=(9, 1.9 + 0.22 * len(comparisons) + height * len(names)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, comparison in enumerate(comparisons):
        offset = ((number + 0.5) / len(comparisons) - 0.5) * 0.75
        rows = {name: row + offset for row, name in enumerate(names)}
        _draw(axes, comparison, rows, _COLOURS[number % len(_COLOURS)], 0.2 / len(comparisons))
    axes.axvline(0, color="black", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="0.9", linewidth=0.8, zorder=0)
    axes.margins(x=0.05)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    first = comparisons[0]
    direction = "left" if first.metric in LOWER_IS_BETTER else "right"
    axes.set_xlabel(f"difference in {first.metric}{_UNITS.get(first.metric, '')}; better is to the {direction}")
    title = f"compared with {_short(first.first)}\neach dot a case; bar: mean and its 95% interval"
    figure.suptitle(title, fontsize="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw(axes: Axes, comparison: Comparison, rows: dict[str, float], colour: str, spread: float) -> None:
    for difference in comparison.differences:
        y = rows[difference.name]
        values = np.array(list(comparison.per_case.get(difference.name, {}).values()))
        jitter = np.random.default_rng(0).uniform(-spread, spread, len(values))  # so that equal ones can be told apart
        axes.scatter(values, y + jitter, s=14, color=colour, alpha=0.5 if len(values) <= 20 else 0.3, linewidths=0)
        if not math.isnan(difference.low):
            axes.plot([difference.low, difference.high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(difference.mean, y, "o", color=colour, markersize=6, markeredgecolor="white")
    axes.plot([], [], "o-", color=colour, linewidth=2.5, label=_short(comparison.second))


def _short(name: str, limit: int = 60) -> str:
    return name if len(name) <= limit else "…" + name[-limit:]
