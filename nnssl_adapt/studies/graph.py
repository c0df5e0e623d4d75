"""A study as a graph of runs, for Slurm or this machine: preprocess each plan once, train, answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnssl_adapt.cluster.graph import Graph, Resources, Step
from nnssl_adapt.data.store import RECORDS_FOLDER
from nnssl_adapt.studies.runs import Preparation, StudyRun
from nnssl_adapt.training.run.stopping import STOPPED

ANSWER = "answer"


def study_graph(
    name: str,
    preparations: Sequence[Preparation],
    runs: Sequence[StudyRun],
    answer: Sequence[str],
    page: Path,
    resources: Resources,
    throttle: int = 0,
    more: Sequence[str] = (),
) -> Graph:
    """The graph of a study.

    Args:
        name: of the study, short, for jobs.
        preparations: what has to be preprocessed.
        runs: all trainings.
        answer: command that writes the results.
        page: that it writes.
        resources: of each training; preprocessing gets its cores and memory, and no GPU.
        throttle: most trainings of a plan at the same time; 0: all.
        more: flags of every training, beside the runs' own.
    """
    plain = replace(resources, gpus="0", nodes=1, tasks=1)
    steps: list[Step] = []
    asked: dict[str, Resources] = {ANSWER: plain}
    trainings = []
    for number, preparation in enumerate(preparations, 1):
        prepare, train = f"preprocess-{number}", f"train-{number}"
        asked |= {prepare: plain, train: resources}
        steps.append(_preparation(prepare, preparation))
        mine = [run for run in runs if run.plans_name == preparation.plans_name]
        steps += [_training(train, prepare, run, more) for run in mine]
        trainings.append(train)
    summaries = tuple(run.summary for run in runs)
    steps.append(Step(ANSWER, ANSWER, tuple(answer), (page,), summaries, tuple(trainings)))
    return Graph(name, tuple(steps), asked, dict.fromkeys(trainings, throttle) if throttle else {})


def _preparation(group: str, preparation: Preparation) -> Step:
    store = preparation.plans_file.parent
    return Step(
        preparation.plans_name,
        group,
        ("preprocess", *preparation.words),
        outputs=(preparation.plans_file,),
        watch=tuple(folder / RECORDS_FOLDER / "cases" for folder in store.glob(f"{preparation.plans_name}*")),
    )


def _training(group: str, after: str, run: StudyRun, more: Sequence[str]) -> Step:
    folder = run.fold_folder
    return Step(
        run.key,
        group,
        ("train", *run.words, "--c", "auto", *more),
        outputs=run.outputs,
        after=(after,),
        watch=(folder / STOPPED, folder / "validation_done.json"),
        folder=folder,
    )
