"""The control groups (cgroups, version 1 and 2) around this process: where Linux writes what a job may use."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cgroup_folders(controller: str, root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> list[Path]:
    """Folders of the process's own group and of all around it, innermost first; some may not exist.

    Version 2 has one tree for everything; of version 1 it is the tree of ``controller`` (``memory``, ``cpu``), which may be
    mounted together with others (``cpu,cpuacct``). In a container the group's path may be the host's, and only the top is there.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        inner = top / path.lstrip("/")
        folders += [inner, *(parent for parent in inner.parents if parent == top or top in parent.parents)]
    return list(dict.fromkeys(folders))


def words_in(path: Path) -> list[str]:
    """The words of such a file; none where it does not exist."""
    try:
        return path.read_text().split()
    except OSError:
        return []
