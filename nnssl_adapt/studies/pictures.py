"""Pictures of a study: each metric over the fraction of the data, and the curves of the trainings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnssl_adapt.studies.answers import Cell
from nnssl_adapt.studies.runs import StudyRun
from nnssl_adapt.studies.spec import StudySpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito: for all kinds of eyes
_MARKERS = "osD^vP"


def learning_curves(study: StudySpec, cells: Sequence[Cell]) -> Figure:
    """A panel a metric: mean and 95% interval of every arm over the number of training cases."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(study.metrics) + 1.2, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(study.metrics), squeeze=False)[0]
    for panel, metric in zip(panels, study.metrics, strict=True):
        for number, arm in enumerate(study.arms):
            mine = [c for c in cells if (c.metric, c.arm) == (metric, arm.name) and not math.isnan(c.value.mean)]
            if not mine:
                continue
            places = [cell.training_cases * 1.015 ** (number - len(study.arms) / 2) for cell in mine]
            style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
            panel.plot(places, [cell.value.mean for cell in mine], label=arm.name, linewidth=1.6, markersize=6, **style)
            for place, cell in zip(places, mine, strict=True):
                if not math.isnan(cell.value.low):
                    panel.plot([place, place], [cell.value.low, cell.value.high], color=style["color"], alpha=0.6)
        sizes = sorted({cell.training_cases for cell in cells})
        panel.set_xscale("log")
        panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel("training cases")
        panel.set_ylabel(metric)
        panel.grid(axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    return figure


def training_curves(study: StudySpec, runs: Sequence[StudyRun]) -> Figure:
    """A panel a fraction: the smoothed pseudo-Dice of every run over the epochs, a colour an arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(study.fractions) + 1.0, 3.8), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(study.fractions), squeeze=False, sharey=True)[0]
    for panel, fraction in zip(panels, study.fractions, strict=True):
        for number, arm in enumerate(study.arms):
            label: str | None = arm.name
            for run in runs:
                if (run.arm, run.fraction) != (arm.name, fraction):
                    continue
                values = _pseudo_dice(run)
                colour = _COLOURS[number % len(_COLOURS)]
                panel.plot(range(1, len(values) + 1), values, color=colour, alpha=0.7, linewidth=1.2, label=label)
                label = None
        panel.set_title(f"{fraction:g} of the training cases", fontsize="medium")
        panel.set_xlabel("epoch")
        panel.grid(axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("pseudo-Dice, smoothed")
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    return figure


def _pseudo_dice(run: StudyRun) -> list[float]:
    path = run.fold_folder / "metrics.jsonl"
    if not path.is_file():
        return []
    epochs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [math.nan if (value := epoch["pseudo_dice_smoothed"]) is None else value for epoch in epochs]
