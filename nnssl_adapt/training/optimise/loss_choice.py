"""Which loss a recipe asks for, and whether a dataset's labels can have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.text import and_more
from nnssl_adapt.training.optimise.losses import SMOOTH, DeepSupervisionLoss, Reduce, alone, build_loss
from nnssl_adapt.training.optimise.network_options import wants_compiling
from nnssl_adapt.training.optimise.one_pass import in_one_pass
from nnssl_adapt.training.optimise.other_losses import (
    FOCAL_GAMMA,
    TOP_PERCENT,
    TVERSKY_FALSE_NEGATIVES,
    TVERSKY_FALSE_POSITIVES,
    CrossEntropy,
    Overlap,
    SumOfTerms,
    judged_labels,
    judged_regions,
)
from nnssl_adapt.training.recipe.recipe import Recipe


def choose_loss(
    recipe: Recipe,
    labels: LabelScheme,
    batch_dice: bool,
    deep_supervision_strides: Sequence[Sequence[int]] | None = None,
    reduce: Reduce = alone,
) -> nn.Module:
    """Return the recipe's loss for a dataset's labels, of (logits, target).

    Args:
        recipe: says which.
        labels: what the logits mean; :func:`loss_mistakes` has nothing against them.
        batch_dice: the plan's; the recipe's counts where it has one.
        deep_supervision_strides: the network's, for a loss at every resolution; see
            :func:`~nnssl_adapt.training.optimise.losses.build_loss`.
        reduce: sums over the processes that share a batch.
    """
    pooled = batch_dice if recipe.batch_dice is None else recipe.batch_dice
    if recipe.loss == "dice_ce" and recipe.dice_smooth == SMOOTH and not recipe.class_weights:
        compiles = wants_compiling(recipe, torch.device("cuda"))  # the only device that it makes a difference on
        return in_one_pass(build_loss(labels, pooled, deep_supervision_strides, reduce), compiles)
    overlap = partial(Overlap, pooled, recipe.dice_smooth, reduce=reduce)
    tversky = partial(overlap, false_positives=TVERSKY_FALSE_POSITIVES, false_negatives=TVERSKY_FALSE_NEGATIVES)
    voxels = partial(CrossEntropy, labels.ignore_label, weights_in_order(recipe, labels), reduce=reduce)
    choices: dict[str, Callable[[], tuple[Any, ...]]] = {
        "dice_ce": lambda: (overlap(), voxels()),
        "dice": lambda: (overlap(),),
        "ce": lambda: (voxels(),),
        "dice_topk": lambda: (overlap(), voxels(top_percent=TOP_PERCENT)),
        "dice_focal": lambda: (overlap(), voxels(gamma=FOCAL_GAMMA)),
        "tversky_ce": lambda: (tversky(), voxels()),
    }
    if labels.has_regions:
        judge: Any = partial(judged_regions, ignore=labels.ignore_label is not None)
    else:
        judge = partial(judged_labels, ignore_label=labels.ignore_label)
    loss = SumOfTerms(judge, choices[recipe.loss]())
    return loss if deep_supervision_strides is None else DeepSupervisionLoss(loss, deep_supervision_strides)


def weights_in_order(recipe: Any, labels: LabelScheme) -> tuple[float, ...] | None:
    """The recipe's class weights in the order of the logits, 1 for classes that it doesn't name; None: all alike."""
    if not recipe.class_weights:
        return None
    return tuple(float(recipe.class_weights.get(name, 1.0)) for name in labels.head_names)


def loss_mistakes(recipe: Any, labels: LabelScheme) -> Iterator[str]:
    """What the labels can't have of ``recipe``, which may be anything with its fields."""
    if recipe.loss == "dice_topk" and labels.has_regions:
        yield "loss dice_topk: needs labels that exclude each other, and this dataset has regions; try dice_focal"
    unknown = [name for name in recipe.class_weights or () if name not in labels.head_names]
    if unknown:
        yield f"class_weights: the dataset has no {and_more(unknown)}; it has {and_more(labels.head_names, 20)}"
    if recipe.class_weights and recipe.loss == "dice":
        yield "class_weights: they count in the cross-entropy, which loss dice has not; use dice_ce"
