"""What may change how a network runs, and never its tensors."""

import copy
import io

import pytest
import torch
from support.tiny_plans import CNN, PATCH, TRANSFORMER

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.optimise import network_options
from nnssl_adapt.training.optimise.network_options import (
    CompiledForward,
    recompute_activations,
    set_deep_supervision,
    to_device,
    training_forward,
    wants_compiling,
)
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.weights.network.architectures import Architecture, build_network

CPU = torch.device("cpu")
PLAIN_CNN = Architecture(
    "PlainConvUNet",
    {**{k: v for k, v in CNN.kwargs.items() if k != "n_blocks_per_stage"}, "n_conv_per_stage": [1, 2, 1]},
)
BOTH = pytest.mark.parametrize("architecture", [CNN, PLAIN_CNN, TRANSFORMER], ids=["residual", "plain", "transformer"])


def network_of(architecture=CNN, channels=2, classes=3):
    torch.manual_seed(0)
    return build_network(architecture, channels, classes, PATCH)


def image(channels=2, batch=2):
    return torch.randn(batch, channels, *PATCH, generator=torch.Generator().manual_seed(1))


def gradients(network, forward=None, seed=5):
    """Loss and gradients of a step in training, its random paths drawn from ``seed``."""
    network.train().zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = (forward or network)(image())
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_same(left, right, tolerance=0.0):
    assert left[1].keys() == right[1].keys() and left[1]
    scale = max(float(g.abs().max()) for g in left[1].values())
    assert torch.allclose(left[0], right[0], atol=tolerance, rtol=0)
    for name, gradient in left[1].items():
        assert torch.allclose(gradient, right[1][name], atol=tolerance * scale, rtol=0), name


# -- activation checkpointing ------------------------------------------------------------------------------------------


@BOTH
def test_recomputing_gives_the_same_gradients_and_names(architecture):
    plain = network_of(architecture)
    recomputing = to_device(copy.deepcopy(plain), Recipe(activation_checkpointing=True), CPU)
    assert list(recomputing.state_dict()) == list(plain.state_dict())
    expected = gradients(plain)
    assert_same(expected, gradients(recomputing))
    assert not torch.equal(gradients(plain, seed=6)[0], expected[0]) or architecture is not TRANSFORMER  # paths drop


def kept_bytes(network):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network.train()(image())
    del output
    return sum(size for where, size in kept.items() if where not in weights)


@BOTH
def test_recomputing_keeps_less(architecture):
    network = network_of(architecture)
    before = kept_bytes(network)
    assert recompute_activations(network) >= 2
    assert kept_bytes(network) < 0.75 * before


@BOTH
def test_recomputing_twice_is_recomputing_once(architecture):
    network = network_of(architecture)
    assert recompute_activations(network) > 0
    with pytest.raises(ConfigurationError, match="no blocks"):
        recompute_activations(network)


def test_blocks_run_twice_in_training_and_once_in_prediction():
    network = network_of()
    block = network.encoder.stages[1].blocks[0]
    calls = []
    block.conv1.register_forward_hook(lambda *_: calls.append(1))
    recompute_activations(network)
    gradients(network)
    assert len(calls) == 2
    with torch.no_grad():
        network(image())
    assert len(calls) == 3


def test_a_copy_of_a_recomputing_network_has_weights_of_its_own():
    network = network_of()
    recompute_activations(network)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert network(image()).abs().max() > 0 and other(image()).abs().max() == 0


def test_a_network_without_blocks():
    with pytest.raises(ConfigurationError, match="activation_checkpointing: Conv3d has no blocks"):
        to_device(torch.nn.Conv3d(1, 2, 1), Recipe(activation_checkpointing=True), CPU)


# -- deep supervision --------------------------------------------------------------------------------------------------


def test_deep_supervision_can_be_switched():
    network = network_of()
    finest = network(image())
    to_device(network, Recipe(deep_supervision=True), CPU)
    outputs = network(image())
    assert [tuple(output.shape[2:]) for output in outputs] == [(16, 16, 24), (8, 8, 12)]
    assert torch.equal(outputs[0], finest)
    set_deep_supervision(network, False)
    assert torch.equal(network(image()), finest)


def test_a_transformer_has_none():
    with pytest.raises(ConfigurationError, match=r"Primus has a single output.*deep_supervision=false"):
        to_device(network_of(TRANSFORMER), Recipe(deep_supervision=True), CPU)
    set_deep_supervision(network_of(TRANSFORMER), False)


# -- memory layout -----------------------------------------------------------------------------------------------------


@BOTH
def test_channels_last_computes_the_same(architecture):
    plain = network_of(architecture)
    recipe = Recipe(channels_last=True)
    other = to_device(copy.deepcopy(plain), recipe, CPU)
    layouts = {p.is_contiguous(memory_format=torch.channels_last_3d) for p in other.parameters() if p.ndim == 5}
    assert layouts == {True}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert_same(gradients(plain), gradients(other, training_forward(other, recipe, CPU)), tolerance=1e-4)


def test_the_image_gets_the_layout_of_the_weights():
    seen = []
    network = network_of()
    network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    training_forward(network, Recipe(channels_last=True), CPU)(image())
    training_forward(network, Recipe(), CPU)(image())
    assert [x.is_contiguous(memory_format=torch.channels_last_3d) for x in seen] == [True, False]
    assert torch.equal(seen[0], seen[1])


def test_the_optimiser_keeps_the_layout_and_a_file_the_values():
    network = to_device(network_of(), Recipe(channels_last=True), CPU)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    fresh = build_network(CNN, 2, 3, PATCH)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.allclose(fresh(image()), network(image()), atol=1e-5)


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "device", "variable", "expected"),
    [
        ("auto", "cuda", None, True),
        ("auto", "cuda", "f", False),
        ("auto", "cuda", "False", False),
        ("auto", "cuda", "T", True),
        ("auto", "cuda", "1", True),
        ("auto", "cpu", "t", False),
        ("auto", "mps", "t", False),
        ("on", "cpu", "f", True),
        ("off", "cuda", "t", False),
    ],
)
def test_when_it_compiles(monkeypatch, wanted, device, variable, expected):
    monkeypatch.delenv("nnUNet_compile", raising=False)
    if variable is not None:
        monkeypatch.setenv("nnUNet_compile", variable)
    assert wants_compiling(Recipe(compile=wanted), torch.device(device)) is expected


def compiling_with(monkeypatch, backend):
    original = torch.compile
    monkeypatch.setattr(network_options.torch, "compile", lambda network: original(network, backend=backend))
    torch._dynamo.reset()


def warnings_in(caplog):
    return [record.message for record in caplog.records if record.name.startswith("nnssl_adapt")]


@pytest.mark.parametrize("architecture", [CNN, TRANSFORMER], ids=["residual", "transformer"])
def test_the_compiled_twin_computes_the_same_and_shares_the_weights(monkeypatch, architecture):
    compiling_with(monkeypatch, "aot_eager")
    plain = network_of(architecture).eval()
    recipe = Recipe(compile="on", activation_checkpointing=True)
    network = to_device(copy.deepcopy(plain), recipe, CPU)
    forward = training_forward(network, recipe, CPU)
    assert isinstance(forward, CompiledForward)
    if architecture is TRANSFORMER:  # compiled code draws its random paths in another order
        for module in [*plain.modules(), *network.modules()]:
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
    expected = gradients(plain)
    assert_same(expected, gradients(network, forward), tolerance=1e-4)
    assert forward.is_compiled and list(network.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        assert forward(image()).abs().max() == 0


def failing_backend(module, inputs):
    raise OSError("no compiler on this machine")


def test_what_can_not_be_compiled_runs_as_it_is_with_one_warning(monkeypatch, caplog):
    compiling_with(monkeypatch, failing_backend)
    network = network_of()
    forward = training_forward(network, Recipe(compile="on"), CPU)
    assert_same(gradients(network), gradients(network, forward))
    forward(image())
    assert not forward.is_compiled
    (message,) = warnings_in(caplog)
    assert "torch.compile does not work here" in message and "no compiler on this machine" in message
    assert "\n" not in message and "--compile off" in message


def test_a_system_without_torch_compile(monkeypatch, caplog):
    def refuse(network):
        raise RuntimeError("torch.compile is not supported on this Python")

    monkeypatch.setattr(network_options.torch, "compile", refuse)
    network = network_of()
    assert torch.equal(training_forward(network, Recipe(compile="on"), CPU)(image()), network(image()))
    assert caplog.text.count("not supported on this Python") == 1


def test_errors_of_the_network_itself_come_through(monkeypatch, caplog):
    compiling_with(monkeypatch, "eager")
    forward = CompiledForward(network_of(channels=2))
    forward(image())

    def out_of_memory(tensor):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    forward._compiled = out_of_memory
    with pytest.raises(torch.cuda.OutOfMemoryError):
        forward(image())
    assert forward.is_compiled and not warnings_in(caplog)


@pytest.mark.cuda
@BOTH
def test_compiled_on_cuda(architecture, cuda_device, caplog, monkeypatch):
    device = cuda_device
    if device.type == "cpu":
        monkeypatch.setattr(torch, "compile", lambda network: network)
    recipe = Recipe(compile="on", channels_last=True, activation_checkpointing=True)
    network = to_device(network_of(architecture).eval(), recipe, device)
    forward = training_forward(network, recipe, device)
    with torch.no_grad():
        expected = network(image().to(device))
        got = forward(image().to(device))
    assert torch.allclose(got, expected, atol=1e-3) and "does not work here" not in caplog.text


def test_a_backward_pass_that_can_not_be_compiled_is_found_before_it_is_needed(monkeypatch, caplog):
    from torch._dynamo.backends.common import aot_autograd

    def failing(module, inputs):
        raise OSError("no space for the backward pass")

    compiling_with(monkeypatch, aot_autograd(fw_compiler=lambda module, inputs: module, bw_compiler=failing))
    network = network_of()
    forward = training_forward(network, Recipe(compile="on"), CPU)
    expected, state = gradients(network), torch.random.get_rng_state()
    assert_same(expected, gradients(network, forward))
    assert not forward.is_compiled and torch.equal(torch.random.get_rng_state(), state)
    (message,) = warnings_in(caplog)
    assert "torch.compile does not work here" in message


@pytest.mark.parametrize("architecture", [TRANSFORMER, CNN], ids=["transformer", "residual"])
def test_fused_norms_of_a_network_that_has_none(architecture, caplog):
    to_device(network_of(architecture), Recipe(fused_norm="on", deep_supervision=False), CPU)
    said = [message for message in warnings_in(caplog) if "InstanceNorm3d" in message]
    assert len(said) == (architecture is TRANSFORMER)
