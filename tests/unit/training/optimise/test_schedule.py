"""The learning rate at the places where schedules go wrong, and what learns in which epoch."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_plans import CNN, PATCH, TRANSFORMER

from nnssl_adapt.training.optimise.optimizer import build_optimizer
from nnssl_adapt.training.optimise.schedule import learning_rate, prepare_epoch
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.weights.network.architectures import build_network

CPU = torch.device("cpu")


def test_warm_up_then_poly():
    recipe = Recipe(epochs=20, warmup_epochs=4, learning_rate=0.8)
    rates = [learning_rate(epoch, recipe) for epoch in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[12] == pytest.approx(0.8 * 0.5**0.9)
    assert rates[19] == pytest.approx(0.8 * (1 / 16) ** 0.9)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_no_warm_up():
    recipe = Recipe(epochs=10, warmup_epochs=0, learning_rate=0.01)
    assert learning_rate(0, recipe) == 0.01
    assert learning_rate(9, recipe) == pytest.approx(0.01 * 0.1**0.9)


def test_cosine_and_constant_follow_the_warm_up():
    cosine = Recipe(epochs=10, warmup_epochs=2, learning_rate=0.6, schedule="cosine")
    rates = [learning_rate(epoch, cosine) for epoch in range(10)]
    assert rates[:3] == pytest.approx([0.3, 0.6, 0.6])
    assert rates[6] == pytest.approx(0.3)  # half-way
    assert rates[4] == pytest.approx(0.6 * (1 + 0.5**0.5) / 2)
    constant = cosine.override(schedule="constant")
    assert [learning_rate(epoch, constant) for epoch in range(10)] == pytest.approx([0.3] + [0.6] * 9)


def test_three_stages():
    recipe = Recipe(
        epochs=20,
        decoder_warmup_epochs=5,
        decoder_warmup_learning_rate=0.2,
        warmup_epochs=4,
        warmup_fraction=0.5,
        learning_rate=0.8,
    )
    rates = [learning_rate(epoch, recipe) for epoch in range(20)]
    assert rates[:2] == pytest.approx([0.1, 0.2])  # the tooth rises in the first half …
    assert rates[2:5] == pytest.approx([0.2, 0.2 * (2 / 3) ** 0.9, 0.2 * (1 / 3) ** 0.9])  # … and falls in the second
    assert rates[5:9] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[9] == 0.8
    assert rates[19] == pytest.approx(0.8 * (1 / 11) ** 0.9)
    alone = recipe.override(decoder_warmup_epochs=1, decoder_warmup_learning_rate=None)
    assert learning_rate(0, alone) == 0.8


@given(
    alone=st.integers(0, 12),
    together=st.integers(0, 12),
    rest=st.integers(1, 30),
    fraction=st.floats(0.05, 1),
    schedule=st.sampled_from(["poly", "cosine", "constant"]),
)
def test_every_schedule_rises_to_the_highest_and_falls(alone, together, rest, fraction, schedule):
    recipe = Recipe(
        epochs=alone + together + rest,
        decoder_warmup_epochs=alone,
        warmup_epochs=together,
        warmup_fraction=fraction,
        schedule=schedule,
        learning_rate=0.3,
    )
    rates = [learning_rate(epoch, recipe) for epoch in range(recipe.epochs)]
    tooth, rising, falling = rates[:alone], rates[alone : alone + together], rates[alone + together :]
    assert all(0 < rate <= 0.3 * (1 + 1e-12) for rate in rates)
    assert not tooth or max(tooth) == pytest.approx(0.3)
    assert rising == sorted(rising) and (not rising or rising[-1] == pytest.approx(0.3 * fraction))
    assert falling[0] == 0.3 and falling == sorted(falling, reverse=True)


def trained_parts(architecture, epoch, **fields):
    recipe = Recipe(epochs=20, warmup_epochs=3, **fields)
    network = build_network(architecture, 1, 3, PATCH)
    optimizer = build_optimizer(network, recipe, CPU)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    prepare_epoch(network, optimizer, epoch, recipe)
    for group in optimizer.param_groups:  # a frozen weight with a gradient left over would still be changed
        assert all(weight.requires_grad == (weight.grad is not None) for weight in group["params"])
    return {group["name"] for group in optimizer.param_groups if all(w.requires_grad for w in group["params"])}


ENCODER = {"encoder.0", "encoder.1", "encoder.2", "encoder.3"}


@pytest.mark.parametrize(
    ("fields", "epoch", "parts"),
    [
        ({}, 0, {*ENCODER, "decoder", "head"}),
        ({"deep_supervision": True}, 0, {*ENCODER, "decoder", "head", "head.deep"}),
        ({"freeze": "encoder"}, 7, {"decoder", "head"}),
        ({"freeze": "all_but_head"}, 7, {"head"}),
        ({"decoder_warmup_epochs": 4}, 3, {"decoder", "head"}),
        ({"decoder_warmup_epochs": 4}, 4, {*ENCODER, "decoder", "head"}),
    ],
)
def test_what_learns(fields, epoch, parts):
    assert trained_parts(CNN, epoch, **fields) == parts


def test_a_transformers_parts():
    assert trained_parts(TRANSFORMER, 0) == {"encoder.0", "encoder.1", "encoder.2", "decoder", "head"}
    assert trained_parts(TRANSFORMER, 0, freeze="all_but_head") == {"head"}


def test_rates_of_the_groups():
    recipe = Recipe(epochs=20, warmup_epochs=3, learning_rate=0.6, encoder_learning_rate=0.2, layer_decay=0.5)
    network = build_network(CNN, 1, 3, PATCH)
    optimizer = build_optimizer(network, recipe, CPU)
    assert prepare_epoch(network, optimizer, 1, recipe) == pytest.approx(0.4)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    expected = {"decoder": 0.4, "head": 0.4, "head.deep": 0.4}
    expected |= {f"encoder.{depth}": 0.4 / 3 * 0.5 ** (4 - depth) for depth in range(4)}
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw", "adam"])
def test_what_is_frozen_stays_bit_for_bit_and_thaws_in_its_epoch(optimizer_name):
    recipe = Recipe(epochs=6, decoder_warmup_epochs=2, warmup_epochs=1, learning_rate=0.05, optimizer=optimizer_name)
    torch.manual_seed(0)
    network = build_network(CNN, 1, 3, PATCH)
    optimizer = build_optimizer(network, recipe, CPU)
    image = torch.randn(2, 1, *PATCH)
    moved = {}
    for epoch in (1, 2):
        before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
        prepare_epoch(network, optimizer, epoch, recipe)
        optimizer.zero_grad(set_to_none=True)
        (network(image)[:, 1].square().mean() + network(image)[:, 0].mean()).backward()
        optimizer.step()
        moved[epoch] = {name for name, weight in network.named_parameters() if not torch.equal(weight, before[name])}
    assert moved[1] and all(name.startswith("decoder.") for name in moved[1])
    assert "encoder.stem.convs.0.conv.weight" in moved[2] and moved[1] <= moved[2]
