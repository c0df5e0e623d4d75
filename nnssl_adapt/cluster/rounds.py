"""What follows a round of a step: it is done, it goes on in another round, or it has failed.

A round is one start of a step's command. Schedulers interrupt it; then it is started again. Whether it is done, its files
say: a process may exit with 0 because its node died.
"""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from nnssl_adapt.cluster.graph import Step
from nnssl_adapt.files import write_json
from nnssl_adapt.training.run.signals import EXIT_CODE

_STUCK = 2
"""Rounds in a row that may bring nothing new: after them another one would not either."""

_BY_SIGNAL = tuple(128 + number for number in (signal.SIGTERM, signal.SIGHUP, *(
    getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)))  # fmt: skip
"""Exit codes of a process that a scheduler's signal ended before Python could heed it."""

INTERRUPTED = (EXIT_CODE, *_BY_SIGNAL)
"""Exit codes that ask for another round."""


class Verdict(Enum):
    """What follows a round."""

    DONE = "done"
    AGAIN = "again"
    FAILED = "failed"


@dataclass(frozen=True)
class Rounds:
    """How a step's rounds went.

    Attributes:
        count: of rounds that ended.
        mark: the step's progress at the end of the last one.
        without_progress: rounds in a row that brought nothing new.
        failure: why there is no other round; empty while there may be.
    """

    count: int = 0
    mark: str = ""
    without_progress: int = 0
    failure: str = ""

    @classmethod
    def load(cls, folder: Path, step: str) -> Rounds:
        """Of a submission's folder; of a step that has had none, a new record."""
        try:
            return cls(**json.loads(_file(folder, step).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, folder: Path, step: str) -> None:
        write_json(_file(folder, step), asdict(self))


def _file(folder: Path, step: str) -> Path:
    return folder / "rounds" / f"{step}.json"


def begin_rounds(folder: Path, step: Step) -> None:
    """Note from where a step starts, when it is submitted."""
    Rounds(mark=step.progress_mark()).save(folder, step.name)


def end_round(folder: Path, step: Step, code: int, counts: bool = True) -> tuple[Verdict, str]:
    """Judge a round that ended with an exit code, and note it. Returns the verdict and its reason.

    Args:
        folder: of the submission.
        step: whose round it was.
        code: of its command; 128 + N for signal N, as shells have it.
        counts: False where it was interrupted for another's sake: that is no sign of a run that is stuck.
    """
    before = Rounds.load(folder, step.name)
    if step.is_done:
        Rounds(before.count + 1, step.progress_mark()).save(folder, step.name)
        return Verdict.DONE, "done"
    if code != 0 and code not in INTERRUPTED:
        reason = f"exit code {code}" + (" (killed: too little memory?)" if code == 128 + signal.SIGKILL else "")
        Rounds(before.count + 1, before.mark, 0, reason).save(folder, step.name)
        return Verdict.FAILED, reason
    mark = step.progress_mark()
    without = 0 if mark != before.mark else before.without_progress + counts
    if without >= _STUCK:
        reason = f"nothing new in {without} rounds: give it more time (--time), or look at its log"
        Rounds(before.count + 1, mark, without, reason).save(folder, step.name)
        return Verdict.FAILED, reason
    Rounds(before.count + 1, mark, without).save(folder, step.name)
    reason = "interrupted" if code else "exit code 0, but its files are not all there (a node that died?)"
    return Verdict.AGAIN, reason
