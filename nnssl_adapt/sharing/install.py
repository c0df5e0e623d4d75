"""Other people's trained models, put where prediction finds them: ``nnUNet_results/DatasetNNN_Name/<model folder>``.

Nothing of a package is run. What is no part of a model stays in the zip, and a model that does not load is not installed.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from nnssl_adapt.errors import ConfigurationError, ModelFolderError, SourceNotFound
from nnssl_adapt.files import explain_write_errors, make_folder, sha256_of, write_json
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.inference.trainer_class import TRAINER_FILE, trainer_for_nnunet
from nnssl_adapt.paths import downloads_folder, results_folder
from nnssl_adapt.sharing.catalogue import INSTALLED
from nnssl_adapt.sharing.contents import check_weights
from nnssl_adapt.sharing.package import zip_of
from nnssl_adapt.sharing.unpack import belongs_to, only_model, unpack_model
from nnssl_adapt.weights.sources.digests import Record, whole_folder
from nnssl_adapt.weights.sources.download import Address, download
from nnssl_adapt.weights.sources.hub import Hub, Missing, NotCached
from nnssl_adapt.weights.sources.hub_files import HubAddress, is_hub_url
from nnssl_adapt.weights.sources.listing import list_models

logger = logging.getLogger(__name__)

_DATASET = re.compile(r"Dataset\d{3}_[A-Za-z0-9][\w.-]*")
_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*?__[\w.+-]+__[\w.-]+")


def install_model(
    source: str | Path,
    dataset: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> ModelFolder:
    """Install a package and return the model; it is whole and loads, or nothing was installed.

    Args:
        source: a zip, the folder of a package or of a model, an https address of a zip (at best with ``#sha256=…``), or a
            repository on the Hugging Face hub (``owner/name[@revision]``).
        dataset: name to install it under (``Dataset041_DeepGrey``); default the one in its plans.
        overwrite: replace the same model.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept, if not in the usual caches.
        local_files_only: never use the network.

    Raises:
        SourceError: it can't be got, is damaged or dangerous, holds no model or several.
        ModelFolderError, PlanError, DatasetJsonError, CheckpointError: the model in it is incomplete or mixed up.
        ConfigurationError: nnUNet_results is not set, the name is none, or such a model is there already.
    """
    results = results_folder()
    text = str(source).strip()
    make_folder(results)
    with explain_write_errors(results), tempfile.TemporaryDirectory(prefix="nnssl_adapt-install-") as place:
        staged = _fetch(text, Path(place), revision, cache_dir, local_files_only)
        model = ModelFolder.open(staged)
        check_weights(model, model.folds)
        target = results / _dataset_name(model, dataset) / _folder_name(model)
        _refuse_existing(target, overwrite)
        _warn_about_id(target.parent, results)
        with whole_folder(target, INSTALLED, replace=True) as staging:
            shutil.copytree(staged, staging, dirs_exist_ok=True)
            if dataset is not None:
                _rename_dataset(staging, dataset)
            digests = {
                p.relative_to(staging).as_posix(): sha256_of(p) for p in sorted(staging.rglob("*")) if p.is_file()
            }
            Record(staging / INSTALLED, digests, {"source": _without_folders(text)}).save()
    if (target / TRAINER_FILE).is_file():
        logger.warning(
            "%s is a program of the package's author: it is not used here, and nnU-Net runs it only where "
            "nnUNet_extTrainer names its folder. Read it before",
            target / TRAINER_FILE,
        )
    return ModelFolder.open(target)


def _without_folders(text: str) -> str:
    return text if "://" in text or not Path(text).expanduser().exists() else Path(text).name


def _dataset_name(model: ModelFolder, wish: str | None) -> str:
    name = wish or model.plan.dataset_name
    if not _DATASET.fullmatch(name):
        where = "--dataset" if wish else "the plans of the package"
        raise ConfigurationError(
            f"{where}: {name!r} is no dataset name: expected DatasetNNN_Name. Give one with --dataset Dataset041_Name"
        )
    return name


def _folder_name(model: ModelFolder) -> str:
    """Its own where that says what is in it; packages of others may have the files at their root."""
    name = model.path.name
    if _MODEL.fullmatch(name):
        return name
    name = f"{trainer_for_nnunet(model.architecture)}__{model.plan.plans_name}__{model.configuration}"
    if not _MODEL.fullmatch(name):
        raise ModelFolderError(f"{model.path.name}: plans and configuration make no folder's name: {name!r}")
    return name


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if Record.load(target / INSTALLED) is None:
        raise ConfigurationError(
            f"{target} is there already and was not installed (perhaps trained here): choose another --dataset, or move it away"
        )
    if not overwrite:
        raise ConfigurationError(
            f"{target} is installed already: replace it with --overwrite, or choose another --dataset"
        )


def _warn_about_id(folder: Path, results: Path) -> None:
    number = folder.name[:10]
    others = sorted(path.name for path in results.glob(f"{number}_*") if path.name != folder.name)
    if others:
        logger.warning(
            "%s has the id of %s: name the model folder (-m) when predicting", folder.name, ", ".join(others)
        )


def _rename_dataset(folder: Path, dataset: str) -> None:
    model = ModelFolder(folder)
    write_json(folder / "plans.json", {**model.plan.content, "dataset_name": dataset})


# -- getting the files -----------------------------------------------------------------------------------------------


def _fetch(text: str, place: Path, revision: str | None, cache_dir: str | Path | None, local_files_only: bool) -> Path:
    """The model folder, complete, below ``place``."""
    path = Path(text).expanduser()
    if "://" not in text and path.exists():
        path = zip_of(path) or path
        if not path.is_dir():
            return unpack_model(path, place)
        files = [
            file for depth in ("*", "*/*", "*/*/*", "*/*/*/*") for file in sorted(path.glob(depth)) if file.is_file()
        ]
        names = [file.relative_to(path).as_posix() for file in files]
        return _copy(text, names, lambda name: path / name, place, path.name)
    hub = HubAddress.parse(text)
    if hub is not None:
        return _from_hub(Hub(hub.repo_id, revision or hub.revision, cache_dir, local_files_only), place)
    if "://" in text and not is_hub_url(text):
        folder = Path(cache_dir).expanduser() if cache_dir else downloads_folder()
        return unpack_model(download(Address.parse(text), folder, local_files_only)[0], place)
    raise SourceNotFound(f"no file or folder {text!r}, and it is no Hugging Face id (owner/name) or https address")


def _from_hub(hub: Hub, place: Path) -> Path:
    def fetched(name: str) -> Path:
        try:
            return hub.fetch(name)
        except (Missing, NotCached):
            raise hub.unavailable(name) from None

    try:
        names = hub.list_files()
    except (Missing, NotCached):
        raise hub.unavailable("the list of files") from None
    if not list_models(names):
        zips = [name for name in names if name.lower().endswith(".zip")]
        if len(zips) == 1:
            return unpack_model(fetched(zips[0]), place)
    return _copy(str(hub), names, fetched, place, hub.repo_id.partition("/")[2])


def _copy(where: str, names: Sequence[str], file_of: Callable[[str], Path], place: Path, root_name: str) -> Path:
    """Copy the one model among these names below ``place``; ``file_of`` gets each file that belongs to it."""
    model = only_model(names, where)
    target = make_folder(place / (PurePosixPath(model.folder).name or root_name))
    for name in names:
        if belongs_to(name, model):
            inside = name.removeprefix(f"{model.folder}/") if model.folder else name
            make_folder((target / inside).parent)
            shutil.copyfile(file_of(name), target / inside)
    return target
