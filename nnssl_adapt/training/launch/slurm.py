"""The ranks of a training that ``srun`` started, one task each, by Slurm's own variables."""

from __future__ import annotations

import re
from collections.abc import Mapping

from nnssl_adapt.errors import ConfigurationError

_FIRST_PORT, _PORTS = 20000, 20000
"""Ports from which each job step gets one of its own, below those that Linux hands out by itself."""


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that ``torchrun`` would set, for the task of a job step that this process is.

    ``RANK`` and ``WORLD_SIZE`` are the task's number and their count in the step. ``LOCAL_WORLD_SIZE`` is that of this node,
    which may differ from others' (``SLURM_STEP_TASKS_PER_NODE``, such as ``2(x2)`` or ``3,1``). ``MASTER_ADDR`` is the step's
    first node, where rank 0 is; it and ``MASTER_PORT`` stay what they are where they are set.

    Raises ConfigurationError where no ``srun`` started this process.
    """
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ConfigurationError(
            f"--ranks slurm: {', '.join(missing)} is not set: start the command with srun, one task for each GPU"
        )
    rank, local_rank, node, size = (environment[name] for name in names[:4])
    per_node = tasks_per_node(environment[names[4]])
    if not int(node) < len(per_node):
        raise ConfigurationError(
            f"--ranks slurm: SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={environment[names[4]]} counts {len(per_node)} "
            "nodes"
        )
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
    job, step = (int(environment.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": str(per_node[int(node)]),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_FIRST_PORT + (7 * job + step) % _PORTS),
    }


def tasks_per_node(text: str) -> list[int]:
    """``2(x2)`` is [2, 2], ``3,1`` is [3, 1]. Raises ConfigurationError for what Slurm does not write."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigurationError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected such as 2(x2) or 3,1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(names: str) -> str:
    """The first name of a list as Slurm writes it: ``node003`` of ``node[003-005,9],other1``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", names)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else names)
