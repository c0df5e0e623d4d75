"""What this job may use of its machine: cores, memory, shared memory; how many workers that is, and what killed one.

A machine of 128 cores says nothing about a job of 8. What counts is the least of what the scheduler, the control group
(cgroup, version 1 or 2) and the process's affinity allow.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nnssl_adapt.machine.cgroups import CGROUPS, MEMBERSHIP, cgroup_folders, words_in
from nnssl_adapt.machine.memory import available_memory
from nnssl_adapt.text import size_text

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")

MOST_WORKERS = 12
"""nnU-Net's number beside a GPU. Batches are made several times as fast here, so that it never takes more."""

_BATCHES_AHEAD = 3
"""Batches a worker has finished or in hand."""

_WORKER_BYTES = 500 << 20
"""A worker with its libraries, before it has read anything."""

_READ_TO_BATCH = 4
"""What a worker holds while it makes a batch, in batches: a turned patch is read from a larger box."""

_USABLE_SHARE = 0.8


@dataclass(frozen=True)
class Resources:
    """What one process of a job may use.

    Attributes:
        cores: CPU cores, at least 1, of this process and its workers.
        memory: bytes, None where the system does not say.
        shared_memory: bytes of ``/dev/shm``, through which workers hand over batches; None where there is none.
    """

    cores: int
    memory: int | None
    shared_memory: int | None

    @classmethod
    def here(cls, ranks_on_machine: int = 1) -> Resources:
        """One rank's share of what this job may use of this machine."""
        share = max(1, ranks_on_machine)
        memory, shared = available_memory(), _shared_memory()
        return cls(
            cores=_cores(os.environ, share),
            memory=None if memory is None else memory // share,
            shared_memory=None if shared is None else shared // share,
        )

    def workers(self, device_type: str, batch_bytes: int = 0) -> int:
        """How many processes should make batches of so many bytes.

        Beside a GPU: one less than the cores, between 1 and 12. On a CPU the network needs the cores: none of two, at most
        two of more. Fewer, down to none, where their batches would not fit into the memory.
        """
        count = min(2, self.cores - 1) if self.cores > 2 else 0
        if device_type != "cpu":
            count = max(1, min(MOST_WORKERS, self.cores - 1))
        if self.memory is not None:
            each = _WORKER_BYTES + (_READ_TO_BATCH + _BATCHES_AHEAD) * batch_bytes
            count = min(count, int(_USABLE_SHARE * self.memory / each))
        if self.shared_memory is not None and batch_bytes:
            fitting = int(_USABLE_SHARE * self.shared_memory / (_BATCHES_AHEAD * batch_bytes))
            if fitting < count:
                logger.warning(
                    "/dev/shm has %s free, which is enough for %s instead of %d: batches will be late. Enlarge it "
                    "(docker run --shm-size 8g)",
                    size_text(self.shared_memory),
                    f"{fitting} data worker{'s' * (fitting != 1)}" if fitting else "no data worker",
                    count,
                )
            count = min(count, fitting)
        return count


def default_data_workers(device_type: str, ranks_on_machine: int = 1, batch_bytes: int = 0) -> int:
    """Processes that make batches when nothing else is asked for: of each rank, where several train on this machine.

    ``nnUNet_n_proc_DA`` decides where it is set. Otherwise see :meth:`Resources.workers`.
    """
    requested = os.environ.get("nnUNet_n_proc_DA", "")
    if requested.isdigit():
        return int(requested)
    return Resources.here(ranks_on_machine).workers(device_type, batch_bytes)


# -- cores ---------------------------------------------------------------------------------------------------------------


def _cores(environment: Mapping[str, str], ranks: int) -> int:
    """Of one of so many ranks: the least that affinity, the control group and Slurm leave it.

    Where Slurm started a task for each rank (srun), ``SLURM_CPUS_PER_TASK`` and the affinity are the rank's own. Where one task
    started them all (torchrun), they share these.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tasks = _leading_number(environment.get("SLURM_TASKS_PER_NODE")) or 1
    sharing = 1 if tasks >= ranks else ranks
    of_task = _leading_number(environment.get("SLURM_CPUS_PER_TASK"))
    of_machine = _leading_number(environment.get("SLURM_CPUS_ON_NODE"))
    quota = cgroup_cores()
    limits = [affinity / sharing]
    limits += [] if of_task is None else [of_task / sharing]
    limits += [] if of_machine is None else [of_machine / ranks]
    limits += [] if quota is None else [quota / ranks]
    return max(1, math.floor(min(limits)))


def _leading_number(text: str | None) -> int | None:
    """Of ``8``, and of ``4(x2)``: four on each of two machines."""
    digits = (text or "").partition("(")[0].partition(",")[0]
    return int(digits) if digits.isdigit() and int(digits) > 0 else None


def cgroup_cores(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """The least CPU quota of the control groups around this process, in cores (may be a fraction); None without any."""
    quotas = []
    for folder in cgroup_folders("cpu", root, membership):
        words = words_in(folder / "cpu.max")  # version 2: "200000 100000" or "max 100000"
        quota = words[:2] if words else words_in(folder / "cpu.cfs_quota_us") + words_in(folder / "cpu.cfs_period_us")
        if len(quota) == 2 and all(word.isdigit() for word in quota) and int(quota[1]) > 0:  # -1, max: no quota
            quotas.append(int(quota[0]) / int(quota[1]))
    return min(quotas) if quotas else None


# -- memory --------------------------------------------------------------------------------------------------------------


def _shared_memory(folder: Path = _SHARED_MEMORY) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def memory_kills(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """How many processes of this process's control group were killed for memory so far; 0 where nobody counts."""
    for folder in cgroup_folders("memory", root, membership):
        for name in ("memory.events", "memory.oom_control"):
            words = words_in(folder / name)
            counts = dict(zip(words[::2], words[1::2], strict=False))
            if counts.get("oom_kill", "").isdigit():
                return int(counts["oom_kill"])
    return 0


def why_a_worker_died(message: str, kills_before: int = 0) -> str:
    """The likely cause, in a sentence that says what to do; ``message`` is torch's, ``kills_before`` an earlier count."""
    if "Bus error" in message or "SIGBUS" in message:
        return (
            f"shared memory is full ({_describe_shared_memory()}): enlarge it (docker run --shm-size 8g), or try fewer "
            "--workers"
        )
    killed = memory_kills() - kills_before
    if killed > 0:
        return (
            f"it was killed for memory: the job's limit was reached ({killed} time(s), says its control group): ask the "
            "scheduler for more memory, or try fewer --workers"
        )
    if "Killed" in message or "SIGKILL" in message:
        return "something killed it, most likely the system for want of memory: ask for more, or try fewer --workers"
    return f"the usual cause is too little memory or shared memory ({_describe_shared_memory()}): try fewer --workers"


def _describe_shared_memory() -> str:
    free = _shared_memory()
    return "/dev/shm" if free is None else f"/dev/shm has {size_text(free)} left"
