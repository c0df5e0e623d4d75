"""Sources on this machine: weight files, folders, zips and trained model folders."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from nnssl_adapt.errors import SourceError, SourceNotFound
from nnssl_adapt.weights.sources.archive import is_archive, list_archive, unpack
from nnssl_adapt.weights.sources.digests import Record, file_digest
from nnssl_adapt.weights.sources.listing import (
    COMPANION_SUFFIX,
    MODEL_FILES,
    SIDECAR_NAME,
    WEIGHT_SUFFIXES,
    choose_file,
    choose_files,
    is_shard,
)
from nnssl_adapt.weights.sources.offline_store import RECORD_NAME as FETCHED_RECORD
from nnssl_adapt.weights.sources.resolved import ResolvedSource, SourceOptions, assemble

_FOLD_FOLDER = re.compile(r"fold_(\d+|all)")
_DEPTH = 5  # folders below a source: wrapping/Dataset/Trainer/fold/file
MAX_FILES = 20_000


def resolve_path(text: str, path: Path, options: SourceOptions) -> ResolvedSource:
    """The weights in an existing file, folder or zip. ``text`` is the source as the user typed it."""
    if path.is_dir():
        return _resolve_folder(text, path, options)
    if is_archive(path):
        return resolve_archive(text, "zip", path, options)
    return _resolve_file(text, path, options.filename, options.fold)


def _resolve_file(text: str, path: Path, filename: str | None, fold: str | None) -> ResolvedSource:
    whole = path.absolute()
    if filename is not None and f"/{filename.strip('/')}/" not in f"{whole.as_posix()}/":
        raise SourceError(f"{text} is a file itself: leave {filename!r} out, or give the folder that holds it")
    root = path.parent
    beside = (path.name, SIDECAR_NAME, f"{path.name}{COMPANION_SUFFIX}")
    names = [name for name in beside if (root / name).is_file()]
    if is_shard(path.name):
        names = _names_below(root, depth=1)
    if _FOLD_FOLDER.fullmatch(whole.parent.name):
        root = whole.parent.parent
        names = _names_below(root, depth=2)
    chosen = choose_file(path.absolute().relative_to(root.absolute()).as_posix(), names, str(root), fold)
    return assemble(text, "file", root, chosen, file_digest)


def _resolve_folder(text: str, folder: Path, options: SourceOptions) -> ResolvedSource:
    its_fold = _FOLD_FOLDER.fullmatch(folder.absolute().name)
    model = folder.absolute().parent
    if its_fold and all((model / name).is_file() for name in MODEL_FILES):
        folder, options = model, replace(options, fold=options.fold or its_fold[1])
    chosen = choose_files(_names_below(folder), str(folder), options.filename, options.fold)
    if chosen.is_archive:
        return resolve_archive(text, "zip", folder / chosen.weights[0], options)
    record = Record.load(folder / FETCHED_RECORD)
    if record is None:
        return assemble(text, "folder", folder, chosen, file_digest)
    fix = "fetch it again with 'nnssl-adapt fetch … --overwrite'"
    resolved = assemble(text, "folder", folder, chosen, lambda path: record.check(path, fix))
    about = record.about
    origin = replace(resolved.origin, repo_id=about.get("repo_id"), revision=about.get("revision"))
    return replace(resolved, origin=origin)


def _names_below(folder: Path, depth: int = _DEPTH) -> list[str]:
    """Files below a folder, not too deep and not too many, so that a whole disk is never searched."""
    names: list[str] = []
    try:
        next(folder.iterdir(), None)
    except OSError as error:  # os.walk would find nothing, and say nothing
        raise SourceNotFound(f"can't look into {folder}: {error.strerror or error}") from error
    for place, folders, files in os.walk(folder, followlinks=True):
        below = Path(place).relative_to(folder)
        names += [(below / name).as_posix() for name in files]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and len(below.parts) + 1 < depth)
        if len(names) > MAX_FILES:
            raise SourceError(
                f"{folder} holds more than {MAX_FILES} files: name the checkpoint itself, or its own folder"
            )
    return names


def resolve_archive(text: str, kind: str, path: Path, options: SourceOptions) -> ResolvedSource:
    """Choose before unpacking, so that a message lists all that is in the zip."""
    filename = options.filename
    inside = None if filename is not None and filename.rpartition("/")[2] == path.name else filename
    chosen = choose_files(list_archive(path), str(path), inside, options.fold)
    if chosen.is_archive:
        raise SourceError(f"{path} holds another zip, {chosen.weights[0]}: unpack it yourself and give that one")
    record = unpack(path, options.cache)
    if strange := [name for name in chosen.names if name not in record.files]:
        raise SourceError(f"{path}: {strange[0]} is not a weight file ({', '.join(WEIGHT_SUFFIXES)})")
    folder = record.path.parent
    resolved = assemble(
        text, kind, folder, chosen, lambda file: record.check(file, f"delete {folder} and run the same command again")
    )
    return replace(resolved, archive=path)
