"""Trained model folders as a source of weights: finding them among file names, and choosing folds.

Layout: ``<Trainer>__<Plans>__<configuration>/{plans.json, dataset.json, fold_k/checkpoint_final.pth}``, written by nnU-Net
or by us. What nnssl leaves after pre-training has the folds, but not both JSON files: its weights are taken as they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nnssl_adapt.errors import SourceError, SourceNotFound
from nnssl_adapt.weights.sources.file_names import (
    MODEL_FILES,
    Chosen,
    is_weight_name,
    join,
    listing,
    pick,
    sidecar_beside,
)

logger = logging.getLogger(__name__)

MEAN = "mean"
"""The fold that is the average of all numbered ones."""

_FOLD_FILE = re.compile(r"(?:(?P<folder>.+)/)?fold_(?P<fold>\d+|all)/(?P<file>[^/]+)")


@dataclass(frozen=True)
class ModelListing:
    """What there is of one trained model.

    Attributes:
        folder: its name below the root of the listing; ``""`` for the root itself.
        folds: fold (``0``, …, ``all``) → names of its weight files.
        complete: whether plans.json and dataset.json are there.
    """

    folder: str
    folds: dict[str, list[str]]
    complete: bool

    def folder_of(self, fold: str) -> str:
        return join(self.folder, f"fold_{fold}")


def find_models(names: Sequence[str]) -> list[ModelListing]:
    """Every folder with trained folds among these file names."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        match = _FOLD_FILE.fullmatch(name)
        if match and is_weight_name(match["file"]):
            found.setdefault(match["folder"] or "", {}).setdefault(match["fold"], []).append(match["file"])
    return [
        ModelListing(
            folder,
            {fold: folds[fold] for fold in sorted(folds, key=lambda fold: (fold == "all", len(fold), fold))},
            all(join(folder, file) in names for file in MODEL_FILES),
        )
        for folder, folds in sorted(found.items())
    ]


def only_model(models: Sequence[ModelListing], where: str) -> ModelListing:
    """The one 3D model. Raises SourceNotFound, which lists them, for several, and SourceError for 2D ones alone."""
    volumetric = [model for model in models if not _is_2d(model, where)]
    if len(volumetric) == 1:
        return volumetric[0]
    if not volumetric:
        raise SourceError(f"{join(where, models[0].folder)} is a 2D network: only 3D weights can be loaded")
    folders = [model.folder or "." for model in volumetric]
    raise SourceNotFound(
        f"{where} holds {len(folders)} trained models: {listing(folders)}; choose one with --file NAME (filename= in Python)"
    )


def _is_2d(model: ModelListing, where: str) -> bool:
    """Whether its folder, or one around it, says so."""
    folder = model.folder or where.rstrip("/").rpartition("/")[2]
    return any(part.endswith("__2d") for part in folder.split("/"))


def choose_folds(
    model: ModelListing, names: Sequence[str], where: str, fold: str | None, filename: str | None = None
) -> Chosen:
    """Choose the weights of one fold, or of all for their mean.

    Without a wish: the only fold, else ``all``, else the first. checkpoint_final goes before checkpoint_best.

    Raises:
        SourceNotFound: no such fold or file; the message lists what there is.
        SourceError: it is a 2D network.
    """
    only_model([model], where)
    place = join(where, model.folder)
    folds = {key: files for key, files in model.folds.items() if filename is None or filename in files}
    if not folds:
        held = sorted({file for files in model.folds.values() for file in files})
        raise SourceNotFound(f"{place} has no {filename} in its folds ({', '.join(model.folds)}), but {listing(held)}")
    wish = fold.removeprefix("fold_") if fold else _default_fold(folds, place)
    taken = [wish]
    if wish == MEAN:
        taken = [key for key in folds if key != "all"] or ["all"]
    elif wish not in folds:
        of_file = f" with {filename}" if filename else ""
        raise SourceNotFound(f"{place} has no fold {wish}{of_file}; it has {', '.join(folds)} (or {MEAN})")
    weights = tuple(join(model.folder_of(key), filename or _file_of(key, folds[key], place)) for key in taken)
    sidecar = sidecar_beside(weights[0], names) or sidecar_beside(join(model.folder, "x"), names)
    return Chosen(weights, sidecar, model.folder if model.complete else None, wish)


def _default_fold(folds: dict[str, list[str]], place: str) -> str:
    if len(folds) == 1:
        return next(iter(folds))
    taken = "all" if "all" in folds else next(iter(folds))
    logger.info(
        "%s has folds %s: using %s (choose with --fold-of-source K, or %s for their average)",
        place,
        ", ".join(folds),
        taken,
        MEAN,
    )
    return taken


def _file_of(fold: str, files: list[str], place: str) -> str:
    taken = pick(files)
    if taken is None:
        raise SourceNotFound(
            f"{place}/fold_{fold} has several weight files: {listing(files)}; choose one with --file NAME"
        )
    return taken
