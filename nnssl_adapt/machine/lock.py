"""One process at a time in a folder: a lock that ends with the process that holds it, however it ends.

Two things say that a folder is in use: a lock of the operating system, and a heartbeat beside it. On network file systems
the first may be known to one machine only (NFS with ``nolock``, Lustre with ``localflock``, BeeGFS without global locks), or
outlive a machine that went down; then the second decides.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from nnssl_adapt.errors import TrainingError, TrainingStopped
from nnssl_adapt.files import explain_write_errors
from nnssl_adapt.machine.heartbeat import STALE, Heartbeat, Holder

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the file in the folder. It stays when it is free again; what counts is whether a process holds it."""

PATIENCE_OF_JOBS = STALE + 120.0
"""Seconds that a Slurm job waits for a folder: an earlier holder that died with its node counts as dead by then."""

_LOOK_EVERY = 2.0
"""Seconds between two looks at a folder that is in use."""


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a fold's folder, on this machine and on others that share the file system.

    Two runs in one folder would overwrite each other's checkpoints. In a Slurm job a folder in use is waited for some minutes
    (:data:`PATIENCE_OF_JOBS`): the other may be what is left of a node that died.

    Raises TrainingError that names the other process; in a Slurm job TrainingStopped, so that it is queued again; OutputError
    if the folder can't be written.
    """
    in_job = bool(os.environ.get("SLURM_JOB_ID"))
    try:
        with held(folder / LOCK, PATIENCE_OF_JOBS if in_job else 0.0, lambda other: _is_of_same_job(other, os.environ)):
            yield
    except InUse as taken:
        if in_job and not _is_of_same_job(taken.holder, os.environ):
            raise TrainingStopped(
                f"{_refusal(folder, taken.holder, os.environ)}. Waited {taken.waited:.0f} s"
            ) from None
        raise TrainingError(_refusal(folder, taken.holder, os.environ)) from None


class InUse(Exception):
    """Another process has the lock.

    Attributes:
        holder: that process, where it is known.
        waited: seconds.
    """

    def __init__(self, holder: Holder | None, waited: float) -> None:
        super().__init__(f"in use by {holder or 'another process'}")
        self.holder = holder
        self.waited = waited


@contextmanager
def held(
    path: Path, patience: float = 0.0, in_vain: Callable[[Holder | None], bool] = lambda holder: False
) -> Iterator[None]:
    """Hold the lock ``path`` (a file that is made if need be), waiting up to ``patience`` seconds for it.

    ``in_vain`` tells for which holders not to wait. Raises InUse, OutputError if the file can't be written.
    """
    me, heartbeat = Holder.here(), Heartbeat(path.with_name(f"{path.name}_heartbeat"))
    with explain_write_errors(path):
        stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 - "a": nothing of it is lost if another holds it
    with stream:
        started = time.monotonic()
        while not _taken(stream, heartbeat, me):
            waited = time.monotonic() - started
            holder = heartbeat.holder()
            if waited >= patience or in_vain(holder):
                raise InUse(holder, waited)
            if waited < _LOOK_EVERY:
                logger.info("%s is in use by %s: waiting", path.parent, holder or "another process")
            time.sleep(min(_LOOK_EVERY, patience))
        with heartbeat.beating(me):
            yield


def _taken(stream: TextIO, heartbeat: Heartbeat, me: Holder) -> bool:
    """Whether the lock is now this process's."""
    locked = _lock(stream)
    other = heartbeat.holder()
    if other is None or (other.machine == me.machine and locked is not None):  # there the lock itself says it
        free = locked is not False
    else:
        free = other.was_before(me) or heartbeat.age() > STALE
        if free:
            logger.info("%s: %s is dead, going on", heartbeat.path.parent, other)
    if free and heartbeat.claim(me, dead=other):
        return True
    if locked:
        _unlock(stream)
    return False


def _lock(stream: TextIO) -> bool | None:
    """Whether the operating system gave the lock; None where it has none to give (Windows, some network file systems)."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:
        return None
    try:
        flock(stream, LOCK_EX | LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second: how some network file systems say it
        return False
    except OSError as error:
        logger.warning("%s can't be locked (%s): only its heartbeat is looked at", Path(stream.name).parent, error)
        return None
    return True


def _unlock(stream: TextIO) -> None:
    from fcntl import LOCK_UN, flock

    with suppress(OSError):
        flock(stream, LOCK_UN)


def _is_of_same_job(holder: Holder | None, environment: Mapping[str, str]) -> bool:
    """Whether another task of this very job holds it: waiting for that one would never end."""
    me = Holder.here(environment)
    return holder is not None and bool(me.job) and (holder.job, holder.restarts) == (me.job, me.restarts)


def _refusal(folder: Path, holder: Holder | None, environment: Mapping[str, str]) -> str:
    message = f"{folder} is in use by {holder or 'another process'}: wait for it or end it"
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks != "1" and "SLURM_PROCID" in environment:
        message += (
            f". If it is another of this job's {tasks} tasks: each was told to train the same fold. Add --ranks slurm to have "
            "them train together, or start one task, with -num_gpus for more GPUs (docs/cluster.md)"
        )
    return message
