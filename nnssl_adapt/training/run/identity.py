"""What a checkpoint belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnssl_adapt.inference.trainer_class import trainer_for_nnunet
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.weights.network.architectures import Architecture


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint belongs to; a run only goes on from a checkpoint of its own.

    Attributes:
        configuration: of the plan, ``3d_fullres``.
        fold: number or ``all``.
        architecture: of the network.
        patch_size: voxels (Z, Y, X).
        num_channels: of the images.
        num_heads: output channels.
        recipe: of the run.
        version: of this package.
        citations: of the weights it started from.
    """

    configuration: str
    fold: int | str
    architecture: Architecture
    patch_size: tuple[int, int, int]
    num_channels: int
    num_heads: int
    recipe: Recipe
    version: str
    citations: tuple[dict[str, Any], ...] = ()

    @property
    def network(self) -> dict[str, Any]:
        """The network as plain values; equal for equal networks."""
        plans = self.architecture.to_plans_dict(self.patch_size)
        return {"architecture": plans, "num_channels": self.num_channels, "num_heads": self.num_heads}

    @property
    def stock_trainer(self) -> str:
        """The trainer class with which released nnU-Net builds this network."""
        return trainer_for_nnunet(self.architecture)
