"""Where things lie: nnU-Net's three environment variables, and one of our own.

``nnUNet_raw``, ``nnUNet_preprocessed`` and ``nnUNet_results`` mean what they mean to nnU-Net. The optional
``nnssl_pretrained_models`` names a folder with pre-trained checkpoints for machines without internet.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nnssl_adapt.errors import ConfigurationError, DatasetNotFound

_MEANING = {
    "nnUNet_raw": "raw datasets (DatasetNNN_Name folders) lie",
    "nnUNet_preprocessed": "preprocessed data and plans go",
    "nnUNet_results": "trained models go",
}


def raw_folder() -> Path:
    """Folder of raw datasets, from ``nnUNet_raw``. Raises ConfigurationError when it is unset or missing."""
    folder = _from_environment("nnUNet_raw")
    if not folder.is_dir():
        raise ConfigurationError(f"nnUNet_raw={folder} is not a folder: export nnUNet_raw=/path/to/your/raw/datasets")
    return folder


def preprocessed_folder() -> Path:
    """Folder of plans and preprocessed stores, from ``nnUNet_preprocessed``; it need not exist yet."""
    return _from_environment("nnUNet_preprocessed")


def results_folder() -> Path:
    """Folder of trained models, from ``nnUNet_results``; it need not exist yet."""
    return _from_environment("nnUNet_results")


def pretrained_models_folder() -> Path | None:
    """Folder of pre-trained checkpoints, from the optional ``nnssl_pretrained_models``, or None."""
    value = os.environ.get("nnssl_pretrained_models")
    return Path(value).expanduser() if value else None


def downloads_folder() -> Path:
    """Where files fetched from plain web addresses and unpacked archives are kept: ``$XDG_CACHE_HOME/nnssl_adapt``.

    What comes from the Hugging Face hub lies in its own cache.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "nnssl_adapt"


def _from_environment(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        raise ConfigurationError(
            f"the environment variable {variable} is not set: "
            f"export {variable}=/path/to/the/folder/where {_MEANING[variable]}"
        )
    return Path(value).expanduser().resolve()


def find_dataset_name(id_or_name: int | str) -> str:
    """Full name (``Dataset041_DeepGrey``) of a dataset given as 41, "41", "041" or its full name.

    Looked for in the raw, preprocessed and results folders, as far as their variables are set.
    Raises DatasetNotFound, with the datasets that do exist.
    """
    text = str(id_or_name).strip()
    known = _known_datasets()
    if text in known:
        return text
    if text.isdigit():
        matches = sorted(name for name in known if int(name[7:10]) == int(text))
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise DatasetNotFound(f"dataset id {int(text)} has several names: {', '.join(matches)}; give the full name")
    found = ", ".join(sorted(known)) or "none"
    searched = ", ".join(f"{v}={os.environ[v]}" for v in _MEANING if os.environ.get(v)) or "nowhere: set nnUNet_raw"
    raise DatasetNotFound(f"no dataset {text!r}. Found: {found} (searched {searched})")


def free_dataset_id(requested: int) -> int:
    """``requested``, or the next id, up to 999 and then down from ``requested``, that no dataset has in any of the three folders.

    Raises ConfigurationError when all are taken.
    """
    taken = {int(name[7:10]) for name in _known_datasets()}
    requested = min(max(requested, 1), 999)
    for number in (*range(requested, 1000), *range(requested - 1, 0, -1)):
        if number not in taken:
            found: int = number
            return found
    raise ConfigurationError("all dataset ids from 1 to 999 are taken: remove a dataset that is no longer needed")


def _known_datasets() -> set[str]:
    names: set[str] = set()
    for variable in _MEANING:
        value = os.environ.get(variable)
        folder = Path(value).expanduser() if value else None
        if folder is not None and folder.is_dir():
            names.update(p.name for p in folder.iterdir() if re.fullmatch(r"Dataset\d{3}_.+", p.name) and p.is_dir())
    return names
