"""Scripts for Slurm: one for each group of a graph, to be read and, where a cluster is special, edited."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_adapt.cluster.graph import Graph, Resources, Step

PROGRAM = (sys.executable, "-m", "nnssl_adapt.cli.main")
"""What a step's command is given to: this very installation, wherever a job starts."""

_AFTER_A_ROUND = (sys.executable, "-m", "nnssl_adapt.cli.after_round")

KEPT_VARIABLES = (
    "nnUNet_raw",
    "nnUNet_preprocessed",
    "nnUNet_results",
    "nnssl_pretrained_models",
    "HF_HOME",
    "HF_HUB_CACHE",
    "XDG_CACHE_HOME",
    "WANDB_MODE",
    "PYTHONPATH",
)
"""Variables that a job needs as they are here; it may get none (``--export=NONE``)."""

_WAIT_FOR_RANKS = 60
"""Seconds after which the ranks of one that ended are ended: they would wait for it."""


@dataclass(frozen=True)
class SlurmSettings:
    """What holds for all jobs of a submission.

    Attributes:
        partition, account: the cluster's names; empty for its defaults.
        setup: a file that every job sources first (modules, a virtual environment), or None.
        flags: more flags of sbatch, as typed.
    """

    partition: str = ""
    account: str = ""
    setup: Path | None = None
    flags: tuple[str, ...] = ()


def group_script(folder: Path, graph: Graph, group: str, settings: SlurmSettings, made_by: Sequence[str]) -> str:
    """The text of a group's script.

    Args:
        folder: of the submission.
        graph: all of it.
        group: which; several steps make an array whose tasks are numbered as the group's steps are.
        settings: of all jobs.
        made_by: the command that asked for it, for the reader.
    """
    steps, resources = graph.of_group(group), graph.resources.get(group, Resources())
    variables = [f"export {name}={shlex.quote(value)}" for name, value in _kept(os.environ).items()]
    setup = [] if settings.setup is None else _setup_lines(settings.setup)
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in _directives(folder, graph, group, settings)),
            f"# Made by: {' '.join(made_by)}",
            "# It may be submitted by hand, too; flags given to sbatch win over the lines above.",
            "",
            *variables,
            *setup,
            *_choice(steps),
            "",
            "# Slurm tells the training itself when to stop; this shell lives on, to queue the job again.",
            "trap : TERM HUP USR1 USR2",
            f'{_srun(resources)} {shlex.join(PROGRAM)} "${{command[@]}}"',
            f'{shlex.join(_AFTER_A_ROUND)} {shlex.quote(str(folder))} "$step" "$?"',
            "exit $?",
            "",
        ]
    )


def _directives(folder: Path, graph: Graph, group: str, settings: SlurmSettings) -> list[str]:
    resources, count = graph.resources.get(group, Resources()), len(graph.of_group(group))
    log = log_name(group, "%a" if count > 1 else "0", count)
    most = graph.at_once.get(group, 0)
    optional = {
        "--partition": settings.partition,
        "--account": settings.account,
        "--time": resources.time,
        "--mem": resources.mem,
        "--gres": f"gpu:{resources.gpus}" if resources.num_gpus else "",
        "--array": f"0-{count - 1}" + (f"%{most}" if most else "") if count > 1 else "",
    }
    return [
        f"--job-name={graph.name}-{group}",
        f"--output={shlex.quote(str(folder / 'logs' / log))}",
        "--open-mode=append",
        "--requeue",
        f"--nodes={resources.nodes}",
        f"--ntasks-per-node={resources.tasks}",
        f"--cpus-per-task={resources.cpus}",
        *(f"{flag}={value}" for flag, value in optional.items() if value),
        *settings.flags,
    ]


def log_name(group: str, index: int | str, count: int) -> str:
    """Name of the log of a group's step."""
    return f"{group}-{index}.txt" if count > 1 else f"{group}.txt"


def _kept(environment: Mapping[str, str]) -> dict[str, str]:
    kept = {name: environment[name] for name in KEPT_VARIABLES if environment.get(name)}
    return {**kept, "HF_HUB_OFFLINE": "1"}  # what is needed of the hub was fetched when this was submitted


def _setup_lines(setup: Path) -> list[str]:
    quoted = shlex.quote(str(setup))
    return [f"source {quoted} || {{ echo 'error: --setup {setup} failed' >&2; exit 1; }}"]


def _choice(steps: Sequence[Step]) -> list[str]:
    """Lines that set ``step`` and ``command``."""
    if len(steps) == 1:
        return [f"step={shlex.quote(steps[0].name)}", f"command=({shlex.join(steps[0].command)})"]
    cases = [
        f"    {number}) step={shlex.quote(step.name)}; command=({shlex.join(step.command)}) ;;"
        for number, step in enumerate(steps)
    ]
    return ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]


def _srun(resources: Resources) -> str:
    """Newer Slurms' srun does not know the job's ``--cpus-per-task``, and takes over ``--export=NONE``."""
    ranks = resources.nodes * resources.tasks
    together = f" --wait={_WAIT_FOR_RANKS}" if ranks > 1 else ""
    return f'srun --export=ALL --cpus-per-task="$SLURM_CPUS_PER_TASK" --ntasks={ranks}{together}'
