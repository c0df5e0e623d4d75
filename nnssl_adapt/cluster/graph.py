"""A graph of runs: commands that depend on each other, each done when its files say so.

A plain record that knows nothing of schedulers, of fine-tuning or of this program's commands: whatever consists of several
commands can be one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nnssl_adapt.errors import ConfigurationError


@dataclass(frozen=True)
class Resources:
    """What a step asks for.

    Attributes:
        cpus: cores of each process (task).
        gpus: GPUs of each machine: a number, or Slurm's ``TYPE:NUMBER``; ``0`` for none.
        nodes: machines.
        tasks: processes that are started on each machine; more than one are ranks of one training.
        mem: memory of each machine, as Slurm writes it (``48G``); empty: the cluster's default.
        time: time limit in one of Slurm's forms; empty: the cluster's default.
    """

    cpus: int = 8
    gpus: str = "0"
    nodes: int = 1
    tasks: int = 1
    mem: str = ""
    time: str = ""

    @property
    def a_task_for_each_gpu(self) -> Resources:
        """The same with at least as many processes as GPUs."""
        return replace(self, tasks=max(self.tasks, self.num_gpus))

    def rank_words(self, by_slurm: bool) -> tuple[str, ...]:
        """Flags of ``train`` for its processes: Slurm's tasks, or processes that the command starts itself."""
        if self.nodes * self.tasks == 1:
            return ()
        return ("--ranks", "slurm") if by_slurm else ("-num_gpus", str(self.tasks))

    @property
    def num_gpus(self) -> int:
        """GPUs of each machine. Raises ConfigurationError for what is no number of GPUs."""
        number = self.gpus.rpartition(":")[2]
        if not number.isdigit():
            raise ConfigurationError(f"--gpus {self.gpus}: expected a number, or TYPE:NUMBER such as a100:2")
        return int(number)


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step, unique in its graph; it names files.
        group: steps of one group need the same resources and may run at the same time.
        command: arguments of the program (what runs it adds the program itself).
        outputs: the step is done when these files are there, none older than an input.
        inputs: files of other steps that it reads.
        after: groups that have to be done before it starts.
        watch: files and folders that change whenever the step has come further.
        folder: of the run, where its figures and logs are looked for; None: it has none.
    """

    name: str
    group: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()
    watch: tuple[Path, ...] = ()
    folder: Path | None = None

    @property
    def is_done(self) -> bool:
        """Judged by its files, and by nothing that a process said of itself."""
        times = [_time_of(path) for path in self.outputs]
        if None in times:
            return False
        newest = max((time for path in self.inputs if (time := _time_of(path)) is not None), default=0.0)
        return all(time is not None and time >= newest for time in times)

    def progress_mark(self) -> str:
        """A text that is another one whenever the step has come further."""
        digest = hashlib.sha256()
        for path in (*self.watch, *self.outputs):
            digest.update(f"{path}:{_content_of(path)};".encode())
        return digest.hexdigest()[:16]


def _time_of(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _content_of(path: Path) -> str:
    """Names below a folder; a small file's content; a large one's size."""
    try:
        if path.is_dir():
            return " ".join(
                sorted(str(p.relative_to(path)) for p in path.rglob("*") if not p.name.startswith(".unfin"))
            )
        if path.stat().st_size > 1 << 20:
            return str(path.stat().st_size)
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


@dataclass(frozen=True)
class Graph:
    """Steps in an order in which none comes before what it waits for.

    Attributes:
        name: short, for the jobs' names.
        steps: all of them.
        resources: what each group's steps ask for; groups that are not named ask for the default.
        at_once: most steps of a group that run at the same time; 0 or no entry: all.

    Raises ConfigurationError where names are not unique, or a step waits for a group that does not come before it.
    """

    name: str
    steps: tuple[Step, ...]
    resources: Mapping[str, Resources] = field(default_factory=dict)
    at_once: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigurationError(f"steps with the same name: {', '.join(twice)}")
        seen: list[str] = []
        for step in self.steps:
            unknown = [group for group in step.after if group not in seen or group == step.group]
            if unknown:
                raise ConfigurationError(
                    f"step {step.name} waits for {', '.join(unknown)}, which does not come before it"
                )
            seen.append(step.group)

    @property
    def groups(self) -> tuple[str, ...]:
        """In order."""
        return tuple(dict.fromkeys(step.group for step in self.steps))

    def step(self, name: str) -> Step:
        """Raises ConfigurationError where there is none of this name."""
        for step in self.steps:
            if step.name == name:
                return step
        raise ConfigurationError(f"no step {name!r}; there are: {', '.join(step.name for step in self.steps)}")

    def of_group(self, group: str) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.group == group)

    def after(self, group: str) -> tuple[str, ...]:
        """Groups that any step of this one waits for."""
        return tuple(dict.fromkeys(before for step in self.of_group(group) for before in step.after))

    def missing(self) -> tuple[Step, ...]:
        """Steps that are not done, and those that come after one of them: their inputs will change."""
        missing: list[Step] = []
        for step in self.steps:
            waits = any(before.group in step.after for before in missing)
            if (waits and step.inputs) or not step.is_done:
                missing.append(step)
        return tuple(missing)

    # -- files -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "steps": [_plain(asdict(step)) for step in self.steps],
            "resources": {group: asdict(resources) for group, resources in self.resources.items()},
            "at_once": dict(self.at_once),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Graph:
        """What :meth:`to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            name=str(content["name"]),
            steps=tuple(_step_from(entry) for entry in content["steps"]),
            resources={group: Resources(**entry) for group, entry in content["resources"].items()},
            at_once={group: int(number) for group, number in content["at_once"].items()},
        )


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: [str(v) for v in value] if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for key, value in entry.items()
    }


def _step_from(entry: Mapping[str, Any]) -> Step:
    def paths(key: str) -> tuple[Path, ...]:
        return tuple(Path(text) for text in entry[key])

    return Step(
        name=str(entry["name"]),
        group=str(entry["group"]),
        command=_words(entry["command"]),
        outputs=paths("outputs"),
        inputs=paths("inputs"),
        after=_words(entry["after"]),
        watch=paths("watch"),
        folder=None if entry["folder"] is None else Path(entry["folder"]),
    )


def _words(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)
