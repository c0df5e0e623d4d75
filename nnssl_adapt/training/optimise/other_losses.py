"""Losses beside the default one: an overlap term, a term of each voxel, or both, in any of the published combinations.

The parts are written to be read. Where nnU-Net has the loss (``dice``, ``ce``, ``dice_ce`` with class weights or another
``smooth``, ``dice_topk``), values and gradients equal its classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnssl_adapt.training.optimise.losses import Reduce, alone

TOP_PERCENT = 10
"""Of the voxels, those with the highest cross-entropy, that ``dice_topk`` looks at (nnU-Net's ``TopK10``)."""

FOCAL_GAMMA = 2.0
"""Exponent with which the focal loss turns from voxels that are right (Lin et al., arXiv 1708.02002)."""

TVERSKY_FALSE_POSITIVES, TVERSKY_FALSE_NEGATIVES = 0.3, 0.7
"""What the two kinds of mistakes count in the Tversky index (Salehi et al., arXiv 1706.05721): missed voxels more."""


@dataclass(frozen=True)
class Judged:
    """A batch as the terms of a loss see it.

    Attributes:
        logits: (B, K, Z, Y, X) float32.
        labels: (B, Z, Y, X) int64, or None for regions.
        truth: (B, F, Z, Y, X) bool, of each foreground class or region.
        probabilities: (B, F, Z, Y, X) float32, of the same.
        counted: (B, 1, Z, Y, X) bool, voxels that are annotated; None for all.
    """

    logits: Tensor
    labels: Tensor | None
    truth: Tensor
    probabilities: Tensor
    counted: Tensor | None


def judged_labels(logits: Tensor, labels: Tensor, ignore_label: int | None) -> Judged:
    """For labels that exclude each other: ``labels`` (B, 1, Z, Y, X) of any integer type."""
    logits = logits.float()
    classes = torch.arange(1, logits.shape[1], device=labels.device).view(1, -1, *[1] * (logits.ndim - 2))
    counted = None if ignore_label is None else labels != ignore_label
    return Judged(logits, labels[:, 0].long(), labels == classes, torch.softmax(logits, dim=1)[:, 1:], counted)


def judged_regions(logits: Tensor, target: Tensor, ignore: bool) -> Judged:
    """For regions that may overlap: ``target`` (B, R or R + 1, Z, Y, X) bool, its last channel the ignored voxels."""
    target, logits = target.bool(), logits.float()
    truth, counted = (target[:, :-1], ~target[:, -1:]) if ignore else (target, None)
    return Judged(logits, None, truth, torch.sigmoid(logits), counted)


# -- overlap -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Minus the mean overlap of the foreground classes, and of the samples unless ``batch_dice``.

    The Tversky index with these weights of the two kinds of mistakes; with a half each it is Dice.

    Attributes:
        batch_dice: counts voxels over the batch as a whole.
        smooth: added to numerator and denominator of Dice.
        false_positives, false_negatives: what a voxel of each kind of mistake counts.
        reduce: sums over the processes that share a batch.
    """

    batch_dice: bool
    smooth: float
    false_positives: float = 0.5
    false_negatives: float = 0.5
    reduce: Reduce = alone

    def __call__(self, judged: Judged) -> Tensor:
        probabilities, truth = judged.probabilities, judged.truth
        if judged.counted is not None:
            probabilities, truth = probabilities * judged.counted, truth & judged.counted
        voxels = tuple(range(2, probabilities.ndim))
        hit = (probabilities * truth).sum(voxels, dtype=torch.float32)
        predicted, true = (sums.sum(voxels, dtype=torch.float32) for sums in (probabilities, truth))
        if self.batch_dice:
            hit, predicted, true = self.reduce(torch.stack([hit.sum(0), predicted.sum(0), true.sum(0)]))
        false_positives, false_negatives = predicted - hit, true - hit
        wrong = 2 * (self.false_positives * false_positives + self.false_negatives * false_negatives)
        return -((2 * hit + self.smooth) / (2 * hit + wrong + self.smooth).clamp(min=1e-8)).mean()


# -- each voxel --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of each voxel, averaged; binary, of each region, where these may overlap.

    Attributes:
        ignore_label: of labels that exclude each other.
        weights: of each class (background first) or region; None: all alike. The mean is weighted, as torch's.
        gamma: above 0: the focal loss, in which a voxel counts ``(1 - probability of the truth) ** gamma``.
        top_percent: below 100: the mean of so many of the voxels only, of those that cost most.
        reduce: sums over the processes that share a batch.
    """

    ignore_label: int | None = None
    weights: Sequence[float] | None = None
    gamma: float = 0.0
    top_percent: int = 100
    reduce: Reduce = alone

    def __call__(self, judged: Judged) -> Tensor:
        costs, shares = self._regions(judged) if judged.labels is None else self._labels(judged)
        if self.top_percent < 100:
            return costs.flatten().topk(int(costs.numel() * self.top_percent / 100), sorted=False).values.mean()
        if judged.counted is None and self.weights is None:
            return costs.mean()
        return self.reduce(costs.sum()) / self.reduce(shares.sum()).clamp(min=1e-8)

    def _labels(self, judged: Judged) -> tuple[Tensor, Tensor]:
        """What each voxel costs, and what it counts in the mean."""
        assert judged.labels is not None
        weights = None if self.weights is None else judged.logits.new_tensor(list(self.weights))
        ignore = -100 if self.ignore_label is None else self.ignore_label
        costs = functional.cross_entropy(judged.logits, judged.labels, ignore_index=ignore, reduction="none")
        counted = torch.ones_like(costs) if judged.counted is None else judged.counted[:, 0].float()
        if self.gamma:
            costs = costs * (1 - torch.exp(-costs)) ** self.gamma
        if weights is not None:
            known = judged.labels.where(counted.bool(), torch.zeros_like(judged.labels))
            counted = counted * weights[known]
            costs = costs * counted
        return costs, counted

    def _regions(self, judged: Judged) -> tuple[Tensor, Tensor]:
        truth = judged.truth.float()
        costs = functional.binary_cross_entropy_with_logits(judged.logits, truth, reduction="none")
        if self.gamma:
            costs = costs * (1 - torch.exp(-costs)) ** self.gamma
        counted = torch.ones_like(costs[:, :1]) if judged.counted is None else judged.counted.float()
        if self.weights is not None:
            shape = (1, -1, *[1] * (costs.ndim - 2))
            shares = counted * judged.logits.new_tensor(list(self.weights)).view(shape)
            return costs * shares, shares
        # With an ignore label nnU-Net divides by the number of voxels, not of voxels times regions: see DiceBCELoss.
        return costs * counted, counted


# -- together ------------------------------------------------------------------------------------------------------------------


class SumOfTerms(nn.Module):
    """A loss of some terms of each batch. ``forward(logits, target)`` as of the other losses; returns a scalar."""

    def __init__(self, judge: Callable[[Tensor, Tensor], Judged], terms: Sequence[Callable[[Judged], Tensor]]) -> None:
        super().__init__()
        self.judge = judge
        self.terms = tuple(terms)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        judged = self.judge(logits, target)
        return torch.stack([term(judged) for term in self.terms]).sum()
