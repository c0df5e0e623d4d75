"""Networks whose normalisations do what follows them: the same numbers, the same names."""

import copy
from functools import partial

import pytest
import torch
from support.tiny_plans import CNN, PATCH, TRANSFORMER
from torch import nn

from nnssl_adapt.planning.traced_step import trace_step
from nnssl_adapt.training.fused import modules
from nnssl_adapt.training.fused.modules import FusedNorm, fuse_norms
from nnssl_adapt.training.optimise.ema import WeightAverage
from nnssl_adapt.training.optimise.network_options import to_device, training_forward
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.weights.modules import stu_net
from nnssl_adapt.weights.network.architectures import Architecture, build_network

CPU = torch.device("cpu")
PLAIN = Architecture(
    "PlainConvUNet",
    {**{k: v for k, v in CNN.kwargs.items() if k != "n_blocks_per_stage"}, "n_conv_per_stage": [1, 2, 1]},
)


def of(architecture):
    torch.manual_seed(0)
    return build_network(architecture, 2, 3, PATCH)


def residual_blocks(**options):
    block = partial(modules.BasicBlockD, nn.Conv3d, kernel_size=3, norm_op=nn.InstanceNorm3d, nonlin=nn.LeakyReLU)
    return nn.Sequential(
        block(input_channels=2, output_channels=4, stride=2, **options),
        block(input_channels=4, output_channels=4, stride=1, **options),
    )


def bottlenecks():
    block = partial(modules.BottleneckD, nn.Conv3d, kernel_size=3, norm_op=nn.InstanceNorm3d, nonlin=nn.ReLU)
    affine = {"affine": True}
    return nn.Sequential(
        block(2, 3, 4, stride=2, norm_op_kwargs=affine), block(4, 3, 4, stride=1, norm_op_kwargs=affine)
    )


NETWORKS = {
    "residual": lambda: of(CNN),
    "plain": lambda: of(PLAIN),
    "stu_net": lambda: nn.Sequential(
        stu_net.Block(2, 4, (3, 3, 3), (2, 2, 2), first=True), stu_net.Block(4, 4, (3, 3, 3))
    ),
    "bottleneck": bottlenecks,
    "without weights": residual_blocks,
    "channel attention": lambda: residual_blocks(squeeze_excitation=True),
}


def step(network, forward=None):
    network.zero_grad(set_to_none=True)
    image = torch.randn(2, 2, *PATCH, generator=torch.Generator().manual_seed(1))
    found = (forward or network)(image)
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    weights = network.named_parameters()
    return found.detach(), {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


def assert_same(one, other, tolerance=1e-4):
    assert torch.allclose(one[0], other[0], atol=tolerance)
    scale = max(float(gradient.abs().max()) for gradient in one[1].values())
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.allclose(gradient, other[1][name], atol=tolerance * scale), name


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_outputs_gradients_and_names(name):
    plain = NETWORKS[name]()
    fused = copy.deepcopy(plain)
    norms = sum(isinstance(module, nn.InstanceNorm3d) for module in plain.modules())
    assert fuse_norms(fused) == norms > 0 and fuse_norms(fused) == 0
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    assert_same(step(plain), step(fused))
    again = copy.deepcopy(fused)
    with torch.no_grad():
        for weight in fused.parameters():
            weight.zero_()
    assert_same(step(plain), step(again))


def activations(network, monkeypatch):
    """How often a normalisation had something added, and an activation of its own."""
    seen = []
    original = modules.norm_act

    def counted(features, weight, bias, residual, slope, eps):
        seen.append((residual is not None, slope))
        return original(features, weight, bias, residual, slope, eps)

    monkeypatch.setattr(modules, "norm_act", counted)
    network(torch.randn(1, 2, *PATCH))
    return seen


def test_what_follows_is_really_done_in_the_normalisation(monkeypatch):
    network = of(CNN)
    fuse_norms(network)
    seen = activations(network, monkeypatch)
    blocks = sum(isinstance(module, modules.FusedBasicBlock) for module in network.modules())
    assert seen.count((True, 0.01)) == blocks == 3
    skips = sum(isinstance(getattr(module, "skip", None), nn.Sequential) for module in network.modules())
    assert seen.count((False, 1.0)) == skips  # nothing follows these
    assert seen.count((False, 0.01)) == len(seen) - blocks - skips


def test_blocks_that_do_something_between_keep_their_order(monkeypatch):
    for options in ({"squeeze_excitation": True}, {"stochastic_depth_p": 0.5}):
        network = residual_blocks(**options)
        fuse_norms(network)
        seen = activations(network, monkeypatch)
        assert not any(added for added, _ in seen) and (False, 0.01) in seen


def test_an_activation_that_others_use_too_stays():
    shared = nn.LeakyReLU(0.1)
    network = nn.Sequential(
        nn.Sequential(nn.InstanceNorm3d(2), shared), nn.Sequential(nn.Conv3d(2, 2, 1), shared), nn.InstanceNorm3d(2)
    )
    plain = copy.deepcopy(network)
    fuse_norms(network)
    image = torch.randn(1, 2, *PATCH)
    assert isinstance(network[0][0], FusedNorm) and type(shared) is nn.LeakyReLU
    assert torch.allclose(network(image), plain(image), atol=1e-6)


def test_other_norms_and_activations_stay():
    network = nn.Sequential(nn.InstanceNorm3d(2, track_running_stats=True), nn.ReLU(), nn.InstanceNorm3d(2), nn.GELU())
    fuse_norms(network)
    kinds = [type(module) for module in network]
    assert kinds == [nn.InstanceNorm3d, nn.ReLU, FusedNorm, nn.GELU]
    transformer = of(TRANSFORMER)
    assert fuse_norms(transformer) == 0


def test_a_single_voxel_is_refused_as_by_torch():
    network = nn.Sequential(nn.InstanceNorm3d(2))
    fuse_norms(network)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        network(torch.ones(1, 2, 1, 1, 1))


def test_the_estimate_of_memory_holds_for_them_too():
    found = []
    for fused in (False, True):
        with torch.device("meta"):
            network = of(CNN).to("meta").train()
        if fused:
            fuse_norms(network)
        traced = trace_step(network, 2, PATCH, 2, half=torch.bfloat16, one_pass_loss=True)
        found.append((traced.kept, traced.peak))
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_with_all_that_a_recipe_may_ask_for_besides(monkeypatch):
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: original(network, backend="aot_eager"))
    torch._dynamo.reset()
    plain = of(CNN)
    recipe = Recipe(compile="on", channels_last=True, fused_norm="on", activation_checkpointing=True)
    network = to_device(copy.deepcopy(plain), recipe, CPU)
    average = WeightAverage(network, 0.9)
    forward = training_forward(network, recipe, CPU)
    assert_same(step(plain), step(network, forward))
    average.update(network)
    assert list(average.weights()) == list(plain.state_dict()) == list(network.state_dict())
    for name, weight in network.named_parameters():
        weight.requires_grad_("decoder" in name)
    network.zero_grad(set_to_none=True)
    network(torch.randn(1, 2, *PATCH)).sum().backward()
    assert {weight.grad is None for name, weight in network.named_parameters() if "decoder" not in name} == {True}
