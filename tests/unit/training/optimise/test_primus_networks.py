"""What a recipe can ask of Primus V1, V2 and V3: it works on every tokenizer, or is refused."""

import pytest
import torch

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.planning.memory import GIB, StepSettings, estimate_memory, largest_fit
from nnssl_adapt.training.optimise.adapters import add_adapters, plain_weights
from nnssl_adapt.training.optimise.layers import frozen_layers, layers_of
from nnssl_adapt.training.optimise.network_options import recompute_activations
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.weights.network.architectures import Architecture, build_network

PATCH = (16, 16, 24)
TINY = {"embed_dim": 24, "eva_depth": 3, "eva_numheads": 2, "drop_path_rate": 0.0}
VERSIONS = [Architecture.named(f"Primus{version}S", **TINY) for version in ("", "V2", "V3")]
ALL = pytest.mark.parametrize("architecture", VERSIONS, ids=lambda a: a.class_name)


@ALL
def test_layers_adapters_and_recomputation(architecture):
    torch.manual_seed(0)
    network = build_network(architecture, 2, 3, PATCH).eval()
    layers = {layer.name: layer for layer in layers_of(network)}
    assert [*layers] == ["encoder.0", "encoder.1", "encoder.2", "encoder.3", "decoder", "head"]
    assert [layers[f"encoder.{i}"].steps_from_top for i in range(4)] == [4, 3, 2, 1]
    assert sum(len(layer.parameters) for layer in layers.values()) == len(list(network.parameters()))
    tokenizer = {id(weight) for weight in network.down_projection.parameters()}
    assert tokenizer | {id(network.eva.pos_embed)} == {id(weight) for weight in layers["encoder.0"].parameters}
    assert frozen_layers(network, 2) == {"encoder.0", "encoder.1", "encoder.2"}
    with pytest.raises(ConfigurationError, match="encoder has 3 blocks"):
        Recipe(freeze="stages:4").check_against(architecture)

    image = torch.randn(1, 2, *PATCH)
    names = set(network.state_dict())
    first = next(network.down_projection.parameters())
    before = network(image)
    before.square().mean().backward()
    gradient = first.grad.clone()
    first.grad = None
    blocks_of_tokenizer = {"Primus": 0, "PrimusV2": 4, "PrimusV3": 4}[architecture.class_name]
    assert recompute_activations(network) == 3 + blocks_of_tokenizer
    network(image).square().mean().backward()
    torch.testing.assert_close(first.grad, gradient)

    with torch.no_grad():
        add_adapters(network, Recipe(lora_rank=2))
        torch.testing.assert_close(network(image), before)
        adapted = [name for name, _ in network.named_parameters() if ".lora_B" in name]
        assert len(adapted) == 4 * 3 and all("eva.blocks." in name for name in adapted)
        for name in adapted:
            network.get_parameter(name).normal_(0, 0.1)
        learned = network(image)
        assert (learned - before).abs().max() > 1e-4 and set(plain_weights(network)) == names
        plain = build_network(architecture, 2, 3, PATCH).eval()
        plain.load_state_dict(plain_weights(network))
        torch.testing.assert_close(plain(image), learned, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_saves_memory_where_the_transformer_is_deep():
    """Of the published widths; nothing is allocated."""
    architecture = Architecture.named("PrimusV3S", eva_depth=6)
    everything, less, frozen = (
        estimate_memory(architecture, 1, 3, (64, 64, 96), 2, StepSettings(optimizer="adamw", **changes)).total
        for changes in ({}, {"activation_checkpointing": True}, {"freeze": "encoder"})
    )
    assert 0 < less < everything and frozen < everything


@pytest.mark.parametrize("architecture", VERSIONS[1:], ids=lambda a: a.class_name)
def test_a_patch_is_chosen_by_the_memory_there_is(architecture):
    chosen, batch = largest_fit(architecture, 1, 3, (16, 24, 32), GIB * 4, StepSettings(device="cpu"))
    assert chosen == (16, 24, 32) and batch >= 2
    with pytest.raises(ConfigurationError, match="too few"):
        largest_fit(architecture, 1, 3, PATCH, 2**16, StepSettings(device="cpu"))


def test_the_tokenizers_of_v2_and_v3_cost_memory():
    """They compute features at the full resolution, where V1 makes its tokens at once."""
    v1, v2, v3 = (estimate_memory(a, 1, 3, (96, 64, 96), 2, StepSettings(device="cpu")).activations for a in VERSIONS)
    assert v1 < v2 and v1 < v3


@ALL
def test_a_single_output_is_all_there_is(architecture):
    with pytest.raises(ConfigurationError, match="single output"):
        Recipe(deep_supervision=True).check_against(architecture, "cpu")
