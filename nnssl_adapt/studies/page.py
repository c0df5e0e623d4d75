"""``study.html``: a study's question, answer, pictures, commands, citations and methods on one page that opens from disk."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence

from nnssl_adapt.evaluation.report.page import png_of, render
from nnssl_adapt.studies.answers import Cell
from nnssl_adapt.studies.pictures import learning_curves, training_curves
from nnssl_adapt.studies.runs import Preparation, StudyRun
from nnssl_adapt.studies.spec import StudySpec
from nnssl_adapt.studies.words import HEADER, findings, methods, table_row


def study_page(
    study: StudySpec,
    cells: Sequence[Cell],
    runs: Sequence[StudyRun],
    preparations: Sequence[Preparation],
    citations: Mapping[str, Sequence[str]],
    facts: Mapping[str, str],
    first_stages: Sequence[StudyRun] = (),
) -> str:
    """The whole document.

    Args:
        study: what was compared.
        cells: what came out.
        runs: all of them, finished or not.
        preparations: what was preprocessed for them.
        citations: of every checkpoint, by its source.
        facts: ``dataset``, ``version``, ``torch``, for the methods.
        first_stages: trainings that cascades among the runs needed before.
    """
    first = [cell for cell in cells if cell.metric == study.metrics[0]]
    arms = ", ".join(arm.name for arm in study.arms)
    return render(
        "study.html",
        "nnssl_adapt.studies",
        title=f"Study {study.name}",
        subtitle=f"{facts['dataset']} · {arms} · reference: {study.reference}",
        tiles=[
            (f"{sum(cell.done for cell in first)} of {sum(cell.runs for cell in first)}", "runs finished"),
            (str(len(study.seeds)), "seeds"),
            (str(max((cell.value.cases for cell in first), default=0)), "validation cases"),
            (f"{sum(cell.hours for cell in first):.1f} h", f"of training on {study.device}"),
        ],
        findings=findings(study, cells),
        header=HEADER,
        tables=[(metric, [table_row(cell) for cell in cells if cell.metric == metric]) for metric in study.metrics],
        curves=_curves(study, cells, runs),
        preparations=[command_line("preprocess", preparation.words) for preparation in preparations],
        trainings=[command_line("train", run.words) for run in (*first_stages, *runs)],
        methods=methods(study, cells, facts),
        citations=[
            (source, text) for source, texts in citations.items() for text in (texts or ("no citation in the file",))
        ],
    )


def _curves(study: StudySpec, cells: Sequence[Cell], runs: Sequence[StudyRun]) -> dict[str, bytes] | None:
    """PNGs; None while there is nothing to draw."""
    if all(math.isnan(cell.value.mean) for cell in cells):
        return None
    return {
        "learning": png_of(learning_curves(study, cells), dpi=100),
        "training": png_of(training_curves(study, runs), dpi=100),
    }


def command_line(command: str, words: Sequence[str]) -> str:
    """``nnssl-adapt train -d …``, quoted for a shell."""
    return f"nnssl-adapt {command} {shlex.join(words)}"
