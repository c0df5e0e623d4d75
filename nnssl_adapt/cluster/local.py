"""Running a submission on this machine, without Slurm: one step after another, or as many as there are GPUs."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nnssl_adapt.cluster.graph import Resources, Step
from nnssl_adapt.cluster.rounds import Verdict, begin_rounds, end_round
from nnssl_adapt.cluster.scripts import PROGRAM
from nnssl_adapt.cluster.submission import Submission
from nnssl_adapt.errors import ConfigurationError, NnsslAdaptError, TrainingStopped
from nnssl_adapt.files import make_folder, write_text
from nnssl_adapt.machine.lock import InUse, held
from nnssl_adapt.training.run.stopping import StopRequest, stop_on_signals

logger = logging.getLogger(__name__)

_LOOK_EVERY = 0.2
"""Seconds between two looks at the processes."""


class StepFailed(NnsslAdaptError):
    """A step of a submission failed; those after it were not started."""


def gpu_slots(gpus: Sequence[str], each: int) -> list[tuple[str, ...]]:
    """Groups of so many GPUs, one for each step that runs at the same time; without GPUs a single empty one.

    Raises ConfigurationError where there are too few for one.
    """
    if each == 0:
        return [()]
    if len(gpus) < each:
        raise ConfigurationError(f"--gpus {each}: this machine shows {len(gpus) or 'no'} GPU{'s' * (len(gpus) != 1)}")
    return [tuple(gpus[start : start + each]) for start in range(0, len(gpus) - each + 1, each)]


@dataclass
class LocalRun:
    """Runs what is missing of a submission.

    Attributes:
        submission: what to run.
        slots: GPUs for each step that runs at the same time, as :func:`gpu_slots` gives them.
        setup: a file that is sourced before each step, or None.
    """

    submission: Submission
    slots: Sequence[tuple[str, ...]]
    setup: Path | None = None
    _running: dict[str, tuple[subprocess.Popen[bytes], int]] = field(default_factory=dict)
    _failed: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Until all is done, or nothing more can be.

        Raises:
            TrainingStopped: a signal asked for it; the steps were asked to stop, too, and go on next time.
            StepFailed: steps failed.
            ConfigurationError: somebody else runs it.
        """
        folder = self.submission.folder
        try:
            with held(folder / ".running"), stop_on_signals() as stop:
                stop.begin()
                for step in self.submission.graph.missing():
                    begin_rounds(folder, step)
                self._run(stop)
        except InUse as used:
            raise ConfigurationError(f"{folder.parent.name} is being run by {used.holder}", path=folder) from None
        if self._failed:
            said = "; ".join(f"{name}: {reason} (see {self._log(name)})" for name, reason in self._failed.items())
            raise StepFailed(
                f"{len(self._failed)} of {len(self.submission.graph.steps)} steps failed: {said}", path=folder
            )

    def _run(self, stop: StopRequest) -> None:
        waiting = list(self.submission.graph.missing())
        told = False
        try:
            while self._running or (waiting and not told):
                if stop.reason is not None and not told:
                    told = True
                    logger.warning("%s: stopping %d steps", stop.reason, len(self._running))
                    self._signal(signal.SIGTERM)
                if not told:
                    waiting = self._start_what_can(waiting)
                    if not self._running:
                        break
                waiting += self._collect(again=not told)
                time.sleep(_LOOK_EVERY)
        finally:
            self._end()
        if told:
            raise TrainingStopped(f"stopped by {stop.reason}; the same command goes on")

    def _start_what_can(self, waiting: Sequence[Step]) -> list[Step]:
        """Start steps as long as there are slots; returns those that still wait. Those after a failed one don't any more."""
        unfinished = {step.group for step in waiting} | {
            self.submission.graph.step(name).group for name in self._running
        }
        blocked = {self.submission.graph.step(name).group for name in self._failed}
        left = []
        for step in waiting:
            if blocked & set(step.after):
                blocked.add(step.group)
                logger.warning("%s is not started: a step before it failed", step.name)
            elif unfinished & set(step.after) or not self._has_room(step.group):
                left.append(step)
            else:
                self._start(step)
        return left

    def _has_room(self, group: str) -> bool:
        graph = self.submission.graph
        most = graph.at_once.get(group, 0) or len(self.slots)
        if not graph.resources.get(group, Resources()).num_gpus:
            most = 1  # it takes all cores
        return len(self._running) < min(most, len(self.slots))

    def _start(self, step: Step) -> None:
        slot = next(
            number for number in range(len(self.slots)) if number not in (used for _, used in self._running.values())
        )
        environment = dict(os.environ)
        if self.slots[slot] and self.submission.graph.resources.get(step.group, Resources()).num_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.slots[slot])
        command = [*PROGRAM, *step.command]
        if self.setup is not None:
            command = ["bash", "-c", f"source {shlex.quote(str(self.setup))} && exec {shlex.join(command)}"]
        log = self.submission.log(step)
        make_folder(log.parent)
        logger.info("%s starts; its output goes to %s", step.name, log)
        with open(log, "ab") as stream:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is passed on, and must not come twice
            )
        self._running[step.name] = (process, slot)
        write_text(self.submission.folder / "running" / step.name, f"{process.pid}\n")

    def _collect(self, again: bool) -> list[Step]:
        """Judge the rounds that ended; returns the steps that need another one."""
        once_more = []
        for name, (process, _) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[name]
            (self.submission.folder / "running" / name).unlink(missing_ok=True)
            step = self.submission.graph.step(name)
            verdict, reason = end_round(self.submission.folder, step, code if code >= 0 else 128 - code, counts=again)
            logger.info("%s: %s", name, reason)
            if verdict is Verdict.FAILED:
                self._failed[name] = reason
            elif verdict is Verdict.AGAIN and again:
                once_more.append(step)
        return once_more

    def _signal(self, number: int) -> None:
        for process, _ in self._running.values():
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def _end(self) -> None:
        """Leave nobody behind."""
        for process, _ in self._running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in self._running:
            (self.submission.folder / "running" / name).unlink(missing_ok=True)

    def _log(self, name: str) -> Path:
        return self.submission.log(self.submission.graph.step(name))


def gpus_here() -> list[str]:
    """The GPUs that processes started here can be given, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]
