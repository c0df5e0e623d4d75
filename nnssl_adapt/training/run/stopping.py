"""Stopping in good order: when a scheduler or a person asks for it, or the time that was given is nearly over.

A run that is asked to stop finishes its step, saves and raises :class:`~nnssl_adapt.errors.TrainingStopped`, which the
command line turns into an exit code of its own, so that a scheduler can tell "start me again" from "I failed".
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import FrameType

from nnssl_adapt.errors import ConfigurationError

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C, a scheduler's end of time, what ``sbatch --signal=USR1@120`` sends ahead of it, and a terminal that closed."""

_RECENT = 50
"""Steps that the longest step is looked for in: the first ones, which compile and tune, don't count for ever."""

_TO_END = 10.0
"""Seconds for what comes after saving: closing files, ending worker processes."""

_SAVING_UNTIL_SEEN = 20.0
"""Seconds that saving is taken to need before the first checkpoint has shown it."""

_DOUBLE_PRESS = 1.0
"""Seconds within which a second Ctrl-C is the first one's echo: launchers pass on what the terminal sent everybody."""


# -- until when ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deadline:
    """When a run has to be over.

    Attributes:
        at: seconds since 1970.
        reason: what sets it, as it is told the user.
    """

    at: float
    reason: str


def read_time_limit(text: str) -> float:
    """Return the seconds that ``90`` (minutes, also ``1.5``) or ``HH:MM:SS`` (with days: ``D-HH:MM:SS``) stand for.

    Both are ways in which Slurm's ``--time`` is written. Raises ConfigurationError for anything else, and for no time.
    """
    seconds = -1.0
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = 60 * float(text)
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)", text):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((24 * days + hours) * 60 + minutes) * 60.0 + rest
    if seconds <= 0:
        raise ConfigurationError(
            f"--time-limit {text}: expected minutes above 0 (90), [days-]hours:minutes:seconds (23:30:00), or none"
        )
    return seconds


def time_left(time_limit: str, started: float) -> str:
    """What is left now of a time limit that counts from ``started`` (seconds since 1970), to be given to another process.

    As :func:`find_deadline` takes it: in minutes, or ``none``. At least a second, on which that process stops in good order.
    """
    if time_limit.lower() == "none":
        return time_limit
    seconds = read_time_limit(time_limit) - (time.time() - started)
    return f"{max(1.0, seconds) / 60:.2f}"


def find_deadline(
    time_limit: str | None = None, started: float | None = None, environment: Mapping[str, str] | None = None
) -> Deadline | None:
    """The earliest end that is known: ``time_limit`` from ``started`` on, and the end of the Slurm job this runs in.

    Args:
        time_limit: as :func:`read_time_limit` takes it; ``none``: no end, not even Slurm's; None: Slurm's, if any.
        started: seconds since 1970; None: now.
        environment: where Slurm's ``SLURM_JOB_END_TIME`` (seconds since 1970; its sbatch sets it) is looked for, if not in
            this process's. One in the past belongs to a job that was prolonged, or to another, and is passed over.
    """
    if time_limit is not None and time_limit.lower() == "none":
        return None
    now = time.time() if started is None else started
    deadlines = []
    if time_limit is not None:
        deadlines.append(Deadline(now + read_time_limit(time_limit), f"the time limit of {time_limit}"))
    end = (os.environ if environment is None else environment).get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        if int(end) > now:
            deadlines.append(Deadline(float(end), "the end of the Slurm job"))
        else:
            logger.warning("SLURM_JOB_END_TIME is in the past; it is passed over")
    return min(deadlines, key=lambda deadline: deadline.at, default=None)


def signals_to_heed() -> tuple[signal.Signals, ...]:
    """The signals that ask for a stop; not SIGHUP where it is ignored, which is what ``nohup`` is for."""
    ignored = [number for number in SIGNALS if number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN]
    return tuple(number for number in SIGNALS if number not in ignored)


# -- whether to stop -------------------------------------------------------------------------------------------------------


class StopRequest:
    """Whether the run was asked to stop, and by what.

    Args:
        deadline: when the run has to be over, or None.
        clock: gives seconds since 1970.

    Attributes:
        reason: a signal's name or the deadline's reason; None as long as nobody asked.
    """

    def __init__(self, deadline: Deadline | None = None, clock: Callable[[], float] = time.time) -> None:
        self.deadline = deadline
        self.clock = clock
        self.reason: str | None = None
        self._told = False
        self._asked_at = clock()
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._saving: float | None = None

    def asked(self) -> bool:
        """Whether to stop now. To be called once after each step: the time between two calls is how long a step takes."""
        now = self.clock()
        self._steps.append(now - self._asked_at)
        self._asked_at = now
        if self.reason is None and self.deadline is not None and now + self.reserve >= self.deadline.at:
            self.reason = self.deadline.reason
        if self.reason is not None and not self._told:
            self._told = True
            again = " (Ctrl-C once more to stop at once)" if self.reason == "SIGINT" else ""
            logger.warning("%s: saving and stopping%s", self.reason, again)
        return self.reason is not None

    __bool__ = asked

    @property
    def reserve(self) -> float:
        """Seconds to keep before the deadline: one more step, then saving, for which an earlier write may have to end."""
        saving = _SAVING_UNTIL_SEEN if self._saving is None else self._saving
        return max(self._steps, default=0.0) + 2 * saving + _TO_END

    def saved(self, seconds: float) -> None:
        """Note how long a checkpoint took from its copy to the renamed file; the longest counts."""
        self._saving = max(self._saving or 0.0, seconds)

    def describe(self) -> str | None:
        """When the run will stop by itself, in words; None: when it is done."""
        if self.deadline is None:
            return None
        return f"stops before {datetime.fromtimestamp(self.deadline.at):%Y-%m-%d %H:%M:%S} ({self.deadline.reason})"


@contextmanager
def stop_on_signals(deadline: Deadline | None = None, clock: Callable[[], float] = time.time) -> Iterator[StopRequest]:
    """Note the signals that ask for a stop instead of dying of them. A second Ctrl-C (SIGINT) stops at once.

    The others may come as often as they like: schedulers send several, to all processes of a job. Where handlers can't be
    set, outside the main thread, signals do what they did before.
    """
    request = StopRequest(deadline, clock)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in signals_to_heed()}
    pressed_at: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if pressed_at and time.monotonic() - pressed_at[0] >= _DOUBLE_PRESS:
                signal.signal(signal.SIGINT, before[signal.SIGINT])
                raise KeyboardInterrupt
            pressed_at.append(time.monotonic())
        if request.reason is None:
            request.reason = signal.Signals(number).name  # told after the step: writing from a handler may deadlock

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
