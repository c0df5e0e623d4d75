"""Which of many files are meant: the same rules for a folder, an archive and a repository, by their names alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from nnssl_adapt.errors import SourceError, SourceNotFound
from nnssl_adapt.weights.sources.file_names import (
    ARCHIVE_SUFFIX,
    PREFERRED_NAMES,
    WEIGHT_NAMES,
    Chosen,
    is_clutter,
    is_weight_name,
    join,
    listing,
    pick,
    sidecar_beside,
)
from nnssl_adapt.weights.sources.model_source import choose_folds, find_models, only_model

_WANTED = f"{WEIGHT_NAMES[0]} (or _best, _latest, or one .safetensors)"
_HOW = "choose one with --file NAME (filename= in Python)"


def choose_files(names: Iterable[str], where: str, filename: str | None = None, fold: str | None = None) -> Chosen:
    """Choose the weights among the files of one place.

    Args:
        names: every file below it, with ``/`` between folders.
        where: what to call the place in messages; a folder's path ends in its name.
        filename: the file (or folder) asked for; a file or trained model folder may leave out the folders before it.
        fold: the fold asked for: ``0``, ``all``, ``mean``, …

    In this order: a checkpoint under one of nnssl's names; a trained model folder; the only weight file; the same in the
    only folder that has any; a zip.

    Raises:
        SourceNotFound: nothing fits, or several do; the message lists them.
        SourceError: a fold is asked for and there are none, or the network is a 2D one.
    """
    visible = sorted(name for name in names if not is_clutter(name))
    if filename is not None:
        return _choose_named(visible, where, filename.strip("/"), fold)
    return _choose_unnamed(visible, "", where, fold)


def _choose_unnamed(names: list[str], root: str, where: str, fold: str | None) -> Chosen:
    here = [name.removeprefix(f"{root}/") for name in names if PurePosixPath(name).parent == PurePosixPath(root)]
    preferred = next((name for name in PREFERRED_NAMES if name in here), None)
    if (preferred is None or fold is not None) and (models := find_models(names)):
        return choose_folds(only_model(models, where), names, where, fold)
    taken = preferred or pick(here)
    if taken is not None:
        return choose_single(join(root, taken), names, where, fold)
    weights = [name for name in names if is_weight_name(name)]
    folders = sorted({str(PurePosixPath(name).parent) for name in weights})
    if len(folders) == 1 and folders[0] not in (".", root):
        return _choose_unnamed([name for name in names if name.startswith(f"{folders[0]}/")], folders[0], where, fold)
    if weights:
        apart = len(folders) > 1 and not any(map(is_weight_name, here))
        several = (
            f"weights in several folders: {listing(folders)}" if apart else f"several weight files: {listing(weights)}"
        )
        raise SourceNotFound(f"{where} has no {WEIGHT_NAMES[0]} (or _best, _latest), and {several}; {_HOW}")
    return Chosen((_only_archive(names, where),))


def _only_archive(names: Sequence[str], where: str) -> str:
    archives = [name for name in names if name.lower().endswith(ARCHIVE_SUFFIX)]
    if len(archives) == 1:
        return archives[0]
    if archives:
        raise SourceNotFound(f"{where} has no {_WANTED}, and several zips: {listing(archives)}; {_HOW}")
    raise SourceNotFound(f"{where} has no {_WANTED}; it holds {listing(names)}")


def _choose_named(names: list[str], where: str, filename: str, fold: str | None) -> Chosen:
    models = find_models(names)
    meant = [model for model in models if model.folder and f"/{model.folder}".endswith(f"/{filename}")]
    if meant:
        return choose_folds(only_model(meant, where), names, where, fold)
    if filename in names:
        return choose_single(filename, names, where, fold)
    if "/" not in filename and any(filename in files for model in models for files in model.folds.values()):
        return choose_folds(only_model(models, where), names, where, fold, filename)
    for model in models:
        for its_fold in model.folds:
            if filename == model.folder_of(its_fold):
                return choose_folds(model, names, where, fold or its_fold)
    inside = [name for name in names if name.startswith(f"{filename}/")]
    if inside:
        return _choose_unnamed(inside, filename, where, fold)
    fitting = [name for name in names if name.endswith(f"/{filename}")]
    if len(fitting) == 1:
        return choose_single(fitting[0], names, where, fold)
    if fitting:
        raise SourceNotFound(f"{where} has several {filename}: {listing(fitting)}; give one in full with --file")
    if not any(is_weight_name(name) for name in names) and any(name.lower().endswith(ARCHIVE_SUFFIX) for name in names):
        return Chosen((_only_archive(names, where),))  # it may be in there
    candidates = [name for name in names if is_weight_name(name) or name.lower().endswith(ARCHIVE_SUFFIX)]
    hint = f"; {_HOW}" if candidates else ""
    raise SourceNotFound(f"{where} has no {filename}; it holds {listing(candidates or names)}{hint}")


def choose_single(name: str, names: Sequence[str], where: str, fold: str | None) -> Chosen:
    """One weight file with what belongs to it; a fold asked for must be that of the trained model it lies in."""
    for model in find_models(names):
        for its_fold, files in model.folds.items():
            if any(join(model.folder_of(its_fold), file) == name for file in files):
                return choose_folds(model, names, where, fold or its_fold, PurePosixPath(name).name)
    if fold is not None:
        raise SourceError(f"{where}: {name} is in no trained model folder (fold_0, …), so there is no fold {fold!r}")
    return Chosen((name,), sidecar_beside(name, names))
