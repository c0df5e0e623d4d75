"""Stopping in good order: when a scheduler or a person asks for it, or the time that was given is nearly over.

A run that is asked to stop finishes its step, saves and raises :class:`~nnssl_adapt.errors.TrainingStopped`, which the
command line turns into an exit code of its own, so that a scheduler can tell "start me again" from "I failed".
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType

from nnssl_adapt.training.run.deadline import Deadline
from nnssl_adapt.training.run.signals import (
    StopNow,
    signals_to_heed,
    stopped_before_training,
    training_begins,
    training_is_over,
)

logger = logging.getLogger(__name__)

STOPPED = "stopped.json"
"""File in the fold's folder: epoch (from 0) and step of it at which the last round was stopped."""

_RECENT = 50
"""Steps that the longest step is looked for in: the first ones, which compile and tune, don't count for ever."""

_TO_END = 10.0
"""Seconds for what comes after saving: closing files, ending worker processes."""

_SAVING_UNTIL_SEEN = 20.0
"""Seconds that saving is taken to need before the first checkpoint has shown it."""

_DOUBLE_PRESS = 1.0
"""Seconds within which a second Ctrl-C is the first one's echo: launchers pass on what the terminal sent everybody."""


class StopRequest:
    """Whether the run was asked to stop, and by what.

    Args:
        deadline: when the run has to be over, or None.
        clock: gives seconds since 1970.

    Attributes:
        reason: a signal's name or the deadline's reason; None as long as nobody asked.
        begun: whether something may be lost by leaving at once; see :meth:`begin`.
    """

    def __init__(self, deadline: Deadline | None = None, clock: Callable[[], float] = time.time) -> None:
        self.deadline = deadline
        self.clock = clock
        self.reason: str | None = None
        self.begun = False
        self._told = False
        self._asked_at = clock()
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._saving: float | None = None

    def begin(self) -> None:
        """The training or validation begins: from now on :meth:`asked` is called again and again, and heeded."""
        self.begun = True

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
def stop_on_signals(
    deadline: Deadline | None = None, clock: Callable[[], float] = time.time, *, alone: bool = True
) -> Iterator[StopRequest]:
    """Note the signals that ask for a stop instead of dying of them. A second Ctrl-C (SIGINT) stops at once.

    The others may come as often as they like: schedulers send several, to all processes of a job. Where handlers can't be
    set, outside the main thread, signals do what they did before.

    Args:
        deadline: when the run has to be over, or None.
        clock: gives seconds since 1970.
        alone: no other process waits for this one: as long as nothing has begun, a signal ends the block at once.

    Raises TrainingStopped when a signal came before anything had begun.
    """
    request = StopRequest(deadline, clock)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    pressed_at: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if pressed_at and time.monotonic() - pressed_at[0] >= _DOUBLE_PRESS:
                signal.signal(signal.SIGINT, before[signal.SIGINT])
                raise KeyboardInterrupt
            pressed_at.append(time.monotonic())
        if request.reason is None:
            request.reason = signal.Signals(number).name  # told after the step: writing from a handler may deadlock
            if alone and not request.begun and number != signal.SIGINT:
                raise StopNow

    before = {number: signal.getsignal(number) for number in signals_to_heed()}
    try:
        for number in before:
            signal.signal(number, note)
        request.reason = training_begins() or request.reason
        if request.reason is not None and alone:
            raise StopNow
        yield request
        training_is_over()
    except StopNow:
        raise stopped_before_training(request.reason) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
