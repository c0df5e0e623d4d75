"""Signals that ask a command to stop, from its first moment to its last.

Before the training there is nothing to save: the command leaves at once, in the way that says "start me again". During the
training :func:`~nnssl_adapt.training.run.stopping.stop_on_signals` takes over. When everything is done they are ignored: a
process that dies of one then would turn a success into a failure.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from nnssl_adapt.errors import TrainingStopped

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
)
"""Ctrl-C, a scheduler's end of time, what ``sbatch --signal=USR1@120`` sends ahead of it (submitit: USR2), and a terminal
that closed."""

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: stopped as asked; the same command goes on."""

_STUCK = 5.0
"""Seconds after which a main thread that does not react is taken to be in a library: loading it, or waiting for others."""


class StopNow(BaseException):
    """Raised where a signal arrives while nothing is to be saved. No ``except Exception`` on the way may swallow it."""


class _Command:
    """What this process does, for the handlers: ``before`` the training, in it (``training``), or ``over``."""

    def __init__(self) -> None:
        self.phase = "before"
        self.reason: str | None = None


_command: _Command | None = None


def signals_to_heed() -> tuple[signal.Signals, ...]:
    """The signals that ask for a stop; not SIGHUP where it is ignored, which is what ``nohup`` is for."""
    ignored = [number for number in SIGNALS if number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN]
    return tuple(number for number in SIGNALS if number not in ignored)


@contextmanager
def stopping_in_order(for_good: bool = False) -> Iterator[None]:
    """For a command that may be stopped at any moment: put around everything it does, before heavy modules are imported.

    Ctrl-C stays what it is. Outside the main thread, where handlers can't be set, this does nothing.

    Args:
        for_good: this process ends with the command: signals stay ignored to its very end, also while Python takes leave.

    Raises TrainingStopped when a signal came before the training.
    """
    global _command
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    command = _command = _Command()

    def handle(number: int, frame: FrameType | None) -> None:
        if command.phase == "before" and command.reason is None:
            command.reason = signal.Signals(number).name
            raise StopNow

    before = {number: signal.signal(number, handle) for number in signals_to_heed() if number != signal.SIGINT}
    try:
        with _leaving_when_stuck(command):
            yield
    except StopNow:
        raise stopped_before_training(command.reason) from None
    finally:
        command.phase, _command = "over", None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if for_good else handler)


def stopped_before_training(reason: str | None) -> TrainingStopped:
    """The error of a command that a signal stopped before there was anything to save."""
    return TrainingStopped(f"stopped by {reason} before the training began; run the same command again to go on")


def training_begins() -> str | None:
    """From now on signals are somebody else's. Returns the name of one that came and was lost in a library's clean-up."""
    if _command is None:
        return None
    _command.phase = "training"
    return _command.reason


def training_is_over() -> None:
    """Everything is done: from now on the command's handlers ignore what arrives."""
    if _command is not None:
        _command.phase = "over"


@contextmanager
def _leaving_when_stuck(command: _Command) -> Iterator[None]:
    """End the process with :data:`EXIT_CODE` when a signal can't reach its handler before the training.

    Python calls handlers between two of its own instructions. Loading a library from a slow disk, or waiting for ranks that
    have left already, is a single one.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        handled = {int(number) for number in signals_to_heed() if number != signal.SIGINT}
        while received := receiver.recv(1):
            if received[0] not in handled or command.phase != "before":
                continue
            if not left.wait(_STUCK) and command.phase == "before" and command.reason is None:
                with suppress(OSError):
                    os.write(2, b"stopped by a signal before the training began; run the same command again to go on\n")
                os._exit(EXIT_CODE)

    left = threading.Event()
    watcher = threading.Thread(target=watch, name="signals before the training", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        sender.close()  # the watcher reads the end of the stream
        watcher.join(1)
        receiver.close()
