"""The segmentations that a cascade's second network sees beside the image: given, or made by the first network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.errors import CaseError, ConfigurationError, ModelFolderError
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.inference.record import PredictionRecord, unfinished
from nnssl_adapt.inference.task import ImageTask
from nnssl_adapt.inference.tile_bar import TileBar
from nnssl_adapt.text import and_more

if TYPE_CHECKING:
    from nnssl_adapt.inference.predictor import Predictor


def first_model_folder(model: ModelFolder) -> Path:
    """Where the model folder of a cascade's first network is looked for: beside the second's, by the same trainer and plans."""
    trainer, _, rest = model.path.resolve().name.partition("__")
    plans, _, _ = rest.rpartition("__")
    return model.path.resolve().parent / f"{trainer}__{plans or model.plan.plans_name}__{model.plan.previous_stage}"


def find_first_model(model: ModelFolder) -> Path | None:
    """The model folder of a cascade's first network; None where there is none, or the model is no cascade."""
    if model.plan.previous_stage is None or not (first_model_folder(model) / "plans.json").is_file():
        return None
    return first_model_folder(model)


def first_model(model: ModelFolder) -> Path:
    """The model folder of a cascade's first network. Raises ModelFolderError, with what to do, where there is none."""
    folder = first_model_folder(model)
    if find_first_model(model) is None:
        raise ModelFolderError(
            f"{model.path} is the second network of a cascade, and its first, {folder.name}, does not lie beside it: put it "
            "there, or give its segmentations of these images with -prev_stage_predictions FOLDER",
            path=folder,
        )
    return folder


def first_predictor(second: Predictor) -> Predictor:
    """A predictor of the first network, with the folds and settings of that of the second. Raises ModelFolderError."""
    return type(second)(
        first_model(second.model),
        *(second.folds, second.checkpoint, second.device, second.step, second.tta, second.accumulation_dtype),
        precision=second.precision,
        batch_size=second.batch_size,
        keep_orientation=second.keep_orientation,
    )


def with_first_stage(
    second: Predictor,
    tasks: Sequence[ImageTask],
    folder: str | Path | None = None,
    overwrite: bool = True,
    workers: int = 0,
    progress: bool = False,
) -> tuple[list[ImageTask], dict[str, Exception]]:
    """Of a cascade, the images with what its first network makes of them, and what went wrong with others, by identifier.

    What is made for an output folder lies in a folder of it that is called as the first network's configuration. Of a model
    that is no cascade, the images as they are.

    Args:
        second: the model.
        tasks: the images.
        folder: with a segmentation for every image, called as it; None: they are made.
        overwrite: make them again; else what is there and of the same model is used.
        workers: processes that read and export.
        progress: whether to draw a progress bar.

    Raises CaseError naming the images that a given folder has no segmentation of; ModelFolderError: there is no first network.
    """
    name = second.plan.previous_stage
    if name is None:
        if folder is not None:
            raise ConfigurationError(f"{second.model.path} is no cascade: leave -prev_stage_predictions out")
        return list(tasks), {}
    if folder is not None:
        return _given(tasks, Path(folder), name, second.model.file_ending), {}
    return _made(second.first_stage, tasks, name, overwrite, workers, progress)


def _given(tasks: Sequence[ImageTask], folder: Path, name: str, file_ending: str) -> list[ImageTask]:
    if not folder.is_dir():
        raise ConfigurationError(f"-prev_stage_predictions {folder} is not a folder", path=folder)
    paths = {task.identifier: folder / f"{task.identifier}{file_ending}" for task in tasks}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise CaseError(
            f"-prev_stage_predictions: {len(missing)} of {len(tasks)} images have no segmentation by {name}: "
            f"{and_more(missing)}",
            path=folder,
        )
    return [replace(task, previous=paths[task.identifier]) for task in tasks]


def _made(
    first: Predictor, tasks: Sequence[ImageTask], name: str, overwrite: bool, workers: int, progress: bool
) -> tuple[list[ImageTask], dict[str, Exception]]:
    beside = [
        replace(task, target=None if task.target is None else task.target.parent / name / task.target.name)
        for task in tasks
    ]
    folders = {task.target.parent for task in beside if task.target is not None}
    record = PredictionRecord(folders.pop(), first.settings) if len(folders) == 1 else None
    if record is not None:
        record.copy_model_files(first.model.path)
    waiting = beside if overwrite else unfinished(beside, record, False)
    with TileBar(len(waiting), progress and bool(waiting)) as bar:
        labels, failures = first.run_tasks(waiting, record, False, bar, workers)
    done = [
        replace(task, previous=made.target if made.target is not None else labels[task.identifier])
        for task, made in zip(tasks, beside, strict=True)
        if task.identifier not in failures
    ]
    return done, failures
