"""One run at a time in a fold's folder: a lock that ends with the process that holds it, however it ends."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from nnssl_adapt.errors import TrainingError
from nnssl_adapt.files import explain_write_errors

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the file in the fold's folder. It stays when the run is over; what counts is whether a process holds it."""


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a fold's folder, on this machine and on others that share the file system.

    The operating system holds the lock, and lets go of it when this process ends. Two runs in one folder would overwrite each
    other's checkpoints. Where locks can't be had (Windows, some network file systems) a run goes on without.

    Raises TrainingError that names the other process, OutputError if the folder can't be written.
    """
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # Windows
        yield
        return
    path = folder / LOCK
    with explain_write_errors(path):
        stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 - "a": who holds it, if others do, is still to be read
    with stream:
        try:
            flock(stream, LOCK_EX | LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # the second: how some network file systems say it
            raise TrainingError(_refusal(folder, path, os.environ)) from error
        except OSError as error:
            logger.warning("%s can't be locked (%s): make sure that nothing else trains this fold", folder, error)
        stream.truncate(0)
        stream.write(_this_process(os.environ))
        stream.flush()
        yield
        stream.truncate(0)


def _this_process(environment: Mapping[str, str]) -> str:
    job = environment.get("SLURM_JOB_ID")
    of_job = f", Slurm job {job}" if job else ""
    return f"process {os.getpid()} on {platform.node()}{of_job}, since {datetime.now():%Y-%m-%d %H:%M}"


def _refusal(folder: Path, path: Path, environment: Mapping[str, str]) -> str:
    try:
        holder = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        holder = ""
    message = f"{folder} is in use by {holder or 'another process'}: wait for it or end it"
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks != "1" and "SLURM_PROCID" in environment:
        message += (
            f". If it is another of this job's {tasks} tasks: each was told to train the same fold. Start one task, with "
            "-num_gpus for more GPUs, or set RANK and the like for each (docs/cluster.md)"
        )
    return message
