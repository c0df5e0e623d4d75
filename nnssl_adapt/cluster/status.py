"""Where a submission stands: by its files, by what Slurm says, and by the last words of its logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.cluster import slurm
from nnssl_adapt.cluster.graph import Step
from nnssl_adapt.cluster.rounds import Rounds
from nnssl_adapt.cluster.submission import SLURM, Submission

_LAST_WORDS = 70
"""Letters of a log's last line that are shown."""

DONE, RUNNING, WAITING, FAILED, CANCELLED, NOT_SUBMITTED = (
    "done",
    "running",
    "waiting",
    "failed",
    "cancelled",
    "not submitted",
)

_ENDING = ("COMPLETING", "COMPLETED")


@dataclass(frozen=True)
class StepStatus:
    """Where one step stands.

    Attributes:
        step: its name.
        state: ``done``, ``running``, ``waiting``, ``failed``, ``cancelled`` or ``not submitted``.
        detail: why it waits, or failed.
        epoch: epochs that are done, None where it trains nothing or has none yet.
        epochs: epochs in all, where known.
        pseudo_dice: of the last epoch, 0 to 1.
        validation_dice: mean over the foreground classes, 0 to 1, of the validation.
        restarts: how often it was started again.
        node: where it runs.
        time_left: of its job, as Slurm writes it.
        last_line: of its log.
    """

    step: str
    state: str
    detail: str = ""
    epoch: int | None = None
    epochs: int | None = None
    pseudo_dice: float | None = None
    validation_dice: float | None = None
    restarts: int = 0
    node: str = ""
    time_left: str = ""
    last_line: str = ""


@dataclass(frozen=True)
class SubmissionStatus:
    """Where a submission stands; as text, a table."""

    folder: Path
    cluster: str
    steps: tuple[StepStatus, ...]

    @property
    def is_done(self) -> bool:
        return all(step.state == DONE for step in self.steps)

    @property
    def is_over(self) -> bool:
        """Whether nothing waits or runs any more."""
        return not any(step.state in (WAITING, RUNNING) for step in self.steps)

    def __getitem__(self, step: str) -> StepStatus:
        return next(status for status in self.steps if status.step == step)

    def __str__(self) -> str:
        header = ["step", "state", "epoch", "pseudo-Dice", "Dice", "restarts", "node", "time left", "last words"]
        rows = [header, *(_row(status) for status in self.steps)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        count = sum(status.state == DONE for status in self.steps)
        return "\n".join([*lines, f"{count} of {len(self.steps)} steps are done ({self.cluster}; {self.folder})"])


def _row(status: StepStatus) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    epochs = "" if status.epochs is None else f"/{status.epochs}"
    return [
        status.step,
        status.state,
        "" if status.epoch is None else f"{status.epoch}{epochs}",
        number(status.pseudo_dice),
        number(status.validation_dice),
        str(status.restarts or ""),
        status.node,
        status.time_left,
        status.detail or status.last_line,
    ]


def status_of(submission: Submission) -> SubmissionStatus:
    """Look at everything once. Raises SlurmError where Slurm does not answer."""
    queued = submission.queued()
    running_here = _running_here(submission)
    steps = tuple(_status(submission, step, queued.get(step.name), running_here) for step in submission.graph.steps)
    return SubmissionStatus(submission.folder, submission.cluster, steps)


def _running_here(submission: Submission) -> set[str]:
    """Steps that a runner on this or another machine is doing, without Slurm."""
    if submission.cluster == SLURM or submission.local_runner() is None:
        return set()
    return {path.name for path in (submission.folder / "running").glob("*")}


def _status(submission: Submission, step: Step, job: slurm.Job | None, running_here: set[str]) -> StepStatus:
    rounds = Rounds.load(submission.folder, step.name)
    state, detail, restarts = _state(submission, step, job, running_here, rounds)
    figures = _figures(step.folder)
    return StepStatus(
        step=step.name,
        state=state,
        detail=detail,
        restarts=restarts,
        node=job.nodes if job else "",
        time_left=job.time_left if job and job.state == "RUNNING" else "",
        last_line=_last_line(submission.log(step)),
        **figures,
    )


def _state(
    submission: Submission, step: Step, job: slurm.Job | None, running_here: set[str], rounds: Rounds
) -> tuple[str, str, int]:
    """State, its reason, and the number of restarts."""
    restarts = max(0, rounds.count - 1)
    if job is not None and not (job.state in _ENDING and step.is_done):
        known = slurm.facts(job.number)
        restarts = int(known.get("Restarts", "0") or 0)
        if job.state == "PENDING":
            return WAITING, job.reason if job.reason != "None" else "", restarts
        return RUNNING, "" if job.state == "RUNNING" else job.state.lower(), restarts
    if step.name in running_here:
        return RUNNING, "", rounds.count
    if step.is_done:
        return DONE, "", restarts
    if rounds.failure and not submission.is_cancelled:  # a job that is cancelled may note that it was stopped
        return FAILED, rounds.failure, restarts
    number = submission.jobs.get(step.name)
    if number is None:
        started = submission.cluster != SLURM and submission.submitted > 0
        return (WAITING if started and running_here else NOT_SUBMITTED), "", restarts
    return (*_ended(submission, number), restarts)


def _ended(submission: Submission, number: str) -> tuple[str, str]:
    """What became of a job that is no longer queued and left no result."""
    ended = slurm.final_state(number)
    if submission.is_cancelled:
        return CANCELLED, ""
    if ended.startswith("CANCELLED"):
        reason = slurm.facts(number).get("Reason", "")
        return CANCELLED, "a step before it failed" if reason in ("DependencyNeverSatisfied", "Dependency") else ""
    return FAILED, f"its job ended ({ended.lower().replace('_', ' ')})" if ended else "its job ended without a result"


def _figures(folder: Path | None) -> dict[str, Any]:
    """Epochs and Dice from a run's own files, as far as there are any."""
    if folder is None:
        return {}
    found: dict[str, Any] = {}
    last = _last_json_line(folder / "metrics.jsonl")
    if last:
        found = {"epoch": int(last["epoch"]) + 1, "pseudo_dice": last.get("pseudo_dice")}
    found["epochs"] = _read(folder / "debug.json").get("recipe", {}).get("epochs")
    found["validation_dice"] = _read(folder / "validation" / "summary.json").get("foreground_mean", {}).get("Dice")
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_json_line(path: Path) -> Mapping[str, Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(json.loads(lines[-1])) if lines else {}
    except (OSError, ValueError, TypeError):
        return {}


def _last_line(log: Path) -> str:
    """The last words of a log, shortened. Logs may be long: only their end is read."""
    try:
        with open(log, "rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 4096))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    last = lines[-1] if lines else ""
    return last if len(last) <= _LAST_WORDS else f"{last[: _LAST_WORDS - 1]}…"
