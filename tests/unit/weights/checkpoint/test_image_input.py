"""Networks trained on (x, y, z) arrays: exchanged exactly, and only where that is meant."""

import dataclasses
import json

import pytest
import torch
from support.nnssl_files import PLAINCONV, RESENC, plan, state_dict, write_checkpoint

from nnssl_adapt.errors import CheckpointError, ConfigurationError
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.checkpoint.image_input import exchange_axes
from nnssl_adapt.weights.network.architectures import Architecture, build_network

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 1]]
KERNELS = [[1, 3, 3], [3, 3, 5], [3, 3, 3]]


def uneven(class_name):
    kwargs = {"PlainConvUNet": PLAINCONV, "ResidualEncoderUNet": RESENC}[class_name]
    return Architecture(class_name, {**kwargs, "strides": STRIDES, "kernel_sizes": KERNELS})


def randomised(network):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def fields(architecture, patch=(6, 8, 12)):
    content = {"architecture": architecture, "spacing": (2, 0.8, 0.7), "patch_size": patch}
    return AdaptationPlan(**content, recommended_patch_size=(12, 16, 20))


@pytest.mark.parametrize("class_name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_the_exchanged_network_computes_the_same_on_the_exchanged_image(class_name):
    architecture = uneven(class_name)
    on_xyz = randomised(build_network(architecture, 2, 3, (6, 8, 12)))
    tensors, exchanged = exchange_axes(on_xyz.state_dict(), fields(architecture), "file.pth")
    assert exchanged.architecture.strides == ((1, 1, 1), (2, 2, 1), (1, 2, 2))
    assert exchanged.architecture.kwargs["kernel_sizes"][1] == [5, 3, 3]
    assert (exchanged.patch_size, exchanged.recommended_patch_size) == ((12, 8, 6), (20, 16, 12))
    assert exchanged.spacing == (0.7, 0.8, 2)
    on_zyx = build_network(exchanged.architecture, 2, 3, exchanged.patch_size).eval()
    on_zyx.load_state_dict(tensors)
    image = torch.randn(1, 2, 6, 8, 12, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        truth, found = on_xyz(image), on_zyx(image.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
        unchanged = on_zyx(image.permute(0, 1, 2, 4, 3).reshape(1, 2, 12, 8, 6))
    assert torch.allclose(found, truth, rtol=1e-4, atol=1e-5 * truth.abs().max())
    assert not torch.allclose(unchanged.permute(0, 1, 4, 3, 2), truth, rtol=1e-2)


def test_nothing_is_copied_and_twice_is_the_identity():
    architecture = uneven("PlainConvUNet")
    tensors = randomised(build_network(architecture, 1, 2, (6, 8, 12))).state_dict()
    before = fields(architecture)
    once, plan_once = exchange_axes(tensors, before, "file.pth")
    twice, plan_twice = exchange_axes(once, plan_once, "file.pth")
    assert plan_twice == before
    for name, tensor in tensors.items():
        assert once[name].data_ptr() == tensor.data_ptr()
        assert torch.equal(twice[name], tensor)


def test_transformers_and_transposed_plans_are_refused():
    with pytest.raises(ConfigurationError, match="only convolutional networks"):
        exchange_axes({}, fields(Architecture.named("PrimusS"), (8, 16, 24)), "file.pth")
    turned = fields(uneven("PlainConvUNet")).model_copy(update={"transpose_forward": (2, 0, 1)})
    with pytest.raises(ConfigurationError, match="transposes image axes"):
        exchange_axes({}, turned, "file.pth")


# -- when ------------------------------------------------------------------------------------------------------------


def lightning_file(folder, prefix="net.", extra=()):
    network = randomised(build_network(uneven("PlainConvUNet"), 1, 2, (6, 8, 12)))
    tensors = network.state_dict()
    folder.mkdir(exist_ok=True)
    named = {prefix + name: tensor for name, tensor in tensors.items()} | dict(extra)
    torch.save({"state_dict": named, "epoch": 3, "pytorch-lightning_version": "2.0"}, folder / "monai.ckpt")
    return folder / "monai.ckpt", tensors


@pytest.mark.parametrize("prefix", ["net.", "model.", "network.", "net._orig_mod.", "model.module.", ""])
def test_a_lightning_file_is_taken_as_trained_on_xyz_and_says_so(tmp_path, prefix):
    path, tensors = lightning_file(tmp_path, prefix, {"loss.weight": torch.ones(2)} if prefix == "net." else {})
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture.strides == ((1, 1, 1), (2, 2, 1), (1, 2, 2))
    name = "encoder.stages.1.0.convs.0.conv.weight"
    assert torch.equal(checkpoint.tensors[name], tensors[name].permute(0, 1, 4, 3, 2))
    assert any("--axes zyx leaves them" in note and "Lightning" in note for note in checkpoint.notes)
    if prefix:
        assert any("taken off" in note and f"{prefix.split('.')[0]}." in note for note in checkpoint.notes)
    as_is = open_checkpoint(path, axes="zyx")
    assert as_is.architecture.strides == uneven("PlainConvUNet").strides
    assert as_is.choices == {"axes": "zyx"}
    assert torch.equal(as_is.tensors[name], tensors[name])


def test_a_prefix_that_not_all_of_the_network_has_stays(tmp_path):
    path, _ = lightning_file(tmp_path, "net.", {"net_2.encoder.stages.0.x": torch.ones(2)})
    with_other = open_checkpoint(path)
    assert with_other.plan.key_to_encoder == "net.encoder.stages"


def test_everything_with_a_plan_stays_as_it_is_unless_asked(tmp_path):
    path = write_checkpoint(tmp_path, state_dict(), sidecar=plan())
    assert open_checkpoint(path).plan.patch_size == (8, 12, 16)
    asked = open_checkpoint(path, axes="xyz")
    assert (asked.plan.patch_size, asked.plan.spacing) == ((16, 12, 8), (0.7, 0.8, 2))
    assert any("as requested" in note for note in asked.notes)
    lightning, _ = lightning_file(tmp_path / "lightning")
    content = plan("PlainConvUNet", (6, 8, 12))
    content["architecture_plans"]["arch_kwargs"] |= {"strides": STRIDES, "kernel_sizes": KERNELS}
    (lightning.parent / "adaptation_plan.json").write_text(json.dumps(content))
    assert open_checkpoint(lightning).plan.patch_size == (6, 8, 12)


def test_another_order_of_axes_does_not_exist(tmp_path):
    path = write_checkpoint(tmp_path, state_dict(), sidecar=plan())
    with pytest.raises(ConfigurationError, match="'yzx': choose one of auto, zyx, xyz"):
        open_checkpoint(path, axes="yzx")
    primus = write_checkpoint(tmp_path / "p", state_dict("Primus"), sidecar=plan("Primus"))
    with pytest.raises((CheckpointError, ConfigurationError), match="only convolutional networks"):
        open_checkpoint(primus, axes="xyz")


def test_the_preset_keeps_its_name():
    architecture = Architecture.named("ResEncL")
    exchanged = exchange_axes({}, fields(architecture, (160, 160, 96)), "file.pth")[1]
    assert dataclasses.asdict(exchanged.architecture) == dataclasses.asdict(architecture)
