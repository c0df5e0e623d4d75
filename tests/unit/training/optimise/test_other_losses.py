"""Losses beside the default one: what labels can have them, ignored voxels, several processes; parity is tests/parity's."""

import pytest
import torch

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.optimise.layers import frozen_layers
from nnssl_adapt.training.optimise.loss_choice import choose_loss, loss_mistakes, weights_in_order
from nnssl_adapt.training.optimise.losses import DeepSupervisionLoss
from nnssl_adapt.training.optimise.one_pass import OnePassDiceCELoss
from nnssl_adapt.training.recipe.recipe import Recipe

SHAPE = (3, 4, 5)
PLAIN = LabelScheme.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}})
IGNORE = LabelScheme.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}})
REGIONS = LabelScheme.from_dataset_json(
    {"labels": {"background": 0, "all": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
)
ALL = ["dice_ce", "dice", "ce", "dice_topk", "dice_focal", "tversky_ce"]


def test_the_default_is_nnunets():
    assert type(choose_loss(Recipe(), PLAIN, False)) is OnePassDiceCELoss  # equal to DiceCELoss, see test_one_pass.py
    assert choose_loss(Recipe(batch_dice=True), PLAIN, False).batch_dice
    deep = choose_loss(Recipe(loss="dice_focal"), PLAIN, False, [(1, 1, 1), (2, 2, 2), (2, 2, 2)])
    assert isinstance(deep, DeepSupervisionLoss)


@pytest.mark.parametrize("name", ALL)
def test_a_perfect_prediction_is_the_best_and_ignored_voxels_count_for_nothing(name):
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 1, *SHAPE), generator=random)
    perfect = 40.0 * torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1).float()
    loss = choose_loss(Recipe(loss=name, dice_smooth=1e-4), IGNORE, False)
    best = loss(perfect, labels).item()
    assert best == pytest.approx(0 if name == "ce" else -1, abs=1e-3)
    labels[:, :, 1] = 3
    wrong = perfect.clone()
    wrong[:, :, 1] = torch.randn(2, 3, *SHAPE[1:], generator=random)
    wrong.requires_grad_()
    value = loss(wrong, labels)
    value.backward()
    assert value.item() == pytest.approx(best, abs=1e-3)
    assert wrong.grad[:, :, 1].abs().max() == 0


@pytest.mark.parametrize("name", ALL)
def test_nothing_annotated_is_finite(name):
    logits = torch.randn(1, 3, *SHAPE, requires_grad=True)
    loss = choose_loss(Recipe(loss=name, class_weights=None if name == "dice" else {"a": 2}), IGNORE, False)
    value = loss(logits, torch.full((1, 1, *SHAPE), 3, dtype=torch.int16))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logits.grad).all()


def test_weights_go_by_name():
    assert weights_in_order(Recipe(class_weights={"b": 3, "background": 0.1}), PLAIN) == (0.1, 1.0, 3.0)
    assert weights_in_order(Recipe(class_weights={"core": 2}), REGIONS) == (1.0, 2.0)
    assert Recipe().override(class_weights="b=3,background=0.1").class_weights == {"b": 3.0, "background": 0.1}


def test_what_the_labels_cannot_have():
    for recipe, labels, word in (
        (Recipe(loss="dice_topk"), REGIONS, "regions"),
        (Recipe(class_weights={"lesion": 2}), PLAIN, "lesion"),
        (Recipe(loss="dice", class_weights={"a": 2}), PLAIN, "dice_ce"),
    ):
        (mistake,) = loss_mistakes(recipe, labels)
        assert word in mistake
    assert not list(loss_mistakes(Recipe(loss="dice_focal", class_weights={"all": 2}), REGIONS))


def test_two_processes_weigh_as_one():
    """What is summed over the batch is: each rank's loss is that of the whole batch."""
    random = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (2, 1, *SHAPE), generator=random)
    logits = torch.randn(2, 3, *SHAPE, generator=random)
    recipe = Recipe(loss="dice_ce", batch_dice=True, class_weights={"b": 4})
    whole = choose_loss(recipe, PLAIN, True)(logits, labels).item()
    seen = []
    choose_loss(recipe, PLAIN, True, reduce=lambda tensor: seen.append(tensor) or tensor)(logits[1:], labels[1:])
    other = iter(seen)
    halves = choose_loss(recipe, PLAIN, True, reduce=lambda tensor: tensor + next(other))
    assert halves(logits[:1], labels[:1]).item() == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "stages", "frozen"),
    [
        ("residual", 0, {"encoder.0"}),
        ("residual", 2, {"encoder.0", "encoder.1", "encoder.2"}),
        ("plain", 1, {"encoder.0"}),
        ("plain", 2, {"encoder.0", "encoder.1"}),
    ],
)
def test_the_stem_and_the_first_stages(name, stages, frozen):
    network = network_of(name)
    assert frozen_layers(network, stages) == frozen


def network_of(name):
    from support.tiny_plans import CNN

    from nnssl_adapt.weights.network.architectures import Architecture, build_network

    architecture = CNN
    if name == "plain":
        kwargs = {key: value for key, value in CNN.kwargs.items() if key != "n_blocks_per_stage"}
        architecture = Architecture("PlainConvUNet", {**kwargs, "n_conv_per_stage": [1, 1, 1]})
    return build_network(architecture, 1, 2, (16, 16, 24), False)
