"""Losses at values that can be worked out by hand; parity with nnU-Net is tests/parity's."""

import math

import pytest
import torch

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.optimise.losses import (
    DeepSupervisionLoss,
    DiceBCELoss,
    DiceCELoss,
    build_loss,
    count_overlap,
    pseudo_dice,
    soft_dice,
    steps_of_outputs,
    supervision_weights,
    thinned,
)

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


# -- deep supervision --------------------------------------------------------------------------------------------------

STRIDES = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 3)]


def test_what_a_voxel_of_each_output_is():
    assert steps_of_outputs(STRIDES) == ((1, 1, 1), (1, 2, 2), (2, 4, 4))


@pytest.mark.parametrize(
    ("outputs", "weights"),
    [(1, (1,)), (2, (1, 0)), (3, (2 / 3, 1 / 3, 0)), (5, (8 / 15, 4 / 15, 2 / 15, 1 / 15, 0))],
)
def test_weights_halve_and_leave_the_coarsest_out(outputs, weights):
    assert supervision_weights(outputs) == pytest.approx(weights)


def test_targets_are_thinned_without_a_copy():
    target = torch.arange(2 * 4 * 6 * 9).view(2, 1, 4, 6, 9)
    thin = thinned(target, (2, 1, 3))
    assert thin.shape == (2, 1, 2, 6, 3) and torch.equal(thin, target[:, :, [1, 3]][..., [1, 4, 7]])
    assert thin.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
    assert thinned(target, (1, 1, 1)).equal(target)


def test_the_loss_is_the_weighted_mean_over_resolutions():
    random = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (2, 1, 4, 8, 12), generator=random)
    logits = [torch.randn(2, 3, 4, 8 // f, 12 // f, generator=random) for f in (1, 2)]
    logits.append(torch.full((2, 3, 2, 2, 3), math.nan))  # the coarsest doesn't count, whatever it says
    single, loss = build_loss(PLAIN, True), build_loss(PLAIN, True, STRIDES)
    assert isinstance(loss, DeepSupervisionLoss)
    fine, coarse = single(logits[0], labels), single(logits[1], labels[..., 1::2, 1::2])
    assert loss(logits, labels).item() == pytest.approx((2 * fine + coarse).item() / 3, rel=1e-6)


@pytest.mark.parametrize("outputs", [torch.zeros(1, 3, *SHAPE), [torch.zeros(1, 3, *SHAPE)]])
def test_a_network_without_deep_supervision_is_told_so(outputs):
    with pytest.raises(
        ConfigurationError, match=r"expected 3 outputs.*got (1|a single tensor).*deep_supervision=false"
    ):
        build_loss(PLAIN, False, STRIDES)(outputs, torch.zeros(1, 1, *SHAPE, dtype=torch.int16))


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [PLAIN, IGNORE], ids=["labels", "ignore"])
def test_the_dice_of_a_shared_batch_is_that_of_the_whole(scheme):
    random = torch.Generator().manual_seed(6)
    labels = torch.randint(0, 4 if scheme is IGNORE else 3, (2, 1, *SHAPE), generator=random)
    labels[1, 0, 1:] = 0
    logits = torch.randn(2, 3, *SHAPE, generator=random)
    whole = build_loss(scheme, batch_dice=True)(logits, labels)
    seen = [[], []]
    for turn in (0, 1):  # each process tells its sums first, then gets everybody's

        def reduce(tensor, turn=turn):
            seen[turn].append(tensor)
            return tensor

        build_loss(scheme, True, reduce=reduce)(logits[turn : turn + 1], labels[turn : turn + 1])
    sums = [sum(pair) for pair in zip(*seen, strict=True)]
    shared = []
    for turn in (0, 1):
        left = iter(sums)
        loss = build_loss(scheme, True, reduce=lambda tensor, left=left: next(left))
        shared.append(loss(logits[turn : turn + 1], labels[turn : turn + 1]).item())
    assert sum(shared) / 2 == pytest.approx(whole.item(), abs=1e-6)
    alone = [build_loss(scheme, True)(logits[i : i + 1], labels[i : i + 1]).item() for i in (0, 1)]
    assert sum(alone) / 2 != pytest.approx(whole.item(), abs=1e-3)


def test_losses_do_not_change_their_inputs():
    labels = torch.randint(0, 4, (1, 1, *SHAPE)).to(torch.int16)
    logits = torch.randn(1, 3, *SHAPE)
    before = labels.clone(), logits.clone()
    build_loss(IGNORE, False)(logits, labels)
    count_overlap(logits, labels, IGNORE)
    assert torch.equal(labels, before[0]) and torch.equal(logits, before[1])
