"""Digests written down when files arrive, and compared on every later use; folders that are whole or not there."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl_adapt.errors import DigestMismatch, SourceNotFound
from nnssl_adapt.files import TEMPORARY_PREFIX, explain_write_errors, make_folder, sha256_of, write_json


@dataclass(frozen=True)
class Record:
    """What some files were when they arrived. It lies in their folder.

    Attributes:
        path: the record's own file.
        files: name below its folder → SHA-256.
        about: where they are from: plain values.
    """

    path: Path
    files: Mapping[str, str]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """The record in this file; None if there is none or it can't be read (then nothing beside it is trusted)."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            files, about = content["files"], content["about"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        if not isinstance(files, dict) or not files or not isinstance(about, dict):
            return None
        texts = [value for key, value in about.items() if key != "bytes"]
        if not all(isinstance(text, (str, type(None))) for text in texts) or not all(map(_is_digest, files.values())):
            return None
        return cls(path, files, about)

    def save(self) -> None:
        write_json(self.path, {"files": dict(self.files), "about": dict(self.about)})

    def check(self, path: Path, fix: str) -> str:
        """The file's digest if it still is what was recorded.

        Args:
            path: one of the files.
            fix: what to do about a changed one, for the message.

        Raises:
            DigestMismatch: it is not.
            SourceNotFound: it is gone or can't be read.
        """
        found = file_digest(path)
        name = path.relative_to(self.path.parent).as_posix()
        recorded = self.files.get(name)
        if found != recorded:
            was = f"it was sha256 {recorded[:12]}…" if recorded else "it was not there"
            raise DigestMismatch(
                f"{path} is not what {self.path.name} beside it recorded: {was}, now {found[:12]}…: {fix}"
            )
        return found


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


@contextmanager
def whole_folder(target: Path, record_name: str, replace: bool) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` that becomes ``target`` when the block ends well, and vanishes otherwise.

    An existing ``target`` stays if it has its record (another process was faster), unless it is to be replaced.
    """
    make_folder(target.parent)
    with explain_write_errors(target):
        work = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
        try:
            staging = work / "new"
            staging.mkdir()  # unlike its parent as readable as others: a shared cache must stay so
            yield staging
            if target.exists() and (replace or Record.load(target / record_name) is None):
                with suppress(FileNotFoundError):
                    target.rename(work / "old")
            try:
                staging.rename(target)
            except OSError:
                if Record.load(target / record_name) is None:
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises SourceNotFound when it can't be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise SourceNotFound(f"can't read {path}: {error.strerror or error}") from error
