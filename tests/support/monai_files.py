"""MONAI's own networks with random weights, and what they compute: what published files are compared with."""

import re
from inspect import signature

import pytest
import torch
from torch import nn

WIDTH = 12


class OldPatchMerging(nn.Module):
    """What MONAI up to 1.4 joined (its source: x0 to x7), written out here apart from the code under test."""

    def __init__(self, dim, norm_layer=nn.LayerNorm, spatial_dims=3):
        super().__init__()
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(8 * dim)

    def forward(self, x):
        x0 = x[:, 0::2, 0::2, 0::2, :]
        x1 = x[:, 1::2, 0::2, 0::2, :]
        x2 = x[:, 0::2, 1::2, 0::2, :]
        x3 = x[:, 0::2, 0::2, 1::2, :]
        x4 = x[:, 1::2, 0::2, 1::2, :]
        x5 = x[:, 0::2, 1::2, 0::2, :]
        x6 = x[:, 0::2, 0::2, 1::2, :]
        x7 = x[:, 1::2, 1::2, 1::2, :]
        return self.reduction(self.norm(torch.cat([x0, x1, x2, x3, x4, x5, x6, x7], -1)))


def swin_unetr(channels=1, classes=5, version=1, merging="old", seed=0):
    """MONAI's Swin UNETR, tiny, in eval mode; biases of positions are made large enough to matter."""
    from monai.networks.nets.swin_unetr import SwinUNETR

    torch.manual_seed(seed)
    until_1_4 = "img_size" in signature(SwinUNETR).parameters
    if until_1_4 and merging == "new":
        pytest.skip("MONAI merges in the new order since 1.5")
    down = OldPatchMerging if merging == "old" else "merging"
    size = {"img_size": (64, 32, 32)} if until_1_4 else {}  # which is not used
    network = SwinUNETR(
        in_channels=channels, out_channels=classes, feature_size=WIDTH, use_v2=version == 2, downsample=down, **size
    )
    for name, parameter in network.named_parameters():
        if "relative_position_bias_table" in name or "norm" in name:
            nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return network.eval()


def swin_names(name):
    """MONAI's name of a tensor of SwinUNETR → ours."""
    blocks = {"1": 0, "2": 1, "3": 2, "4": 3, "10": 5}
    for pattern, to in (
        (r"swinViT\.patch_embed\.proj\.(.+)", lambda m: f"encoder.stem.{m[1]}"),
        (r"swinViT\.layers(\d)\.0\.(.+)", lambda m: f"encoder.stages.{int(m[1]) + 1}.swin.{m[2]}"),
        (r"swinViT\.layers(\d)c\.0\.layer\.(.+)", lambda m: f"encoder.stages.{int(m[1]) + 1}.conv.{m[2]}"),
        (r"encoder(\d+)\.layer\.(.+)", lambda m: f"encoder.stages.{blocks[m[1]]}.residual.{m[2]}"),
        (r"decoder(\d)\.transp_conv\.conv\.(.+)", lambda m: f"decoder.transpconvs.{5 - int(m[1])}.{m[2]}"),
        (r"decoder(\d)\.conv_block\.(.+)", lambda m: f"decoder.stages.{5 - int(m[1])}.{m[2]}"),
        (r"out\.conv\.conv\.(.+)", lambda m: f"decoder.seg_layers.4.{m[1]}"),
    ):
        if match := re.fullmatch(pattern, name):
            return to(match)
    raise AssertionError(name)


def swin_hidden(network, image):
    """The six skips of MONAI's Swin UNETR; without its convolutions what the transformer gives for each, from the second on."""
    with torch.no_grad():
        hidden = network.swinViT(image, True)
        made = [
            network.encoder1(image),
            network.encoder2(hidden[0]),
            network.encoder3(hidden[1]),
            network.encoder4(hidden[2]),
            hidden[3],
            network.encoder10(hidden[4]),
        ]
    return made, hidden


def swin_decoded(network, skips):
    """What MONAI's Swin UNETR makes of its six skips: its ``forward`` after the encoder, which is the slower part."""
    *rest, features = skips
    for number, skip in zip((5, 4, 3, 2, 1), reversed(rest), strict=True):
        features = getattr(network, f"decoder{number}")(features, skip)
    return network.out(features)


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def swin_file(family, network):
    """Content of a published file of a family, in its layout."""
    tensors = network.state_dict()
    swin = {name.removeprefix("swinViT."): tensor for name, tensor in tensors.items() if name.startswith("swinViT.")}
    with_encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith(("decoder", "out."))}
    heads = {
        "rotation_head.weight": torch.zeros(4, 8),
        "contrastive_head.weight": torch.zeros(5, 8),
        "conv.0.bias": torch.zeros(3),
    }
    text = {
        "organ_embedding": torch.zeros(32, 8),
        "controller.weight": torch.zeros(3, 8, 1),
        "GAP.0.bias": torch.zeros(4),
    }
    old_mlp = {name.replace(".mlp.linear", ".mlp.fc"): tensor for name, tensor in swin.items()}
    if family == "nvidia":
        return {"epoch": 5, "state_dict": prefixed("module.", old_mlp)}
    if family == "disruptive":
        again = {name.replace(".0.", ".0.0.", 1): tensor for name, tensor in swin.items() if name.startswith("layers")}
        rest = {name: tensor for name, tensor in swin.items() if not name.startswith("layers")}
        extra = {"mask_token": torch.zeros(1, 8), "norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)}
        return {"model": {**prefixed("encoder.", {**again, **rest, **extra}), "decoder.0.weight": torch.zeros(3, 3)}}
    if family == "voco":
        students = {f"student.layer1.0.{kind}": torch.zeros(8) for kind in ("weight", "bias")}
        return {"state_dict": prefixed("module.backbone.", with_encoder) | prefixed("module.", students)}
    if family == "vocomni":
        return dict(tensors)
    if family == "suprem":
        without_out = {name: tensor for name, tensor in tensors.items() if not name.startswith("out.")}
        return {"net": prefixed("module.backbone.", without_out) | prefixed("module.", text)}
    if family == "brainsegfounder":
        return {"state_dict": prefixed("module.", {**prefixed("swinViT.", swin), **heads})}
    if family == "encoder":
        return dict(with_encoder)
    assert family == "unknown"
    return dict(tensors)


def with_noise(network, seed=0):
    """The network with norms and statistics that matter, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data = base + 0.3 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return network.eval()


def seg_res_net(family, channels=1, published=False):
    """MONAI's network of a family of SegResNets, tiny, and what its file holds; or as ``published``, without memory behind it."""
    sizes = {"ctfm": 32, "ctfm_extractor": 32, "whole_body": 32, "vista3d": 48}
    if not published:
        return _seg_res_net(
            family, channels, (1, 2, 2), (1, 1), 8 if family in ("suprem", "segresnet") else 4, with_noise
        )
    with torch.device("meta"):
        if family in sizes:
            return _seg_res_net(family, channels, (1, 2, 2, 4, 4), (1, 1, 1, 1), sizes[family], lambda network: network)
        return _seg_res_net(family, channels, (1, 2, 2, 4), (1, 1, 1), 16, lambda network: network)


def _seg_res_net(family, channels, blocks, blocks_up, width, finished):
    from monai.networks.nets import SegResNet, SegResNetDS
    from monai.networks.nets.segresnet_ds import SegResEncoder, SegResNetDS2

    torch.manual_seed(0)
    text = {"organ_embedding": torch.zeros(32, 8)}
    if family == "ctfm":
        network = finished(SegResNetDS(init_filters=width, in_channels=channels, blocks_down=blocks, dsdepth=2))
        return network, network.state_dict()
    if family == "ctfm_extractor":
        network = finished(SegResEncoder(init_filters=width, in_channels=channels, blocks_down=blocks))
        return network, prefixed("backbone.", network.state_dict())
    if family == "whole_body":
        network = finished(SegResNetDS(init_filters=width, in_channels=channels, blocks_down=blocks, out_channels=9))
        return network, network.state_dict()
    if family == "vista3d":
        kwargs = {
            "init_filters": width,
            "in_channels": channels,
            "blocks_down": blocks,
            "norm": "instance",
            "out_channels": 4,
        }
        network = finished(SegResNetDS2(**kwargs))
        more = {"class_head.class_embeddings.weight": torch.zeros(9, 4), "point_head.mlp.bias": torch.zeros(4)}
        return network, prefixed("network.", {**prefixed("image_encoder.", network.state_dict()), **more})
    kwargs = {
        "init_filters": width,
        "in_channels": channels,
        "blocks_down": blocks,
        "blocks_up": blocks_up,
        "dropout_prob": 0.0,
    }
    network = finished(SegResNet(out_channels=32 if family == "suprem" else 3, **kwargs))
    if family == "suprem":
        return network, {"net": prefixed("module.", {**network.state_dict(), **text})}
    assert family == "segresnet"
    return network, {"state_dict": prefixed("model.", network.state_dict())}
