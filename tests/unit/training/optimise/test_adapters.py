"""Adapters in a transformer's attention: they start as nothing, learn alone, and are merged for whoever predicts."""

import sys

import pytest
import torch
from support.tiny_plans import CNN, PATCH, TRANSFORMER

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.optimise.adapters import add_adapters, has_adapters, plain_weights
from nnssl_adapt.training.optimise.ema import WeightAverage
from nnssl_adapt.training.optimise.layers import layers_of
from nnssl_adapt.training.optimise.optimizer import build_optimizer
from nnssl_adapt.training.optimise.schedule import prepare_epoch
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.weights.network.architectures import build_network

RECIPE = Recipe(
    optimizer="adamw", learning_rate=0.01, epochs=9, warmup_epochs=0, lora_rank=3, lora_alpha=5, layer_decay=0.5
)
IMAGE = torch.sin(torch.arange(2 * 16 * 16 * 24).reshape(2, 1, *PATCH) * 0.37)


def network_of(architecture=TRANSFORMER, seed=0):
    torch.manual_seed(seed)
    return build_network(architecture, 1, 3, PATCH).eval()


@pytest.fixture
def adapted():
    pytest.importorskip("peft")
    network = network_of()
    add_adapters(network, RECIPE)
    return network


def train(network, recipe=RECIPE, epoch=0, steps=3):
    optimizer = build_optimizer(network, recipe, torch.device("cpu"))
    prepare_epoch(network, optimizer, epoch, recipe)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        network(IMAGE)[:, 1].square().mean().backward()
        optimizer.step()
    return optimizer


def test_they_start_as_nothing(adapted):
    with torch.no_grad():
        assert torch.equal(adapted(IMAGE), network_of()(IMAGE))


def test_their_random_halves_follow_from_the_seed_alone():
    pytest.importorskip("peft")
    networks = [network_of(seed=0), network_of(seed=1), network_of(seed=0)]
    for network, seed in zip(networks, (4, 4, 5), strict=True):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        add_adapters(network, RECIPE.override(seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    name = "eva.blocks.1.attn.k_proj.lora_A.default.weight"
    first, second, third = (network.state_dict()[name] for network in networks)
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_every_attention_layer_has_one_and_every_parameter_one_group(adapted):
    found = {name.rpartition(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    layers = ("q_proj", "k_proj", "v_proj", "proj")
    assert found == {f"eva.blocks.{block}.attn.{layer}" for block in (0, 1) for layer in layers}
    groups = build_optimizer(adapted, RECIPE, torch.device("cpu")).param_groups
    grouped = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(grouped) == sorted(id(weight) for weight in adapted.parameters())
    scales = {group["name"]: group["lr_scale"] for group in groups if group["adapters"]}
    assert scales == {"encoder.1.adapters": 0.25, "encoder.2.adapters": 0.5}


def test_adapters_decoder_and_head_learn_and_nothing_else(adapted):
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
    train(adapted)
    moved = {name for name, weight in adapted.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all("lora_" in name or name.startswith("up_projection.") for name in moved)
    assert {name for name in before if "lora_B" in name} <= moved


def test_they_wait_for_the_decoder():
    pytest.importorskip("peft")
    network = network_of()
    add_adapters(network, RECIPE)
    recipe = RECIPE.override(decoder_warmup_epochs=2)
    train(network, recipe, epoch=1)
    assert all(weight.abs().max() == 0 for name, weight in network.named_parameters() if "lora_B" in name)


def test_merged_weights_predict_the_same_in_a_plain_network(adapted):
    train(adapted)
    plain = network_of(seed=3)
    merged = plain_weights(adapted)
    assert list(merged) == list(plain.state_dict())
    plain.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(plain(IMAGE), adapted(IMAGE), rtol=0, atol=2e-5)
        assert not torch.allclose(plain(IMAGE), network_of()(IMAGE), atol=1e-3)
    changed = {name for name, tensor in network_of().state_dict().items() if not torch.equal(tensor, merged[name])}
    assert "eva.blocks.0.attn.q_proj.weight" in changed
    assert all(".attn." in name or name.startswith("up_projection.") for name in changed)


def test_merging_is_pefts_own(adapted):
    train(adapted)
    merged = plain_weights(adapted)
    for name in ("eva.blocks.0.attn.q_proj", "eva.blocks.1.attn.proj"):
        layer = adapted.get_submodule(name)
        expected = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-7)
    assert has_adapters(adapted)  # merging leaves the network as it is


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (5, 5 / 3), (0.75, 0.25)])
def test_what_an_adapter_counts(alpha, scale):
    pytest.importorskip("peft")
    network = network_of()
    add_adapters(network, RECIPE.override(lora_alpha=alpha))
    layer, name = network.get_submodule("eva.blocks.0.attn.v_proj"), "eva.blocks.0.attn.v_proj.weight"
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.5)
    product = torch.full((36, 3), 0.5) @ layer.lora_A["default"].weight
    difference = plain_weights(network)[name] - network_of().state_dict()[name]
    torch.testing.assert_close(difference, scale * product, rtol=0, atol=1e-6)


def test_averaged_adapters_are_merged_too(adapted):
    average = WeightAverage(adapted, 0.9)
    train(adapted)
    average.update(adapted)
    averaged = plain_weights(adapted, average.weights())
    adapted.load_state_dict(average.weights())
    for name, tensor in plain_weights(adapted).items():
        assert torch.equal(tensor, averaged[name]), name


def test_a_resumed_network_goes_on_from_its_own_names(adapted):
    train(adapted)
    resumed = network_of(seed=8)
    add_adapters(resumed, RECIPE)
    resumed.load_state_dict(adapted.state_dict())
    with torch.no_grad():
        assert torch.equal(resumed(IMAGE), adapted(IMAGE))


def test_without_adapters_the_weights_are_the_networks():
    network = network_of(CNN)
    add_adapters(network, Recipe())
    assert not has_adapters(network)
    plain = plain_weights(network)
    assert list(plain) == list(network.state_dict())
    assert all(plain[name].data_ptr() == tensor.data_ptr() for name, tensor in network.state_dict().items())


def test_a_cnn_has_no_attention():
    with pytest.raises(ConfigurationError, match="ResidualEncoderUNet has no attention layers"):
        add_adapters(network_of(CNN), RECIPE)


def test_twice_is_a_mistake(adapted):
    with pytest.raises(ConfigurationError, match="has adapters already"):
        add_adapters(adapted, RECIPE)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'nnssl-adapt\[lora\]'"):
        add_adapters(network_of(), RECIPE)


def test_layers_of_an_adapted_network(adapted):
    layers = {layer.name: layer for layer in layers_of(adapted)}
    assert layers["encoder.2.adapters"].depth == 2 and layers["encoder.2.adapters"].adapters
    assert len(layers["encoder.2.adapters"].parameters) == 8
    assert not layers["encoder.2"].adapters
