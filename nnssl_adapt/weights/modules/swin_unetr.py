"""Swin UNETR, versions 1 and 2 (arXiv 2201.01266), in the structure of nnU-Net's networks: encoder, skips, decoder.

It computes what MONAI's ``SwinUNETR`` computes, out of MONAI's own blocks (MONAI 1.4 or later). Only the merging of patches is
written here: MONAI joins other voxels since version 1.5, and weights are right for one of the two ways only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks.dynunet_block import UnetResBlock
from monai.networks.nets.swin_unetr import BasicLayer, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

WINDOW = (7, 7, 7)
HEADS = (3, 6, 12, 24)
BLOCKS = 2
"""Voxels of an attention window, attention heads of the four Swin stages, and blocks of each: the same in all versions."""

MERGED = {
    "old": ("000", "100", "010", "001", "101", "010", "001", "111"),
    "new": ("000", "100", "010", "001", "110", "101", "011", "111"),
}
"""Of every 2 × 2 × 2 voxels, the offsets that are joined, in order. ``old``: MONAI up to 1.4, which takes two of them twice and
leaves two out (MONAI issue 4757). ``new``: MONAI since 1.5."""


class PatchMerging(nn.Module):
    """Halves the resolution and doubles the features: (B, X, Y, Z, C) → (B, X/2, Y/2, Z/2, 2C)."""

    def __init__(self, dim: int, order: str) -> None:
        super().__init__()
        self.offsets = [tuple(int(digit) for digit in offset) for offset in MERGED[order]]
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(8 * dim)

    def forward(self, image: Tensor) -> Tensor:
        missing = [size % 2 for size in image.shape[1:4]]
        if any(missing):
            image = functional.pad(image, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        joined = torch.cat([image[:, i::2, j::2, k::2] for i, j, k in self.offsets], dim=-1)
        merged: Tensor = self.reduction(self.norm(joined))
        return merged


class SwinBlocks(BasicLayer):  # type: ignore[misc]
    """The attention blocks of a stage, and the merging after them."""

    def __init__(self, dim: int, heads: int, drop_path: Sequence[float], order: str) -> None:
        super().__init__(dim, BLOCKS, heads, WINDOW, list(drop_path), qkv_bias=True, downsample=None)
        self.downsample = PatchMerging(dim, order)
        for block in self.blocks:
            assert isinstance(block, SwinTransformerBlock)
            vars(block)["recomputed_as_one"] = True


class Residual(UnetResBlock):  # type: ignore[misc]
    """Two convolutions and what passes them by, with instance normalisation that has no weights."""

    recomputed_as_one = True

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(3, inputs, outputs, kernel_size=3, stride=1, norm_name="instance")


class Stage(nn.Module):
    """One resolution of the encoder.

    Stages 0 and 1 only make a skip, of the image and of its patches. The others go on from the stage before: a convolution
    (version 2), attention, merging; and then make a skip, in stages 2, 3 and 5 by convolutions.
    """

    def __init__(self, swin: SwinBlocks | None, conv: Residual | None, residual: Residual | None) -> None:
        super().__init__()
        if conv is not None:
            self.conv = conv
        if swin is not None:
            self.swin = swin
        if residual is not None:
            self.residual = residual

    def forward(self, features: Tensor) -> Tensor:
        if hasattr(self, "conv"):
            features = self.conv(features.contiguous())
        found: Tensor = self.swin(features.contiguous())
        return found

    def skip(self, features: Tensor) -> Tensor:
        found: Tensor = self.residual(features) if hasattr(self, "residual") else features
        return found


def without_scale(features: Tensor) -> Tensor:
    """Features (B, C, …) normalised over C at every voxel."""
    last = functional.layer_norm(features.movedim(1, -1), [features.shape[1]])
    return last.movedim(-1, 1)


class Encoder(nn.Module):
    """(B, channels, X, Y, Z) → six skips, from the full resolution to a 32nd."""

    def __init__(self, channels: int, width: int, version: int, order: str, drop_path_rate: float) -> None:
        super().__init__()
        self.strides = [[1, 1, 1], *([[2, 2, 2]] * 5)]
        self.output_channels = [width, *(width * 2**level for level in range(5))]
        self.stem = nn.Conv3d(channels, width, 2, stride=2)
        rates = torch.linspace(0, drop_path_rate, 4 * BLOCKS, device="cpu").tolist()
        stages = [Stage(None, None, Residual(channels, width)), Stage(None, None, Residual(width, width))]
        for level, heads in enumerate(HEADS):
            dim = width * 2**level
            swin = SwinBlocks(dim, heads, rates[BLOCKS * level : BLOCKS * (level + 1)], order)
            conv = Residual(dim, dim) if version == 2 else None
            stages.append(Stage(swin, conv, Residual(2 * dim, 2 * dim) if level != 2 else None))
        self.stages = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> list[Tensor]:
        stages: Any = self.stages
        skips = [stages[0].skip(image)]
        features = self.stem(image)
        skips.append(stages[1].skip(without_scale(features)))
        for stage in stages[2:]:
            features = stage(features)
            skips.append(stage.skip(without_scale(features)))
        return skips


class Decoder(nn.Module):
    """Six skips → logits (B, classes, X, Y, Z). It has one output, at the full resolution."""

    def __init__(self, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.transpconvs = nn.ModuleList(nn.ConvTranspose3d(i, o, 2, stride=2, bias=False) for i, o in pairs)
        self.stages = nn.ModuleList(Residual(2 * out, out) for _, out in pairs)
        self.seg_layers = nn.ModuleDict({str(len(pairs) - 1): nn.Conv3d(widths[0], classes, 1)})

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        *rest, features = skips
        for up, stage, skip in zip(self.transpconvs, self.stages, reversed(rest), strict=True):
            features = stage(torch.cat((up(features), skip), dim=1))
        (head,) = self.seg_layers.values()
        logits: Tensor = head(features)
        return logits


class SwinUNETR(nn.Module):
    """(B, channels, X, Y, Z) → logits (B, classes, X, Y, Z); every axis divisible by 32.

    The network is not symmetric in its axes: arrays have the order (x, y, z) in which it was pre-trained.

    Args:
        input_channels: of the image.
        num_classes: outputs.
        feature_size: width at the full resolution, a multiple of 12 (48 as published).
        version: 2 has a residual convolution before the attention of each stage.
        patch_merging: ``old`` (MONAI up to 1.4, all published weights) or ``new``, see :data:`MERGED`.
        drop_path_rate: of stochastic depth in training.
        deep_supervision: has to be false; the decoder has one output.
    """

    attention_layers = ("qkv", "proj")
    key_to_encoder = "encoder.stages"
    key_to_stem = "encoder.stem"
    keys_to_in_proj = (
        "encoder.stem",
        "encoder.stages.0.residual.conv1.conv",
        "encoder.stages.0.residual.conv3.conv",
    )

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        feature_size: int,
        version: int,
        patch_merging: str,
        drop_path_rate: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if deep_supervision:
            raise ValueError("Swin UNETR has a single output: train it without deep supervision")
        self.untold = {"patch_merging": patch_merging}
        self.encoder = Encoder(input_channels, feature_size, version, patch_merging, drop_path_rate)
        self.decoder = Decoder(num_classes, self.encoder.output_channels)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.encoder(image))
        return logits
