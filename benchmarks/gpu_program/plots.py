"""Pictures of what was measured: a bar a figure, of those that can be compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PICTURES = {
    "steps": (2, "ms a step"),
    "loss": (2, "ms, loss and its gradient"),
    "beside_nnunetv2": (3, "steps/s"),
    "prediction": (4, "s"),
}
"""Name of the file → stage, and unit of the rows that are drawn."""


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Write the pictures that there are figures for; their files.

    Raises ImportError where matplotlib is missing.
    """
    drawn = []
    for name, (stage, unit) in PICTURES.items():
        bars = [(row["name"], row["value"]) for row in rows if row["stage"] == stage and row["unit"] == unit]
        bars = [(label, value) for label, value in bars if isinstance(value, (int, float)) and math.isfinite(value)]
        if bars:
            path = folder / f"{name}.png"
            _bars(bars, unit, next(row["device"] for row in rows if row["stage"] == stage), path)
            drawn.append(path)
    return drawn


def _bars(bars: list[tuple[str, float]], unit: str, device: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.28 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(bars))
    axes.barh(places, [value for _, value in bars], color="#3b6ea5")
    axes.set_yticks(places, [label for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    for place, (_, value) in zip(places, bars, strict=True):
        axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
    axes.set_xlabel(unit)
    axes.set_title(device, fontsize=9)
    axes.margins(x=0.12)
    figure.savefig(path, dpi=110)
