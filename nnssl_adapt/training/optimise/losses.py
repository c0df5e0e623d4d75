"""The training losses: soft Dice with cross-entropy, for labels that exclude each other and for overlapping regions.

Values and gradients equal nnU-Net's ``DC_and_CE_loss`` and ``DC_and_BCE_loss`` with ``MemoryEfficientSoftDiceLoss``, and
its ``DeepSupervisionWrapper`` around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import ConfigurationError

SMOOTH = 1e-5
"""Added to numerator and denominator of each Dice: nnU-Net's value, so that an absent class costs next to nothing."""

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that share a batch, gradients included: ``Ranks.sum``."""


def alone(tensor: Tensor) -> Tensor:
    """The :data:`Reduce` of a single process."""
    return tensor


class DiceCELoss(nn.Module):
    """Soft Dice of the foreground classes plus cross-entropy of all, for labels that exclude each other.

    Args:
        batch_dice: Dice over the batch as a whole instead of the mean over its samples.
        ignore_label: label whose voxels count for nothing, or None.
        reduce: sums what is counted over the whole batch, where several processes share one.

    ``forward(logits (B, K, Z, Y, X) float, labels (B, 1, Z, Y, X) of any integer type)`` returns a scalar, in [-1, ∞).
    """

    def __init__(self, batch_dice: bool = False, ignore_label: int | None = None, reduce: Reduce = alone) -> None:
        super().__init__()
        self.batch_dice = batch_dice
        self.reduce = reduce
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        classes = torch.arange(1, logits.shape[1], device=labels.device).view(1, -1, *[1] * (logits.ndim - 2))
        probabilities = torch.softmax(logits.float(), dim=1)[:, 1:]
        counted = None if self.ignore_label is None else labels != self.ignore_label
        dice = soft_dice(probabilities, labels == classes, counted, self.batch_dice, self.reduce)
        return self._cross_entropy(logits.float(), labels[:, 0].long()) - dice

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.ignore_label is None:
            return functional.cross_entropy(logits, labels)
        total = functional.cross_entropy(logits, labels, ignore_index=self.ignore_label, reduction="sum")
        annotated = self.reduce((labels != self.ignore_label).sum())
        return self.reduce(total) / annotated.clamp(min=1)  # nothing annotated costs 0, not NaN


class DiceBCELoss(nn.Module):
    """Soft Dice plus binary cross-entropy of each region, for regions that may overlap.

    Args:
        batch_dice: Dice over the batch as a whole instead of the mean over its samples.
        ignore: whether the last channel of the target marks voxels that count for nothing.
        reduce: sums what is counted over the whole batch, where several processes share one.

    ``forward(logits (B, R, Z, Y, X) float, target (B, R or R + 1, Z, Y, X) bool)`` returns a scalar.
    """

    def __init__(self, batch_dice: bool = False, ignore: bool = False, reduce: Reduce = alone) -> None:
        super().__init__()
        self.batch_dice = batch_dice
        self.reduce = reduce
        self.ignore = ignore

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        target = target.bool()
        regions, counted = (target[:, :-1], ~target[:, -1:]) if self.ignore else (target, None)
        dice = soft_dice(torch.sigmoid(logits.float()), regions, counted, self.batch_dice, self.reduce)
        if counted is None:
            return functional.binary_cross_entropy_with_logits(logits.float(), regions.float()) - dice
        entropy = functional.binary_cross_entropy_with_logits(logits.float(), regions.float(), reduction="none")
        # nnU-Net divides the sum over all regions by the number of voxels, not of voxels times regions: with an ignore
        # label this term weighs R times more than without. Kept, since its published results were made so.
        total, annotated = self.reduce((entropy * counted).sum()), self.reduce(counted.sum())
        return total / annotated.clamp(min=1e-8) - dice


class DeepSupervisionLoss(nn.Module):
    """The weighted mean of a loss at every resolution of a decoder.

    Args:
        loss: of one resolution, as those above.
        strides: the network's, stage by stage as plans list them: (1, 1, 1), (2, 2, 2), … The decoder has an output at
            every stage but the last.

    ``forward(logits, target)`` takes the outputs as a list, finest first, and one target of full size, which is thinned out
    on the device: coarser targets needn't be made and carried. Returns a scalar.
    """

    def __init__(self, loss: nn.Module, strides: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.loss = loss
        self.steps = steps_of_outputs(strides)
        self.weights = supervision_weights(len(self.steps))

    def forward(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        if not isinstance(logits, (list, tuple)) or len(logits) != len(self.steps):
            got = len(logits) if isinstance(logits, (list, tuple)) else "a single tensor"
            raise ConfigurationError(
                f"deep supervision: expected {len(self.steps)} outputs of the network, one for each resolution, got {got}: "
                "switch it on in the network as well (set_deep_supervision), or train with deep_supervision=false"
            )
        terms = [
            weight * self.loss(output, thinned(target, step))
            for output, step, weight in zip(logits, self.steps, self.weights, strict=True)
            if weight
        ]
        return torch.stack(terms).sum()


def steps_of_outputs(strides: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """How many voxels of the image a voxel of each output is, by axis, finest first; ``strides`` as of DeepSupervisionLoss."""
    step = [1] * len(strides[0])
    steps = []
    for stride in strides[:-1]:
        step = [known * factor for known, factor in zip(step, stride, strict=True)]
        steps.append(tuple(step))
    return tuple(steps)


def supervision_weights(outputs: int) -> tuple[float, ...]:
    """Weight of each output, finest first; they add up to 1.

    nnU-Net's: each half of the one before, and the coarsest nothing. It gives a network with a single output 0/0; here that
    one counts in full.
    """
    halved = [0.5**level for level in range(outputs)]
    if outputs > 1:
        halved[-1] = 0.0
    return tuple(weight / sum(halved) for weight in halved)


def thinned(target: Tensor, step: Sequence[int]) -> Tensor:
    """One voxel of every ``step`` (Z, Y, X) of a target (B, C, Z, Y, X), of the same type; a view where the size divides.

    It is the middle one (the later of two): what ``nearest-exact`` interpolation takes, by which nnU-Net makes its targets.
    """
    shape = target.shape[2:]
    if all(size % every == 0 for size, every in zip(shape, step, strict=True)):
        voxels = (slice(None), slice(None), *(slice(every // 2, None, every) for every in step))
        return target[voxels]
    size = [round(n * (1 / every)) for n, every in zip(shape, step, strict=True)]
    return functional.interpolate(target.float(), size, mode="nearest-exact").to(target.dtype)


def soft_dice(
    probabilities: Tensor, truth: Tensor, counted: Tensor | None, batch_dice: bool, reduce: Reduce = alone
) -> Tensor:
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
        shared, predicted, true = reduce(torch.stack([shared.sum(0), predicted.sum(0), true.sum(0)]))
    return ((2 * shared + SMOOTH) / (true + predicted + SMOOTH).clamp(min=1e-8)).mean()


def build_loss(
    labels: LabelScheme,
    batch_dice: bool,
    deep_supervision_strides: Sequence[Sequence[int]] | None = None,
    reduce: Reduce = alone,
) -> nn.Module:
    """Return the loss for a dataset's labels, of (logits, target).

    Args:
        labels: what the logits mean.
        batch_dice: Dice over the batch as a whole instead of the mean over its samples.
        deep_supervision_strides: the network's strides, stage by stage, for a loss at every resolution: the logits are a
            list then. None for a single output.
        reduce: sums over the processes that share a batch; as it is for a single one.
    """
    loss: nn.Module
    if labels.has_regions:
        loss = DiceBCELoss(batch_dice, labels.ignore_label is not None, reduce)
    else:
        loss = DiceCELoss(batch_dice, labels.ignore_label, reduce)
    return loss if deep_supervision_strides is None else DeepSupervisionLoss(loss, deep_supervision_strides)


@torch.no_grad()
def count_overlap(logits: Tensor, target: Tensor, labels: LabelScheme) -> Tensor:
    """Count (true positive, false positive, false negative) voxels of a batch for each foreground class or region.

    ``logits`` (B, K, Z, Y, X); ``target`` as the loss takes it. Returns int64 (3, number of classes) on the
    device of the logits. Voxels of the ignore label are left out.
    """
    if not labels.has_regions:
        return _count_classes(logits.argmax(1), target[:, 0].long(), logits.shape[1], labels.ignore_label)
    predicted = logits > 0  # sigmoid above one half
    target = target.bool()
    truth = target[:, :-1] if labels.ignore_label is not None else target
    counted = ~target[:, -1:] if labels.ignore_label is not None else None
    if counted is not None:
        predicted, truth = predicted & counted, truth & counted
    axes = (0, *range(2, logits.ndim))
    return torch.stack([(predicted & truth).sum(axes), (predicted & ~truth).sum(axes), (~predicted & truth).sum(axes)])


def _count_classes(predicted: Tensor, truth: Tensor, classes: int, ignore_label: int | None) -> Tensor:
    """The same of labels (B, Z, Y, X) that exclude each other: all pairs of them are counted at once."""
    pairs = truth * classes + predicted
    if ignore_label is not None:
        pairs = torch.where(truth == ignore_label, classes**2, pairs)  # a bin of its own, which nobody asks for
    pairs = pairs.flatten().long()
    # Not torch.bincount, which on a GPU waits for the largest value to know how many bins there are.
    bins = pairs.new_zeros(classes**2 + 1).scatter_add_(0, pairs, torch.ones_like(pairs))
    table = bins[: classes**2].view(classes, classes)
    hit = table.diagonal()
    return torch.stack([hit, table.sum(0) - hit, table.sum(1) - hit])[:, 1:]


def pseudo_dice(counts: Tensor) -> list[float]:
    """Return the Dice of each class from counts (3, classes) as of :func:`count_overlap`; NaN where a class never occurred."""
    hit, wrong, missed = counts.double()
    return [float(value) for value in 2 * hit / (2 * hit + wrong + missed)]
