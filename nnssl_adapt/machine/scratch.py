"""Folders for half-written files, where several processes may be writing into the same store."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnssl_adapt.files import make_folder

_LONG = 24 * 3600.0
"""Seconds after which a folder of another machine is taken for abandoned: no single case takes that long."""

_NAME = re.compile(r"(?P<machine>.+)-(?P<process>\d+)-[^-]*")


@contextmanager
def workplace(parent: Path) -> Iterator[Path]:
    """Yield a new folder below ``parent`` that no other process writes into; it vanishes when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"{_machine()}-{os.getpid()}-", dir=make_folder(parent)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove what processes left below ``parent`` that were killed, and nothing that another is still writing."""
    for path in parent.iterdir() if parent.is_dir() else ():
        if not _is_in_use(path):
            shutil.rmtree(path, ignore_errors=True)
            if path.is_file():
                path.unlink(missing_ok=True)


def _machine() -> str:
    return platform.node() or "machine"


def _is_in_use(path: Path) -> bool:
    """Whether the process that made it is there; of another machine's that can't be asked, and its age decides."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return False
    if match["machine"] == _machine() and os.name != "nt":  # on Windows, asking with os.kill would end it
        return _is_running(int(match["process"]))
    try:
        return time.time() - path.stat().st_mtime < _LONG
    except OSError:  # gone in the meantime
        return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
