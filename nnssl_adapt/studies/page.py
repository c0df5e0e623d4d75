"""``study.html``: a study's question, answer, pictures, commands, citations and methods on one page that opens from disk."""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nnssl_adapt.evaluation import report_page as html
from nnssl_adapt.studies.answers import Cell
from nnssl_adapt.studies.pictures import learning_curves, training_curves
from nnssl_adapt.studies.runs import Preparation, StudyRun
from nnssl_adapt.studies.spec import StudySpec
from nnssl_adapt.studies.words import HEADER, findings, methods, table_row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def study_page(
    study: StudySpec,
    cells: Sequence[Cell],
    runs: Sequence[StudyRun],
    preparations: Sequence[Preparation],
    citations: Mapping[str, Sequence[str]],
    facts: Mapping[str, str],
) -> str:
    """The whole document.

    Args:
        study: what was compared.
        cells: what came out.
        runs: all of them, finished or not.
        preparations: what was preprocessed for them.
        citations: of every checkpoint, by its source.
        facts: ``dataset``, ``version``, ``torch``, for the methods.
    """
    return html.page(
        f"Study {study.name}",
        [
            *_header(study, cells, facts),
            *_answer(study, cells),
            *_curves(study, cells, runs),
            *_again(runs, preparations),
            *_for_a_paper(study, cells, citations, facts),
        ],
    )


def _header(study: StudySpec, cells: Sequence[Cell], facts: Mapping[str, str]) -> Iterator[str]:
    first = [cell for cell in cells if cell.metric == study.metrics[0]]
    done, runs = sum(cell.done for cell in first), sum(cell.runs for cell in first)
    yield html.heading(f"Study {study.name}", 1)
    arms = ", ".join(arm.name for arm in study.arms)
    yield html.paragraph(f"{facts['dataset']} · {arms} · reference: {study.reference}", dim=True)
    yield html.tiles(
        [
            (f"{done} of {runs}", "runs finished"),
            (str(len(study.seeds)), "seeds"),
            (str(max((cell.value.cases for cell in first), default=0)), "validation cases"),
            (f"{sum(cell.hours for cell in first):.1f} h", f"of training on {study.device}"),
        ]
    )


def _answer(study: StudySpec, cells: Sequence[Cell]) -> Iterator[str]:
    yield html.heading("The answer")
    yield html.bullets(findings(study, cells))
    for metric in study.metrics:
        yield html.heading(metric, 3)
        yield html.table(HEADER, [table_row(cell) for cell in cells if cell.metric == metric], numbers_from=2)
    yield html.paragraph(
        "Means over validation cases and seeds; a case's value is its mean over the classes. Fraction: of a fold's training "
        "cases (their number). Intervals: 95 %, bootstrap over cases and seeds. Differences are paired by case and seed; p: "
        "Wilcoxon's signed-rank test over cases, corrected by Holm.",
        dim=True,
    )


def _curves(study: StudySpec, cells: Sequence[Cell], runs: Sequence[StudyRun]) -> Iterator[str]:
    if all(math.isnan(cell.value.mean) for cell in cells):
        return
    yield html.heading("Over the amount of data")
    yield html.picture(_png(learning_curves(study, cells)), "Mean and 95% interval over the number of training cases")
    yield html.heading("Training")
    yield html.picture(_png(training_curves(study, runs)), "Smoothed pseudo-Dice of every run over the epochs")


def _again(runs: Sequence[StudyRun], preparations: Sequence[Preparation]) -> Iterator[str]:
    yield html.heading("The commands")
    lines = [command_line("preprocess", preparation.words) for preparation in preparations]
    yield html.code("\n".join(lines))
    lines = [command_line("train", run.words) for run in runs]
    yield html.details(f"the {len(lines)} trainings", html.code("\n".join(lines)))


def _for_a_paper(
    study: StudySpec, cells: Sequence[Cell], citations: Mapping[str, Sequence[str]], facts: Mapping[str, str]
) -> Iterator[str]:
    yield html.heading("For a paper")
    yield html.paragraph(methods(study, cells, facts))
    yield html.heading("Please cite", 3)
    rows = [(source, text) for source, texts in citations.items() for text in (texts or ("no citation in the file",))]
    yield html.table(("checkpoint", "citation"), rows, numbers_from=2)


def command_line(command: str, words: Sequence[str]) -> str:
    """``nnssl-adapt train -d …``, quoted for a shell."""
    return f"nnssl-adapt {command} {shlex.join(words)}"


def _png(figure: Figure) -> bytes:
    stream: Any = io.BytesIO()
    figure.savefig(stream, format="png")
    return bytes(stream.getvalue())
