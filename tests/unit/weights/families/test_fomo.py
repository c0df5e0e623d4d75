"""FOMO's AMAES: its names are translated, and the encoder computes what the original class computes."""

import re

import pytest
import torch
from support.nnssl_files import RESENC
from torch import nn

from nnssl_adapt.errors import UnreadableCheckpoint
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.transfer.transfer import transfer_weights

SIZES = {"features_per_stage": [4, 6, 8], "n_blocks_per_stage": [1, 2, 1], "strides": [1, 2, 2], "kernel_sizes": 3}
SHAPE = (8, 12, 16)


class StandIn(nn.Module):
    """The encoder with the original's names: our encoder, and a decoder without skip connections."""

    def __init__(self):
        super().__init__()
        self.network = build_network(Architecture("ResidualEncoderUNet", {**RESENC, **SIZES}), 1, 1, SHAPE)

    def encoder(self, image):
        return self.network.encoder(image)

    def named_tensors(self):
        for name, tensor in self.network.encoder.state_dict().items():
            name = f"encoder.{name}".replace("stem.convs.0", "stem.conv1")
            yield re.sub(r"\.norm\.", ".norm_op.", name), tensor
        for stage, (wide, narrow) in enumerate(((8, 6), (6, 4))):
            yield f"decoder.upsample_layers.{stage}.weight", torch.randn(wide, narrow, 2, 2, 2)
            yield f"decoder.upsample_layers.{stage}.bias", torch.randn(narrow)
            for layer, shape in (("conv", (narrow, narrow, 3, 3, 3)), ("all_modules.0", (narrow, narrow, 3, 3, 3))):
                yield f"decoder.decoder_convs.{stage}.conv1.{layer}.weight", torch.zeros(shape)
                yield f"decoder.decoder_convs.{stage}.conv1.{layer}.bias", torch.zeros(narrow)
            for layer in ("norm_op", "all_modules.2"):
                yield f"decoder.decoder_convs.{stage}.conv1.{layer}.weight", torch.ones(narrow)
                yield f"decoder.decoder_convs.{stage}.conv1.{layer}.bias", torch.zeros(narrow)
        yield "decoder.out_conv.weight", torch.zeros(1, 4, 1, 1, 1)
        yield "decoder.out_conv.bias", torch.zeros(1)


class Original(nn.Module):
    """The class itself, where gardening_tools is installed."""

    def __init__(self):
        super().__init__()
        resunet = pytest.importorskip("gardening_tools.modules.networks.resunet")
        sizes = {"features_per_stage": (4, 6, 8), "n_blocks_per_stage": (1, 2, 1), "n_conv_per_stage_decoder": (1, 1)}
        self.network = resunet.ResidualEncoderUNet(
            dimensions="3D",
            input_channels=1,
            output_channels=1,
            stride=2,
            kernel_size=3,
            use_skip_connections=False,
            **sizes,
        )

    def encoder(self, image):
        return self.network.encoder(image)

    def named_tensors(self):
        yield from self.network.state_dict().items()


@pytest.fixture(params=[StandIn, Original])
def published(request, tmp_path):
    torch.manual_seed(0)
    network = request.param().eval()
    tensors = {f"model._orig_mod.{name}": tensor for name, tensor in network.named_tensors()}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "last.ckpt")
    return network, tmp_path / "last.ckpt"


def test_the_encoder_computes_what_it_did(published):
    original, path = published
    checkpoint = open_checkpoint(path)
    assert checkpoint.plan.supervised is False and checkpoint.plan.patch_size == (160, 160, 160)
    assert any("FOMO" in note for note in checkpoint.notes) and any("(x, y, z)" in note for note in checkpoint.notes)
    for channels in (1, 3):
        network = build_network(checkpoint.architecture, channels, 2, SHAPE).eval()
        report = transfer_weights(checkpoint, network)
        assert report.coverage == 1
        image = torch.randn(1, 1, *SHAPE)  # (z, y, x)
        with torch.no_grad():
            ours = network.encoder(image.expand(-1, channels, -1, -1, -1))
            theirs = original.encoder(image.permute(0, 1, 4, 3, 2))
        for one, other in zip(ours, theirs, strict=False):
            torch.testing.assert_close(one, other.permute(0, 1, 4, 3, 2), rtol=1e-5, atol=1e-5)


def test_every_tensor_is_accounted_for(published):
    checkpoint = open_checkpoint(published[1])
    network = build_network(checkpoint.architecture, 1, 2, SHAPE)
    report = transfer_weights(checkpoint, network)
    dropped = {row.name: row.reason for row in report.source_rows if row.fate == "dropped"}
    assert dropped and all(name.startswith("decoder.") for name in dropped)
    assert set(dropped.values()) <= {"pre-training decoder"}


def test_a_name_of_another_network_is_refused(published):
    path = published[1]
    content = torch.load(path)
    content["state_dict"]["model._orig_mod.encoder.stages.0.attention.weight"] = torch.zeros(3)
    torch.save(content, path)
    with pytest.raises(UnreadableCheckpoint, match="attention"):
        open_checkpoint(path)
