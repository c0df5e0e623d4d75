"""Fine-tune pre-trained 3D networks for segmentation, in nnU-Net's own file formats.

The public page: the names a notebook imports. Each is loaded when it is first used, so that importing the package
costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl_adapt.cluster.resumable import Resumable
    from nnssl_adapt.cluster.submit import submit
    from nnssl_adapt.data.convert.dataset_json import write_dataset_json
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.data.preprocess import preprocess_case
    from nnssl_adapt.data.reorient import reorient_dataset
    from nnssl_adapt.data.store import CaseStore
    from nnssl_adapt.evaluation.metrics import evaluate_folder
    from nnssl_adapt.evaluation.report.report import Report, make_report, write_report
    from nnssl_adapt.evaluation.selection import find_best
    from nnssl_adapt.evaluation.show import show
    from nnssl_adapt.inference.model_folder import ModelFolder
    from nnssl_adapt.inference.predictor import Predictor
    from nnssl_adapt.planning.make import make_plan
    from nnssl_adapt.planning.plan import FinetunePlan
    from nnssl_adapt.planning.preprocess_dataset import preprocess_dataset
    from nnssl_adapt.sharing.install import install_model
    from nnssl_adapt.sharing.package import make_package
    from nnssl_adapt.sharing.push import push_model
    from nnssl_adapt.studies.study import Study
    from nnssl_adapt.training.recipe.recipe import Recipe
    from nnssl_adapt.training.trainer import PretrainedTrainer
    from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from nnssl_adapt.weights.network.architectures import Architecture, build_network
    from nnssl_adapt.weights.proof.prove import Proof, prove_transfer
    from nnssl_adapt.weights.transfer.report import TransferReport
    from nnssl_adapt.weights.transfer.settings import TransferSettings
    from nnssl_adapt.weights.transfer.transfer import transfer_weights

_HOME = {
    "Architecture": "nnssl_adapt.weights.network.architectures",
    "CaseStore": "nnssl_adapt.data.store",
    "Checkpoint": "nnssl_adapt.weights.checkpoint.checkpoint",
    "FinetunePlan": "nnssl_adapt.planning.plan",
    "ModelFolder": "nnssl_adapt.inference.model_folder",
    "Predictor": "nnssl_adapt.inference.predictor",
    "PretrainedTrainer": "nnssl_adapt.training.trainer",
    "Proof": "nnssl_adapt.weights.proof.prove",
    "RawDataset": "nnssl_adapt.data.dataset",
    "Recipe": "nnssl_adapt.training.recipe.recipe",
    "Report": "nnssl_adapt.evaluation.report.report",
    "Resumable": "nnssl_adapt.cluster.resumable",
    "Study": "nnssl_adapt.studies.study",
    "TransferReport": "nnssl_adapt.weights.transfer.report",
    "TransferSettings": "nnssl_adapt.weights.transfer.settings",
    "build_network": "nnssl_adapt.weights.network.architectures",
    "evaluate_folder": "nnssl_adapt.evaluation.metrics",
    "find_best": "nnssl_adapt.evaluation.selection",
    "install_model": "nnssl_adapt.sharing.install",
    "make_package": "nnssl_adapt.sharing.package",
    "make_plan": "nnssl_adapt.planning.make",
    "make_report": "nnssl_adapt.evaluation.report.report",
    "open_checkpoint": "nnssl_adapt.weights.checkpoint.checkpoint",
    "preprocess_case": "nnssl_adapt.data.preprocess",
    "preprocess_dataset": "nnssl_adapt.planning.preprocess_dataset",
    "prove_transfer": "nnssl_adapt.weights.proof.prove",
    "push_model": "nnssl_adapt.sharing.push",
    "reorient_dataset": "nnssl_adapt.data.reorient",
    "show": "nnssl_adapt.evaluation.show",
    "submit": "nnssl_adapt.cluster.submit",
    "transfer_weights": "nnssl_adapt.weights.transfer.transfer",
    "write_dataset_json": "nnssl_adapt.data.convert.dataset_json",
    "write_report": "nnssl_adapt.evaluation.report.report",
}

__all__ = [
    "Architecture",
    "CaseStore",
    "Checkpoint",
    "FinetunePlan",
    "ModelFolder",
    "Predictor",
    "PretrainedTrainer",
    "Proof",
    "RawDataset",
    "Recipe",
    "Report",
    "Resumable",
    "Study",
    "TransferReport",
    "TransferSettings",
    "build_network",
    "evaluate_folder",
    "find_best",
    "install_model",
    "make_package",
    "make_plan",
    "make_report",
    "open_checkpoint",
    "preprocess_case",
    "preprocess_dataset",
    "prove_transfer",
    "push_model",
    "reorient_dataset",
    "show",
    "submit",
    "transfer_weights",
    "write_dataset_json",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nnssl_adapt' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
