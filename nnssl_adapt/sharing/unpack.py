"""The files of a trained model in somebody's package, and nothing else of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nnssl_adapt.errors import SourceError
from nnssl_adapt.files import make_folder
from nnssl_adapt.inference.trainer_class import TRAINER_FILE
from nnssl_adapt.weights.sources.archive import extract, is_archive, list_archive
from nnssl_adapt.weights.sources.listing import ModelListing, is_clutter, join_path, list_models

_OF_MODEL = ("plans.json", "dataset.json", "dataset_fingerprint.json", TRAINER_FILE, "README.md")
_OF_FOLD = re.compile(
    r"fold_(\d+|all)/(checkpoint_(final|best)\.pth|debug\.json|progress\.png|training_log[\w.-]*\.(txt|png))"
)
_CARD = "README.md"


def unpack_model(path: Path, place: Path) -> Path:
    """Unpack the one model of a zip below ``place`` and return its folder.

    Raises SourceError: no zip, damaged, dangerous (names outside its folder, links, bombs), no model or several.
    """
    if not is_archive(path):
        raise SourceError(f"{path} is no zip of a model: give the release's zip, or a model folder")
    model = only_model(list_archive(path), str(path))
    unpacked = make_folder(place / "zip")
    names = extract(path, unpacked, lambda name: belongs_to(name, model))
    folder = unpacked / model.folder if model.folder else unpacked
    if _CARD in names and model.folder and not (folder / _CARD).exists():
        (unpacked / _CARD).rename(folder / _CARD)
    return folder


def belongs_to(name: str, model: ModelListing) -> bool:
    """Whether a file of a package is part of the model, or the card."""
    if name == _CARD:
        return True
    if model.folder and not name.startswith(f"{model.folder}/"):
        return False
    inside = name.removeprefix(f"{model.folder}/") if model.folder else name
    return inside in _OF_MODEL or _OF_FOLD.fullmatch(inside) is not None


def only_model(names: Sequence[str], where: str) -> ModelListing:
    """The one model among the names of files in ``where``. Raises SourceError for none, several, or an incomplete one."""
    visible = [name for name in names if not is_clutter(name)]
    models = list_models(visible)
    if not models:
        described = sorted(
            {
                str(PurePosixPath(name).parent)
                for name in visible
                if name.endswith("plans.json") and name.count("/") <= 2
            }
        )
        untrained = f"; {described[0]} has plans.json but no fold_*/checkpoint_final.pth" if described else ""
        raise SourceError(f"{where} holds no trained model (fold_*/checkpoint_final.pth){untrained}")
    if len(models) > 1:
        listed = ", ".join(model.folder or "." for model in models)
        raise SourceError(
            f"{where} holds {len(models)} trained models: {listed}. A package has one: unpack it and give one folder"
        )
    model = models[0]
    missing = [name for name in ("plans.json", "dataset.json") if join_path(model.folder, name) not in visible]
    if missing:
        raise SourceError(
            f"{where}: {model.folder or 'its root'} has no {' and no '.join(missing)}: not a complete model"
        )
    return model
