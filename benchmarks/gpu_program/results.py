"""What becomes of the figures: tables, a list of goals and failures, and the section of docs/benchmarks.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TITLES = {0: "Machine", 1: "Correctness", 2: "Step time", 3: "Beside nnunetv2", 4: "Prediction"}
BEGIN, END = "<!-- measured on a GPU: begin -->", "<!-- measured on a GPU: end -->"
RUN = "run"
"""Name of the row that a stage begins with: its date, commit and command."""

COLUMNS = {
    "least_ms": "least, ms",
    "most_ms": "most, ms",
    "peak_gib": "peak, GiB",
    "estimate_gib": "estimate, GiB",
    "goal": "goal",
}
"""Of a row, beside name, value and unit: what gets a column where any row of a table has it."""

Row = dict[str, Any]


def read_rows(folder: Path) -> list[Row]:
    """The rows of a folder; of those of one name in one stage the last. A line that a crash cut off is left out."""
    path = folder / "results.jsonl"
    rows: dict[tuple[int, str], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.pop((row["stage"], row["name"]), None)
        rows[row["stage"], row["name"]] = row
    return list(rows.values())


def figures_of(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["name"] != RUN]


def tables(rows: list[Row]) -> str:
    """Markdown: a table for each stage, of nothing but the rows."""
    lines = []
    for stage, title in TITLES.items():
        mine = [row for row in figures_of(rows) if row["stage"] == stage]
        if not mine:
            continue
        columns = [key for key in COLUMNS if any(row.get(key) is not None for row in mine)]
        lines += [f"**{title}** ({', '.join(sorted({row['device'] for row in mine}))})", ""]
        lines += [f"| {' | '.join(['what', 'figure', 'unit', *(COLUMNS[key] for key in columns)])} |"]
        lines += ["|---" * (3 + len(columns)) + "|"]
        lines += [f"| {' | '.join(_cell(cell) for cell in _cells(row, columns))} |" for row in mine]
        lines.append("")
    return "\n".join(lines)


def _cells(row: Row, columns: list[str]) -> list[Any]:
    unit = row.get("error") or row["unit"]
    if row.get("passed") is False:
        unit = f"{unit} **wrong**".strip()
    return [row["name"], row["value"], unit, *(_goal(row) if key == "goal" else row.get(key, "") for key in columns)]


def _goal(row: Row) -> str:
    return f"{row['goal']}: {'met' if row['met'] else '**missed**'}" if "goal" in row else ""


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("\n", " ").replace("|", "\\|")


def failures(rows: list[Row]) -> list[str]:
    """Names of rows that failed or are wrong."""
    return [row["name"] for row in rows if row["value"] == "failed" or row.get("passed") is False]


def missed(rows: list[Row]) -> list[str]:
    """Goals that were missed on a GPU."""
    return [
        f"{row['name']} {row['value']:.3g}, goal {row['goal']}"
        for row in rows
        if row["on_gpu"] and row.get("met") is False
    ]


def publish(folder: Path, document: Path) -> str | None:
    """Put a folder's tables and plots into the document, between its two marks. Returns why not, if not."""
    rows = read_rows(folder)
    figures = figures_of(rows)
    if not figures:
        return "there are no figures to publish"
    if others := [row["name"] for row in figures if row.get("on_gpu") is not True]:
        return f"not measured on a GPU: {', '.join(others[:3])}{' …' * (len(others) > 3)}"
    cards = sorted({row["device"] for row in figures})
    if len(cards) > 1:
        return f"figures of different cards don't go together: {', '.join(cards)}"
    runs = [row for row in rows if row["name"] == RUN]
    commits = sorted({row.get("commit", "") for row in runs})
    if not runs or "" in commits:
        return "the commit that was measured is not known: measure with --commit where the copy has no .git"
    if len(commits) > 1:
        return f"figures of different commits don't go together: {', '.join(commits)}"
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        return f"{document} has no {BEGIN} … {END}"
    run = runs[-1]
    head = f"{run['date']}, commit `{run['commit']}`, {cards[0]}: `{run['command']}`"
    before, rest = text.split(BEGIN)
    pictures = "".join(f"\n![{path.stem}](images/gpu_{path.name})\n" for path in sorted(folder.glob("*.png")))
    document.write_text(
        f"{before}{BEGIN}\n\n{head}\n\n{tables(rows)}{pictures}\n{END}{rest.split(END)[1]}", encoding="utf-8"
    )
    for path in sorted(folder.glob("*.png")):
        (document.parent / "images").mkdir(exist_ok=True)
        shutil.copyfile(path, document.parent / "images" / f"gpu_{path.name}")
    return None
