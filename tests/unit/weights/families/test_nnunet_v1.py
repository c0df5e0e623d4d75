"""nnU-Net version 1: its Generic_UNet's names are taken over into PlainConvUNet; other v1 networks are called what they are."""

import re

import pytest
import torch
from support.nnssl_files import PLAINCONV

from nnssl_adapt.errors import UnreadableCheckpoint
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.transfer.transfer import transfer_weights

PATCH = (8, 12, 16)


def v1_name(name, stages=3):
    """The name that nnunet 1.7.1 gives to a tensor of a PlainConvUNet; None for biases that it does not have."""
    name = name.replace(".norm.", ".instnorm.")
    if match := re.fullmatch(r"encoder\.stages\.(\d+)\.0\.convs\.(\d)\.(.+)", name):
        stage, conv, rest = match.groups()
        deepest = int(stage) == stages - 1
        inside = f"{conv}.blocks.0" if deepest else f"blocks.{conv}"
        return f"conv_blocks_context.{stage}.{inside}.{rest}"
    if match := re.fullmatch(r"decoder\.stages\.(\d+)\.convs\.(\d)\.(.+)", name):
        return "conv_blocks_localization.{}.{}.blocks.0.{}".format(*match.groups())
    if match := re.fullmatch(r"decoder\.(transpconvs|seg_layers)\.(\d)\.weight", name):
        return f"{'tu' if match[1] == 'transpconvs' else 'seg_outputs'}.{match[2]}.weight"
    return None


@pytest.fixture
def trained(tmp_path):
    """A network in evaluation mode, and the file in which version 1 would have saved it."""
    torch.manual_seed(0)
    network = build_network(Architecture("PlainConvUNet", PLAINCONV), 2, 3, PATCH).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            is_kept = v1_name(name) is not None or name.startswith("decoder.encoder")
            parameter.copy_(torch.randn_like(parameter) if is_kept else torch.zeros_like(parameter))
    own = {name: tensor for name, tensor in network.state_dict().items() if "all_modules" not in name}
    tensors = {v1_name(name): tensor for name, tensor in own.items() if v1_name(name)}
    folder = tmp_path / "nnUNetTrainerV2__nnUNetPlansv2.1" / "fold_0"
    folder.mkdir(parents=True)
    content = {"epoch": 1000, "state_dict": tensors, "optimizer_state_dict": None, "plot_stuff": ([0.5], [], [], [])}
    torch.save(content, folder / "model_final_checkpoint.model")
    return network, folder / "model_final_checkpoint.model"


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_the_network_computes_what_version_1_computed(trained, levels):
    network, path = trained
    source = path if levels == 0 else path.parents[levels - 1]
    checkpoint = open_checkpoint(source)
    assert checkpoint.plan.supervised and checkpoint.architecture.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    assert any("version 1" in note for note in checkpoint.notes)
    ours = build_network(checkpoint.architecture, 2, 3, PATCH).eval()
    report = transfer_weights(checkpoint, ours)
    assert report.coverage == report.decoder_coverage == 1
    image = torch.randn(1, 2, *PATCH)
    with torch.no_grad():
        features, theirs = ours.encoder(image), network.encoder(image)
        for one, other in zip(features, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        network.decoder.seg_layers.load_state_dict(ours.decoder.seg_layers.state_dict())
        torch.testing.assert_close(ours.decoder(features), network.decoder(theirs), rtol=1e-4, atol=1e-4)


def test_a_name_that_version_1_does_not_have_is_refused(tmp_path):
    tensors = {"conv_blocks_context.0.blocks.0.conv.weight": torch.zeros(8, 1, 3, 3, 3), "what.weight": torch.zeros(1)}
    torch.save({"state_dict": tensors}, tmp_path / "model_best.model")
    with pytest.raises(UnreadableCheckpoint, match=r"what\.weight"):
        open_checkpoint(tmp_path)
