"""The training losses in one pass over the logits, without probabilities, one-hot labels or float32 copies in memory.

Values and gradients are those of :mod:`nnssl_adapt.training.optimise.losses`, which is the readable reference. It keeps
several tensors as large as the logits in float32: 15 GiB for 118 classes at 160³. Here slabs of voxels go through one after
the other: of each slab the cross-entropy and the three sums that each class's Dice is made of are added up, and the slab is
forgotten. The backward pass works a slab's probabilities out again. What is made besides is a gradient as large as the
logits, in their type, and one slab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnssl_adapt.training.optimise.losses import SMOOTH, DeepSupervisionLoss, DiceBCELoss, DiceCELoss, Reduce

_SLAB = 1 << 24
"""Numbers of a slab of logits on a GPU: 64 MiB in float32, enough to keep it busy."""

_SLAB_ON_CPU = 1 << 18
"""On a CPU: what stays in a processor's cache."""

_SHARE = 128
"""A slab is at most this part of the logits, so that working memory is small beside them: unless it is small anyway."""

_SMALL_SLAB = 1 << 22


class OnePassDiceCELoss(DiceCELoss):
    """:class:`~nnssl_adapt.training.optimise.losses.DiceCELoss`, in one pass. Arguments and results are the same."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        ignored = -1 if self.ignore_label is None else self.ignore_label
        entropy: Tensor
        sums: Tensor
        entropy, sums = _CrossEntropyAndOverlap.apply(logits.flatten(2), labels.flatten(2), ignored)
        dice = _dice_of(sums[:, :, 1:], self.batch_dice, self.reduce)
        if self.ignore_label is None:
            return entropy / labels.numel() - dice
        annotated = self.reduce((labels != self.ignore_label).sum())
        return self.reduce(entropy) / annotated.clamp(min=1) - dice  # nothing annotated costs 0, not NaN


class OnePassDiceBCELoss(DiceBCELoss):
    """:class:`~nnssl_adapt.training.optimise.losses.DiceBCELoss`, in one pass. Arguments and results are the same."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        entropy: Tensor
        sums: Tensor
        entropy, sums = _BinaryEntropyAndOverlap.apply(logits.flatten(2), target.bool().flatten(2), self.ignore)
        dice = _dice_of(sums, self.batch_dice, self.reduce)
        if not self.ignore:
            return entropy / logits.numel() - dice
        annotated = self.reduce((~target.bool()[:, -1]).sum())
        return self.reduce(entropy) / annotated.clamp(min=1e-8) - dice


def in_one_pass(loss: nn.Module) -> nn.Module:
    """The same loss in one pass: Dice with (binary) cross-entropy, deeply supervised (changed then) or not."""
    if isinstance(loss, DeepSupervisionLoss):
        loss.loss = in_one_pass(loss.loss)
        return loss
    if isinstance(loss, DiceCELoss):
        return OnePassDiceCELoss(loss.batch_dice, loss.ignore_label, loss.reduce)
    if isinstance(loss, DiceBCELoss):
        return OnePassDiceBCELoss(loss.batch_dice, loss.ignore, loss.reduce)
    raise TypeError(f"{type(loss).__name__} has no form in one pass")


def _dice_of(sums: Tensor, batch_dice: bool, reduce: Reduce) -> Tensor:
    """Mean soft Dice of sums (3, B, K): shared, predicted, true."""
    shared, predicted, true = reduce(sums.sum(1)) if batch_dice else sums
    dice: Tensor = ((2 * shared + SMOOTH) / (true + predicted + SMOOTH).clamp(min=1e-8)).mean()
    return dice


def _slabs(logits: Tensor) -> Iterator[slice]:
    """Voxels (the last axis) of each slab."""
    numbers = min(_SLAB, max(_SMALL_SLAB, logits.numel() // _SHARE))
    if logits.device.type == "cpu":
        numbers = _SLAB_ON_CPU
    rows, voxels = logits.shape[0] * logits.shape[1], logits.shape[2]
    width = max(1, numbers // max(1, rows))
    for start in range(0, voxels, width):
        yield slice(start, min(voxels, start + width))


def _added_up(logits: Tensor, target: Tensor, of_slab: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    entropy = torch.zeros((), device=logits.device)
    sums = torch.zeros((3, *logits.shape[:2]), device=logits.device)
    for part in _slabs(logits):
        more_entropy, more_sums = of_slab(logits[..., part].float(), target[..., part])
        entropy += more_entropy
        sums += more_sums
    return entropy, sums


def _gradient(logits: Tensor, target: Tensor, of_slab: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    gradient = torch.empty_like(logits)
    for part in _slabs(logits):
        gradient[..., part] = of_slab(logits[..., part].to(torch.float32, copy=True), target[..., part])
    return gradient


# -- labels that exclude each other ----------------------------------------------------------------------------------------


def _is_class(labels: Tensor, classes: int) -> Tensor:
    """Of labels (B, 1, V): (B, K, V) bool."""
    return labels == torch.arange(classes, device=labels.device).view(1, -1, 1)


class _CrossEntropyAndOverlap(torch.autograd.Function):
    """Logits (B, K, V) and labels (B, 1, V) → summed cross-entropy; (3, B, K): shared, predicted, true."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignored: int) -> Any:
        ctx.save_for_backward(logits, labels)
        ctx.ignored = ignored

        def of_slab(slab: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
            is_class, counted = _is_class(truth, slab.shape[1]), truth != ignored
            log_sum = torch.logsumexp(slab, 1, keepdim=True)
            probabilities = (slab - log_sum).exp_().mul_(counted)
            entropy = (log_sum * counted).sum() - torch.where(is_class & counted, slab, 0).sum()
            shared = torch.where(is_class, probabilities, 0).sum(2)
            return entropy, torch.stack([shared, probabilities.sum(2), (is_class & counted).sum(2)])

        return _added_up(logits, labels, of_slab)

    @staticmethod
    def backward(ctx: Any, of_entropy: Tensor, of_sums: Tensor) -> Any:
        logits, labels = ctx.saved_tensors
        of_shared, of_predicted = of_sums[0].unsqueeze(2), of_sums[1].unsqueeze(2)

        def of_slab(slab: Tensor, truth: Tensor) -> Tensor:
            is_class, counted = _is_class(truth, slab.shape[1]), truth != ctx.ignored
            probabilities = slab.sub_(torch.logsumexp(slab, 1, keepdim=True)).exp_()  # in place: memory is what counts
            result = torch.where(is_class, of_shared, 0).add_(of_predicted)  # of the probabilities; now of the logits:
            result.sub_((probabilities * result).sum(1, keepdim=True).sub_(of_entropy)).mul_(probabilities)
            return result.sub_(torch.where(is_class, of_entropy, 0)).mul_(counted)

        return _gradient(logits, labels, of_slab), None, None


# -- regions that may overlap ----------------------------------------------------------------------------------------------


def _split(target: Tensor, ignore: bool) -> tuple[Tensor, Tensor | None]:
    """Regions (B, R, V), and which voxels count (B, 1, V), None for all."""
    return (target[:, :-1], ~target[:, -1:]) if ignore else (target, None)


class _BinaryEntropyAndOverlap(torch.autograd.Function):
    """Logits (B, R, V) and bool target (B, R or R + 1, V) → summed binary cross-entropy; (3, B, R)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore: bool) -> Any:
        ctx.save_for_backward(logits, target)
        ctx.ignore = ignore

        def of_slab(slab: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
            regions, counted = _split(wanted, ignore)
            probabilities = torch.sigmoid(slab)
            entropy = functional.binary_cross_entropy_with_logits(slab, regions.float(), reduction="none")
            if counted is not None:
                regions, probabilities, entropy = regions & counted, probabilities * counted, entropy * counted
            shared = torch.where(regions, probabilities, 0).sum(2)
            return entropy.sum(), torch.stack([shared, probabilities.sum(2), regions.sum(2)])

        return _added_up(logits, target, of_slab)

    @staticmethod
    def backward(ctx: Any, of_entropy: Tensor, of_sums: Tensor) -> Any:
        logits, target = ctx.saved_tensors
        of_shared, of_predicted = of_sums[0].unsqueeze(2), of_sums[1].unsqueeze(2)

        def of_slab(slab: Tensor, wanted: Tensor) -> Tensor:
            regions, counted = _split(wanted, ctx.ignore)
            probabilities = torch.sigmoid(slab)
            of_probability = torch.where(regions, of_shared, 0) + of_predicted
            of_logit = of_probability * probabilities * (1 - probabilities)
            of_logit += of_entropy * (probabilities - regions.float())
            return of_logit if counted is None else of_logit.mul_(counted)

        return _gradient(logits, target, of_slab), None, None
