"""A submission: a graph of runs, the jobs that do them, and the folder in which all of it is written down."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnssl_adapt.cluster import slurm
from nnssl_adapt.cluster.graph import Graph, Step
from nnssl_adapt.cluster.rounds import begin_rounds
from nnssl_adapt.cluster.scripts import SlurmSettings, group_script, log_name
from nnssl_adapt.errors import ConfigurationError, NnsslAdaptError
from nnssl_adapt.files import make_folder, write_json, write_text
from nnssl_adapt.machine.heartbeat import Holder
from nnssl_adapt.machine.lock import InUse, held
from nnssl_adapt.paths import find_dataset_name, results_folder

FOLDER = "submission"
"""Name of a submission's folder, beside what it makes."""

_RECORD = "jobs.json"
_CANCELLED = "cancelled"

SLURM, LOCAL = "slurm", "local"
CLUSTERS = (SLURM, LOCAL)


@dataclass(frozen=True)
class Submission:
    """What was submitted, as ``jobs.json`` has it.

    Attributes:
        folder: of the submission.
        graph: of the runs.
        cluster: ``slurm`` or ``local``.
        command: that asked for it.
        versions: of what was installed then.
        jobs: number of each step's job, such as ``123`` or ``123_4``; a local step has none.
        submitted: seconds since 1970 when it last was.
    """

    folder: Path
    graph: Graph
    cluster: str = SLURM
    command: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    jobs: Mapping[str, str] = field(default_factory=dict)
    submitted: float = 0.0

    @classmethod
    def load(cls, folder: Path) -> Submission:
        """Raises ConfigurationError where there is none, or its record is damaged."""
        path = folder / _RECORD
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                folder=folder,
                graph=Graph.from_dict(content["graph"]),
                cluster=str(content["cluster"]),
                command=tuple(content["command"]),
                versions=dict(content["versions"]),
                jobs=dict(content["jobs"]),
                submitted=float(content["submitted"]),
            )
        except FileNotFoundError:
            raise ConfigurationError(
                f"{folder} has no submission: nothing was submitted under this name", path=path
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path} is damaged ({type(error).__name__}: {error}): move it away and submit again; what is done is not "
                "done again",
                path=path,
            ) from error

    @classmethod
    def exists(cls, folder: Path) -> bool:
        return (folder / _RECORD).is_file()

    def save(self) -> None:
        write_json(
            self.folder / _RECORD,
            {
                "cluster": self.cluster,
                "command": list(self.command),
                "versions": dict(self.versions),
                "submitted": self.submitted,
                "jobs": dict(self.jobs),
                "graph": self.graph.to_dict(),
            },
        )

    def log(self, step: Step) -> Path:
        """Where a step's output goes."""
        steps = self.graph.of_group(step.group)
        return self.folder / "logs" / log_name(step.group, steps.index(step), len(steps))

    def script(self, group: str) -> Path:
        """A group's script; its number says when its turn is."""
        return self.folder / f"{self.graph.groups.index(group) + 1:02d}_{group}.sh"

    @property
    def is_cancelled(self) -> bool:
        return (self.folder / _CANCELLED).exists()

    # -- what lives ----------------------------------------------------------------------------------------------------

    def queued(self) -> dict[str, slurm.Job]:
        """Steps whose jobs Slurm has in its queue. Raises SlurmError."""
        if self.cluster != SLURM or not self.jobs:
            return {}
        jobs = slurm.queued(self.jobs.values())
        return {step: jobs[number] for step, number in self.jobs.items() if number in jobs}

    def refuse_if_alive(self) -> None:
        """Raise ConfigurationError if any of its jobs waits or runs."""
        alive = self.queued()
        if alive:
            first = ", ".join(
                f"{step} is {job.state.lower()} (job {job.number})" for step, job in list(alive.items())[:3]
            )
            more = f" and {len(alive) - 3} more" if len(alive) > 3 else ""
            raise ConfigurationError(
                f"{self.folder.parent.name} is submitted already: {first}{more}. See --status, or end it with --cancel",
                path=self.folder,
                next_command="nnssl-adapt submit … --status",
            )
        if self.cluster == LOCAL and (holder := self.local_runner()):
            raise ConfigurationError(
                f"{self.folder.parent.name} is being run by {holder}: see --status, or end it with --cancel",
                path=self.folder,
            )

    def local_runner(self) -> Holder | None:
        """Which process runs it without Slurm, on this machine or another, if any does."""
        try:
            with held(self.folder / ".running"):
                return None
        except InUse as used:
            return used.holder

    def renewed(self, settings: SlurmSettings) -> Submission:
        """Write its scripts and record into its folder; jobs of an earlier one, which must have ended, stay known.

        Raises ConfigurationError if any job of the earlier one waits or runs.
        """
        renewed = self
        if Submission.exists(self.folder):
            earlier = Submission.load(self.folder)
            earlier.refuse_if_alive()
            known = {step.name for step in self.graph.steps}
            jobs = {step: number for step, number in earlier.jobs.items() if step in known}
            kept = jobs if self.cluster == earlier.cluster else {}
            renewed = replace(self, jobs=kept, submitted=earlier.submitted)
        make_folder(self.folder)
        for script in self.folder.glob("[0-9][0-9]_*.sh"):
            script.unlink()
        shutil.rmtree(self.folder / "running", ignore_errors=True)
        if self.cluster == SLURM:
            renewed.write_scripts(settings)
        renewed.save()
        return renewed

    # -- from here to Slurm and back -----------------------------------------------------------------------------------

    def write_scripts(self, settings: SlurmSettings) -> None:
        """Write a numbered script for each group."""
        make_folder(self.folder / "logs")
        for group in self.graph.groups:
            write_text(self.script(group), group_script(self.folder, self.graph, group, settings, self.command))

    def submit(self) -> Submission:
        """Submit the steps that are missing; returns the submission with their jobs.

        Raises SlurmError with sbatch's own words; what was submitted until then is cancelled.
        """
        missing = self.graph.missing()
        (self.folder / _CANCELLED).unlink(missing_ok=True)
        numbers: dict[str, str] = {}
        jobs: dict[str, str] = {}
        try:
            for group in self.graph.groups:
                steps = [step for step in self.graph.of_group(group) if step in missing]
                if not steps:
                    continue
                for step in steps:
                    begin_rounds(self.folder, step)
                before = [numbers[name] for name in self.graph.after(group) if name in numbers]
                numbers[group] = slurm.sbatch(self.script(group), self._flags(group, steps, before))
                jobs |= self._numbered(group, steps, numbers[group])
        except (NnsslAdaptError, KeyboardInterrupt):
            slurm.cancel(numbers.values())
            raise
        new = replace(self, jobs={**self.jobs, **jobs}, submitted=time.time())
        new.save()
        return new

    def _flags(self, group: str, steps: Sequence[Step], before: Sequence[str]) -> list[str]:
        everyone = self.graph.of_group(group)
        flags = ["--kill-on-invalid-dep=yes"]
        if before:
            flags.append(f"--dependency=afterok:{':'.join(before)}")
        if len(everyone) > len(steps):  # of an array, only the tasks that are missing
            most = self.graph.at_once.get(group, 0)
            tasks = ",".join(str(everyone.index(step)) for step in steps)
            flags.append(f"--array={tasks}" + (f"%{most}" if most else ""))
        return flags

    def _numbered(self, group: str, steps: Sequence[Step], number: str) -> dict[str, str]:
        everyone = self.graph.of_group(group)
        if len(everyone) == 1:
            return {steps[0].name: number}
        return {step.name: f"{number}_{everyone.index(step)}" for step in steps}

    def cancel(self) -> int:
        """Cancel what waits or runs, so that nothing of it comes back; returns the number of jobs (without Slurm: of runners).

        Raises SlurmError; ConfigurationError where it runs on another machine, without Slurm.
        """
        write_text(self.folder / _CANCELLED, time.strftime("%Y-%m-%d %H:%M:%S\n"))
        if self.cluster == LOCAL:
            return self._end_runner()
        alive = self.queued()
        slurm.cancel(job.number for job in alive.values())
        return len(alive)

    def _end_runner(self) -> int:
        runner = self.local_runner()
        if runner is None:
            return 0
        if runner.machine != platform.node():
            raise ConfigurationError(
                f"{self.folder.parent.name} is being run by {runner}: cancel it there", path=self.folder
            )
        os.kill(runner.process, signal.SIGTERM)
        return 1


@contextmanager
def only_submitter(folder: Path) -> Iterator[None]:
    """Two commands that submit the same at the same time would submit it twice. Raises ConfigurationError for the second."""
    try:
        with held(make_folder(folder) / ".submitting"):
            yield
    except InUse as used:
        raise ConfigurationError(
            f"{folder.parent.name} is just being submitted by {used.holder}", path=folder
        ) from None


def versions_here(package: str) -> dict[str, str]:
    """What is installed, for the record."""
    return {"nnssl_adapt": package, "python": platform.python_version(), "executable": sys.executable}


def find_submissions(dataset: int | str, name: str | None = None) -> list[Submission]:
    """Submissions of a dataset, those of a name (``-n``) where one is given. Raises ConfigurationError where there is none."""
    folder = results_folder() / find_dataset_name(dataset)
    found = [Submission.load(path.parent) for path in sorted(folder.glob(f"*/{FOLDER}/jobs.json"))]
    if name is not None:
        found = [submission for submission in found if submission.graph.name.rpartition("-")[0] == name]
    if not found:
        raise ConfigurationError(f"{folder} has no submission" + (f" of the name {name}" if name else ""), path=folder)
    return found
