"""The training losses in one pass over the logits, without probabilities, one-hot labels or float32 copies in memory.

Values and gradients are those of :mod:`nnssl_adapt.training.optimise.losses`, which is the readable reference. It keeps
several tensors as large as the logits in float32: 15 GiB for 118 classes at 160³. Here slabs of voxels go through one after
the other: of each slab the cross-entropy and the three sums that each class's Dice is made of are added up, and the slab is
forgotten. The backward pass works a slab's probabilities out again. What is made besides is a gradient as large as the
logits, in their type, and one slab. On a GPU the fastest of several ways does it
(:mod:`nnssl_adapt.training.fused.loss_ways`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.training.fused.loss_ways import way_for
from nnssl_adapt.training.optimise.losses import SMOOTH, DeepSupervisionLoss, DiceBCELoss, DiceCELoss, Reduce


class OnePassDiceCELoss(DiceCELoss):
    """:class:`~nnssl_adapt.training.optimise.losses.DiceCELoss`, in one pass. Arguments and results are the same."""

    compiles = False
    """Whether torch.compile may be used, on a GPU."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        ignored = -1 if self.ignore_label is None else self.ignore_label
        entropy: Tensor
        sums: Tensor
        entropy, sums = _Sums.apply(logits.flatten(2), labels.flatten(2), ignored, False, self.compiles)
        dice = _dice_of(sums[:, :, 1:], self.batch_dice, self.reduce)
        if self.ignore_label is None:
            return entropy / labels.numel() - dice
        annotated = self.reduce((labels != self.ignore_label).sum())
        return self.reduce(entropy) / annotated.clamp(min=1) - dice  # nothing annotated costs 0, not NaN


class OnePassDiceBCELoss(DiceBCELoss):
    """:class:`~nnssl_adapt.training.optimise.losses.DiceBCELoss`, in one pass. Arguments and results are the same."""

    compiles = False
    """Whether torch.compile may be used, on a GPU."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        entropy: Tensor
        sums: Tensor
        entropy, sums = _Sums.apply(logits.flatten(2), target.bool().flatten(2), self.ignore, True, self.compiles)
        dice = _dice_of(sums, self.batch_dice, self.reduce)
        if not self.ignore:
            return entropy / logits.numel() - dice
        annotated = self.reduce((~target.bool()[:, -1]).sum())
        return self.reduce(entropy) / annotated.clamp(min=1e-8) - dice


def in_one_pass(loss: nn.Module, compiles: bool = False) -> nn.Module:
    """The same loss in one pass: Dice with (binary) cross-entropy, deeply supervised (changed then) or not.

    ``compiles`` says whether torch.compile may be used, on a GPU.
    """
    found: OnePassDiceCELoss | OnePassDiceBCELoss
    if isinstance(loss, DeepSupervisionLoss):
        loss.loss = in_one_pass(loss.loss, compiles)
        return loss
    if isinstance(loss, DiceCELoss):
        found = OnePassDiceCELoss(loss.batch_dice, loss.ignore_label, loss.reduce)
    elif isinstance(loss, DiceBCELoss):
        found = OnePassDiceBCELoss(loss.batch_dice, loss.ignore, loss.reduce)
    else:
        raise TypeError(f"{type(loss).__name__} has no form in one pass")
    found.compiles = compiles
    return found


def _dice_of(sums: Tensor, batch_dice: bool, reduce: Reduce) -> Tensor:
    """Mean soft Dice of sums (3, B, K): shared, predicted, true."""
    shared, predicted, true = reduce(sums.sum(1)) if batch_dice else sums
    dice: Tensor = ((2 * shared + SMOOTH) / (true + predicted + SMOOTH).clamp(min=1e-8)).mean()
    return dice


class _Sums(torch.autograd.Function):
    """Logits (B, K, V) and labels (B, 1, V), or regions → summed (binary) cross-entropy; (3, B, K): shared, predicted, true.

    ``rule`` is the label that counts for nothing; of regions, whether their last channel says what counts for nothing.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, rule: int | bool, regions: bool, compiles: bool) -> Any:
        ctx.save_for_backward(logits, target)
        way = way_for(logits, target, rule, regions, compiles)
        ctx.rule, ctx.gradient_of = rule, way.region_gradient if regions else way.label_gradient
        return (way.region_sums if regions else way.label_sums)(logits, target, rule)

    @staticmethod
    def backward(ctx: Any, of_entropy: Tensor, of_sums: Tensor) -> Any:
        logits, target = ctx.saved_tensors
        return ctx.gradient_of(logits, target, ctx.rule, of_entropy, of_sums), None, None, None, None
