"""A trained model on disk, in nnU-Net's layout.

``<Trainer>__<Plans>__<configuration>/{dataset.json, plans.json, fold_k/checkpoint_final.pth}``: written by our training
or by nnU-Net 2.x. Checkpoints are read as data (``weights_only``), whoever wrote them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.data.images import NIBABEL_REORIENT, READERS, SIMPLE_ITK
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.reorient import ORIENTATION_KEY
from nnssl_adapt.errors import ConfigurationError, ModelFolderError
from nnssl_adapt.geometry.orientation import check_code
from nnssl_adapt.inference.precision import OF_NNUNET, trained_precision
from nnssl_adapt.inference.trained_with import other_order, trained_with
from nnssl_adapt.planning.plan import KEEP, RESAMPLE, FinetunePlan
from nnssl_adapt.weights.checkpoint.state_dict import strip_wrappers, tensors_of, training_ended
from nnssl_adapt.weights.checkpoint.weight_file import read_weight_file
from nnssl_adapt.weights.families.nnunet import architecture_of_trainer
from nnssl_adapt.weights.families.registry import in_our_names
from nnssl_adapt.weights.network.architectures import Architecture, build_network, without_memory
from nnssl_adapt.weights.transfer.token_order import flatten_as_before, order_of_nnunet

logger = logging.getLogger(__name__)

Fold = int | Literal["all"]
Which = Literal["final", "best"]

NIBABEL_ORIENTATION = "LPI"
"""What nnU-Net's ``NibabelIOWithReorient`` turns images to (RAS in nibabel's words)."""

_CHECKPOINTS: tuple[Which, ...] = ("final", "best")


@dataclass(frozen=True)
class FoldWeights:
    """One trained network.

    Attributes:
        network_weights: name → tensor on the CPU, without the prefixes of compiled or parallel training. They may be the
            file itself, mapped into memory: copy before changing them.
        configuration: which of the plan's configurations it was trained with.
        trainer_name: nnU-Net's trainer class.
        mirror_axes: axes (0 is Z) that were mirrored in training, so that predictions may be; empty: none.
        channels: names of the channels that it was trained with, in order; empty where the checkpoint does not say.
        labels: ``labels`` of the dataset.json that it was trained with; empty likewise.
        precision: ``auto``, ``bf16``, ``fp16`` or ``fp32``: of the network in training.
        trained_until: day of the last epoch, where nnU-Net noted it.
    """

    network_weights: dict[str, Tensor]
    configuration: str
    trainer_name: str
    mirror_axes: tuple[int, ...]
    channels: tuple[str, ...] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)
    precision: str = OF_NNUNET
    trained_until: date | None = None


@dataclass(frozen=True)
class ModelFolder:
    """A trained model folder. :meth:`open` checks it; the constructor only notes where it lies."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> ModelFolder:
        """Open a trained model.

        Raises:
            ModelFolderError: the folder is none, incomplete, or has no trained fold; or the model needs something that
                is not supported (2D, other image readers).
            PlanError, DatasetJsonError: its plans.json or dataset.json is wrong.
            CheckpointError: its checkpoint is damaged or would run code.
        """
        folder = cls(Path(path).expanduser())
        folder._check_layout()
        folder._check_supported()
        return folder

    def _check_layout(self) -> None:
        if not self.path.is_dir():
            raise ModelFolderError(f"{self.path} is not a folder: give the model folder, the one with plans.json")
        missing = [name for name in ("dataset.json", "plans.json") if not (self.path / name).is_file()]
        if missing:
            raise ModelFolderError(f"{self.path} has no {' and no '.join(missing)}{self._models_near()}")
        if not self.folds:
            raise ModelFolderError(f"{self.path} has no trained fold: expected fold_0/checkpoint_final.pth or the like")

    def _check_supported(self) -> None:
        settings = self.plan.settings_of_configuration
        if self.image_reader not in READERS:
            raise ModelFolderError(
                f"{self.path}/plans.json: images of this model are read by nnU-Net's {self.image_reader}, which is not "
                f"supported; supported are {', '.join(READERS)}"
            )
        for key in ("resampling_fn_data", "resampling_fn_probabilities"):
            function = settings.get(key, RESAMPLE)
            if function not in (RESAMPLE, KEEP):
                raise ModelFolderError(
                    f"{self.path}/plans.json: {key} is {function}, not supported yet; supported are {RESAMPLE} and {KEEP}"
                )

    def _models_near(self) -> str:
        """Model folders below or above, for those who gave the dataset's folder or a fold's."""
        near = [p.parent for p in self.path.glob("*/plans.json")]
        if (self.path.parent / "plans.json").is_file():
            near.append(self.path.parent)
        return f"; did you mean {' or '.join(str(p) for p in sorted(near))}?" if near else ": it is not a model folder"

    # -- what it says --------------------------------------------------------------------------------------------

    @cached_property
    def dataset(self) -> DatasetJson:
        """``dataset.json``, checked. Raises DatasetJsonError."""
        return DatasetJson.load(self.path / "dataset.json")

    @property
    def dataset_json(self) -> dict[str, Any]:
        """The exact content of ``dataset.json``."""
        return self.dataset.raw

    @cached_property
    def labels(self) -> LabelScheme:
        return LabelScheme.from_dataset_json(self.dataset_json, self.path / "dataset.json")

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the input channels, in order."""
        return tuple(self.dataset.channel_names.values())

    @property
    def image_reader(self) -> str:
        """nnU-Net's name of the reader of the model's images."""
        return str(self.plan.content.get("image_reader_writer", SIMPLE_ITK))

    @cached_property
    def image_orientation(self) -> str | None:
        """How the training images lay (``RPI``: where the axes x, y, z come from), by the plans, else by dataset.json.

        None where neither says. With nnU-Net's ``NibabelIOWithReorient``, what that reader turns images to.
        Raises ModelFolderError when it is no code.
        """
        if self.image_reader == NIBABEL_REORIENT:
            return NIBABEL_ORIENTATION
        stated = {
            name: content[ORIENTATION_KEY]
            for name, content in (("dataset.json", self.dataset_json), ("plans.json", self.plan.content))
            if content.get(ORIENTATION_KEY)
        }
        try:
            codes = {name: check_code(code) for name, code in stated.items()}
        except ConfigurationError as error:
            raise ModelFolderError(f"{self.path}: {ORIENTATION_KEY}: {error}", path=self.path) from None
        if len(set(codes.values())) > 1:
            logger.warning(
                "%s: %s is %s in dataset.json and %s in plans.json, which counts: planning read it off the images",
                self.path,
                ORIENTATION_KEY,
                codes["dataset.json"],
                codes["plans.json"],
            )
        return codes.get("plans.json", codes.get("dataset.json"))

    @property
    def file_ending(self) -> str:
        return self.dataset.file_ending

    @cached_property
    def plan(self) -> FinetunePlan:
        """The plan, seen through the configuration that was trained. Raises PlanError."""
        return FinetunePlan.load(self.path / "plans.json", self.configuration)

    @cached_property
    def configuration(self) -> str:
        """Name of the configuration, from a checkpoint; before there is one, from the folder's name."""
        for fold in self.folds:
            return self.load_weights(fold, self._checkpoints(fold)[0]).configuration
        return self._configuration_from_name() or "3d_fullres"

    def _configuration_from_name(self) -> str | None:
        parts = self.path.resolve().name.split("__")
        return parts[-1] if len(parts) >= 3 else None

    # -- folds ---------------------------------------------------------------------------------------------------

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Folds that have a checkpoint (final or best), numbers first, then ``"all"``."""
        if not self.path.is_dir():
            return ()
        names = [p.name.removeprefix("fold_") for p in self.path.glob("fold_*") if p.is_dir()]
        numbers: list[Fold] = [*sorted(int(name) for name in names if re.fullmatch(r"\d+", name))]
        everything: list[Fold] = ["all"] if "all" in names else []
        return tuple(fold for fold in numbers + everything if self._checkpoints(fold))

    def folds_with(self, which: Which) -> tuple[Fold, ...]:
        """Folds that have this checkpoint. Numbered ones only, if there are any, as nnU-Net chooses."""
        folds = tuple(fold for fold in self.folds if which in self._checkpoints(fold))
        return tuple(fold for fold in folds if fold != "all") or folds

    def choose_folds(self, asked: int | str | Sequence[int | str] | None, which: Which) -> tuple[Fold, ...]:
        """The folds asked for (numbers or ``all``), which must have this checkpoint; None: see :meth:`folds_with`.

        Raises ModelFolderError, listing what there is; ConfigurationError for what is no fold, or one given twice.
        """
        if asked is None:
            folds = self.folds_with(which)
            if not folds:
                self.checkpoint_path(self.folds[0], which)  # says which there are
            return folds
        names = [asked] if isinstance(asked, (int, str)) else list(asked)
        chosen: list[Fold] = []
        for name in names:
            if str(name) != "all" and not re.fullmatch(r"[0-9]+", str(name)):
                raise ConfigurationError(f"fold {name!r}: expected a number (0 to 4) or all")
            fold: Fold = "all" if str(name) == "all" else int(name)
            self.checkpoint_path(fold, which)
            chosen.append(fold)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ConfigurationError(f"folds must be given once each, got {', '.join(str(n) for n in names) or 'none'}")
        return tuple(chosen)

    def fold_folder(self, fold: int | str) -> Path:
        return self.path / f"fold_{fold}"

    def _checkpoints(self, fold: int | str) -> list[Which]:
        return [w for w in _CHECKPOINTS if (self.fold_folder(fold) / f"checkpoint_{w}.pth").is_file()]

    def checkpoint_path(self, fold: int | str, which: Which = "final") -> Path:
        """The checkpoint's file. Raises ModelFolderError, listing what there is, if it does not exist."""
        if which not in _CHECKPOINTS:
            raise ModelFolderError(f"unknown checkpoint {which!r}: expected {' or '.join(_CHECKPOINTS)}")
        path = self.fold_folder(fold) / f"checkpoint_{which}.pth"
        if not path.is_file():
            trained = ", ".join(f"{f} ({', '.join(self._checkpoints(f))})" for f in self.folds) or "none"
            raise ModelFolderError(f"{self.path} has no {path.parent.name}/{path.name}; trained folds: {trained}")
        return path

    def load_weights(self, fold: int | str, which: Which = "final") -> FoldWeights:
        """Read a checkpoint's weights and what goes with them, without running anything in it.

        Raises:
            ModelFolderError: no such checkpoint.
            UnreadableCheckpoint, UnsafeCheckpoint: it is damaged, or loading it would run code.
        """
        path = self.checkpoint_path(fold, which)
        content = read_weight_file(path)
        weights, _, _ = in_our_names(strip_wrappers(tensors_of(content, path), path), str(path))
        arguments = content.get("init_args")
        configuration = arguments.get("configuration") if isinstance(arguments, dict) else None
        configuration = configuration or self._configuration_from_name()
        if not isinstance(configuration, str):
            raise ModelFolderError(
                f"{path} does not say which configuration it was trained with (init_args.configuration), nor does the "
                "folder's name, expected as <Trainer>__<Plans>__<configuration>"
            )
        channels, outputs = trained_with(content)
        return FoldWeights(
            network_weights=weights,
            configuration=configuration,
            trainer_name=str(content.get("trainer_name", "")),
            mirror_axes=tuple(int(axis) for axis in content.get("inference_allowed_mirroring_axes") or ()),
            precision=trained_precision(content),
            channels=channels,
            labels=outputs,
            trained_until=training_ended(content, path.parent),
        )

    # -- the network -----------------------------------------------------------------------------------------------

    @cached_property
    def architecture(self) -> Architecture:
        """Of the network that was trained: the plan's, unless the trainer built one of its own (Primus, STU-Net)."""
        planned = self.plan.architecture
        for fold in self.folds if not planned.is_transformer else ():
            trainer = self.load_weights(fold, self._checkpoints(fold)[0]).trainer_name
            return architecture_of_trainer(trainer, lambda: planned) or planned
        return planned

    @cached_property
    def _has_old_token_order(self) -> bool:
        """Whether it is a Primus that nnU-Net trained with another order of tokens than it has today."""
        if self.architecture.class_name != "Primus" or self.plan.architecture.is_transformer:
            return False  # plans of our own models describe the Primus; nnU-Net's speak of a U-Net
        weights = self.load_weights(self.folds[0], self._checkpoints(self.folds[0])[0])
        z, y, x = (n // s for n, s in zip(self.plan.patch_size, self.architecture.total_stride, strict=True))
        order, reason = order_of_nnunet(weights.trained_until, weights.network_weights, (z, y, x))
        if order == "hwd":
            logger.warning(
                "%s: its tokens are flattened (h w d), as when it was trained (%s). nnU-Net with today's "
                "dynamic-network-architectures predicts something else with it",
                self.path,
                reason,
            )
        return order == "hwd"

    def build_network(self, empty: bool = False) -> nn.Module:
        """The network, with random weights, for this dataset's channels and labels.

        ``empty``: with whatever stands in memory for weights, which is many times faster. For those who load all of them.
        """
        channels = len(self.channel_names) + len(self.plan.stage_channels(self.labels))
        arguments = self.architecture, channels, self.labels.num_heads, self.plan.patch_size
        if self._has_old_token_order:
            network = build_network(*arguments)
            flatten_as_before(network)
            return network
        if not empty:
            return build_network(*arguments)
        with without_memory(self.architecture):
            network = build_network(*arguments)
        # Transformers compute some of their tensors when they are built, and don't save them.
        saved = network.state_dict()
        if any(name not in saved for name, _ in network.named_buffers()):
            return build_network(*arguments)
        return network.to_empty(device="cpu")

    def load_into(self, network: nn.Module, weights: FoldWeights, where: str | Path) -> None:
        """Overwrite the network's weights by a fold's; every tensor must have its match, and channels and labels their order.

        Raises ModelFolderError, naming ``where`` and what does not match, and leaves the network as it was.
        """
        for what, then, now in other_order(self.dataset, weights.channels, weights.labels):
            raise ModelFolderError(
                f"{where} was trained with the {what} {then}, and {self.path / 'dataset.json'} has {now}: bring back the "
                "dataset.json of that training, or train this fold again",
                path=where,
            )
        own = network.state_dict()
        theirs = weights.network_weights
        problems = [f"{name} is missing" for name in own.keys() - theirs.keys()]
        problems += [f"{name} has no place in it" for name in theirs.keys() - own.keys()]
        problems += [
            f"{name} is {tuple(theirs[name].shape)} and not {tuple(own[name].shape)}"
            for name in own.keys() & theirs.keys()
            if own[name].shape != theirs[name].shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ModelFolderError(
                f"{where} is not of the network in plans.json ({self.architecture}): "
                f"{'; '.join(sorted(problems)[:3])}{more}. Either the files were mixed up, or the trainer "
                f"{weights.trainer_name or '(unnamed)'} builds another network than its plan says"
            )
        network.load_state_dict(theirs)

    def __str__(self) -> str:
        return f"{self.path} (folds {', '.join(str(fold) for fold in self.folds) or 'none'})"
