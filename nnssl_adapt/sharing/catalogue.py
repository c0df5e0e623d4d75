"""Pre-trained checkpoints that everybody can get, and the models installed on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from nnssl_adapt.errors import NnsslAdaptError
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.paths import results_folder
from nnssl_adapt.weights.sources.digests import Record

INSTALLED = "installed.json"
"""Record beside a model that was installed: digests and source."""


@dataclass(frozen=True)
class KnownCheckpoint:
    """A published checkpoint, as ``-pc`` takes it.

    Attributes:
        repo_id: ``owner/name`` on the Hugging Face hub.
        also: other repositories with the same files.
        network: what it is.
        method: of pre-training.
        data: patch, spacing, size, as published.
        source: the page to read.
        licence: as its page states it; None where that was not recorded: read the page.
        note: what to know before using it.
    """

    repo_id: str
    also: tuple[str, ...]
    network: str
    method: str
    data: str
    source: str
    licence: str | None
    note: str


@cache
def known_checkpoints() -> tuple[KnownCheckpoint, ...]:
    """The table of published checkpoints (``known_checkpoints.json``), in its order."""
    content = json.loads(files("nnssl_adapt.sharing").joinpath("known_checkpoints.json").read_text(encoding="utf-8"))
    return tuple(
        KnownCheckpoint(
            repo_id=f"{group['owner']}/{group['name'].format(method=method)}",
            also=tuple(f"{owner}/{group['name'].format(method=method)}" for owner in group.get("also_under", ())),
            network=group["network"],
            method=method,
            data=group["data"],
            source=f"https://huggingface.co/{group['owner']}/{group['name'].format(method=method)}",
            licence=group.get("licences", {}).get(method),
            note=group.get("notes", {}).get(method, ""),
        )
        for group in content["groups"]
        for method in group["methods"]
    )


def find_known(repo_id: str) -> KnownCheckpoint | None:
    """The published checkpoint of this repository, or None."""
    return next((known for known in known_checkpoints() if repo_id in (known.repo_id, *known.also)), None)


@dataclass(frozen=True)
class InstalledModel:
    """A trained model in ``nnUNet_results``, trained here or installed.

    Attributes:
        dataset: ``DatasetNNN_Name``.
        path: its model folder.
        summary: folds, channels and labels; or why it can't be used.
        source: where it was installed from; None: it was trained here (or put there by hand).
    """

    dataset: str
    path: Path
    summary: str
    source: str | None


def installed_models() -> list[InstalledModel]:
    """Every model folder below ``nnUNet_results``, by name. Raises ConfigurationError when that is not set."""
    found = []
    for plans in sorted(results_folder().glob("Dataset*/*__*__*/plans.json")):
        folder = plans.parent
        record = Record.load(folder / INSTALLED)
        source = str(record.about.get("source")) if record is not None else None
        found.append(InstalledModel(folder.parent.name, folder, _summary(folder), source))
    return found


def _summary(folder: Path) -> str:
    try:
        model = ModelFolder(folder)
        labels = ", ".join(model.labels.class_names)
        folds = ", ".join(map(str, model.folds)) or "none finished"
        return f"folds {folds}; {', '.join(model.channel_names)} → {labels}"
    except NnsslAdaptError as error:
        return f"can't be used: {error}"
