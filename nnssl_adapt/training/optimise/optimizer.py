"""The optimiser, and the precision that it and the network work in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.machine.device import half_precision
from nnssl_adapt.training.optimise.layers import Layer, layers_of, says_where_its_encoder_is
from nnssl_adapt.training.recipe.recipe import Recipe

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
}


def build_optimizer(network: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Return the recipe's optimiser over all weights of ``network``, which lie on ``device``.

    Every parameter is in exactly one group, one a layer (:func:`~nnssl_adapt.training.optimise.layers.layers_of`). A group
    has, besides torch's own keys, ``name``, ``part`` (``encoder``, ``decoder`` or ``head``), ``adapters``, ``unused`` and
    ``lr_scale``: its learning rate is that times the schedule's
    (:func:`~nnssl_adapt.training.optimise.schedule.prepare_epoch`). Weights that stay frozen are in groups as well, so that
    the groups of a run are always the same; without gradients they don't change.

    Raises ConfigurationError when the recipe treats parts differently and the network doesn't say where its encoder is.
    """
    layers = _layers_for(network, recipe)
    groups = [
        {
            "params": list(layer.parameters),
            "name": layer.name,
            "part": layer.part,
            "adapters": layer.adapters,
            "unused": layer.unused,
            "lr_scale": lr_scale(layer, recipe),
        }
        for layer in layers
    ]
    kind = _OPTIMIZERS[recipe.optimizer]
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        options |= {"momentum": recipe.momentum, "nesterov": True}
    else:
        options["betas"] = recipe.betas
    if device.type == "cuda" and "fused" in inspect.signature(kind).parameters:  # SGD has it since torch 2.3
        options["fused"] = True
    return kind(groups, **options)


def _layers_for(network: nn.Module, recipe: Recipe) -> list[Layer]:
    """The network's layers; a single one for a network of unknown parts, if the recipe treats all parts alike."""
    distinguishes = (
        recipe.encoder_learning_rate is not None
        or recipe.layer_decay != 1
        or recipe.freeze != "none"
        or recipe.lora_rank > 0
        or recipe.decoder_warmup_epochs > 0
    )
    if distinguishes or says_where_its_encoder_is(network):
        return layers_of(network, recipe.deep_supervision)
    return [Layer("network", "decoder", None, 0, tuple(network.parameters()))]


def lr_scale(layer: Layer, recipe: Recipe) -> float:
    """What the schedule's learning rate is multiplied with for a layer.

    1 for decoder and head. The encoder's last layer has ``layer_decay`` times the encoder's learning rate, the one before it
    the square of that, and so on down to the stem, as in fine-tuning of BEiT (arXiv 2106.08254) and masked autoencoders
    (arXiv 2111.06377), where the head counts as the layer above the last block.
    """
    if layer.part != "encoder":
        return 1.0
    rate = recipe.encoder_learning_rate or recipe.learning_rate
    return rate / recipe.learning_rate * recipe.layer_decay**layer.steps_from_top


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its kernels take a flag on the device that says that the step is to be skipped."""
    return all(bool(group.get("fused")) for group in optimizer.param_groups)


def step_if_finite(optimizer: torch.optim.Optimizer, figures: Tensor) -> None:
    """Take a step, unless one of ``figures`` is NaN or infinite: then neither weights nor momenta change.

    A fused optimiser gets the answer as a tensor on the device (``found_inf``), and nothing waits for it. For others the
    figures are read.
    """
    if not is_fused(optimizer):
        if bool(torch.isfinite(figures).all()):
            optimizer.step()
        return
    begin_momenta(optimizer)
    optimizer.found_inf = (~torch.isfinite(figures).all()).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def begin_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Give each weight that has a gradient a momentum of zero, if it has none. Changes ``optimizer``, for fused SGD only.

    The step stays the same: the first momentum is the gradient. But torch makes it without values and marks it as begun also
    where ``found_inf`` skips the step, and then the next step would add to whatever stood in memory.
    """
    if not isinstance(optimizer, torch.optim.SGD) or not is_fused(optimizer):
        return
    for group in optimizer.param_groups:
        for weight in group["params"] if group["momentum"] else ():
            if weight.grad is not None and optimizer.state[weight].get("momentum_buffer") is None:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a checkpoint's momenta and counts into ``optimizer`` (changes it), which keeps the settings of its groups.

    They follow from the recipe and the device. With the checkpoint's own, one from a GPU would ask the CPU for a fused
    optimiser, one from a CPU would leave counts where a fused optimiser can't use them, and a changed ``weight_decay`` or
    ``layer_decay`` would not count.

    Raises ValueError (torch's) when it has other groups, or groups of other sizes.
    """
    ours, theirs = optimizer.param_groups, list(state["param_groups"])
    settings = [{key: value for key, value in group.items() if key != "params"} for group in ours]
    groups = [{**settings[i], "params": group["params"]} if i < len(ours) else group for i, group in enumerate(theirs)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    _lay_out_as_weights(optimizer)


@torch.no_grad()
def _lay_out_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give each momentum or moment the strides of its weight, which fused optimisers on CUDA insist on.

    A checkpoint has them as they were: a run that was begun in another memory layout (``channels_last``) left others.
    """
    for weight, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                kept[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return what the network computes in on ``device``, or None for plain float32.

    ``auto`` is bf16 on CUDA devices that have it in hardware, fp16 on other CUDA devices, float32 elsewhere.
    Raises ConfigurationError for fp16 without CUDA, which needs the loss scaling that only CUDA has.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        return half_precision(device)
    if precision == "fp16" and device.type != "cuda":
        raise ConfigurationError(f"precision fp16 needs a CUDA device, not {device.type}: use auto or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def grad_scaler() -> Any:
    """Loss scaling for fp16 on CUDA."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cuda")
    return torch.cuda.amp.GradScaler()  # torch before 2.3
