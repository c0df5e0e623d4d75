"""Zips of weights: looked at with suspicion, unpacked once.

Only weights and their plans are unpacked, into a folder named by the zip's own SHA-256. That folder appears in one move
when everything is in it, with a record of the digests, so that a killed run leaves nothing that looks whole.
"""

from __future__ import annotations

import errno
import logging
import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from nnssl_adapt.errors import SourceError
from nnssl_adapt.text import size_text
from nnssl_adapt.weights.sources.digests import Record, file_digest, whole_folder
from nnssl_adapt.weights.sources.listing import (
    ARCHIVE_SUFFIX,
    MODEL_FILES,
    SIDECAR_NAME,
    is_clutter,
    is_companion,
    is_weight_name,
)

logger = logging.getLogger(__name__)

RECORD_NAME = "unpacked.json"

MAX_ENTRIES = 20_000
MAX_BYTES = 64 << 30
"""What may come out of one zip; five folds of the largest published network are a fifth of it."""

MAX_RATIO = 100
"""Bytes out for a byte in. Trained weights hardly shrink; only bombs grow a hundredfold."""

_FREE_OF_RATIO = 64 << 20  # bytes; a tiny zip of zeros is no danger
_BLOCK = 1 << 20
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError)


def is_archive(path: Path) -> bool:
    """Whether a file is a zip of files (or called so). Since torch 1.6 a ``.pth`` is a zip too, with ``*/data.pkl``."""
    called_so = path.suffix.lower() == ARCHIVE_SUFFIX
    try:
        if not zipfile.is_zipfile(path):
            return called_so
        with zipfile.ZipFile(path) as archive:
            return not any(PurePosixPath(name).name in ("data.pkl", "constants.pkl") for name in archive.namelist())
    except (OSError, NotImplementedError, *_DAMAGE):
        return called_so


def list_archive(path: Path) -> list[str]:
    """Names of the files in a zip. Raises SourceError for one that is damaged, or dangerous to unpack."""
    with _opened(path) as archive:
        return [entry.filename for entry in _checked(archive, path) if not entry.is_dir()]


def unpack(path: Path, folder: Path) -> Record:
    """Unpack what is needed of a zip below ``folder``, unless it was before. Returns the record in the unpacked folder.

    Raises:
        SourceError: the zip is damaged, or dangerous: names outside its folder, links, a size out of proportion.
        OutputError: no space, or not allowed to write.
    """
    digest = file_digest(path)
    target = folder / "unpacked" / digest
    known = Record.load(target / RECORD_NAME)
    if known is not None:
        return known
    about = {"zip": path.name, "sha256": digest}
    with whole_folder(target, RECORD_NAME, replace=False) as staging:
        with _opened(path) as archive:
            logger.info("unpacking %s to %s", path, target)
            files = _extract(archive, path, staging, _is_needed)
        Record(staging / RECORD_NAME, files, about).save()
    return Record(target / RECORD_NAME, files, about)


def extract(path: Path, folder: Path, is_wanted: Callable[[str], bool]) -> list[str]:
    """Unpack the files whose names are wanted below ``folder``, with the same suspicion; returns their names.

    Raises SourceError for a damaged or dangerous zip. What was unpacked until then stays: give a folder to throw away.
    """
    with _opened(path) as archive:
        return list(_extract(archive, path, folder, lambda entry: not entry.is_dir() and is_wanted(entry.filename)))


def _extract(
    archive: zipfile.ZipFile, path: Path, folder: Path, is_wanted: Callable[[zipfile.ZipInfo], bool]
) -> dict[str, str]:
    entries = [entry for entry in _checked(archive, path) if is_wanted(entry)]
    names = [entry.filename for entry in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SourceError(f"{path} holds {min(twice)} twice: refused, it is not clear which one is meant")
    _check_sizes(entries, path)
    for entry in entries:
        destination = folder / entry.filename
        destination.parent.mkdir(parents=True, exist_ok=True)
        written = 0
        with archive.open(entry) as packed, open(destination, "wb") as stream:
            while block := packed.read(_BLOCK):
                written += len(block)
                if written > entry.file_size:
                    raise SourceError(f"{path}: {entry.filename} is longer than the zip says: refused")
                stream.write(block)
        if written != entry.file_size:
            raise SourceError(f"{path}: {entry.filename} has {written} bytes, the zip says {entry.file_size}: damaged")
    return {name: file_digest(folder / name) for name in names}


def _is_needed(entry: zipfile.ZipInfo) -> bool:
    name = entry.filename
    if entry.is_dir() or is_clutter(name):
        return False
    return is_weight_name(name) or is_companion(name) or PurePosixPath(name).name in (*MODEL_FILES, SIDECAR_NAME)


def _checked(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise SourceError(f"{path} holds {len(entries)} files, more than {MAX_ENTRIES}: refused")
    for entry in entries:
        if reason := _why_dangerous(entry):
            raise SourceError(f"{path} holds {entry.filename!r}, {reason}: refused")
    return entries


def _why_dangerous(entry: zipfile.ZipInfo) -> str | None:
    name = entry.filename
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "a path out of the zip's own folder"
    if "\\" in name:
        return "a name with a backslash"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "a symbolic link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "no regular file"
    return None


def _check_sizes(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """Against bombs: the sum of what comes out, whatever the entries share of what is in."""
    total, packed = sum(entry.file_size for entry in entries), path.stat().st_size
    if total > MAX_BYTES:
        raise SourceError(f"{path} would unpack to {size_text(total)}, more than {size_text(MAX_BYTES)}: refused")
    if total > max(_FREE_OF_RATIO, MAX_RATIO * packed):
        raise SourceError(
            f"{path} ({size_text(packed)}) would unpack to {size_text(total)}, more than {MAX_RATIO} times its size, "
            "which weights never do: refused"
        )


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, *_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the disk's; EINVAL is a seek to nowhere
            raise
        raise SourceError(f"{path} is a damaged zip ({error}): copy or download it again") from error
    except (NotImplementedError, RuntimeError) as error:  # a compression unknown here; a password
        raise SourceError(f"{path} can't be unpacked ({error}): unpack it yourself and give the folder") from error
