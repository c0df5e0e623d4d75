"""The networks of a trained model's folds, which compute the logits of an image together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nnssl_adapt.errors import ModelFolderError, PredictionError
from nnssl_adapt.inference.export import can_decide_on_device, decided_on_device
from nnssl_adapt.inference.model_folder import Fold, FoldWeights, ModelFolder, Which
from nnssl_adapt.inference.precision import PRECISIONS, Precision, predicting_precision
from nnssl_adapt.inference.sliding_window import Allocate, logits_by_tiles, with_float32_as_fallback
from nnssl_adapt.inference.steps import PreparedImage
from nnssl_adapt.inference.sums import Tiles, part_of, sum_of


class FoldNetworks:
    """Networks whose logits are averaged. One of them is in memory at a time; the others' weights are mapped from their files.

    Args:
        model: the trained model.
        folds: of which networks are taken.
        checkpoint: which of a fold's.
        device: that computes.
        step: largest distance between tiles, as a fraction of the patch.
        tta: whether to average over mirrored images, where training mirrored.
        accumulation_dtype: of the sums over tiles.
        precision: of the network; None: as it was trained.
        batch_size: tiles that go through the network together; None: as fits the device.

    Attributes:
        plan: the model's, in the configuration that the networks were trained in.
        labels: what the networks' outputs mean.
        precision: that the networks compute in.
        mirror_axes: of a volume, along which images are mirrored.

    Raises ModelFolderError or CheckpointError for weights that can't be used together.
    """

    def __init__(
        self,
        model: ModelFolder,
        folds: Sequence[Fold],
        checkpoint: Which,
        device: torch.device,
        *,
        step: float,
        tta: bool,
        accumulation_dtype: torch.dtype,
        precision: Precision | None,
        batch_size: int | None,
    ) -> None:
        self.model, self.device, self.labels = model, device, model.labels
        self.step, self.accumulation_dtype, self.batch_size = step, accumulation_dtype, batch_size
        self._network = model.build_network(empty=True)
        self._weights = [self._load(fold, checkpoint) for fold in folds]
        self._loaded = len(self._weights) - 1
        first = self._weights[0]
        self.precision = predicting_precision(precision, first.precision, device)
        self.plan = replace(model.plan, configuration=first.configuration)
        self.mirror_axes = self.plan.mirrored_in_volume(first.mirror_axes) if tta else ()

    def __len__(self) -> int:
        return len(self._weights)

    def _load(self, fold: Fold, checkpoint: Which) -> FoldWeights:
        weights = self.model.load_weights(fold, checkpoint)
        where = self.model.checkpoint_path(fold, checkpoint)
        if weights.configuration != self.model.configuration:
            raise ModelFolderError(
                f"{where} was trained in configuration {weights.configuration}, other folds of {self.model.path} in "
                f"{self.model.configuration}: they can't be averaged"
            )
        self.model.load_into(self._network, weights, where)
        return weights

    def logits_by_tiles(
        self, image: np.ndarray | Tensor, allocate: Allocate | None = None, keep: bool = False
    ) -> Tiles:
        """Logits (K, Z, Y, X) of a preprocessed image (C, Z, Y, X), averaged; stops after each tile of each network.

        ``allocate`` makes the tensor that is returned. ``keep``: leave the logits on the device, if they have room there.
        """
        tensor = torch.as_tensor(image)
        total: Tensor | None = None
        folds = len(self._weights)
        for index, weights in enumerate(self._weights):
            if index != self._loaded:
                self._network.load_state_dict(weights.network_weights)
                self._loaded = index
            logits = yield from part_of(self._fold_logits(tensor, allocate, keep), index, folds)
            total, allocate = sum_of(total, logits), None
        assert total is not None
        return total.div_(folds) if folds > 1 else total

    def _fold_logits(self, image: Tensor, allocate: Allocate | None, keep: bool) -> Tiles:
        def run(precision: torch.dtype | None) -> Tiles:
            return logits_by_tiles(
                self._network,
                image,
                self.plan.patch_size,
                self.labels.num_heads,
                step=self.step,
                mirror_axes=self.mirror_axes,
                device=self.device,
                autocast_dtype=precision,
                accumulation_dtype=self.accumulation_dtype,
                batch_size=self.batch_size,
                allocate=allocate,
                keep=keep,
                copies=min(2, len(self._weights)) if keep else 1,
            )

        try:
            return (yield from with_float32_as_fallback(run, PRECISIONS[self.precision], self.device))
        except NotImplementedError as error:
            raise PredictionError(
                f"PyTorch can't run a part of this network on {self.device.type}: use -device cpu"
                + (", or export PYTORCH_ENABLE_MPS_FALLBACK=1" if self.device.type == "mps" else "")
            ) from error

    @property
    def decides_on_device(self) -> bool:
        """Whether labels are made where the logits are, so that they need not leave a GPU."""
        return self.device.type == "cuda" and can_decide_on_device(self.plan, self.labels)

    def decided(self, logits: Tensor, prepared: PreparedImage) -> Tensor:
        """Labels of logits that stayed on the device, made there; others as they are."""
        if not self.decides_on_device or logits.device.type != self.device.type:
            return logits
        return decided_on_device(logits, prepared.properties, self.plan)
