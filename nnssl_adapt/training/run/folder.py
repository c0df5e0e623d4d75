"""Where a run's files lie: nnU-Net's model folder, and the folder of one fold in it."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from nnssl_adapt.data.reorient import ORIENTATION_KEY
from nnssl_adapt.errors import ConfigurationError, DatasetJsonError, NothingToResume
from nnssl_adapt.files import atomic_path, explain_write_errors, make_folder, write_json
from nnssl_adapt.inference.trainer_class import write_trainer_class
from nnssl_adapt.paths import results_folder
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.text import read_json
from nnssl_adapt.training.run.checkpointing import BEST, FINAL, LATEST
from nnssl_adapt.training.run.stopping import STOPPED

logger = logging.getLogger(__name__)

_OF_ONE_RUN = (
    LATEST,
    BEST,
    FINAL,
    "progress.png",
    "metrics.jsonl",
    "metrics.csv",
    "tensorboard",
    "wandb_id.txt",
    "transfer_report.json",
    "debug.json",
    "validation",
    "validation_done.json",
    STOPPED,
)


def source_of(plan: FinetunePlan) -> dict[str, Any]:
    """What a plan records of the weights that it starts from; empty where it names none."""
    source = plan.provenance.source
    return {} if source is None else source.to_dict()


@dataclass(frozen=True)
class RunFolder:
    """``<results>/<dataset>/<trainer>__<plans>__<configuration>/fold_<fold>``.

    Attributes:
        model: the model folder.
        fold: number or ``all``.
    """

    model: Path
    fold: int | str

    @classmethod
    def of(cls, plan: FinetunePlan, trainer_name: str, fold: int | str, results: str | Path | None = None) -> RunFolder:
        """The folder of a run; ``results`` instead of ``nnUNet_results`` where given."""
        root = results_folder() if results is None else Path(results)
        return cls(root / plan.dataset_name / f"{trainer_name}__{plan.plans_name}__{plan.configuration}", fold)

    @property
    def path(self) -> Path:
        """The fold's folder."""
        return self.model / f"fold_{self.fold}"

    def checkpoint(self, name: str) -> Path | None:
        """A checkpoint of this fold, if it is there."""
        path = self.path / name
        return path if path.is_file() else None

    def require_checkpoint(self, name: str) -> None:
        """Raise NothingToResume, with what to do instead, if this fold has no checkpoint of this name."""
        if self.checkpoint(name) is not None:
            return
        there = [other for other in (LATEST, BEST, FINAL) if self.checkpoint(other)]
        advice = {
            LATEST: "the training is not over: go on with --c",
            BEST: "--val_best validates checkpoint_best.pth",
            FINAL: "--val alone validates checkpoint_final.pth",
        }
        what = "; ".join(advice[other] for other in there) or "train it first, without --val"
        raise NothingToResume(f"{self.path} has no {name} to validate: {what}")

    @property
    def has_run(self) -> bool:
        """Whether an earlier run of this fold left a checkpoint."""
        return any(self.checkpoint(name) for name in (LATEST, BEST, FINAL))

    def set_earlier_run_aside(self, for_checkpoints: bool = True) -> None:
        """Move what an earlier run of this fold left into ``earlier_run_<date and time>``: it may still be wanted, and must
        not be taken for this run's.

        Raises ConfigurationError if the new run is to write no checkpoints (``for_checkpoints``): trying things out must not
        leave the folder without a model.
        """
        if not self.has_run:
            return
        if not for_checkpoints:
            raise ConfigurationError(
                f"{self.path} has a model or a run to go on with, which a run without checkpoints would push aside: give it "
                "a folder of its own with --set trainer_name=NAME"
            )
        aside = make_folder(self.path / f"earlier_run_{datetime.now():%Y_%m_%d_%H_%M_%S}")
        with explain_write_errors(aside):
            for name in _OF_ONE_RUN:
                if (self.path / name).exists():
                    (self.path / name).rename(aside / name)
        logger.warning("%s has an earlier run; its files are now in %s", self.path, aside.name)

    def write_model_files(self, plan: FinetunePlan) -> None:
        """Write plans.json, dataset.json and dataset_fingerprint.json, which prediction and nnU-Net look for, and, where it
        has no trainer that builds the network, one for it.
        """
        write_json(self.model / "plans.json", plan.content)
        for name in ("dataset.json", "dataset_fingerprint.json"):
            source = plan.dataset_folder / name
            if source.is_file():
                with atomic_path(self.model / name) as temporary:
                    temporary.write_bytes(source.read_bytes())
        self._note_orientation(plan)
        write_trainer_class(self.model, plan.architecture)

    def _note_orientation(self, plan: FinetunePlan) -> None:
        """Say in the model's dataset.json how its training images lay, where the Spinal Cord Toolbox looks for it."""
        path, lies = self.model / "dataset.json", plan.content.get(ORIENTATION_KEY)
        if not path.is_file() or lies is None:
            return
        content = read_json(path, DatasetJsonError, "dataset.json")
        if content.get(ORIENTATION_KEY) != lies:
            write_json(path, {**content, ORIENTATION_KEY: lies})

    def refuse_other_model(self, plan: FinetunePlan) -> None:
        """Raise ConfigurationError if other folds in this folder have another network, patch, data or starting weights."""
        path = self.model / "plans.json"
        others = [
            fold for fold in self.model.glob("fold_*") if fold != self.path and any(fold.glob("checkpoint_*.pth"))
        ]
        if not others or not path.is_file():
            return
        old = FinetunePlan.load(path, plan.configuration)
        for what in ("architecture", "patch_size", "data_identifier"):
            there, here = old.settings_of_configuration[what], plan.settings_of_configuration[what]
            if json.loads(json.dumps(there)) != json.loads(json.dumps(here)):
                shown = f": {there} there, {here} now" if what != "architecture" else ""
                raise ConfigurationError(
                    f"{self.model} has {others[0].name} trained with another {what}{shown}. Give this run a folder of its "
                    "own with --set trainer_name=NAME"
                )
        there, here = (str(source_of(content).get("sha256") or "") for content in (old, plan))
        if there and here and there != here:
            raise ConfigurationError(
                f"{self.model} has {others[0].name} trained from other weights: SHA-256 {there[:12]}… there, {here[:12]}… now. "
                "Give this run a folder of its own with --set trainer_name=NAME"
            )

    def recorded_plan(self, configuration: str) -> FinetunePlan | None:
        """The plan that an earlier run of this folder was trained with, if there is one."""
        path = self.model / "plans.json"
        return FinetunePlan.load(path, configuration) if path.is_file() else None

    def write_debug(self, content: dict[str, Any], device: torch.device) -> None:
        """Write debug.json: what was run, with which versions, where."""
        machine = {
            "hostname": platform.node(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": str(device),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        }
        write_json(self.path / "debug.json", {**content, **machine})
