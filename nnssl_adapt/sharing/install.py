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
from nnssl_adapt.inference.first_stage import find_first_model, first_model_folder
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.inference.trainer_class import TRAINER_FILE, trainer_for_nnunet
from nnssl_adapt.paths import downloads_folder, results_folder
from nnssl_adapt.sharing.catalogue import INSTALLED
from nnssl_adapt.sharing.contents import check_weights
from nnssl_adapt.sharing.package import zip_of
from nnssl_adapt.sharing.unpack import belongs_to, chosen_models, unpack_model
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
    configuration: str | None = None,
) -> ModelFolder:
    """Install a package and return the model; it is whole and loads, or nothing was installed.

    A cascade's first stage is installed with it, where the package has it.

    Args:
        source: a zip, the folder of a package or of a model, an https address of a zip (at best with ``#sha256=…``), or a
            repository on the Hugging Face hub (``owner/name[@revision]``).
        dataset: name to install it under (``Dataset041_DeepGrey``); default the one in its plans.
        overwrite: replace the same model.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept, if not in the usual caches.
        local_files_only: never use the network.
        configuration: of the model that is meant, where there are several.

    Raises:
        SourceError: it can't be got, is damaged or dangerous, holds no model or several.
        ModelFolderError, PlanError, DatasetJsonError, CheckpointError: the model in it is incomplete or mixed up.
        ConfigurationError: nnUNet_results is not set, the name is none, or such a model is there already.
    """
    results = results_folder()
    text = str(source).strip()
    make_folder(results)
    with explain_write_errors(results), tempfile.TemporaryDirectory(prefix="nnssl_adapt-install-") as place:
        model = ModelFolder.open(_fetch(text, Path(place), revision, cache_dir, local_files_only, configuration))
        first = find_first_model(model)
        stages = [] if first is None else [ModelFolder.open(first)]
        placed = [(one, results / _dataset_name(model, dataset) / _folder_name(one)) for one in (*stages, model)]
        for one, target in placed:
            check_weights(one, one.folds)
            _refuse_existing(target, overwrite or (one is not model and _is_same(one.path, target)))
        _warn_about_id(target.parent, results)
        for one, target in placed:  # a cascade last: it is not there before its first stage is
            _place(one.path, target, dataset, _without_folders(text))
    _warn_of_missing_stage(installed := ModelFolder.open(target))
    if (target / TRAINER_FILE).is_file():
        logger.warning(
            "%s is a program of the package's author: it is not used here, and nnU-Net runs it only where "
            "nnUNet_extTrainer names its folder. Read it before",
            target / TRAINER_FILE,
        )
    return installed


def _place(staged: Path, target: Path, dataset: str | None, source: str) -> None:
    with whole_folder(target, INSTALLED, replace=True) as staging:
        shutil.copytree(staged, staging, dirs_exist_ok=True)
        if dataset is not None:
            _rename_dataset(staging, dataset)
        Record(staging / INSTALLED, _digests(staging), {"source": source}).save()


def _digests(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _is_same(staged: Path, target: Path) -> bool:
    """Whether the model that is installed there has the same weights."""
    record = Record.load(target / INSTALLED)
    return record is not None and all(
        record.files.get(name) == digest for name, digest in _digests(staged).items() if name.endswith(".pth")
    )


def _warn_of_missing_stage(model: ModelFolder) -> None:
    if model.plan.previous_stage is not None and find_first_model(model) is None:
        logger.warning(
            "%s is the second network of a cascade, and neither the package nor %s has the first, %s: install that too, or "
            "predict with its segmentations (-prev_stage_predictions)",
            model.path.name,
            model.path.parent,
            first_model_folder(model).name,
        )


def _without_folders(text: str) -> str:
    return text if "://" in text or not Path(text).expanduser().exists() else Path(text).name


def _dataset_name(model: ModelFolder, requested: str | None) -> str:
    name = requested or model.plan.dataset_name
    if not _DATASET.fullmatch(name):
        where = "--dataset" if requested else "the plans of the package"
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


def _fetch(
    text: str,
    place: Path,
    revision: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    configuration: str | None,
) -> Path:
    """The model folder, complete, below ``place``; a cascade's first stage lies beside it."""
    path = Path(text).expanduser()
    if "://" not in text and path.exists():
        path = zip_of(path) or path
        if not path.is_dir():
            return unpack_model(path, place, configuration)
        root, folders = path, [path]
        if (path / "plans.json").is_file() and (first := find_first_model(ModelFolder(path))) is not None:
            root, folders = first.parent, [path.resolve(), first]
        depths = ("*", "*/*", "*/*/*", "*/*/*/*")
        files = [file for folder in folders for depth in depths for file in sorted(folder.glob(depth))]
        names = [file.relative_to(root).as_posix() for file in files if file.is_file()]
        return _copy(text, names, root.joinpath, place, path.name, configuration)
    hub = HubAddress.parse(text)
    if hub is not None:
        address = Hub(hub.repo_id, revision or hub.revision, cache_dir, local_files_only)
        return _from_hub(address, place, configuration)
    if "://" in text and not is_hub_url(text):
        folder = Path(cache_dir).expanduser() if cache_dir else downloads_folder()
        return unpack_model(download(Address.parse(text), folder, local_files_only)[0], place, configuration)
    raise SourceNotFound(f"no file or folder {text!r}, and it is no Hugging Face id (owner/name) or https address")


def _from_hub(hub: Hub, place: Path, configuration: str | None) -> Path:
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
            return unpack_model(fetched(zips[0]), place, configuration)
    return _copy(str(hub), names, fetched, place, hub.repo_id.partition("/")[2], configuration)


def _copy(
    where: str,
    names: Sequence[str],
    file_of: Callable[[str], Path],
    place: Path,
    root_name: str,
    configuration: str | None,
) -> Path:
    """Copy the one model among these names, and its first stage, below ``place``; ``file_of`` gets each file of theirs."""
    models = chosen_models(names, where, file_of, configuration)
    targets = [make_folder(place / (PurePosixPath(model.folder).name or root_name)) for model in models]
    for model, target in zip(models, targets, strict=True):
        for name in names:
            if belongs_to(name, model):
                inside = name.removeprefix(f"{model.folder}/") if model.folder else name
                make_folder((target / inside).parent)
                shutil.copyfile(file_of(name), target / inside)
    return targets[0]
