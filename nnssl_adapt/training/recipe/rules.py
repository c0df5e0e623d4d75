"""What a recipe's values must be: alone, together, and for the network and device that they are meant for.

The rules look at anything that has a recipe's fields, so that what can be read of a recipe with mistakes is checked as well.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from nnssl_adapt.weights.families.nnunet import PRIMUS_TRAINERS
from nnssl_adapt.weights.network.architectures import CLASSES, Architecture
from nnssl_adapt.weights.network.presets import PRESETS


def range_mistakes(recipe: Any) -> Iterable[str]:
    """Values that no recipe can have; they are of the right types already."""
    yield from _number_mistakes(recipe)
    if not 0 <= recipe.momentum < 1:
        yield f"momentum: expected 0 or more and less than 1, got {recipe.momentum}"
    elif recipe.optimizer == "sgd" and recipe.momentum == 0:
        yield "momentum: Nesterov's SGD needs one above 0, got 0"
    if not all(0 <= beta < 1 for beta in recipe.betas):
        yield f"betas: expected two numbers of 0 or more and less than 1, got {recipe.betas}"
    if not 0 < recipe.layer_decay <= 1:
        yield f"layer_decay: expected a number above 0 and up to 1 (1 for none), got {recipe.layer_decay}"
    if not 0 < recipe.warmup_fraction <= 1:
        yield f"warmup_fraction: expected a number above 0 and up to 1, got {recipe.warmup_fraction}"
    if recipe.ema_decay is not None and not 0 < recipe.ema_decay < 1:
        yield f"ema_decay: expected a number between 0 and 1 (0.999, say), or none, got {recipe.ema_decay}"
    if recipe.network is not None and recipe.network not in (*PRESETS, *CLASSES):
        yield f"network: expected one of {', '.join((*CLASSES, *PRESETS))} or none, got {recipe.network!r}"
    if recipe.batch_size is not None and recipe.batch_size < 1:
        yield f"batch_size: expected at least 1, got {recipe.batch_size}"
    if recipe.patch_size is not None and min(recipe.patch_size) < 1:
        yield f"patch_size: expected three numbers of at least 1, got {recipe.patch_size}"
    if recipe.freeze not in ("none", "encoder", "all_but_head") and frozen_stages(recipe.freeze) is None:
        yield f"freeze: expected none, encoder, all_but_head or stages:K (stages:2, say), got {recipe.freeze!r}"
    for name, weight in (recipe.class_weights or {}).items():
        if not 0 <= weight < math.inf:
            yield f"class_weights: expected 0 or more for {name}, got {weight}"
    if not 0 <= recipe.foreground_fraction <= 1:
        yield f"foreground_fraction: expected 0 to 1, got {recipe.foreground_fraction}"
    if len(set(recipe.mirror_axes)) != len(recipe.mirror_axes) or not set(recipe.mirror_axes) <= {0, 1, 2}:
        yield f"mirror_axes: expected some of 0, 1, 2, each once, got {recipe.mirror_axes}"
    if not 0 <= recipe.seed < 2**32:
        yield f"seed: expected 0 to 4294967295, got {recipe.seed}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", recipe.trainer_name) or "__" in recipe.trainer_name:
        yield (
            f"trainer_name: {recipe.trainer_name!r} names a folder; use letters, digits, '-', '.' and single '_' "
            "('__' separates it from the plan's name)"
        )


def _number_mistakes(recipe: Any) -> Iterable[str]:
    at_least_one = (
        "epochs",
        "iterations_per_epoch",
        "validation_iterations",
        "accumulate",
        "checkpoint_every",
        "non_finite_limit",
    )
    for name in at_least_one:
        if getattr(recipe, name) < 1:
            yield f"{name}: expected at least 1, got {getattr(recipe, name)}"
    for name in ("warmup_epochs", "decoder_warmup_epochs", "lora_rank"):
        if getattr(recipe, name) < 0:
            yield f"{name}: expected 0 or more, got {getattr(recipe, name)}"
    above_zero = (
        "learning_rate",
        "encoder_learning_rate",
        "decoder_warmup_learning_rate",
        "gradient_clip",
        "checkpoint_minutes",
        "lora_alpha",
    )
    for name in above_zero:
        value = getattr(recipe, name)
        if value is not None and not 0 < value < math.inf:
            yield f"{name}: expected a number above 0, got {value}"
    for name in ("weight_decay", "poly_exponent", "dice_smooth"):
        if not 0 <= getattr(recipe, name) < math.inf:
            yield f"{name}: expected 0 or more, got {getattr(recipe, name)}"


def contradictions(recipe: Any) -> Iterable[str]:
    """Values that are fine alone and not together."""
    warmup = max(0, recipe.warmup_epochs) + max(0, recipe.decoder_warmup_epochs)
    if recipe.epochs >= 1 and warmup >= recipe.epochs:
        name, also = "warmup_epochs", ""
        if recipe.decoder_warmup_epochs:
            name, also = "warmup_epochs + decoder_warmup_epochs", " or --decoder-warmup"
        yield f"{name}: expected fewer than epochs ({recipe.epochs}), got {warmup} (change it with --warmup{also})"
    if recipe.fused_norm == "on" and recipe.channels_last is False:
        yield "fused_norm on and channels_last false: it is made for channels last; drop one of them"
    if recipe.decoder_warmup_learning_rate is not None and recipe.decoder_warmup_epochs == 0:
        yield "decoder_warmup_learning_rate: means nothing without decoder_warmup_epochs (--decoder-warmup)"
    if recipe.lora_alpha is not None and recipe.lora_rank == 0:
        yield "lora_alpha: means nothing without adapters; give lora_rank (--lora) as well"
    if frozen_stages(recipe.freeze) is not None:
        if recipe.lora_rank > 0:
            yield f"freeze {recipe.freeze} and lora_rank: with adapters no stage's own weights learn; drop one of them"
    elif recipe.freeze != "none":
        what = "the encoder" if recipe.freeze == "encoder" else "everything but the head"
        if recipe.lora_rank > 0:
            yield f"freeze {recipe.freeze} and lora_rank {recipe.lora_rank}: adapters lie in the encoder, which would not learn"
        if recipe.encoder_learning_rate is not None:
            yield f"freeze {recipe.freeze} and encoder_learning_rate: {what} would not learn at all; drop one of them"
        if recipe.layer_decay != 1:
            yield f"freeze {recipe.freeze} and layer_decay: {what} would not learn at all; drop one of them"
        if recipe.decoder_warmup_epochs > 0:
            yield (
                f"freeze {recipe.freeze} and decoder_warmup_epochs: the encoder never thaws; use warmup_epochs (--warmup)"
            )
    if recipe.from_scratch and recipe.freeze != "none":
        yield f"freeze {recipe.freeze} and from_scratch: random weights would stay random; drop one of them"
    if recipe.from_scratch and recipe.lora_rank > 0:
        yield "lora_rank and from_scratch: random weights would stay random; drop one of them"


def machine_mistakes(architecture: Architecture, recipe: Any, device_type: str | None = None) -> Iterable[str]:
    """What the network, the device or the installation can't do of ``recipe``, which may be anything with its fields."""
    kind = architecture.kind
    if recipe.network is not None and not is_network(architecture, recipe.network):
        yield (
            f"trainer name {recipe.trainer_name}: it stands for a {recipe.network}, and this network is {architecture}; take a "
            "trainer name for any network (PretrainedTrainer, nnUNetTrainer), or a plan with that network: one of such weights "
            f"(-pc){_how_planned(recipe.network)}"
        )
    stages = kind.stages(architecture.kwargs)
    if (frozen_stages(recipe.freeze) or 0) > stages:
        words = "blocks" if architecture.is_transformer else "stages"
        yield f"freeze {recipe.freeze}: this network's encoder has {stages} {words}"
    if recipe.lora_rank > 0 and not kind.has_attention:
        yield (
            "lora_rank: adapters go into a transformer's attention, and this network is a CNN; "
            "try layer_decay (--llrd 0.75) or freeze (--freeze encoder)"
        )
    elif recipe.lora_rank > 0 and importlib.util.find_spec("peft") is None:
        yield "lora_rank: needs peft, which is not installed: pip install 'nnssl-adapt[lora]'"
    if recipe.deep_supervision and not kind.has_deep_supervision:
        yield (
            f"deep_supervision: a {architecture.class_name} has a single output; leave --deep-supervision out, or take a recipe "
            f"without it ({kind.recipe})"
        )
    if recipe.from_scratch and (why := kind.needs_pretraining(architecture.kwargs)):
        yield f"from_scratch: {why}, and random weights have none; leave it out"
    if recipe.precision == "fp16" and device_type not in (None, "cuda"):
        yield f"precision: fp16 needs a CUDA device, not {device_type}; use auto or fp32"
    if recipe.compile == "on" and device_type == "mps":
        yield "compile: not on mps; use auto or off"


def _how_planned(network: str) -> str:
    return f", or of --keep-topology --preset {network}" if network in PRIMUS_TRAINERS else ""


def frozen_stages(freeze: str) -> int | None:
    """K of ``stages:K``; None for another way to freeze."""
    match = re.fullmatch(r"stages:(\d+)", freeze)
    return int(match[1]) if match else None


def is_network(architecture: Architecture, name: str) -> bool:
    """Whether a network is of a class (``Primus``: of any version), or has the size of a preset (``PrimusS``)."""
    if name == architecture.class_name or name not in PRESETS:
        return name == architecture.class_name or (name == "Primus" and architecture.is_transformer)
    named = Architecture.named(name)
    what = named.kind.named_sizes
    return named.class_name == architecture.class_name and all(
        json.dumps(named.kwargs.get(key)) == json.dumps(architecture.kwargs.get(key)) for key in what
    )
