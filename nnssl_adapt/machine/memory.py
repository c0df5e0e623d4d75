"""Memory of this machine: how much there is to use, and using it again instead of asking for more."""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path

from nnssl_adapt.machine.cgroups import CGROUPS, MEMBERSHIP, cgroup_folders

logger = logging.getLogger(__name__)

_UNLIMITED = 1 << 60
"""Version 1 of cgroups writes a number near 2^63 where there is no limit."""

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def available_memory() -> int | None:
    """Bytes that new processes may use: what the machine has left, or the job's own limit (cgroup, Slurm) if that is less.

    None where the system does not say.
    """
    limits = [_machine_memory(), _cgroup_memory()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _machine_memory(source: Path = Path("/proc/meminfo")) -> int | None:
    try:
        entries = dict(line.split(":", 1) for line in source.read_text().splitlines() if ":" in line)
        return int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _cgroup_memory(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """The least that any control group around this process has left, None without a limit."""
    left: list[int] = []
    for folder in cgroup_folders("memory", root, membership):
        for limit_name, usage_name, cache_name in (
            ("memory.max", "memory.current", "file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
        ):
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and usage is not None and limit < _UNLIMITED:
                # Pages of files that were read count as used, but are given up when memory gets short.
                left.append(limit - max(0, usage - _statistic(folder / "memory.stat", cache_name)))
    return max(0, min(left)) if left else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name)
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def reuse_freed_memory() -> bool:
    """Make this process keep the memory of freed arrays for the next ones; whether it worked (glibc only).

    By default every large array is mapped again, and the kernel clears each page at its first touch, which costs several
    times what is computed on it. For worker processes only: it changes the allocator of the whole process.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))


def give_back_freed_memory() -> None:
    """Return to the system what :func:`reuse_freed_memory` kept."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
