"""Endings of file names, compared without case: a folder may hold ``a.nii.gz`` and ``b.NII.GZ``."""

from __future__ import annotations

from pathlib import Path


def stem_of(name: str, ending: str) -> str | None:
    """The name without ``ending``, in capitals or not; None where it ends in something else."""
    return name[: len(name) - len(ending)] if name.lower().endswith(ending.lower()) else None


def files_with(folder: Path, ending: str) -> dict[str, Path]:
    """Name without ending → file, sorted by name; hidden files are passed over, links that lead nowhere are not.

    Where two names differ only in their ending's case, the one that is written exactly so counts.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        stem = stem_of(path.name, ending)
        if stem is None or path.name.startswith(".") or path.is_dir():
            continue
        if stem not in found or path.name.endswith(ending):
            found[stem] = path
    return dict(sorted(found.items()))
