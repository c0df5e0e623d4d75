"""Which of many files are the weights: told by their names alone, by the same rules for a folder, an archive and a repository.

A trained model folder is ``<Trainer>__<Plans>__<configuration>/{plans.json, dataset.json, fold_k/checkpoint_final.pth}``,
written by nnU-Net or by us. What nnssl leaves after pre-training has the folds, but not both JSON files: its weights are
taken as they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from nnssl_adapt.errors import SourceError, SourceNotFound

logger = logging.getLogger(__name__)

SIDECAR_NAME = "adaptation_plan.json"
"""The adaptation plan that nnssl writes beside a checkpoint."""

MODEL_FILES = ("plans.json", "dataset.json")
"""What makes the folder around fold_* a trained nnU-Net model."""

WEIGHT_NAMES = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")
"""What nnssl and nnU-Net call their checkpoints, the one to prefer first."""

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".model")
"""Of two files with one stem, the suffix that comes first is taken."""

COMPANION_SUFFIX = ".pkl"
"""What nnU-Net version 1 adds to the name of its weights for what it knows of them (``X.model.pkl``)."""

ARCHIVE_SUFFIX = ".zip"

PREFERRED_NAMES = (
    *(*WEIGHT_NAMES, "checkpoint_final.safetensors", "model.safetensors"),
    *("model_final_checkpoint.model", "model_best.model", "model_latest.model"),  # nnU-Net version 1
)

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
"""One of several files that hold one network together (``model-00001-of-00002.safetensors``), as Hugging Face writes them."""

_SHARD_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index\.json")
"""What names the shard of each tensor. The shards themselves tell as much, so that it is not needed."""


@dataclass(frozen=True)
class Chosen:
    """Names below one root, with ``/`` between folders.

    Attributes:
        weights: the weight files, several where folds are averaged; or one zip that has them.
        sidecar: the adaptation plan beside them, or None.
        model_folder: the folder with plans.json and dataset.json, ``""`` if that is the root, or None.
        fold: which fold of a trained model, ``mean`` for several, or None.
        other_shards: of weights that are spread over several files, all but the first, which is the one of ``weights``.
        companion: what nnU-Net version 1 wrote beside the weights, or None.
    """

    weights: tuple[str, ...]
    sidecar: str | None = None
    model_folder: str | None = None
    fold: str | None = None
    other_shards: tuple[str, ...] = ()
    companion: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every file that is needed, the small ones first."""
        model = () if self.model_folder is None else tuple(join_path(self.model_folder, name) for name in MODEL_FILES)
        small = tuple(name for name in (self.sidecar, self.companion) if name)
        return (*small, *model, *self.weights, *self.other_shards)

    @property
    def is_archive(self) -> bool:
        return self.weights[0].lower().endswith(ARCHIVE_SUFFIX)


def is_clutter(name: str) -> bool:
    """Hidden files, and what macOS adds to zips (``__MACOSX/._checkpoint_final.pth``)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_weight_name(name: str) -> bool:
    return name.lower().endswith(WEIGHT_SUFFIXES)


def join_path(folder: str, name: str) -> str:
    """Both with ``/`` between them; either may be empty."""
    return "/".join(part for part in (folder, name) if part)


def pick(names: Sequence[str]) -> str | None:
    """The weight file to take among those of one folder; None if there is none, or no reason to prefer one."""
    for name in PREFERRED_NAMES:
        if name in names:
            return name
    candidates = [name for name in names if is_weight_name(name)]
    if len({name.rpartition(".")[0] for name in candidates}) == 1:  # the same weights in several formats
        return min(candidates, key=lambda name: WEIGHT_SUFFIXES.index(PurePosixPath(name).suffix.lower()))
    return None


def shown_names(names: Sequence[str]) -> str:
    """Some of the names, for a message."""
    shown = ", ".join(names[:12]) or "nothing"
    return f"{shown}, … ({len(names)} files)" if len(names) > 12 else shown


def sidecar_beside(name: str, names: Sequence[str]) -> str | None:
    sidecar = join_path(name.rpartition("/")[0], SIDECAR_NAME)
    return sidecar if sidecar in names else None


# -- the choice -----------------------------------------------------------------------------------------------------

_WANTED = f"{WEIGHT_NAMES[0]} (or _best, _latest, or one .safetensors)"
_HOW = "choose one with --file NAME (filename= in Python)"


def choose_files(names: Iterable[str], where: str, filename: str | None = None, fold: str | None = None) -> Chosen:
    """Choose the weights among the files of one place.

    Args:
        names: every file below it, with ``/`` between folders.
        where: what to call the place in messages; a folder's path ends in its name.
        filename: the file (or folder) requested; a file or trained model folder may leave out the folders before it.
        fold: the fold requested: ``0``, ``all``, ``mean``, …

    In this order: a checkpoint under one of nnssl's names; a trained model folder; the only weight file; the same in the
    only folder that has any; a zip.

    Raises:
        SourceNotFound: nothing fits, or several do; the message lists them.
        SourceError: a fold is requested and there are none.
    """
    visible = sorted(name for name in names if not is_clutter(name))
    firsts = _without_later_shards(visible)
    if filename is not None:
        chosen = _choose_named(firsts, where, _first_shard(filename.strip("/"), visible), fold)
    else:
        chosen = _choose_unnamed(firsts, "", where, fold)
    return _with_shards(chosen, visible, where)


def choose_file(name: str, names: Sequence[str], where: str, fold: str | None) -> Chosen:
    """One weight file with what belongs to it: its sidecar, its trained model, and its other shards.

    Raises SourceError when a fold is requested that it does not belong to, SourceNotFound when a shard is missing.
    """
    return _with_shards(_choose_single(_first_shard(name, names), names, where, fold), names, where)


def is_shard(name: str) -> bool:
    """Whether it is one of several files that hold a network together, or their index."""
    return bool(_SHARD.fullmatch(name) or _SHARD_INDEX.fullmatch(name))


def _without_later_shards(names: Sequence[str]) -> list[str]:
    """The names, of each network that is spread over several files only the first file that is there."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for name in names:  # sorted
        match = _SHARD.fullmatch(name)
        if match is None or (match["stem"], match["count"]) not in seen:
            kept.append(name)
        if match is not None:
            seen.add((match["stem"], match["count"]))
    return kept


def _first_shard(name: str, names: Sequence[str]) -> str:
    """The first of the shards that a shard or an index of shards belongs to; other names as they are."""
    if match := _SHARD.fullmatch(name):
        return f"{match['stem']}-00001-of-{match['count']}.safetensors"
    if match := _SHARD_INDEX.fullmatch(name):
        firsts = [
            other for other in names if other.startswith(f"{match['stem']}-00001-of-") and _SHARD.fullmatch(other)
        ]
        return firsts[0] if len(firsts) == 1 else name
    return name


def is_companion(name: str) -> bool:
    """Whether it is what nnU-Net version 1 wrote beside weights."""
    return name.lower().endswith(COMPANION_SUFFIX) and is_weight_name(name[: -len(COMPANION_SUFFIX)])


def _with_shards(chosen: Chosen, names: Sequence[str], where: str) -> Chosen:
    """With the other files that belong to the first of the weights: its shards, and what version 1 wrote beside it."""
    companion = chosen.weights[0] + COMPANION_SUFFIX
    chosen = replace(chosen, companion=companion if companion in names else None)
    match = _SHARD.fullmatch(chosen.weights[0])
    if match is None and _SHARD_INDEX.fullmatch(chosen.weights[0]):
        raise SourceNotFound(
            f"{where}: {chosen.weights[0]} lists files of which none is there: copy or download them too"
        )
    if match is None:
        return chosen
    count = int(match["count"])
    shards = [f"{match['stem']}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, min(count, 10_000) + 1)]
    missing = [name for name in shards if name not in names]
    if missing:
        raise SourceNotFound(
            f"{where}: {missing[0]} is missing; the network is spread over {count} files, of which "
            f"{len(shards) - len(missing)} are there: copy or download all of them"
        )
    return replace(chosen, weights=(shards[0],), other_shards=tuple(shards[1:]))


def _choose_unnamed(names: list[str], root: str, where: str, fold: str | None) -> Chosen:
    here = [name.removeprefix(f"{root}/") for name in names if PurePosixPath(name).parent == PurePosixPath(root)]
    preferred = next((name for name in PREFERRED_NAMES if name in here), None)
    if (preferred is None or fold is not None) and (models := list_models(names)):
        return choose_fold_weights(only_model(models, where), names, where, fold)
    taken = preferred or pick(here)
    if taken is not None:
        return _choose_single(join_path(root, taken), names, where, fold)
    weights = [name for name in names if is_weight_name(name)]
    folders = sorted({str(PurePosixPath(name).parent) for name in weights})
    if len(folders) == 1 and folders[0] not in (".", root):
        return _choose_unnamed([name for name in names if name.startswith(f"{folders[0]}/")], folders[0], where, fold)
    if weights:
        apart = len(folders) > 1 and not any(map(is_weight_name, here))
        several = (
            f"weights in several folders: {shown_names(folders)}"
            if apart
            else f"several weight files: {shown_names(weights)}"
        )
        raise SourceNotFound(f"{where} has no {WEIGHT_NAMES[0]} (or _best, _latest), and {several}; {_HOW}")
    return Chosen((_only_archive(names, where),))


def _only_archive(names: Sequence[str], where: str) -> str:
    archives = [name for name in names if name.lower().endswith(ARCHIVE_SUFFIX)]
    if len(archives) == 1:
        return archives[0]
    if archives:
        raise SourceNotFound(f"{where} has no {_WANTED}, and several zips: {shown_names(archives)}; {_HOW}")
    raise SourceNotFound(f"{where} has no {_WANTED}; it holds {shown_names(names)}")


def _choose_named(names: list[str], where: str, filename: str, fold: str | None) -> Chosen:
    models = list_models(names)
    meant = [model for model in models if model.folder and f"/{model.folder}".endswith(f"/{filename}")]
    if meant:
        return choose_fold_weights(only_model(meant, where), names, where, fold)
    if filename in names:
        return _choose_single(filename, names, where, fold)
    if "/" not in filename and any(filename in files for model in models for files in model.folds.values()):
        return choose_fold_weights(only_model(models, where), names, where, fold, filename)
    for model in models:
        for its_fold in model.folds:
            if filename == model.folder_of(its_fold):
                return choose_fold_weights(model, names, where, fold or its_fold)
    inside = [name for name in names if name.startswith(f"{filename}/")]
    if inside:
        return _choose_unnamed(inside, filename, where, fold)
    fitting = [name for name in names if name.endswith(f"/{filename}")]
    if len(fitting) == 1:
        return _choose_single(fitting[0], names, where, fold)
    if fitting:
        raise SourceNotFound(f"{where} has several {filename}: {shown_names(fitting)}; give one in full with --file")
    if not any(is_weight_name(name) for name in names) and any(name.lower().endswith(ARCHIVE_SUFFIX) for name in names):
        return Chosen((_only_archive(names, where),))  # it may be in there
    candidates = [name for name in names if is_weight_name(name) or name.lower().endswith(ARCHIVE_SUFFIX)]
    hint = f"; {_HOW}" if candidates else ""
    raise SourceNotFound(f"{where} has no {filename}; it holds {shown_names(candidates or names)}{hint}")


def _choose_single(name: str, names: Sequence[str], where: str, fold: str | None) -> Chosen:
    """One weight file with what belongs to it; a fold that is requested must be that of the trained model it lies in."""
    for model in list_models(names):
        for its_fold, files in model.folds.items():
            if any(join_path(model.folder_of(its_fold), file) == name for file in files):
                return choose_fold_weights(model, names, where, fold or its_fold, PurePosixPath(name).name)
    if fold is not None:
        raise SourceError(f"{where}: {name} is in no trained model folder (fold_0, …), so there is no fold {fold!r}")
    return Chosen((name,), sidecar_beside(name, names))


# -- trained model folders ------------------------------------------------------------------------------------------

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
        return join_path(self.folder, f"fold_{fold}")


def list_models(names: Sequence[str]) -> list[ModelListing]:
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
            all(join_path(folder, file) in names for file in MODEL_FILES),
        )
        for folder, folds in sorted(found.items())
    ]


def only_model(models: Sequence[ModelListing], where: str) -> ModelListing:
    """The one model, or the one 3D model where there are 2D ones as well. Raises SourceNotFound for several."""
    volumetric = [model for model in models if not is_2d(model, where)] or list(models)
    if len(volumetric) == 1:
        return volumetric[0]
    folders = [model.folder or "." for model in volumetric]
    raise SourceNotFound(
        f"{where} holds {len(folders)} trained models: {shown_names(folders)}; choose one with --file NAME (filename= in Python)"
    )


def is_2d(model: ModelListing, where: str) -> bool:
    """Whether its folder, or one around it, says so."""
    folder = model.folder or where.rstrip("/").rpartition("/")[2]
    return any(part.endswith("__2d") for part in folder.split("/"))


def choose_fold_weights(
    model: ModelListing, names: Sequence[str], where: str, fold: str | None, filename: str | None = None
) -> Chosen:
    """Choose the weights of one fold, or of all for their mean.

    Without one: the only fold, else ``all``, else the first. checkpoint_final goes before checkpoint_best.

    Raises:
        SourceNotFound: no such fold or file; the message lists what there is.
    """
    place = join_path(where, model.folder)
    folds = {key: files for key, files in model.folds.items() if filename is None or filename in files}
    if not folds:
        held = sorted({file for files in model.folds.values() for file in files})
        raise SourceNotFound(
            f"{place} has no {filename} in its folds ({', '.join(model.folds)}), but {shown_names(held)}"
        )
    wanted = fold.removeprefix("fold_") if fold else _default_fold(folds, place)
    taken = [wanted]
    if wanted == MEAN:
        taken = [key for key in folds if key != "all"] or ["all"]
    elif wanted not in folds:
        of_file = f" with {filename}" if filename else ""
        raise SourceNotFound(f"{place} has no fold {wanted}{of_file}; it has {', '.join(folds)} (or {MEAN})")
    weights = tuple(join_path(model.folder_of(key), filename or _file_of(key, folds[key], place)) for key in taken)
    sidecar = sidecar_beside(weights[0], names) or sidecar_beside(join_path(model.folder, "x"), names)
    return Chosen(weights, sidecar, model.folder if model.complete else None, wanted)


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
            f"{place}/fold_{fold} has several weight files: {shown_names(files)}; choose one with --file NAME"
        )
    return taken
