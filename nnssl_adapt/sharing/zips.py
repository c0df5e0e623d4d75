"""Zips that are the same byte for byte whenever and wherever they are made of the same files."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

from nnssl_adapt.files import atomic_path


def write_zip(path: Path, files: Mapping[str, Path], tag: str) -> None:
    """Write a zip whole or not at all.

    Members are sorted, dated by the release's tag (``rYYYYMMDD``), and stored as they are: weights hardly shrink, and
    what a compressor gives depends on its version.

    Args:
        path: of the zip.
        files: name in the zip, ``/`` between folders → file.

    Raises OutputError when it can't be written.
    """
    day = (int(tag[1:5]), int(tag[5:7]), int(tag[7:9]), 0, 0, 0)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, day)
            entry.create_system = 3  # Unix, whatever this is, so that the next line counts
            entry.external_attr = 0o100644 << 16
            entry.file_size = files[name].stat().st_size
            with open(files[name], "rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 1 << 20)
