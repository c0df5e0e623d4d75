"""Networks without a plan: what their tensors tell, and the contrast-agnostic network, which is known by its size."""

from __future__ import annotations

import copy

import pytest
import torch
from support.nnssl_files import PLAINCONV, RESENC

from nnssl_adapt.errors import AdaptationPlanError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.checkpoint.plan_of_tensors import plan_from_tensors
from nnssl_adapt.weights.network.architectures import Architecture, build_network, outline
from nnssl_adapt.weights.network.topology import read_topology

VARIANTS = {
    "plain": ("PlainConvUNet", PLAINCONV),
    "residual": ("ResidualEncoderUNet", RESENC),
    "uneven blocks": ("PlainConvUNet", PLAINCONV | {"n_conv_per_stage": [1, 3, 2], "n_conv_per_stage_decoder": [3, 1]}),
    "no bias": ("PlainConvUNet", PLAINCONV | {"conv_bias": False}),
    "batch norm": ("PlainConvUNet", PLAINCONV | {"norm_op": "BatchNorm3d"}),
    "not affine": ("PlainConvUNet", PLAINCONV | {"norm_op_kwargs": {"eps": 1e-5, "affine": False}}),
    "bottleneck": ("ResidualEncoderUNet", RESENC | {"block": "BottleneckD", "bottleneck_channels": [2, 3, 4]}),
    "stem": ("ResidualEncoderUNet", RESENC | {"stem_channels": 5}),
    "last kernel": ("ResidualEncoderUNet", RESENC | {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [1, 3, 5]]}),
    "last stride": ("PlainConvUNet", PLAINCONV | {"strides": [[1, 1, 1], [2, 2, 2], [1, 2, 2]]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("alias", ["both", "conv", "all_modules"])
def test_the_architecture_is_read_off_the_tensors(variant, prefix, alias):
    """Whatever leaves a trace; the rest is as nnU-Net always has it."""
    architecture = Architecture(*VARIANTS[variant])
    state = outline(architecture, 3, (8, 16, 16)).state_dict()
    other = {"conv": "all_modules", "all_modules": ".conv.", "both": "nothing"}[alias]
    named = {prefix + name: tensor for name, tensor in state.items() if other not in name}
    topology = read_topology(named)
    assert topology.architecture == architecture
    assert (topology.channels, topology.heads, topology.guessed) == (3, 1, ())
    assert topology.encoder == f"{prefix}encoder"


def planar(kwargs):
    """The same network of two axes."""
    sizes = {key: [entry[1:] for entry in kwargs[key]] for key in ("kernel_sizes", "strides")}
    return {**kwargs, **sizes, "conv_op": "Conv2d", "norm_op": "InstanceNorm2d"}


def test_what_an_encoder_alone_does_not_tell_is_said():
    state = dict(outline(Architecture("PlainConvUNet", PLAINCONV), 1, (8, 16, 16)).state_dict().items())
    topology = read_topology({name: tensor for name, tensor in state.items() if name.startswith("encoder.")})
    assert topology.guessed == ("strides", "n_conv_per_stage_decoder")
    hinted = read_topology(state | {}, PLAINCONV)
    assert hinted.guessed == ()


def test_gaps_in_the_numbering_are_an_error():
    state = outline(Architecture("PlainConvUNet", PLAINCONV), 1, (8, 16, 16)).state_dict()
    gapped = {name: tensor for name, tensor in state.items() if ".stages.1." not in name}
    with pytest.raises(AdaptationPlanError, match=r"numbered \[0, 2\], expected 0, 1, 2"):
        plan_from_tensors(gapped, "file.pth")


def test_a_2d_network_is_read_and_a_transformer_refused_by_what_it_is():
    plain = Architecture("PlainConvUNet", planar(PLAINCONV))
    topology = read_topology(outline(plain, 2, (1, 16, 24)).state_dict())
    assert topology.architecture == plain and topology.architecture.is_planar and topology.channels == 2
    primus = outline(Architecture.named("PrimusS"), 1, (16, 16, 24)).state_dict()
    with pytest.raises(AdaptationPlanError, match=r"don't show its patch: copy its adaptation_plan\.json"):
        plan_from_tensors(primus, "file.pth")
    with pytest.raises(AdaptationPlanError, match="neither a U-Net's"):
        plan_from_tensors({"head.weight": torch.zeros(2, 3)}, "file.pth")


def test_a_bare_file_says_what_is_not_in_it(tmp_path):
    network = build_network(Architecture("PlainConvUNet", PLAINCONV), 2, 3, (8, 16, 16))
    for content in (network.state_dict(), {"network_weights": network.state_dict()}):
        torch.save(content, tmp_path / "bare.pth")
        checkpoint = open_checkpoint(tmp_path / "bare.pth")
        assert checkpoint.plan.supervised
        assert (checkpoint.plan.spacing, checkpoint.plan.orientation) == (None, None)
        assert checkpoint.plan.patch_size == (8, 16, 16)
        assert checkpoint.plan.normalization_schemes == ("ZScoreNormalization",) * 2
        assert any("choose -am median or fixed" in note for note in checkpoint.notes)
        assert not any("contradicts" in note or "key_to" in note for note in checkpoint.notes)
        assert "spacing   not known" in str(checkpoint)


def test_one_output_without_a_trainer_is_no_proof_of_segmentation(tmp_path):
    network = build_network(Architecture("ResidualEncoderUNet", RESENC), 1, 1, (8, 16, 16))
    torch.save({"network_weights": network.state_dict()}, tmp_path / "bare.pth")
    checkpoint = open_checkpoint(tmp_path / "bare.pth")
    assert not checkpoint.plan.supervised
    assert any("--scope encoder+decoder" in note for note in checkpoint.notes)
    torch.save(
        {"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer_250epochs"}, tmp_path / "bare.pth"
    )
    assert open_checkpoint(tmp_path / "bare.pth").plan.supervised


# -- the contrast-agnostic network -----------------------------------------------------------------------------------

CORD = copy.deepcopy(PLAINCONV) | {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": 3,
    "strides": [1, 2, 2, 2, 2, [1, 2, 2]],
    "n_conv_per_stage": [2] * 6,
    "n_conv_per_stage_decoder": [2] * 5,
}


def cord_tensors(**changes):
    """Its names and shapes without its numbers: one zero a tensor is enough, and takes no memory."""
    return outline(Architecture("PlainConvUNet", CORD | changes), 1, (64, 192, 320)).state_dict()


@pytest.mark.parametrize("last", [[320, 320], [320, 384], [384, 384]])
def test_the_contrast_agnostic_network_is_known_by_its_size(last):
    tensors = cord_tensors(features_per_stage=[32, 64, 128, 256, *last])
    plan, axes, notes = plan_from_tensors(tensors, "file.pth")
    assert plan.architecture.kwargs["features_per_stage"][-2:] == last
    assert plan.spacing == (1, 1, 1)
    assert plan.patch_size == plan.recommended_patch_size == (64, 192, 320)
    assert (plan.orientation, plan.supervised, plan.num_input_channels) == ("RPI", True, 1)
    assert any("contrast-agnostic" in note for note in notes)
    assert (axes, len(plan.citations)) == ("xyz", 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"features_per_stage": [32, 64, 128, 256, 320, 512]},
        {"features_per_stage": [32, 64, 128, 256, 256, 256]},
        {"strides": [1, 2, 2, 2, 2, 2]},
        {"strides": [1, 2, 2, 2, 2, [2, 2, 1]]},
        {"n_conv_per_stage": [2, 2, 2, 2, 2, 1]},
    ],
)
def test_a_network_of_nearly_its_size_is_not_taken_for_it(changes):
    plan, axes, _ = plan_from_tensors(cord_tensors(**changes), "file.pth")
    assert (plan.spacing, plan.orientation, axes) == (None, None, "zyx")


@pytest.fixture(scope="module")
def cord_file(tmp_path_factory):
    """A bare file of the real size (no numbers in it but zeros), as the releases before native nnU-Net have it."""
    path = tmp_path_factory.mktemp("cord") / "nnunet_compatible.pth"
    known: dict[int, torch.Tensor] = {}
    tensors = {
        name: known.setdefault(id(tensor), torch.zeros(tensor.shape, dtype=torch.float16))
        for name, tensor in cord_tensors().items()
    }
    torch.save({"network_weights": tensors}, path)
    return path


def test_a_bare_contrast_agnostic_file_is_turned_from_monais_axes(cord_file):
    checkpoint = open_checkpoint(cord_file)
    assert checkpoint.plan.patch_size == checkpoint.plan.recommended_patch_size == (320, 192, 64)
    assert checkpoint.architecture.strides[-1] == (2, 2, 1)
    assert checkpoint.plan.orientation == "RPI"
    assert any("--axes zyx" in note for note in checkpoint.notes)
    as_is = open_checkpoint(cord_file, axes="zyx")
    assert (as_is.plan.patch_size, as_is.architecture.strides[-1]) == ((64, 192, 320), (1, 2, 2))
