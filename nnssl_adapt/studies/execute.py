"""Doing a study's runs on this machine, one after another, each a process of its own with its output in a file."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nnssl_adapt.errors import TrainingError, TrainingStopped
from nnssl_adapt.files import make_folder
from nnssl_adapt.studies.runs import Preparation, StudyRun

logger = logging.getLogger(__name__)

_STOPPED = 75
"""Exit code of a training that was asked to stop and has saved."""


def run_here(preparations: Sequence[Preparation], runs: Sequence[StudyRun], folder: Path) -> None:
    """Preprocess and train what files say is missing.

    Raises:
        TrainingStopped: a signal came; the training has saved.
        TrainingError: runs failed. The others were done all the same; a failed preparation fails its runs.
    """
    logs = make_folder(folder / "logs")
    failed: list[str] = []
    unprepared: set[str] = set()
    for preparation in preparations:
        if preparation.plans_file.is_file():
            continue
        logger.info("preprocessing for %s", preparation.plans_name)
        if not _do(["preprocess", *preparation.words], logs / f"{preparation.plans_name}.txt"):
            unprepared.add(preparation.plans_name)
            failed.append(f"preprocessing {preparation.plans_name}: {logs / f'{preparation.plans_name}.txt'}")
    for number, run in enumerate(runs, 1):
        if run.is_done or run.plans_name in unprepared:
            continue
        logger.info("run %d of %d: %s", number, len(runs), run.key)
        log = logs / f"{run.key}.txt"
        if not _do(["train", *run.words, "--c", "auto"], log) or not run.is_done:
            failed.append(f"{run.key}: {log}")
    if failed:
        lines = "".join(f"\n  {line}" for line in failed)
        raise TrainingError(
            f"{len(failed)} step(s) of the study failed; see their output, and run the same command again{lines}",
            mistakes=failed,
        )


def _do(words: Sequence[str], log: Path) -> bool:
    """Run a command of ours; its output is appended to ``log``. A signal to us is passed on, and the end awaited."""
    with open(log, "ab") as output:
        command = [sys.executable, "-m", "nnssl_adapt.cli.main", *words]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        with _passed_on(process) as signals:
            code = process.wait()
    if signals or code == _STOPPED:  # a training that was nearly done ends in good order all the same
        raise TrainingStopped(f"the study was stopped while it did '{words[0]}'; run the same command again to go on")
    return code == 0


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """While the block runs, signals that ask to stop go to ``process`` instead of ending us; yields those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
