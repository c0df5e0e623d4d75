"""What a checkpoint belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnssl_adapt.training.recipe import Recipe
from nnssl_adapt.weights.architectures import Architecture

_STOCK_PRIMUS_TRAINERS = {f"Primus{size}": f"nnUNet_Primus_{size}_Trainer" for size in "SBML"}


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
        """The trainer class of released nnU-Net that builds this network: its prediction needs the name of one it has.

        The plan spells CNNs out, so its default trainer does; presets of Primus have trainers of their own.
        """
        preset = _primus_preset(self.architecture)
        return _STOCK_PRIMUS_TRAINERS[preset] if preset else "nnUNetTrainer"


def _primus_preset(architecture: Architecture) -> str | None:
    """The Primus preset that an architecture equals, whatever it is called."""
    if not architecture.is_transformer:
        return None
    for preset in _STOCK_PRIMUS_TRAINERS:
        if dict(architecture.kwargs) == dict(Architecture.named(preset).kwargs):
            return preset
    return None
