"""What a trained network computes in on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.machine.device import half_precision

PRECISIONS: dict[str, torch.dtype | None] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}

Precision = Literal["fp16", "bf16", "fp32"]

OF_NNUNET = "fp16"
"""What nnU-Net's trainers and predictors compute in."""


def trained_precision(checkpoint: Mapping[str, Any]) -> str:
    """``auto``, ``bf16``, ``fp16`` or ``fp32``: the recipe's, as the checkpoint records it, or nnU-Net's if it is not ours."""
    ours = checkpoint.get("nnssl_adapt")
    recipe = ours.get("recipe") if isinstance(ours, Mapping) else None
    found = recipe.get("precision") if isinstance(recipe, Mapping) else None
    return found if found in (*PRECISIONS, "auto") else OF_NNUNET


def predicting_precision(asked: str | None, trained: str, device: torch.device) -> Precision:
    """The precision to predict in: what is asked for, else what the network was trained in.

    A network of bf16 has numbers that fp16 may not hold. Cards without bf16 take fp16, and float32 for images on which it
    overflows. Other devices than CUDA's always compute in float32.

    Raises ConfigurationError for an unknown precision.
    """
    if asked is not None and asked not in PRECISIONS:
        raise ConfigurationError(f"precision {asked!r}: expected {', '.join(PRECISIONS)}")
    if device.type != "cuda":
        return "fp32"
    wanted = asked or trained
    if asked is None and wanted in ("auto", "bf16"):
        return "bf16" if half_precision(device) is torch.bfloat16 else "fp16"
    return "fp32" if wanted == "fp32" else "bf16" if wanted == "bf16" else "fp16"
