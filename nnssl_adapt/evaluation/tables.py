"""Numbers for people: tables of text, and CSV for whatever else reads numbers."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.data.endings import stem_of
from nnssl_adapt.files import write_text
from nnssl_adapt.text import and_more

if TYPE_CHECKING:
    from nnssl_adapt.evaluation.metrics import CaseMetrics, Summary

_SHOWN = {
    "Dice": "Dice",
    "IoU": "IoU",
    "Precision": "precision",
    "Recall": "recall",
    "HD95": "HD95 mm",
    "ASSD": "ASSD mm",
    "NSD": "NSD",
    "VolumeError": "volume ml",
    "RelativeVolumeError": "volume %",
    "LesionF1": "lesion F1",
    "LesionSensitivity": "sens.",
    "LesionPPV": "PPV",
    "LesionDice": "Dice of found",
    "LesionwiseDice": "lesion-wise Dice",
    "LesionsReference": "lesions",
    "LesionsPredicted": "predicted",
}
_SIGNED = ("VolumeError", "RelativeVolumeError")
_DISTANCES = ("HD95", "ASSD")
_COUNTS = ("LesionsReference", "LesionsPredicted")


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as needed, the first one to the left and the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def summary_table(summary: Summary) -> str:
    """Means over cases of every class, and their mean, with what the numbers rest on."""
    names = [name for name in _SHOWN if name in summary.metric_names]
    rows = [
        [name, str(_cases_with(summary, entry)), *(_shown(metrics[m], m) for m in names)]
        for (entry, metrics), name in zip(summary.mean.items(), summary.class_names, strict=True)
    ]
    if len(rows) > 1:
        rows.append(["mean of classes", "", *(_shown(summary.foreground_mean[m], m) for m in names)])
    lines = [text_table(["class", "cases", *(_SHOWN[name] for name in names)], rows)]
    lines.append(f"{len(summary.cases)} case(s); 'cases': those whose reference has the class")
    elsewhere = [f"{Path(case.prediction_file).name} ({case.elsewhere})" for case in summary.cases if case.elsewhere]
    if elsewhere:
        lines.append(
            f"{len(elsewhere)} case(s) do not lie where their references do, so these numbers may be wrong: "
            f"{and_more(elsewhere, 3)}"
        )
    if summary.judging is not None:
        weighed = "by area" if summary.judging.surface == "area" else "by surface voxels"
        lines.append(f"NSD: surface Dice {weighed} at {summary.judging.tolerance:g} mm; {summary.judging.explanation}")
        if summary.judging.lesions is not None:
            lines.append(str(summary.judging.lesions))
        lines += _undefined_distances(summary)
    return "\n".join(lines)


def _cases_with(summary: Summary, entry: object) -> int:
    return sum(case.metrics[entry]["n_ref"] > 0 for case in summary.cases)  # type: ignore[index]


def _undefined_distances(summary: Summary) -> Iterable[str]:
    """Say where means of distances flatter: cases in which a class was missed or invented have none."""
    for entry, name in zip(summary.mean, summary.class_names, strict=True):
        metrics = [case.metrics[entry] for case in summary.cases]
        missed = sum(m["n_ref"] > 0 and m["n_pred"] == 0 and math.isnan(m["HD95"]) for m in metrics)
        invented = sum(m["n_pred"] > 0 and m["n_ref"] == 0 and math.isnan(m["HD95"]) for m in metrics)
        if missed or invented:
            yield f"{name}: missed in {missed} case(s), invented in {invented}; these are not in its HD95 and ASSD"


def _shown(value: float, metric: str) -> str:
    if math.isnan(value):
        return "–"
    if metric == "RelativeVolumeError":
        return f"{100 * value:+.1f}"
    if metric in _SIGNED:
        return f"{value:+.2f}"
    if metric in _COUNTS:
        return f"{value:.1f}"
    return f"{value:.2f}" if metric in _DISTANCES else f"{value:.4f}"


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file (comma, UTF-8, header first). NaN is an empty cell, as pandas and R read it."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row])
    write_text(path, text.getvalue())


def write_summary_csv(path: str | Path, summary: Summary, file_ending: str) -> None:
    """One row for every case and class: ``case, class, label``, the metrics, and how the prediction lies elsewhere, if so."""
    names = summary.metric_names
    rows = (
        [_identifier(case, file_ending), name, str(entry), *(metrics[m] for m in names), case.elsewhere or ""]
        for case in summary.cases
        for (entry, metrics), name in zip(case.metrics.items(), summary.class_names, strict=True)
    )
    write_csv(path, ["case", "class", "label", *names, "geometry_differs"], rows)


def _identifier(case: CaseMetrics, file_ending: str) -> str:
    name = Path(case.prediction_file).name
    return stem_of(name, file_ending) or name
