"""The optimiser, and the precision that it and the network work in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.recipe import Recipe


def build_optimizer(network: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Return the recipe's optimiser over all weights of ``network``, which lie on ``device``."""
    weights = list(network.parameters())
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            weights,
            recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=device.type == "cuda",
        )
    return torch.optim.SGD(
        weights, recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return what the network computes in on ``device``, or None for plain float32.

    ``auto`` is bf16 on CUDA devices that have it in hardware, fp16 on other CUDA devices, float32 elsewhere.
    Raises ConfigurationError for fp16 without CUDA, which needs the loss scaling that only CUDA has.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if native else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise ConfigurationError(f"precision fp16 needs a CUDA device, not {device.type}: use auto or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def grad_scaler() -> Any:
    """Loss scaling for fp16 on CUDA."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cuda")
    return torch.cuda.amp.GradScaler()  # torch before 2.3
