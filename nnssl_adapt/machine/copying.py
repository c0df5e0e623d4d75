"""A process that copies files to a disk of this machine, checks them, and removes them when nobody wants them any more.

It is a process of its own so that the copies also vanish when the process that wanted them is killed: its input then ends.
Where a scheduler kills both at once, the next one on this machine removes what is left.

``python -m nnssl_adapt.machine.copying`` reads an :class:`Order` as a line of JSON, works until its input ends, and writes what
it has to tell as lines of JSON: ``{"begins": …}``, then ``{"ended": …}``, or ``{"impossible": reason}``.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isal import isal_zlib

from nnssl_adapt.errors import ConfigurationError

SPARE = 1 << 30
"""Bytes of the disk that are left to others."""

NONE = "none"
"""What ``--stage`` takes for: no copies."""

_LOCK = ".lock"
_BLOCK = 1 << 22

Group = tuple[tuple[str, int | None], ...]
"""Files that belong together, each with its CRC-32 where that is known; the last is what says that all are there."""


@dataclass(frozen=True)
class Stage:
    """Where copies may be put.

    Attributes:
        folder: on a disk of each machine; in it, each training makes a folder of its own.
        whole: whether only if everything fits; else as much as fits.
    """

    folder: Path
    whole: bool = False

    @classmethod
    def of(cls, text: str | None, environment: Mapping[str, str] | None = None) -> Stage | None:
        """What ``--stage`` asks for; None for no copies.

        Args:
            text: a folder, in which variables (``$TMPDIR``) and ``~`` are replaced; ``none``; None: ``SLURM_TMPDIR`` where it
                is set and everything fits.
            environment: where variables are looked for; None: this process's.

        Raises ConfigurationError for a variable that is not set and a folder that depends on where the program was started.
        """
        environment = os.environ if environment is None else environment
        if text is None:
            folder = environment.get("SLURM_TMPDIR", "")
            return cls(Path(folder), whole=True) if folder and os.name != "nt" else None
        if text.lower() == NONE:
            return None
        if os.name == "nt":
            raise ConfigurationError("--stage: not on Windows")
        check_stage(text)
        replaced = os.path.expandvars(text)
        if "$" in replaced:
            raise ConfigurationError(f"--stage {text}: a variable in it is not set on {platform.node()}")
        return cls(Path(replaced).expanduser())


def check_stage(text: str) -> None:
    """Raise ConfigurationError for what ``--stage`` can't take on any machine."""
    if not text.startswith(("/", "~", "$")) and text.lower() != NONE:
        raise ConfigurationError(
            f"--stage {text}: expected a folder on a disk of the machine, from the root (/scratch), or none"
        )


@dataclass(frozen=True)
class Order:
    """What to copy, and where to.

    Attributes:
        folder: to be made, below an existing one.
        groups: the files, in the order of copying; those of a group appear in ``folder`` together.
        links: folders that ``folder`` gets symbolic links to.
        whole: whether to copy nothing where not everything fits.
        spare: bytes that are left free.
    """

    folder: str
    groups: tuple[Group, ...]
    links: tuple[str, ...] = ()
    whole: bool = False
    spare: int = SPARE

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        content = json.loads(text)
        groups = tuple(tuple((str(path), crc) for path, crc in group) for group in content["groups"])
        return cls(**{**content, "groups": groups, "links": tuple(content["links"])})


@dataclass(frozen=True)
class Ended:
    """How the copying ended.

    Attributes:
        groups: how many were copied.
        seconds: how long it took.
        reason: why no more were: ``full``, or the operating system's words; empty when all were.
        damaged: numbers, from 0, of groups whose bytes differ from their checksums where they were read.
    """

    groups: int
    seconds: float
    reason: str = ""
    damaged: tuple[int, ...] = ()


class _Refused(Exception):
    """A file that can't be copied: ``args[0]`` says why."""


class _Damaged(Exception):
    """A file whose bytes are not those that were written."""


def carry_out(order: Order, tell: Callable[[dict[str, Any]], None], over: threading.Event) -> None:
    """Copy, wait until ``over``, and remove the copies. ``tell`` gets what is to be told, as plain values."""
    folder = Path(order.folder)
    try:
        remove_abandoned_copies(folder.parent)
        wanted = sum(_size(path) for group in order.groups for path, _ in group)
        free = shutil.disk_usage(folder.parent).free
        if order.whole and wanted + order.spare > free:
            tell({"impossible": "", "bytes": wanted, "free": free})
            return
        lock = _locked_folder(folder)
    except OSError as error:
        tell({"impossible": error.strerror or str(error)})
        return
    try:
        for link in order.links:
            with suppress(OSError):
                (folder / Path(link).name).symlink_to(link)
        tell({"begins": {"groups": len(order.groups), "bytes": wanted, "free": free}})
        ended = _copy_groups(order, folder, over)
        if not over.is_set():
            tell({"ended": asdict(ended)})
        over.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _copy_groups(order: Order, folder: Path, over: threading.Event) -> Ended:
    started, count, reason = time.monotonic(), 0, ""
    damaged: list[int] = []
    for number, group in enumerate(order.groups):
        if over.is_set():
            break
        try:
            _copy_group(group, folder, order.spare, over)
            count += 1
        except _Damaged:
            damaged.append(number)
        except _Refused as error:
            reason = str(error)
            break
    return Ended(count, time.monotonic() - started, reason, tuple(damaged))


def _copy_group(group: Group, folder: Path, spare: int, over: threading.Event) -> None:
    """Copy files under other names, and give them their own when all are whole."""
    copies = [(folder / f".unfinished-{Path(path).name}", folder / Path(path).name) for path, _ in group]
    try:
        if shutil.disk_usage(folder).free - sum(_size(path) for path, _ in group) < spare:
            raise _Refused("full")
        for (path, crc), (unfinished, _) in zip(group, copies, strict=True):
            _copy(Path(path), unfinished, crc, over)
        if not over.is_set():
            for unfinished, final in copies:
                unfinished.replace(final)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise _Refused("full" if full else f"{error.filename or folder}: {error.strerror}") from error
    finally:
        for unfinished, _ in copies:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


def _copy(source: Path, target: Path, crc: int | None, over: threading.Event) -> None:
    """Copy a file and read the copy again. Raises _Damaged for a source that differs from ``crc``, _Refused for a bad copy."""
    read, size = 0, 0
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while (block := reader.read(_BLOCK)) and not over.is_set():
            writer.write(block)
            read, size = isal_zlib.crc32(block, read), size + len(block)
    if over.is_set():
        return
    if crc is not None and read != crc:
        raise _Damaged(str(source))
    if target.stat().st_size != size or _crc_of(target) != read:
        raise _Refused(f"{target}: what was written reads differently")


def _crc_of(path: Path) -> int:
    value = 0
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            value = isal_zlib.crc32(block, value)
    return value


def _size(path: str) -> int:
    return Path(path).stat().st_size


# -- whose copies are still wanted ------------------------------------------------------------------------------------------


def prefix_of_copies() -> str:
    """How the names of this user's folders of copies begin: a machine's disk has those of others, too."""
    return f"nnssl_adapt-copies-{os.getuid()}-"


def remove_abandoned_copies(parent: Path) -> None:
    """Remove copies below ``parent`` whose process was killed: nobody holds their lock."""
    for folder in parent.glob(f"{prefix_of_copies()}*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:  # another's, or just being removed
            continue
        try:
            if _lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _locked_folder(folder: Path) -> int:
    """Make the folder, readable by this user only, and hold its lock; it has its name when it is locked."""
    unlocked = Path(tempfile.mkdtemp(prefix=".nnssl_adapt-", dir=folder.parent))
    try:
        lock = os.open(unlocked / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        _lock(lock)
        unlocked.rename(folder)
    except OSError:
        shutil.rmtree(unlocked, ignore_errors=True)
        raise
    return lock


def _lock(file: int) -> bool:
    from fcntl import LOCK_EX, LOCK_NB, flock

    try:
        flock(file, LOCK_EX | LOCK_NB)
    except OSError:
        return False
    return True


def main() -> None:
    """Signals that ask a job to stop reach all its processes: this one ends with the one that it works for."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.nice(10)
    order, over = Order.from_json(sys.stdin.readline()), threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        over.set()

    def tell(message: dict[str, Any]) -> None:
        with suppress(OSError):  # nobody is there to read it
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()

    threading.Thread(target=wait_for_end, daemon=True).start()
    carry_out(order, tell, over)


if __name__ == "__main__":
    main()
