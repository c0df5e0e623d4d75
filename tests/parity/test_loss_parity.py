"""Losses and their gradients, against nnunetv2's own classes; where it has none, against MONAI's."""

import copy

import pytest
import torch

pytest.importorskip("nnunetv2")

from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.optimise.loss_choice import choose_loss
from nnssl_adapt.training.optimise.other_losses import TVERSKY_FALSE_NEGATIVES, TVERSKY_FALSE_POSITIVES
from nnssl_adapt.training.recipe.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")  # nnunetv2's TopKLoss

SHAPE = (5, 6, 7)
PLAIN = {"labels": {"background": 0, "a": 1, "b": 2}}
IGNORE = {"labels": {**PLAIN["labels"], "ignore": 3}}
REGIONS = {"labels": {"background": 0, "all": [1, 2], "b": 2}, "regions_class_order": [1, 2]}
REGIONS_IGNORE = {**REGIONS, "labels": {**REGIONS["labels"], "ignore": 3}}
WEIGHTS = {"b": 3.0, "background": 0.5}
IN_ORDER = torch.tensor([0.5, 1.0, 3.0])


def batch(content, foreground=True):
    """Logits (2, K, Z, Y, X), and labels or regions as both packages take them; the second sample has background alone."""
    labels = LabelScheme.from_dataset_json(content)
    random = torch.Generator().manual_seed(3)
    target = torch.randint(0, 3 if foreground else 1, (2, 1, *SHAPE), generator=random).to(torch.int16)
    target[1] = 0
    if labels.ignore_label is not None:
        target[:, :, 2] = labels.ignore_label
    logits = 2 * torch.randn(2, labels.num_heads, *SHAPE, generator=random)
    if labels.has_regions:
        regions = [(target > 0) & (target < 3), target == 2]
        target = torch.cat([*regions, target == 3] if labels.ignore_label is not None else regions, dim=1)
    return labels, logits, target


def value_and_gradient(loss, logits, target):
    logits = logits.clone().requires_grad_()
    value = loss(logits, target.clone())
    value.backward()
    return value.item(), logits.grad


def assert_same(ours, theirs, logits, target):
    (value, gradient), (expected, their_gradient) = (
        value_and_gradient(loss, logits, target) for loss in (ours, theirs)
    )
    assert value == pytest.approx(expected, abs=1e-5)
    assert (gradient - their_gradient).abs().max() < 1e-5 * max(their_gradient.abs().max(), 1e-3)


def their_dice(content, batch_dice, smooth):
    regions = "regions_class_order" in content
    nonlinear = torch.sigmoid if regions else softmax_helper_dim1
    return MemoryEfficientSoftDiceLoss(nonlinear, batch_dice, do_bg=regions, smooth=smooth, ddp=False)


def theirs(name, content, batch_dice, smooth=1e-5, weights=None):
    """The class of nnunetv2 that stands for one of our names."""
    ignore = 3 if "ignore" in content["labels"] else None
    dice = {"batch_dice": batch_dice, "smooth": smooth, "ddp": False}
    if name == "dice":
        return their_dice(content, batch_dice, smooth)
    if name == "ce":
        loss = RobustCrossEntropyLoss(weight=weights, ignore_index=-100 if ignore is None else ignore)
        return lambda logits, target: loss(logits, target)
    if name == "dice_topk":
        return DC_and_topk_loss({**dice, "do_bg": False}, {"k": 10, "label_smoothing": 0.0}, ignore_label=ignore)
    if "regions_class_order" in content:
        parts = {**dice, "do_bg": True}
        return DC_and_BCE_loss({}, parts, use_ignore_label=ignore is not None, dice_class=MemoryEfficientSoftDiceLoss)
    parts = {**dice, "do_bg": False}
    return DC_and_CE_loss(parts, {"weight": weights}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)


@pytest.mark.parametrize("foreground", [True, False], ids=["foreground", "background alone"])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dice", PLAIN),
        ("dice", REGIONS),
        ("ce", PLAIN),
        ("ce", IGNORE),
        ("dice_topk", PLAIN),
        ("dice_topk", IGNORE),
    ],
)
def test_nnunets_losses(name, content, batch_dice, foreground):
    labels, logits, target = batch(content, foreground)
    ours = choose_loss(Recipe(loss=name, batch_dice=batch_dice), labels, batch_dice=not batch_dice)
    assert_same(ours, theirs(name, copy.deepcopy(content), batch_dice), logits, target)


@pytest.mark.parametrize("foreground", [True, False], ids=["foreground", "background alone"])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("content", [PLAIN, IGNORE, REGIONS, REGIONS_IGNORE])
def test_without_smoothing(content, batch_dice, foreground):
    """nnUNetTrainerDiceCELoss_noSmooth."""
    labels, logits, target = batch(content, foreground)
    ours = choose_loss(Recipe.for_trainer_name("nnUNetTrainerDiceCELoss_noSmooth"), labels, batch_dice)
    assert_same(ours, theirs("dice_ce", copy.deepcopy(content), batch_dice, smooth=0), logits, target)


@pytest.mark.parametrize("name", ["ce", "dice_ce"])
@pytest.mark.parametrize("content", [PLAIN, IGNORE])
def test_class_weights(name, content):
    labels, logits, target = batch(content)
    ours = choose_loss(Recipe(loss=name, class_weights=WEIGHTS), labels, batch_dice=False)
    assert_same(ours, theirs(name, copy.deepcopy(content), False, weights=IN_ORDER), logits, target)


def test_the_focal_term():
    from monai.losses import FocalLoss

    labels, logits, target = batch(PLAIN)
    focal = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0)
    dice = their_dice(PLAIN, False, 1e-5)
    classes = logits.shape[1]  # MONAI's mean is over the classes as well, all but one of which cost nothing
    ours = choose_loss(Recipe(loss="dice_focal"), labels, batch_dice=False)
    assert_same(ours, lambda x, y: dice(x, y) + classes * focal(x, y), logits, target)
    labels, logits, target = batch(REGIONS)
    focal, dice = FocalLoss(gamma=2.0), their_dice(REGIONS, False, 1e-5)
    ours = choose_loss(Recipe(loss="dice_focal"), labels, batch_dice=False)
    assert_same(ours, lambda x, y: dice(x, y) + focal(x, y.float()), logits, target)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_the_tversky_index(batch_dice):
    from monai.losses import TverskyLoss

    labels, logits, target = batch(PLAIN)
    index = TverskyLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        alpha=TVERSKY_FALSE_POSITIVES,
        beta=TVERSKY_FALSE_NEGATIVES,
        smooth_nr=0.5e-5,  # of an index that is written without the factor 2
        smooth_dr=0.5e-5,
        batch=batch_dice,
    )
    entropy = RobustCrossEntropyLoss()
    ours = choose_loss(Recipe(loss="tversky_ce"), labels, batch_dice)
    assert_same(ours, lambda x, y: index(x, y) - 1 + entropy(x, y), logits, target)
