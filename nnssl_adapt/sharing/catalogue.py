"""The models installed on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnssl_adapt.errors import NnsslAdaptError
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.paths import results_folder
from nnssl_adapt.weights.sources.digests import Record

INSTALLED = "installed.json"
"""Record beside a model that was installed: digests and source."""


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
