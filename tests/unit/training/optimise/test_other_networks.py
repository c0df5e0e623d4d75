"""What a recipe can ask of Swin UNETR and SegResNet: it works, or it is refused."""

import pytest
import torch

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.planning.memory import StepSettings, estimate_memory, largest_fit
from nnssl_adapt.training.optimise.adapters import add_adapters, plain_weights
from nnssl_adapt.training.optimise.layers import frozen_layers, layers_of
from nnssl_adapt.training.optimise.network_options import recompute_activations
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.weights.network.architectures import Architecture, build_network

SWIN = Architecture("SwinUNETR", {"feature_size": 12, "version": 2, "patch_merging": "old"})
SEG_RES_NET = Architecture(
    "SegResNet",
    {
        **{"init_filters": 4, "blocks_down": [1, 2], "blocks_up": [1], "norm": "batch", "decoder_norm": "instance"},
        **{"upsampling": "deconv", "final_norm": False},
    },
)
PATCHES = {"SwinUNETR": (64, 32, 32), "SegResNet": (8, 12, 16)}
BOTH = pytest.mark.parametrize("architecture", [SWIN, SEG_RES_NET], ids=lambda a: a.class_name)


@BOTH
def test_every_parameter_is_in_one_layer_and_stages_are_frozen_from_the_image_on(architecture):
    network = build_network(architecture, 1, 3, PATCHES[architecture.class_name])
    layers = layers_of(network)
    stages = len(network.encoder.stages)
    assert [layer.name for layer in layers if layer.part == "encoder"] == [f"encoder.{i}" for i in range(stages + 1)]
    assert [layer.steps_from_top for layer in layers if layer.part == "encoder"] == list(range(stages + 1, 0, -1))
    assert sum(len(layer.parameters) for layer in layers) == len(list(network.parameters()))
    assert {"decoder", "head"} <= {layer.name for layer in layers}
    assert frozen_layers(network, 1) == {"encoder.0", "encoder.1"}
    with pytest.raises(ConfigurationError, match=f"encoder has {stages} stages"):
        Recipe(freeze=f"stages:{stages + 1}").check_against(architecture)


@BOTH
def test_activation_checkpointing_changes_no_gradient(architecture):
    gradients = []
    image = torch.randn(1, 1, *PATCHES[architecture.class_name], generator=torch.Generator().manual_seed(0))
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = build_network(architecture, 1, 2, PATCHES[architecture.class_name]).train()
        if recomputed:
            assert recompute_activations(network) >= len(network.encoder.stages)
        network(image).square().mean().backward()
        gradients.append(network.encoder.stem.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@BOTH
def test_memory_is_predicted_and_a_patch_chosen_by_it(architecture):
    patch = PATCHES[architecture.class_name]
    everything, less, frozen, stages = (
        estimate_memory(architecture, 1, 3, patch, 2, StepSettings(device="cpu", **changes)).total
        for changes in ({}, {"activation_checkpointing": True}, {"freeze": "encoder"}, {"freeze": "stages:1"})
    )
    assert 0 < less < everything and frozen < everything and stages == everything
    chosen, batch = largest_fit(architecture, 1, 3, patch, everything, StepSettings(device="cpu"))
    assert batch >= 2 and all(n % s == 0 for n, s in zip(chosen, architecture.total_stride, strict=True))


def test_adapters_begin_as_nothing_and_are_merged_under_the_plans_names():
    network = build_network(SWIN, 1, 2, PATCHES["SwinUNETR"]).eval()
    image = torch.randn(1, 1, *PATCHES["SwinUNETR"])
    names = set(network.state_dict())
    with torch.no_grad():
        before = network.encoder.stages[2](network.encoder.stem(image))  # the first attention
        add_adapters(network, Recipe(lora_rank=2))
        torch.testing.assert_close(network.encoder.stages[2](network.encoder.stem(image)), before)
        adapted = [name for name, _ in network.named_parameters() if ".lora_B" in name]
        assert len(adapted) == 4 * 2 * 2  # queries, keys and values, and the output, of each block
        for name in adapted:
            network.get_parameter(name).normal_(0, 0.1)
        learned = network.encoder.stages[2](network.encoder.stem(image))
        assert (learned - before).abs().max() > 1e-4
        plain = build_network(SWIN, 1, 2, PATCHES["SwinUNETR"]).eval()
        weights = plain_weights(network)
        assert set(weights) == names
        plain.load_state_dict(weights)
        found = plain.encoder.stages[2](plain.encoder.stem(image))
        torch.testing.assert_close(found, learned, rtol=1e-4, atol=1e-5)


def test_what_they_can_not_do_is_refused_before_anything_starts():
    Recipe.load("swin_unetr").check_against(SWIN, "cpu")
    for recipe, architecture, word in (
        (Recipe(deep_supervision=True), SWIN, "single output"),
        (Recipe(lora_rank=2), SEG_RES_NET, "CNN"),
        (Recipe(from_scratch=True), SEG_RES_NET, "statistics of pre-training"),
        (Recipe.load("swin_unetr"), SEG_RES_NET, "stands for a SwinUNETR"),
    ):
        with pytest.raises(ConfigurationError, match=word):
            recipe.check_against(architecture, "cpu")
