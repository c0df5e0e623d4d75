"""The training losses: soft Dice with cross-entropy, for labels that exclude each other and for overlapping regions.

Values and gradients equal nnU-Net's ``DC_and_CE_loss`` and ``DC_and_BCE_loss`` with ``MemoryEfficientSoftDiceLoss``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnssl_adapt.data.labels import LabelScheme

SMOOTH = 1e-5
"""Added to numerator and denominator of each Dice: nnU-Net's value, so that an absent class costs next to nothing."""


class DiceCELoss(nn.Module):
    """Soft Dice of the foreground classes plus cross-entropy of all, for labels that exclude each other.

    Args:
        batch_dice: Dice over the batch as a whole instead of the mean over its samples.
        ignore_label: label whose voxels count for nothing, or None.

    ``forward(logits (B, K, Z, Y, X) float, labels (B, 1, Z, Y, X) of any integer type)`` returns a scalar, in [-1, ∞).
    """

    def __init__(self, batch_dice: bool = False, ignore_label: int | None = None) -> None:
        super().__init__()
        self.batch_dice = batch_dice
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        classes = torch.arange(1, logits.shape[1], device=labels.device).view(1, -1, *[1] * (logits.ndim - 2))
        probabilities = torch.softmax(logits.float(), dim=1)[:, 1:]
        counted = None if self.ignore_label is None else labels != self.ignore_label
        dice = soft_dice(probabilities, labels == classes, counted, self.batch_dice)
        return self._cross_entropy(logits.float(), labels[:, 0].long()) - dice

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.ignore_label is None:
            return functional.cross_entropy(logits, labels)
        total = functional.cross_entropy(logits, labels, ignore_index=self.ignore_label, reduction="sum")
        return total / (labels != self.ignore_label).sum().clamp(min=1)  # nothing annotated costs 0, not NaN


class DiceBCELoss(nn.Module):
    """Soft Dice plus binary cross-entropy of each region, for regions that may overlap.

    Args:
        batch_dice: Dice over the batch as a whole instead of the mean over its samples.
        ignore: whether the last channel of the target marks voxels that count for nothing.

    ``forward(logits (B, R, Z, Y, X) float, target (B, R or R + 1, Z, Y, X) bool)`` returns a scalar.
    """

    def __init__(self, batch_dice: bool = False, ignore: bool = False) -> None:
        super().__init__()
        self.batch_dice = batch_dice
        self.ignore = ignore

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        target = target.bool()
        regions, counted = (target[:, :-1], ~target[:, -1:]) if self.ignore else (target, None)
        dice = soft_dice(torch.sigmoid(logits.float()), regions, counted, self.batch_dice)
        if counted is None:
            return functional.binary_cross_entropy_with_logits(logits.float(), regions.float()) - dice
        entropy = functional.binary_cross_entropy_with_logits(logits.float(), regions.float(), reduction="none")
        # nnU-Net divides the sum over all regions by the number of voxels, not of voxels times regions: with an ignore
        # label this term weighs R times more than without. Kept, since its published results were made so.
        return (entropy * counted).sum() / counted.sum().clamp(min=1e-8) - dice


def soft_dice(probabilities: Tensor, truth: Tensor, counted: Tensor | None, batch_dice: bool) -> Tensor:
    """Return the mean soft Dice (a scalar) over classes, and over samples unless ``batch_dice``.

    ``probabilities`` (B, K, …) float, ``truth`` (B, K, …) bool, ``counted`` (B, 1, …) bool or None for all voxels.
    """
    voxels = tuple(range(2, probabilities.ndim))
    if counted is not None:
        truth = truth & counted
        probabilities = probabilities * counted
    shared = (probabilities * truth).sum(voxels, dtype=torch.float32)
    predicted = probabilities.sum(voxels, dtype=torch.float32)
    true = truth.sum(voxels, dtype=torch.float32)
    if batch_dice:
        shared, predicted, true = shared.sum(0), predicted.sum(0), true.sum(0)
    return ((2 * shared + SMOOTH) / (true + predicted + SMOOTH).clamp(min=1e-8)).mean()


def build_loss(labels: LabelScheme, batch_dice: bool) -> DiceCELoss | DiceBCELoss:
    """Return the loss for a dataset's labels."""
    if labels.has_regions:
        return DiceBCELoss(batch_dice, ignore=labels.ignore_label is not None)
    return DiceCELoss(batch_dice, labels.ignore_label)


@torch.no_grad()
def count_overlap(logits: Tensor, target: Tensor, labels: LabelScheme) -> Tensor:
    """Count (true positive, false positive, false negative) voxels of a batch for each foreground class or region.

    ``logits`` (B, K, Z, Y, X); ``target`` as the loss takes it. Returns int64 (3, number of classes), on the CPU. Voxels of
    the ignore label are left out.
    """
    if labels.has_regions:
        predicted = logits > 0  # sigmoid above one half
        target = target.bool()
        truth = target[:, :-1] if labels.ignore_label is not None else target
        counted = ~target[:, -1:] if labels.ignore_label is not None else None
    else:
        classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
        predicted = logits.argmax(1, keepdim=True) == classes
        truth = target == classes
        counted = target != labels.ignore_label if labels.ignore_label is not None else None
    if counted is not None:
        predicted, truth = predicted & counted, truth & counted
    axes = (0, *range(2, logits.ndim))
    counts = torch.stack(
        [(predicted & truth).sum(axes), (predicted & ~truth).sum(axes), (~predicted & truth).sum(axes)]
    )
    return counts.cpu()


def pseudo_dice(counts: Tensor) -> list[float]:
    """Return the Dice of each class from counts (3, classes) as of :func:`count_overlap`; NaN where a class never occurred."""
    hit, wrong, missed = counts.double()
    return [float(value) for value in 2 * hit / (2 * hit + wrong + missed)]
