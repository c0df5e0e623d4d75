"""The learning rate and what learns, pure functions of the epoch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from nnssl_adapt.training.optimise.layers import frozen_layers
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.recipe.rules import frozen_stages


def learning_rate(epoch: int, recipe: Recipe) -> float:
    """Return the learning rate of a whole epoch (counted from 0), the decoder's and head's.

    1. Over ``decoder_warmup_epochs``, in which the encoder is frozen: linear to ``decoder_warmup_learning_rate`` (that of
       everything, where it is None) in the first half, polynomial down towards 0 in the second: the tooth of "sawtooth"
       in the OpenMind study (arXiv 2412.17041).
    2. Over ``warmup_epochs``: linear, from one step above zero to ``warmup_fraction`` of the highest in the last of them.
    3. Over the rest, whose first epoch is at the highest again: ``poly`` is ``highest * (1 - fraction done) **
       poly_exponent``, ``cosine`` half a wave down to 0, ``constant`` stays.

    Without the first it is the sequence of nnU-Net's warm-up trainers (``Lin_incr_LRScheduler``, then
    ``PolyLRScheduler_offset``), and without the second that of its default one. Zero of either is legal.
    """
    alone, together = recipe.decoder_warmup_epochs, recipe.warmup_epochs
    if epoch < alone:
        return _tooth(epoch, alone, recipe)
    if epoch < alone + together:
        return recipe.learning_rate * recipe.warmup_fraction / together * (1 + epoch - alone)
    done = (epoch - alone - together) / (recipe.epochs - alone - together)
    return recipe.learning_rate * _falling(done, recipe)


def _tooth(epoch: int, epochs: int, recipe: Recipe) -> float:
    highest = recipe.decoder_warmup_learning_rate or recipe.learning_rate
    rising = epochs // 2
    if epoch < rising:
        return highest / rising * (1 + epoch)
    return float(highest * (1 - (epoch - rising) / (epochs - rising)) ** recipe.poly_exponent)


def _falling(done: float, recipe: Recipe) -> float:
    """The rate as a fraction of the highest, ``done`` (0 to 1) of the epochs after the warm-up being over."""
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return float((1 - done) ** recipe.poly_exponent)


def learns(group: Mapping[str, Any], epoch: int, recipe: Recipe, frozen: Collection[str] = ()) -> bool:
    """Whether the parameters of an optimiser's group learn in an epoch.

    Args:
        group: of :func:`~nnssl_adapt.training.optimise.optimizer.build_optimizer`, with ``name``, ``part``, ``adapters`` and
            ``unused``.
        epoch: counted from 0.
        recipe: of the run.
        frozen: names of layers that never learn.
    """
    if group["name"] in frozen:
        return False
    if group["unused"]:  # no gradient ever comes there, which DDP must know
        return False
    if recipe.freeze == "all_but_head":
        found: bool = group["part"] == "head"
        return found
    if group["part"] != "encoder":
        return True
    if recipe.freeze == "encoder" or epoch < recipe.decoder_warmup_epochs:
        return False
    return group["adapters"] if recipe.lora_rank > 0 else True


def prepare_epoch(network: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, recipe: Recipe) -> float:
    """Set each group's learning rate and what learns in an epoch (changes both arguments); return the rate to log.

    To be called at the start of every epoch, also of one that is resumed in its middle: it depends on the epoch alone. Where
    what learns changes from one epoch to the next, DDP has to be wrapped again: it looks at ``requires_grad`` only once.

    Args:
        network: the plain network that the optimiser is of.
        optimizer: made by :func:`~nnssl_adapt.training.optimise.optimizer.build_optimizer`.
        epoch: counted from 0.
        recipe: of the run.
    """
    rate = learning_rate(epoch, recipe)
    stages = frozen_stages(recipe.freeze)
    frozen = set() if stages is None else frozen_layers(network, stages)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        trainable = learns(group, epoch, recipe, frozen)
        for parameter in group["params"]:
            if not trainable:
                parameter.grad = None  # a gradient left from the epoch before would still be applied
            parameter.requires_grad_(trainable)
    return rate
