"""The files of a trained model in somebody's package, and nothing else of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from nnssl_adapt.errors import SourceError
from nnssl_adapt.files import make_folder
from nnssl_adapt.inference.stage_listing import meant_models
from nnssl_adapt.inference.trainer_class import TRAINER_FILE
from nnssl_adapt.weights.sources.archive import extract, is_archive, list_archive
from nnssl_adapt.weights.sources.listing import ModelListing, is_clutter, join_path, list_models

_OF_MODEL = ("plans.json", "dataset.json", "dataset_fingerprint.json", TRAINER_FILE, "README.md")
_OF_FOLD = re.compile(
    r"fold_(\d+|all)/(checkpoint_(final|best)\.pth|debug\.json|progress\.png|training_log[\w.-]*\.(txt|png))"
)
_CARD = "README.md"


def unpack_model(path: Path, place: Path, configuration: str | None = None) -> Path:
    """Unpack the one model of a zip below ``place`` and return its folder; a cascade's first stage lies beside it.

    ``configuration``: of the model that is meant, where the zip has several.

    Raises SourceError: no zip, damaged, dangerous (names outside its folder, links, bombs), no model or several.
    """
    if not is_archive(path):
        raise SourceError(f"{path} is no zip of a model: give the release's zip, or a model folder")
    unpacked, plans = make_folder(place / "zip"), make_folder(place / "plans")

    def file_of(name: str) -> Path:
        extract(path, plans, lambda other: other == name)
        return plans / name

    models = chosen_models(list_archive(path), str(path), file_of, configuration)
    model = models[0]
    names = extract(path, unpacked, lambda name: any(belongs_to(name, listed) for listed in models))
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


def chosen_models(
    names: Sequence[str], where: str, file_of: Callable[[str], Path], configuration: str | None = None
) -> tuple[ModelListing, ...]:
    """The one model among the names of files in ``where``, and its first stage if it is a cascade.

    Arguments as of :func:`~nnssl_adapt.inference.stage_listing.meant_models`. Raises SourceError for none, several, or an
    incomplete one.
    """
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
    meant = meant_models(models, where, file_of, configuration)
    for model in meant:
        _refuse_incomplete(model, visible, where)
    return meant


def _refuse_incomplete(model: ModelListing, visible: Sequence[str], where: str) -> None:
    missing = [name for name in ("plans.json", "dataset.json") if join_path(model.folder, name) not in visible]
    if missing:
        raise SourceError(
            f"{where}: {model.folder or 'its root'} has no {' and no '.join(missing)}: not a complete model"
        )
