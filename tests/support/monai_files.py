"""MONAI's own networks with random weights, and what they compute: what published files are compared with."""

import re

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
    down = OldPatchMerging if merging == "old" else "merging"
    network = SwinUNETR(channels, classes, feature_size=WIDTH, use_v2=version == 2, downsample=down)
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
