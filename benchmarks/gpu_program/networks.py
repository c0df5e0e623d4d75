"""The networks that are measured, and a step of a training on each: made by what a run is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_program.setting import Setting

_TINY_RESENC: dict[str, Any] = {
    "n_stages": 3,
    "features_per_stage": [4, 6, 8],
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1] * 3, [2] * 3, [2] * 3],
    "n_blocks_per_stage": [1] * 3,
    "n_conv_per_stage_decoder": [1] * 2,
}
_TINY_PRIMUS: dict[str, Any] = {"embed_dim": 36, "eva_depth": 2, "eva_numheads": 3}

LAYOUTS = {"NCDHW": (False, "off"), "NDHWC": (True, "off"), "NDHWC with fused norms": (True, "on")}
"""Name → a recipe's ``channels_last`` and ``fused_norm``."""


def patch_of(setting: Setting) -> tuple[int, int, int]:
    return setting.choose((160, 160, 160), (16, 16, 24))


def architecture_of(setting: Setting, preset: str) -> Any:
    """ResEncL or PrimusM; in a rehearsal a tiny one of its kind."""
    from nnssl_adapt.weights.network.architectures import Architecture

    tiny = _TINY_RESENC if preset == "ResEncL" else _TINY_PRIMUS
    return Architecture.named(preset, **setting.choose({}, tiny))


def labels_of(classes: int) -> Any:
    """So many labels, background included."""
    from nnssl_adapt.data.labels import LabelScheme

    return LabelScheme.from_dataset_json({"labels": {"background": 0, **{f"part {n}": n for n in range(1, classes)}}})


def losses_of(classes: int, recipe: Any = None) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """By name: the readable reference, the same compiled, and the one that trains by a recipe (None: the default)."""
    from nnssl_adapt.training.optimise.loss_choice import choose_loss
    from nnssl_adapt.training.optimise.losses import build_loss
    from nnssl_adapt.training.recipe.recipe import Recipe

    labels = labels_of(classes)
    return {
        "reference": build_loss(labels, False),
        "reference compiled": torch.compile(build_loss(labels, False)),
        "as trained": choose_loss(recipe or Recipe(), labels, False),
    }


AS_TRAINED = "as trained"


@dataclass
class Step:
    """A network in training on one batch that stays on the device. Call :meth:`take`.

    Attributes:
        recipe: layout, compiling and the rest.
        network: prepared by it, on the device.
        forward: what is called in its place.
    """

    setting: Setting
    recipe: Any
    classes: int
    network: Any
    forward: Callable[[Tensor], Any]
    batch: dict[str, Tensor]

    @classmethod
    def of(cls, setting: Setting, architecture: Any, classes: int, layout: str, compile: str) -> Step:
        """``layout``: of :data:`LAYOUTS`; ``compile``: ``off``, ``on``, or ``max-autotune``, which a recipe does not have."""
        from nnssl_adapt.training.optimise.network_options import to_device, training_forward
        from nnssl_adapt.training.recipe.recipe import Recipe
        from nnssl_adapt.weights.network.architectures import build_network

        device, patch = setting.device, patch_of(setting)
        last, fused = LAYOUTS[layout]
        recipe = Recipe(channels_last=last, fused_norm=fused, compile="on" if compile == "on" else "off")
        torch.manual_seed(0)
        network = to_device(build_network(architecture, 1, classes, patch), recipe, device).train()
        forward = training_forward(network, recipe, device)
        if compile == "max-autotune":
            tuned = torch.compile(network, mode="max-autotune-no-cudagraphs")
            kind = torch.channels_last_3d if last else torch.contiguous_format
            forward = lambda image: tuned(image.contiguous(memory_format=kind))  # noqa: E731
        image = torch.randn(2, 1, *patch, device=device)
        target = torch.randint(0, classes, (2, 1, *patch), device=device).to(torch.int16)
        return cls(setting, recipe, classes, network, forward, {"image": image, "target": target})

    def take(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        """What takes a step of the training loop with this loss; the optimiser is new. bf16, as a GPU trains."""
        from nnssl_adapt.training.loop import TrainingLoop
        from nnssl_adapt.training.optimise.optimizer import build_optimizer
        from nnssl_adapt.training.run.checkpointing import TrainingState

        device, half = self.setting.device, self.setting.choose(torch.bfloat16, None)
        loop = TrainingLoop(self.recipe, loss, labels_of(self.classes), 2, device, half)
        state = TrainingState(self.network, build_optimizer(self.network, self.recipe, device), None)
        self.network.zero_grad(set_to_none=True)
        return lambda: loop.step(state, [self.batch], self.forward)
