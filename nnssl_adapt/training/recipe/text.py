"""A recipe in a few lines for the log: what is on, and nothing about what is off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl_adapt.training.recipe.recipe import Recipe


def described(recipe: Recipe) -> str:
    """Return the recipe as indented lines."""
    lines = [
        f"recipe {recipe.name}: {_epochs(recipe.epochs)} of {recipe.iterations_per_epoch} steps",
        f"  {_optimizer(recipe)}, weight decay {recipe.weight_decay:g}, gradients clipped at {recipe.gradient_clip:g}",
        f"  learning rate {recipe.learning_rate:g}: {_schedule(recipe)}",
        f"  augmentation {recipe.augmentation}, mirroring {list(recipe.mirror_axes)}, precision {recipe.precision}",
    ]
    if special := ", ".join(_special(recipe)):
        lines.append(f"  {special}")
    return "\n".join(lines)


def _optimizer(recipe: Recipe) -> str:
    if recipe.optimizer == "sgd":
        return f"SGD momentum {recipe.momentum:g}"
    return f"{'AdamW' if recipe.optimizer == 'adamw' else 'Adam'} betas {recipe.betas}"


def _schedule(recipe: Recipe) -> str:
    parts = []
    if recipe.decoder_warmup_epochs:
        parts.append(f"the decoder alone for {_epochs(recipe.decoder_warmup_epochs)}")
    if recipe.warmup_epochs:
        parts.append(f"warm-up over {_epochs(recipe.warmup_epochs)}")
    return ", then ".join([*parts, recipe.schedule])


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' if number != 1 else ''}"


def _special(recipe: Recipe) -> Iterable[str]:
    if recipe.from_scratch:
        yield "from random weights"
    if recipe.encoder_learning_rate is not None:
        yield f"encoder's learning rate {recipe.encoder_learning_rate:g}"
    if recipe.layer_decay != 1:
        yield f"learning rate times {recipe.layer_decay:g} per encoder layer"
    if recipe.freeze != "none":
        yield "encoder frozen" if recipe.freeze == "encoder" else "only the segmentation head learns"
    if recipe.lora_rank:
        yield f"adapters of rank {recipe.lora_rank} in place of the encoder"
    if recipe.accumulate > 1:
        yield f"{recipe.accumulate} batches a step"
    if recipe.ema_decay is not None:
        yield f"weights averaged with decay {recipe.ema_decay:g}"
    if recipe.deep_supervision:
        yield "deep supervision"
    if recipe.activation_checkpointing:
        yield "activation checkpointing"
