"""Queueing a job again that was interrupted, and no other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from nnssl_adapt.cluster import slurm
from nnssl_adapt.cluster.rounds import Verdict, end_round
from nnssl_adapt.cluster.submission import Submission
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.machine.copying import Stage, remove_abandoned_copies


def after_round(folder: Path, name: str, code: int, job: str) -> tuple[Verdict, str]:
    """Judge a round of a step that ended with an exit code, and queue its job again if it is to go on.

    To be called by the job itself, as its last act: being queued again ends it.

    Args:
        folder: of the submission.
        name: of the step.
        code: of its command.
        job: number of this job; empty outside Slurm.

    Returns the verdict and what to tell. Raises ConfigurationError for a step that is none, SlurmError where Slurm refuses.
    """
    submission = Submission.load(folder)
    _remove_copies(submission.graph.step(name).command)
    known = slurm.facts(job) if job else {}
    preempted = known.get("PreemptTime", "None") not in ("None", "Unknown", "")
    verdict, reason = end_round(folder, submission.graph.step(name), code, counts=not preempted)
    if verdict is not Verdict.AGAIN or not job:
        return verdict, reason
    if submission.is_cancelled or _was_cancelled(known):
        return Verdict.FAILED, "cancelled: not queued again"
    slurm.requeue(job)
    return verdict, f"{reason}: queued again"


def _remove_copies(command: Sequence[str]) -> None:
    """Remove what a training that was killed together with its copying process left on this machine's disk."""
    with suppress(ConfigurationError):  # the training has told it
        stage = Stage.of(dict(itertools.pairwise(command)).get("--stage"))
        if stage is not None:
            remove_abandoned_copies(stage.folder)


def _was_cancelled(known: Mapping[str, str]) -> bool:
    """Whether this job was cancelled. One that runs was not; of those that are being ended, those whose time is not over were."""
    if known.get("JobState", "RUNNING") in ("RUNNING", "PREEMPTED", "NODE_FAIL", "TIMEOUT"):
        return False
    if known.get("Reason") == "TimeLimit":
        return False
    return _seconds(known.get("RunTime", "")) < _seconds(known.get("TimeLimit", "")) - 1


def _seconds(text: str) -> float:
    """Of ``1-02:03:04`` as ``scontrol`` writes it; endless for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((24 * days + hours) * 60 + minutes) * 60.0 + seconds
