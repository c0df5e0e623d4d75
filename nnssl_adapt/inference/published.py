"""Trained models by the name that they are published under: ``OWNER/NAME[@REVISION]`` on the Hugging Face hub.

Files stay in the hub's own cache, and the second time nothing is asked of the network where that is not allowed
(``HF_HUB_OFFLINE``, ``local_files_only``) or not possible.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnssl_adapt.errors import ModelFolderError, OutputError, SourceError, SourceNotFound, SourceUnavailable
from nnssl_adapt.files import write_json
from nnssl_adapt.inference.stage_listing import meant_models
from nnssl_adapt.text import read_record
from nnssl_adapt.weights.sources.hub import Hub, Missing, NotCached, commit_of
from nnssl_adapt.weights.sources.hub_files import HubAddress, verified_digest
from nnssl_adapt.weights.sources.listing import (
    MODEL_FILES,
    ModelListing,
    is_2d,
    is_weight_name,
    join_path,
    list_models,
)
from nnssl_adapt.weights.sources.offline_store import find_in_store
from nnssl_adapt.weights.sources.resolve import resolve_source
from nnssl_adapt.weights.sources.resolved import SourceOptions

COUNTED = "config.json"
"""The hub counts a model's downloads by this file, which is fetched too where a repository has it."""


def find_published(
    source: str | Path,
    folds: int | str | Sequence[int | str] | None = None,
    checkpoint: str = "final",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The model folder that a path or a name on the hub means, downloaded if need be.

    Args:
        source: a folder; else ``[hf://]owner/name[@revision]`` or the repository's address. A folder that exists wins.
        folds: only these are fetched; None: all.
        checkpoint: ``final`` or ``best``.
        revision: branch, tag or commit.
        cache_dir: where downloads are kept, if not in the hub's cache.
        local_files_only: never use the network.

    Raises:
        ModelFolderError: the repository holds pre-trained weights and no trained model.
        SourceError: there is no such repository, it holds no model or several, or it can't be fetched.
    """
    text = str(source).strip()
    if "://" not in text and Path(text).expanduser().exists():
        return Path(text).expanduser()
    address = HubAddress.parse(text)
    if address is None:
        return Path(text).expanduser()  # opening it says what is wrong
    stored = find_in_store(text, revision, None)
    if stored is not None and (models := list_models(_names_below(stored[0]))):
        return stored[0] / meant_models(_preferred(models, text), text, stored[0].joinpath)[0].folder
    hub = Hub(address.repo_id, revision or address.revision, cache_dir, local_files_only)
    wanted = None if folds is None else [str(f) for f in ([folds] if isinstance(folds, (int, str)) else folds)]
    try:
        return _fetch(hub, wanted, f"checkpoint_{checkpoint}.pth")
    except SourceUnavailable as error:
        if not hub.local_files_only:
            with contextlib.suppress(SourceError):  # no network: what was fetched before is as good
                return _fetch(replace(hub, local_files_only=True), wanted, f"checkpoint_{checkpoint}.pth")
        raise type(error)(_with_path(text, error)) from error
    except SourceError as error:
        raise type(error)(_with_path(text, error)) from error


def _with_path(text: str, error: SourceError) -> str:
    return str(error) if "://" in text else f"{error} (there is no folder {text} here)"


def _preferred(models: Sequence[ModelListing], where: str) -> list[ModelListing]:
    """The 3D ones, if there are any."""
    return [model for model in models if not is_2d(model, where)] or list(models)


def _names_below(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []


def _fetch(hub: Hub, folds: Sequence[str] | None, checkpoint: str) -> Path:
    try:
        names = hub.list_files()
    except (Missing, NotCached):
        raise hub.unavailable("the list of files") from None
    models = list_models(names)
    if not models:
        return _from_zip(hub, names)
    model, *stages = meant_models(_preferred(models, str(hub)), str(hub), lambda name: _file(hub, name))
    first = _file(hub, join_path(model.folder, MODEL_FILES[0]))
    commit = commit_of(first)
    pinned = replace(hub, revision=commit or hub.revision)  # all files of one commit, whatever is pushed meanwhile
    record = first.parents[len(Path(model.folder).parts) + 2] / f"nnssl_adapt-{commit}.json"
    if hub.local_files_only:  # what is in the cache may be a part: then what is missing is named
        names = [name for name in read_record(record).get("files", names) if isinstance(name, str)]
        known = {listed.folder: listed for listed in list_models(names)}
        model, *stages = (known.get(listed.folder, listed) for listed in (model, *stages))
    else:
        with contextlib.suppress(OutputError):  # a shared cache that can only be read
            write_json(record, {"files": names})
    needed = [name for listed in (model, *stages) for name in _needed(listed, names, folds, checkpoint)]
    for name in dict.fromkeys(needed):
        path = _file(pinned, name)
        if is_weight_name(name):
            verified_digest(path, pinned)
    return first.parent


def _needed(model: ModelListing, names: Sequence[str], folds: Sequence[str] | None, checkpoint: str) -> list[str]:
    """Plans, dataset.json and the folds' checkpoints. Folds that are not there are left to those who choose folds."""
    small = [join_path(model.folder, name) for name in MODEL_FILES] + [COUNTED]
    weights = [
        join_path(model.folder_of(fold), checkpoint)
        for fold, files in model.folds.items()
        if checkpoint in files and (folds is None or fold in folds)
    ]
    others = [] if weights else [n for n in names if n.startswith(f"{model.folder}/") and n.endswith(".pth")][:1]
    return [name for name in (*small, *weights, *others) if name in names]


def _file(hub: Hub, name: str) -> Path:
    try:
        return hub.fetch(name)
    except (Missing, NotCached):
        raise hub.unavailable(name) from None


def _from_zip(hub: Hub, names: Sequence[str]) -> Path:
    """The model in the only zip of a repository; else what the repository holds instead is said."""
    if len([name for name in names if name.lower().endswith(".zip")]) == 1 and not any(map(is_weight_name, names)):
        options = SourceOptions(revision=hub.revision, cache_dir=hub.cache_dir, local_files_only=hub.local_files_only)
        found = resolve_source(hub.repo_id, options)
        if found.model_folder is not None:
            return found.model_folder
    elif any(map(is_weight_name, names)):
        command = f"nnssl-adapt finetune -d DATASET -pc {hub}"
        raise ModelFolderError(
            f"{hub} is a pre-training, not a trained segmentation model: it has weights, but no plans.json with trained "
            f"folds. Fine-tune it on your own labelled data first ({command}), and predict with the model that this gives",
            next_command=command,
        )
    raise SourceNotFound(f"{hub} holds no trained model (plans.json, dataset.json, fold_*/checkpoint_final.pth)")
