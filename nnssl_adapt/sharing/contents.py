"""What of a trained model is published: the files of a release, written small, clean, and the same every time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl_adapt.errors import ConfigurationError, ModelFolderError
from nnssl_adapt.files import explain_write_errors, make_folder, write_json, write_text
from nnssl_adapt.inference.model_folder import Fold, ModelFolder, Which
from nnssl_adapt.inference.trainer_class import trainer_for_nnunet, write_trainer_class
from nnssl_adapt.sharing.anonymous import Cleaner
from nnssl_adapt.weights.checkpoint.weight_file import read_weight_file
from nnssl_adapt.weights.families.nnunet import NNUNET_CITATION
from nnssl_adapt.weights.network.other_kinds import OTHER_KINDS

CHECKPOINT = "checkpoint_final.pth"

_MEANT = ("channel_names", "modality", "labels", "regions_class_order")
"""Entries of dataset.json whose every letter counts."""

_LISTS_OF_FILES = ("dataset", "training", "test", "validation")
"""Those that name every subject: nnU-Net's, and the Decathlon's."""

_FOR_SCT = '''

def _from_either(first, *others, **named):
    """nnU-Net up to 2.6 (and the Spinal Cord Toolbox) hands over the class name and its arguments, later ones managers."""
    if not isinstance(first, str):
        return _from_managers(first, *others, **named)
    named.pop("enable_deep_supervision", None)
    return {build}


_from_managers = {trainer}.build_network_architecture
{trainer}.build_network_architecture = staticmethod(_from_either)


def get_trainer_class():
    """Called by the Spinal Cord Toolbox."""
    return {trainer}
'''

_BUILD_FROM_PLANS = "get_network_from_plans(first, *others[:4], **named)"


@dataclass(frozen=True)
class PackagedModel:
    """A model folder ready to be published.

    Attributes:
        folder: ``<trainer>__<plans>__<configuration>``, on disk.
        dataset_name: ``DatasetNNN_Name``.
        trainer: nnU-Net's trainer class that builds the network.
        folds: in it.
        dropped: what was left out or changed, for people.
    """

    folder: Path
    dataset_name: str
    trainer: str
    folds: tuple[Fold, ...]
    dropped: tuple[str, ...] = field(default=())

    @property
    def files(self) -> dict[str, Path]:
        """Name below the folder → file."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}


def folds_to_publish(model: ModelFolder, requested: Sequence[str | int] | None) -> tuple[Fold, ...]:
    """Folds to publish: all numbered ones that are finished, else ``all``; or those asked for.

    Raises ModelFolderError when one has no checkpoint_final, or none has.
    """
    finished = model.folds_with("final")
    if requested is None:
        if not finished:
            raise ModelFolderError(
                f"{model.path}: no fold is trained to its end (no fold_*/{CHECKPOINT}): nothing to publish"
            )
        return finished
    chosen: list[Fold] = []
    for item in requested:
        fold: Fold = "all" if str(item) == "all" else int(item) if str(item).isdigit() else _no_fold(item)
        model.checkpoint_path(fold)  # says what there is
        if fold not in chosen:
            chosen.append(fold)
    if "all" in chosen and len(chosen) > 1:
        raise ConfigurationError("fold all stands alone in a package: give it, or numbers")
    return tuple(chosen)


def _no_fold(item: object) -> Fold:
    raise ConfigurationError(f"fold {item!r}: expected a number or all")


def check_weights(model: ModelFolder, folds: Sequence[Fold]) -> None:
    """Make sure that every fold is of this plan and dataset.

    Raises ModelFolderError naming the checkpoint that has another network, configuration or dataset.
    """
    network = model.build_network(empty=True)
    for fold in folds:
        which: Which = "final" if (model.fold_folder(fold) / CHECKPOINT).is_file() else "best"
        path = model.checkpoint_path(fold, which)
        weights = model.load_weights(fold, which)
        if weights.configuration != model.configuration:
            raise ModelFolderError(
                f"{path} was trained in configuration {weights.configuration}, others in {model.configuration}"
            )
        _refuse_other_dataset(model, path)
        model.load_into(network, weights, path)


def _refuse_other_dataset(model: ModelFolder, path: Path) -> None:
    """nnU-Net keeps the plans and dataset.json of the training in its checkpoint: they must be those beside it."""
    arguments = read_weight_file(path).get("init_args")
    if not isinstance(arguments, dict):
        return
    plans, dataset = arguments.get("plans"), arguments.get("dataset_json")
    trained_on = plans.get("dataset_name") if isinstance(plans, dict) else None
    if trained_on not in (None, model.plan.dataset_name):
        raise ModelFolderError(
            f"{path} was trained on {trained_on}, and plans.json beside it is of {model.plan.dataset_name}: "
            "files were mixed up"
        )
    if isinstance(dataset, dict) and dataset.get("labels") not in (None, model.dataset_json["labels"]):
        raise ModelFolderError(
            f"{path} was trained with the labels {dataset['labels']}, and dataset.json beside it has "
            f"{model.dataset_json['labels']}: files were mixed up"
        )


def write_contents(
    model: ModelFolder,
    folds: Sequence[Fold],
    target: Path,
    orientation: str | None,
    cleaner: Cleaner,
    licence: str | None = None,
) -> PackagedModel:
    """Write the publishable copy of a model folder below ``target``.

    Only what prediction needs, and what tells how the training went; no path of this machine and no case's name.

    Args:
        model: what is to be published; it is not changed.
        folds: to take.
        target: an existing folder; the model's own, ``<trainer>__<plans>__<configuration>``, is made in it.
        orientation: for dataset.json's ``image_orientation``; None leaves it as it is.
        cleaner: takes out what must not be told.
        licence: of the model, kept in its plans for whoever fine-tunes it.

    Raises OutputError when it can't be written, CheckpointError for a damaged checkpoint.
    """
    trainer = trainer_for_nnunet(model.architecture)
    folder = make_folder(target / f"{trainer}__{model.plan.plans_name}__{model.configuration}")
    write_json(folder / "dataset.json", _dataset_json(model, orientation, cleaner))
    write_json(folder / "plans.json", _plans(model, cleaner, licence))
    _copy_json(model.path / "dataset_fingerprint.json", folder, cleaner)
    for fold in folds:
        _write_fold(model, fold, make_folder(folder / f"fold_{fold}"), trainer, cleaner)
    written = write_trainer_class(folder, model.architecture)
    if written is not None and "def get_trainer_class" not in (text := written.read_text(encoding="utf-8")):
        write_text(written, text.rstrip("\n") + "\n" + _for_sct(model, trainer))
    return PackagedModel(folder, model.plan.dataset_name, trainer, tuple(folds), _left_out(model, folds))


def _for_sct(model: ModelFolder, trainer: str) -> str:
    name = model.architecture.class_name
    build = f"{name}(others[2], others[3], **others[0])" if name in OTHER_KINDS else _BUILD_FROM_PLANS
    return _FOR_SCT.format(build=build, trainer=trainer)


def _dataset_json(model: ModelFolder, orientation: str | None, cleaner: Cleaner) -> dict[str, Any]:
    content = {
        key: value if key in _MEANT else cleaner.json(value, keep_keys=True)
        for key, value in model.dataset_json.items()
        if key not in _LISTS_OF_FILES
    }
    if orientation is not None:
        content["image_orientation"] = orientation
    return content


def _plans(model: ModelFolder, cleaner: Cleaner, licence: str | None) -> dict[str, Any]:
    content: dict[str, Any] = cleaner.json(model.plan.content, keep_keys=True)
    ours = content.get("nnssl_adapt", {})
    # A package of a package remembers the first trainer.
    added = {"trained_by": ours.get("trained_by") or _own_trainer(model), "licence": licence}
    content["nnssl_adapt"] = {**ours, **{key: value for key, value in added.items() if value is not None}}
    return content


def _own_trainer(model: ModelFolder) -> str | None:
    """The trainer's name in the folder's, where it is not nnU-Net's that predicts."""
    name, separator, _ = model.path.resolve().name.partition("__")
    return name if separator else None


def _write_fold(model: ModelFolder, fold: Fold, target: Path, trainer: str, cleaner: Cleaner) -> None:
    source = model.fold_folder(fold)
    save_slim(model, fold, target / CHECKPOINT, trainer)
    _copy_json(source / "debug.json", target, cleaner)
    for path in sorted(source.glob("progress.png")) + sorted(source.glob("training_log*.png")):
        shutil.copyfile(path, target / path.name)
    for path in sorted(source.glob("training_log*.txt")):
        write_text(target / path.name, cleaner.text(path.read_text(encoding="utf-8", errors="replace")))


def _copy_json(path: Path, target: Path, cleaner: Cleaner) -> None:
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFolderError(f"{path} can't be read as JSON: {error}") from error
    write_json(target / path.name, cleaner.json(content))


def save_slim(model: ModelFolder, fold: Fold, path: Path, trainer: str) -> None:
    """Write a checkpoint of the four keys that prediction reads, and what to cite: plain tensors and primitives only.

    torch from 1.6 on reads it with ``weights_only``. The bytes depend on the tensors and torch's version alone.
    """
    weights = model.load_weights(fold)
    content: dict[str, Any] = {
        "network_weights": plain_tensors(weights.network_weights),
        "trainer_name": trainer,
        "init_args": {"configuration": weights.configuration, "fold": fold},
        "inference_allowed_mirroring_axes": weights.mirror_axes or None,
    }
    if citations := model.plan.pretrain_info.get("citations"):
        content["citations"] = [*citations, NNUNET_CITATION]  # whoever goes on from these weights cites them too
    with explain_write_errors(path):
        torch.save(content, path)


def plain_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compact copies on the CPU; names of one tensor share it, so that files hold it once."""
    known: dict[tuple[Any, ...], Tensor] = {}
    plain = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in known or tensor.numel() == 0:
            known[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
        plain[name] = known[key]
    return plain


def _left_out(model: ModelFolder, folds: Sequence[Fold]) -> tuple[str, ...]:
    names = sorted(path.name for path in model.path.glob("fold_*") if path.is_dir())
    others = [name for name in names if name not in [f"fold_{fold}" for fold in folds]]
    return tuple(f"{name} (not asked for, not finished, or no fold)" for name in others)
