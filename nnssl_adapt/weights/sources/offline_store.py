"""The offline store: a folder of fetched weights (``nnssl_pretrained_models``) for machines without internet.

What ``nnssl-adapt fetch SOURCE --to FOLDER`` copies there is found again under the name it has on the internet, and
``fetched.json`` beside it says what it is. Folders that were put there by hand need no such record.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urldefrag

from nnssl_adapt.errors import SourceError
from nnssl_adapt.files import sha256_of
from nnssl_adapt.paths import pretrained_models_folder
from nnssl_adapt.weights.sources.digests import Record, whole_folder
from nnssl_adapt.weights.sources.download import Address, safe_name
from nnssl_adapt.weights.sources.hub_files import HubAddress
from nnssl_adapt.weights.sources.listing import (
    ARCHIVE_SUFFIX,
    COMPANION_SUFFIX,
    MODEL_FILES,
    PREFERRED_NAMES,
    WEIGHT_SUFFIXES,
)

RECORD_NAME = "fetched.json"
_MAIN = "main"  # the hub's branch where none is named


def find_in_store(text: str, revision: str | None, filename: str | None) -> tuple[Path, str | None] | None:
    """The folder or file in the store that a source means, and which file is still to be chosen in it; or None.

    ``owner/name`` is looked for under that name, then under ``name``; with a revision first as ``owner/name@revision``,
    then where the record says that it is this revision; one file of a repository as ``owner/name+file``. Of a web address
    only what was fetched from it is taken.
    """
    store = pretrained_models_folder()
    if store is None or not text or Path(text).is_absolute():
        return None
    hub = HubAddress.parse(text)
    if hub is not None:
        wanted = HubAddress(hub.repo_id, revision or hub.revision, filename or hub.filename)
        return _find_repository(store, wanted)
    if "://" in text:
        path = store / _stem(Address.parse(text).name)
        return (path, filename) if _is_from(path, text) else None
    found = next((path for path in _named(store, text, revision) if path.exists()), None)
    return (found, filename) if found else None


def _named(store: Path, text: str, revision: str | None) -> Iterator[Path]:
    suffix = f"@{revision}" if revision else ""
    for name in (text, Path(text).name):
        yield from (store / f"{name}{suffix}", store / f"{_stem(name)}{suffix}")
        yield store / f"{name}{suffix}{ARCHIVE_SUFFIX}"
        if revision and has_revision(store / name, revision):
            yield store / name


def _find_repository(store: Path, wanted: HubAddress) -> tuple[Path, str | None] | None:
    owner, _, name = wanted.repo_id.partition("/")
    for folder in (store / owner, store):
        for path in [folder / name, *sorted(folder.glob(f"{name}[@+]*"))]:
            record = Record.load(path / RECORD_NAME)
            if record is not None and _is_that(record, wanted):
                return path, None
        plain = [name] if wanted.revision in (None, _MAIN) else []
        for by_hand in [
            *([folder / f"{name}@{wanted.revision}"] if wanted.revision else []),
            *(folder / n for n in plain),
        ]:
            if by_hand.exists() and Record.load(by_hand / RECORD_NAME) is None:
                return by_hand, wanted.filename
    return None


def _is_that(record: Record, wanted: HubAddress) -> bool:
    about = record.about
    same = about.get("repo_id") == wanted.repo_id and about.get("file") == wanted.filename
    return same and has_revision(record.path.parent, wanted.revision or _MAIN)


def has_revision(path: Path, revision: str) -> bool:
    """Whether the record in a folder says that it was fetched at this branch, tag or commit."""
    record = Record.load(path / RECORD_NAME)
    if record is None:
        return False
    commit = str(record.about.get("revision") or "")
    return revision == (record.about.get("asked") or _MAIN) or (len(revision) >= 7 and commit.startswith(revision))


def _is_from(path: Path, text: str) -> bool:
    record = Record.load(path / RECORD_NAME)
    if record is None:
        return False
    asked, kept = urldefrag(text), urldefrag(str(record.about.get("source")))
    return asked.url == kept.url and asked.fragment in ("", kept.fragment)


def _stem(name: str) -> str:
    """Without the ending of a zip or weight file."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in (*WEIGHT_SUFFIXES, ARCHIVE_SUFFIX) else name


def put_into_store(
    store: Path, name: str, files: dict[str, Path], about: Mapping[str, object], overwrite: bool
) -> bool:
    """Copy files into ``store/name``, which appears whole or not at all.

    Args:
        store: the folder of all fetched weights; made where it is missing.
        name: below it, ``/`` between folders.
        files: name below ``store/name`` → the file to copy.
        about: for the record: ``source``, ``repo_id``, ``revision`` (the commit); and the revision ``asked`` for and the
            ``file``, where they were named.
        overwrite: replace other weights under this name.

    Returns whether anything was copied: what is there already and equal stays.

    Raises:
        SourceError: other files lie there.
        OutputError: no space, or not allowed to write.
    """
    target = store / name
    digests = {key: sha256_of(path) for key, path in files.items()}
    if target.exists():
        if not target.is_dir() or Record.load(target / RECORD_NAME) is None:
            raise SourceError(
                f"{target} is there already and was not put there by fetch (it has no {RECORD_NAME}): "
                "choose another --to, or move it away"
            )
        problem = _difference(target, digests)
        if problem is None:
            return False
        if not overwrite:
            raise SourceError(f"{target} {problem}: choose another --to, or replace what is there with --overwrite")
    with whole_folder(target, RECORD_NAME, replace=True) as staging:
        for key, path in files.items():
            (staging / key).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / key)
            if sha256_of(staging / key) != digests[key]:
                raise SourceError(f"{path} changed while it was copied: run the same command again")
        Record(staging / RECORD_NAME, digests, about).save()
    return True


def _difference(target: Path, digests: dict[str, str]) -> str | None:
    for name, digest in digests.items():
        path = target / name
        if not path.is_file():
            return f"has no {name}"
        if sha256_of(path) != digest:
            return f"has another {name}"
    return None


def files_to_copy(
    weights: Sequence[Path], sidecar: Path | None, model_folder: Path | None, in_folds: bool
) -> dict[str, Path]:
    """Name in the store → file. Folds keep their folders, and a trained model its name, which tells its configuration."""
    root = model_folder or (weights[0].parent.parent if in_folds else weights[0].parent)
    small = [model_folder / name for name in MODEL_FILES] if model_folder else []
    beside = (path.with_name(f"{path.name}{COMPANION_SUFFIX}") for path in weights)
    small += [path for path in beside if path.is_file()]
    if sidecar is not None:
        small.append(sidecar)
    outer = PurePosixPath(root.name if "__" in root.name else "")
    return {(outer / path.relative_to(root).as_posix()).as_posix(): path for path in [*small, *weights]}


def name_in_store(address: HubAddress | None, source: str, path: Path) -> str:
    """Under which name weights are put in the store.

    A repository's own (``owner/name[@revision][+file]``), else that of the file at the web address ``source``, else that of
    the zip, trained model, folder or file at ``path``.
    """
    if address is not None:
        revision = f"@{address.revision}" if address.revision else ""
        file = f"+{_stem(safe_name(address.filename.replace('/', '_')))}" if address.filename else ""
        return f"{address.repo_id}{revision}{file}"
    if "://" in source:
        return _stem(Address.parse(source).name)
    if path.name in PREFERRED_NAMES:  # says nothing
        path = path.parent
    return safe_name(path.name if path.is_dir() else _stem(path.name))
