"""Parameter groups: every parameter once, in the right layer, with the right learning rate."""

import pytest
import torch
from support.tiny_plans import CNN, PATCH, TRANSFORMER
from torch import nn

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.optimise.layers import layers_of
from nnssl_adapt.training.optimise.network_options import channels_last
from nnssl_adapt.training.optimise.optimizer import build_optimizer, is_fused, load_optimizer_state
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.weights.network.architectures import Architecture, build_network, outline

CPU = torch.device("cpu")
PLAIN = Architecture(
    "PlainConvUNet",
    {
        **{key: value for key, value in CNN.kwargs.items() if key != "n_blocks_per_stage"},
        "n_conv_per_stage": [1, 2, 1],
    },
)
ARCHITECTURES = {"residual": CNN, "plain": PLAIN, "primus": TRANSFORMER}


def network_of(name):
    torch.manual_seed(0)
    return build_network(ARCHITECTURES[name], 2, 3, PATCH)


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_in_exactly_one_group(name, deep_supervision):
    network = network_of(name)
    recipe = Recipe(layer_decay=0.7, deep_supervision=deep_supervision)
    groups = build_optimizer(network, recipe, CPU).param_groups
    grouped = [id(weight) for group in groups for weight in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(weight) for weight in network.parameters()}
    assert len({group["name"] for group in groups}) == len(groups)


LAYERS = {  # a few tensors of each layer, by the shallowest name
    "residual": {
        "encoder.0": ["encoder.stem.convs.0.conv.weight"],
        "encoder.1": ["encoder.stages.0.blocks.0.conv1.conv.weight"],
        "encoder.2": ["encoder.stages.1.blocks.0.conv1.norm.weight"],
        "encoder.3": ["encoder.stages.2.blocks.0.conv2.norm.bias"],
        "decoder": ["decoder.stages.0.convs.0.conv.weight", "decoder.transpconvs.1.weight"],
        "head": ["decoder.seg_layers.1.weight"],
        "head.deep": ["decoder.seg_layers.0.bias"],
    },
    "plain": {
        "encoder.0": ["encoder.stages.0.0.convs.0.conv.weight"],  # its stem is its first stage
        "encoder.1": ["encoder.stages.1.0.convs.1.conv.weight"],
        "encoder.2": ["encoder.stages.2.0.convs.0.norm.weight"],
        "decoder": ["decoder.stages.1.convs.0.conv.bias"],
        "head": ["decoder.seg_layers.1.bias"],
        "head.deep": ["decoder.seg_layers.0.weight"],
    },
    "primus": {
        "encoder.0": ["down_projection.proj.weight", "eva.pos_embed"],
        "encoder.1": ["eva.blocks.0.attn.q_proj.weight", "eva.blocks.0.gamma_1"],
        "encoder.2": ["eva.blocks.1.mlp.fc2.bias", "eva.norm.weight"],
        "decoder": ["up_projection.decode.0.0.weight"],
        "head": [],
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_tensors_they_should(name):
    network = network_of(name)
    tensors = dict(network.named_parameters())
    layers = {layer.name: layer for layer in layers_of(network)}
    assert set(layers) == set(LAYERS[name])
    for layer, members in LAYERS[name].items():
        for member in members:
            assert any(tensors[member] is weight for weight in layers[layer].parameters), (layer, member)


@pytest.mark.parametrize(
    ("preset", "layers", "tensors"),  # stem and stages or blocks; parameters of the last one
    [("ResEncL", 7, 6 * 8), ("PrimusS", 13, 25), ("PrimusM", 17, 25)],
)
def test_presets(preset, layers, tensors):
    network = outline(Architecture.named(preset), 1, (64, 64, 64))
    found = layers_of(network)
    encoder = [layer for layer in found if layer.part == "encoder"]
    assert [layer.name for layer in encoder] == [f"encoder.{depth}" for depth in range(layers)]
    assert len({id(weight) for layer in found for weight in layer.parameters}) == len(list(network.parameters()))
    assert sum(len(layer.parameters) for layer in found) == len(list(network.parameters()))
    assert len(encoder[-1].parameters) == tensors


def test_a_primus_head_makes_the_classes():
    network = network_of("primus")
    (head,) = [layer for layer in layers_of(network) if layer.part == "head"]
    assert {tuple(weight.shape)[:2] for weight in head.parameters if weight.ndim > 1} == {(8, 3)}
    with torch.no_grad():
        for weight in head.parameters:
            weight.zero_()
        assert network(torch.randn(1, 2, *PATCH)).abs().max() == 0


def test_deep_supervision_uses_every_head_and_changes_no_layer():
    network = network_of("residual")
    without, with_it = layers_of(network), layers_of(network, deep_supervision=True)
    assert [layer.name for layer in without if layer.unused] == ["head.deep"]
    assert not any(layer.unused for layer in with_it)
    assert [(layer.name, layer.parameters) for layer in without] == [
        (layer.name, layer.parameters) for layer in with_it
    ]


def test_depth_counts_from_the_stem_and_rates_from_the_top():
    layers = {layer.name: (layer.depth, layer.steps_from_top) for layer in layers_of(network_of("residual"))}
    assert layers["encoder.0"] == (0, 4) and layers["encoder.3"] == (3, 1)
    assert layers["decoder"] == (None, 0) and layers["head"] == (None, 0)
    assert {layer.steps_from_top for layer in layers_of(network_of("plain"))} == {3, 2, 1, 0}


def test_layer_decay_and_the_encoders_own_rate():
    recipe = Recipe(learning_rate=0.2, encoder_learning_rate=0.05, layer_decay=0.8)
    scales = {
        group["name"]: group["lr_scale"] for group in build_optimizer(network_of("primus"), recipe, CPU).param_groups
    }
    expected = {
        "encoder.0": 0.25 * 0.8**3,
        "encoder.1": 0.25 * 0.8**2,
        "encoder.2": 0.25 * 0.8,
        "decoder": 1,
        "head": 1,
    }
    assert scales == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)]
)
def test_the_optimizer_that_was_asked_for(name, kind):
    recipe = Recipe(optimizer=name, weight_decay=0.03, momentum=0.8, betas=(0.7, 0.9))
    optimizer = build_optimizer(network_of("plain"), recipe, CPU)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0.03
        if name == "sgd":
            assert group["momentum"] == 0.8 and group["nesterov"]
        else:
            assert group["betas"] == (0.7, 0.9) and not group["amsgrad"]


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
def test_groups_take_the_steps_of_one_list_of_weights(name):
    """Groups are for rates; with equal rates nothing else may differ."""
    recipe = Recipe(optimizer=name, learning_rate=0.01, weight_decay=0.1)
    networks = [network_of("residual"), network_of("residual")]
    ours = build_optimizer(networks[0], recipe, CPU)
    options = {"momentum": 0.99, "nesterov": True} if name == "sgd" else {"betas": recipe.betas}
    theirs = type(ours)(networks[1].parameters(), 0.01, weight_decay=0.1, **options)
    for step in range(3):
        for network, optimizer in zip(networks, (ours, theirs), strict=True):
            for number, weight in enumerate(network.parameters()):
                weight.grad = torch.full_like(weight, 0.1 * (step + 1) - 0.02 * number)
            optimizer.step()
    for first, second in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(first, second)


def stepped(network, recipe):
    optimizer = build_optimizer(network, recipe, CPU)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


def test_a_checkpoint_from_another_device_and_other_settings_goes_on_here():
    recipe = Recipe(optimizer="adamw", layer_decay=0.5, weight_decay=0.1)
    network = network_of("plain")
    before = stepped(network, recipe)
    state = before.state_dict()
    for group in state["param_groups"]:
        group["fused"] = True  # written on a GPU
    after = build_optimizer(network, recipe.override(layer_decay=0.9, weight_decay=0.2, betas=(0.8, 0.95)), CPU)
    load_optimizer_state(after, state)
    for group in after.param_groups:
        assert (group["fused"], group["weight_decay"], group["betas"]) == (None, 0.2, (0.8, 0.95))
    scales = {group["name"]: group["lr_scale"] for group in after.param_groups}
    assert scales["encoder.1"] == pytest.approx(0.9**2)
    for weight in network.parameters():
        assert torch.equal(after.state[weight]["exp_avg"], before.state[weight]["exp_avg"])
        assert after.state[weight]["step"] == 1


def test_a_checkpoint_goes_on_with_deep_supervision_too():
    network = network_of("residual")
    before = stepped(network, Recipe())
    after = build_optimizer(network, Recipe(deep_supervision=True), CPU)
    load_optimizer_state(after, before.state_dict())
    assert len(after.state) == len(list(network.parameters()))


@pytest.mark.parametrize(("written", "read"), [("residual", "plain"), ("plain", "residual"), ("residual", "primus")])
def test_a_checkpoint_of_other_groups_is_refused(written, read):
    state = stepped(network_of(written), Recipe()).state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        load_optimizer_state(build_optimizer(network_of(read), Recipe(), CPU), state)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")])
def test_checkpoints_travel_between_devices(name, devices, cuda_device):
    devices = [cuda_device if device == "cuda" else CPU for device in devices]
    recipe = Recipe(optimizer=name)
    networks = [network_of("plain").to(device) for device in devices]
    optimizers = [build_optimizer(n, recipe, d) for n, d in zip(networks, devices, strict=True)]
    for number, (network, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
        if number:
            load_optimizer_state(optimizer, optimizers[0].state_dict())
        for weight in network.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    if name != "sgd":
        assert {float(state["step"]) for state in optimizers[1].state.values()} == {2.0}


@pytest.mark.parametrize(
    "fields",
    [{"encoder_learning_rate": 0.1}, {"layer_decay": 0.9}, {"freeze": "encoder"}, {"decoder_warmup_epochs": 2}],
)
def test_a_network_that_does_not_say_where_its_encoder_is(fields):
    network = nn.Linear(2, 3)
    (group,) = build_optimizer(network, Recipe(), CPU).param_groups  # all parts alike: nothing to ask
    assert group["params"] == list(network.parameters()) and group["lr_scale"] == 1
    with pytest.raises(ConfigurationError, match="Linear does not say where its encoder is"):
        build_optimizer(network, Recipe(**fields), CPU)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
def test_on_a_gpu_the_optimizer_is_fused_and_takes_the_same_steps(name, cuda_device):
    networks = [network_of("residual").to(cuda_device), network_of("residual")]
    devices = [cuda_device, CPU]
    optimizers = [build_optimizer(n, Recipe(optimizer=name), d) for n, d in zip(networks, devices, strict=True)]
    assert is_fused(optimizers[0]) == (cuda_device.type == "cuda")
    for network, optimizer in zip(networks, optimizers, strict=True):
        for weight in network.parameters():
            weight.grad = torch.ones_like(weight) * 0.3
        optimizer.step()
    for first, second in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(first.cpu(), second, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("before", [False, True])
def test_momenta_lie_in_memory_as_the_weights_do_after_a_change_of_layout(before):
    def trained(last):
        network = network_of("residual")
        network = channels_last(network) if last else network
        optimizer = build_optimizer(network, Recipe(), CPU)
        for number, weight in enumerate(network.parameters()):
            weight.grad = torch.full_like(weight, number + 1.0) * weight
        return network, optimizer

    _, first = trained(before)
    first.step()
    network, second = trained(not before)
    load_optimizer_state(second, first.state_dict())
    for weight in network.parameters():
        momentum = second.state[weight]["momentum_buffer"]
        assert momentum.stride() == weight.stride()  # fused optimisers refuse others
    old = [state["momentum_buffer"] for state in first.state.values()]
    new = [state["momentum_buffer"] for state in second.state.values()]
    assert len(old) == len(new) > 10 and all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
