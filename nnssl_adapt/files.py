"""Files that are either whole or not there.

Every file of the project is written under a temporary name in its own folder, flushed to disk and renamed, so that a
run that dies at any instant never leaves a file that looks whole and is not.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnssl_adapt.errors import OutputError

TEMPORARY_PREFIX = ".unfinished-"


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


_UMASK = _umask()  # asked once: it can only be read by setting it, which other threads' files would notice


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write below ``path`` into an :class:`OutputError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"no space left while writing {path}: free some (or raise the quota) and run the same command again; "
                "what was finished before is kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"not allowed to write {path}: choose another folder or change its permissions"
            ) from error
        if isinstance(error, (NotADirectoryError, FileExistsError)):
            raise OutputError(f"can't write {path}: a file stands where a folder is needed") from error
        raise


def make_folder(path: str | Path) -> Path:
    """Create a folder (and its parents) and return it; an existing one is fine."""
    path = Path(path)
    with explain_write_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # below /proc, say, or on a drive that is not there
            raise OutputError(f"can't create the folder {path}: choose another one") from error
    return path


@contextmanager
def atomic_path(path: str | Path, ending: str | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise.

    The temporary name keeps the whole name, since writers choose the format by its ending (``.nii.gz``, ``.b2nd``). Some find
    one anywhere in a name: with ``ending``, the temporary name has only that, and a digest instead of the name.
    :func:`leftovers` finds what a killed process left.
    """
    path = Path(path)
    make_folder(path.parent)
    suffix = f"-{path.name}" if ending is None else f"-{_name_digest(path)}{ending}"
    with explain_write_errors(path):
        handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _flush_to_disk(temporary)
            temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes files private; a shared store must stay readable
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def leftovers(path: Path) -> Iterator[Path]:
    """Yield the temporary files of :func:`atomic_path` that killed processes left of ``path``."""
    for pattern in (f"{TEMPORARY_PREFIX}*-{glob.escape(path.name)}", f"{TEMPORARY_PREFIX}*-{_name_digest(path)}.*"):
        yield from path.parent.glob(pattern)


def _name_digest(path: Path) -> str:
    return f"{zlib.crc32(os.fsencode(path.name)):08x}"


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write text (UTF-8) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, sort_keys: bool = False) -> None:
    """Write JSON atomically, indented by four blanks as nnU-Net does. NumPy scalars and arrays become plain numbers."""
    write_text(path, json.dumps(content, indent=4, sort_keys=sort_keys, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy and torch scalars and arrays
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} can't be written as JSON")


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
