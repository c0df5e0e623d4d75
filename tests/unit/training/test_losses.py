"""Losses at values that can be worked out by hand; parity with nnU-Net is tests/parity's."""

import math

import pytest
import torch

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.losses import DiceBCELoss, DiceCELoss, build_loss, count_overlap, pseudo_dice, soft_dice

SHAPE = (3, 4, 5)
PLAIN = LabelScheme.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}})
IGNORE = LabelScheme.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}})
REGIONS = {"labels": {"background": 0, "all": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


def perfect_logits(labels, classes=3):
    return 40.0 * torch.nn.functional.one_hot(labels[:, 0].long(), classes).movedim(-1, 1).float()


def test_a_perfect_prediction_costs_minus_one():
    labels = torch.randint(0, 3, (2, 1, *SHAPE), generator=torch.Generator().manual_seed(0))
    assert DiceCELoss()(perfect_logits(labels), labels).item() == pytest.approx(-1, abs=1e-5)


def test_undecided_logits():
    labels = torch.zeros(1, 1, *SHAPE, dtype=torch.int16)
    labels[0, 0, 0] = 1  # 20 of 60 voxels
    loss = DiceCELoss()(torch.zeros(1, 2, *SHAPE), labels).item()
    assert loss == pytest.approx(math.log(2) - 2 * 10 / (30 + 20), rel=1e-5)


def test_batch_dice_pools_samples():
    truth = torch.zeros(2, 1, *SHAPE, dtype=torch.bool)
    truth[0, 0, 0] = True
    probabilities = torch.full((2, 1, *SHAPE), 0.5)
    each = soft_dice(probabilities, truth, None, batch_dice=False).item()
    pooled = soft_dice(probabilities, truth, None, batch_dice=True).item()
    assert each == pytest.approx((2 * 10 / 50 + 0) / 2, abs=1e-5)
    assert pooled == pytest.approx(2 * 10 / 80, abs=1e-5)


def test_ignored_voxels_cost_nothing_and_get_no_gradient():
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (2, 1, *SHAPE), generator=random).to(torch.int16)
    labels[:, :, 1] = 3
    logits = torch.randn(2, 3, *SHAPE, generator=random)
    loss = build_loss(IGNORE, batch_dice=False)
    changed = logits.clone()
    changed[:, :, 1] += 5
    assert loss(logits, labels).item() == pytest.approx(loss(changed, labels).item(), abs=1e-6)
    logits.requires_grad_()
    loss(logits, labels).backward()
    assert logits.grad[:, :, 1].abs().max() == 0 and logits.grad[:, :, 0].abs().max() > 0


def test_nothing_annotated_is_finite():
    labels = torch.full((1, 1, *SHAPE), 3, dtype=torch.int16)
    logits = torch.randn(1, 3, *SHAPE, requires_grad=True)
    loss = build_loss(IGNORE, batch_dice=False)(logits, labels)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_regions_with_ignored_voxels():
    scheme = LabelScheme.from_dataset_json({**REGIONS, "labels": {**REGIONS["labels"], "ignore": 3}})
    loss = build_loss(scheme, batch_dice=True)
    assert isinstance(loss, DiceBCELoss)
    target = torch.zeros(1, 3, *SHAPE, dtype=torch.bool)
    target[:, 0, :2] = True
    target[:, 2, 2] = True  # the last slice is ignored
    logits = torch.where(target[:, :2], 40.0, -40.0)
    wrong_where_ignored = logits.clone()
    wrong_where_ignored[:, :, 2] *= -1
    assert loss(wrong_where_ignored, target).item() == pytest.approx(loss(logits, target).item(), abs=1e-6)


def test_counts_and_pseudo_dice():
    labels = torch.zeros(1, 1, *SHAPE, dtype=torch.int16)
    labels[0, 0, 0] = 1
    predicted = labels.clone()
    predicted[0, 0, 0, 0] = 0  # 5 missed
    predicted[0, 0, 1, :2] = 1  # 10 too many
    counts = count_overlap(perfect_logits(predicted), labels, PLAIN)
    assert counts.tolist() == [[15, 0], [10, 0], [5, 0]]
    dice = pseudo_dice(counts)
    assert dice[0] == pytest.approx(30 / 45) and math.isnan(dice[1])


def test_counts_leave_ignored_voxels_out():
    labels = torch.full((1, 1, *SHAPE), 3, dtype=torch.int16)
    labels[0, 0, 0] = 2
    counts = count_overlap(perfect_logits(torch.full_like(labels, 2)), labels, IGNORE)
    assert counts.tolist() == [[0, 20], [0, 0], [0, 0]]


def test_counts_of_regions():
    scheme = LabelScheme.from_dataset_json(REGIONS)
    target = torch.zeros(1, 2, *SHAPE, dtype=torch.bool)
    target[:, 0, :2] = True
    target[:, 1, 0] = True
    logits = torch.full((1, 2, *SHAPE), 1.0)
    assert count_overlap(logits, target, scheme).tolist() == [[40, 20], [20, 40], [0, 0]]


def test_losses_do_not_change_their_inputs():
    labels = torch.randint(0, 4, (1, 1, *SHAPE)).to(torch.int16)
    logits = torch.randn(1, 3, *SHAPE)
    before = labels.clone(), logits.clone()
    build_loss(IGNORE, False)(logits, labels)
    count_overlap(logits, labels, IGNORE)
    assert torch.equal(labels, before[0]) and torch.equal(logits, before[1])
