"""A study as a graph of runs, for Slurm or this machine: preprocess each plan once, train, answer.

The first stage of a cascade is trained before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnssl_adapt.cluster.graph import Graph, Resources, Step
from nnssl_adapt.data.store import RECORDS_FOLDER
from nnssl_adapt.planning.plan import CASCADE, LOW_RESOLUTION
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
        runs: all trainings, also those that are only the first stages of cascades.
        answer: command that writes the results.
        page: that it writes.
        resources: of each training; preprocessing gets its cores and memory, and no GPU.
        throttle: most trainings of a plan at the same time; 0: all.
        more: flags of every training, beside the runs' own.
    """
    plain = replace(resources, gpus="0", nodes=1, tasks=1)
    steps: list[Step] = []
    asked: dict[str, Resources] = {ANSWER: plain}
    trainings: list[str] = []
    for number, preparation in enumerate(preparations, 1):
        prepare, train, second = f"preprocess-{number}", f"train-{number}", f"train-{number}-{CASCADE}"
        steps.append(_preparation(prepare, preparation))
        mine = [run for run in runs if run.plans_name == preparation.plans_name]
        cascades = [run for run in mine if run.configuration == CASCADE]
        steps += [_training(train, (prepare,), run, more) for run in mine if run not in cascades]
        steps += [_training(second, (prepare, train), run, more, _first_stages(run, mine)) for run in cascades]
        asked |= {prepare: plain, **dict.fromkeys((train, second) if cascades else (train,), resources)}
        trainings += (train, second) if cascades else (train,)
    summaries = tuple(run.summary for run in runs if not run.for_cascade)
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


def _first_stages(cascade: StudyRun, runs: Sequence[StudyRun]) -> tuple[Path, ...]:
    """What the first stages of a cascade leave when they are validated."""
    return tuple(run.summary for run in runs if run.results == cascade.results and run.configuration == LOW_RESOLUTION)


def _training(
    group: str, after: tuple[str, ...], run: StudyRun, more: Sequence[str], inputs: tuple[Path, ...] = ()
) -> Step:
    folder = run.fold_folder
    return Step(
        run.key,
        group,
        ("train", *run.words, "--c", "auto", *more),
        outputs=run.outputs,
        inputs=inputs,
        after=after,
        watch=(folder / STOPPED, folder / "validation_done.json"),
        folder=folder,
    )
