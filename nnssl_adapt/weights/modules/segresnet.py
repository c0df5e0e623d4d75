"""SegResNet (arXiv 1810.11654) in the structure of nnU-Net's networks: encoder, skips, decoder. It needs torch alone.

Its encoder computes what those of MONAI's ``SegResNet`` and ``SegResNetDS`` compute, which are one network under two sets of
names. Their decoders differ in how they up-sample, and in what stands before the output.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

GROUPS = 8


class FrozenBatchNorm(nn.BatchNorm3d):
    """Batch normalisation by the statistics of pre-training, in training too; its weight and bias learn.

    Statistics of a batch of two patches would replace what was learned over thousands of images.
    """

    def forward(self, features: Tensor) -> Tensor:
        return functional.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def normalisation(name: str, features: int) -> nn.Module:
    """``batch`` (with frozen statistics), ``group``, ``instance`` or ``instance_plain`` (without weights)."""
    if name == "batch":
        return FrozenBatchNorm(features)
    if name == "group":
        return nn.GroupNorm(GROUPS, features)
    return nn.InstanceNorm3d(features, affine=name == "instance")


class Block(nn.Module):
    """Twice normalisation, ReLU and convolution, and what passes them by."""

    recomputed_as_one = True

    def __init__(self, features: int, norm: str) -> None:
        super().__init__()
        self.norm1 = normalisation(norm, features)
        self.conv1 = nn.Conv3d(features, features, 3, padding=1, bias=False)
        self.norm2 = normalisation(norm, features)
        self.conv2 = nn.Conv3d(features, features, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.conv1(functional.relu(self.norm1(features)))
        found: Tensor = self.conv2(functional.relu(self.norm2(inner))) + features
        return found


class Stage(nn.Module):
    """One resolution of the encoder: a strided convolution but in the first, and blocks."""

    def __init__(self, inputs: int, outputs: int, blocks: int, norm: str) -> None:
        super().__init__()
        if inputs != outputs:
            self.down = nn.Conv3d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.blocks = nn.Sequential(*(Block(outputs, norm) for _ in range(blocks)))

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.blocks(self.down(features) if hasattr(self, "down") else features)
        return found


class Encoder(nn.Module):
    """(B, channels, Z, Y, X) → skips, from the full resolution down."""

    def __init__(self, channels: int, width: int, blocks: Sequence[int], norm: str) -> None:
        super().__init__()
        self.strides = [[1, 1, 1], *([[2, 2, 2]] * (len(blocks) - 1))]
        self.output_channels = [width * 2**level for level in range(len(blocks))]
        self.stem = nn.Conv3d(channels, width, 3, padding=1, bias=False)
        inputs = [width, *self.output_channels]
        self.stages = nn.ModuleList(
            Stage(i, o, n, norm) for i, o, n in zip(inputs, self.output_channels, blocks, strict=False)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.stem(image)
        skips = []
        for stage in self.stages:
            features = stage(features)
            skips.append(features)
        return skips


class LinearUpsampling(nn.Conv3d):
    """A convolution of single voxels, then linear interpolation to twice the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return functional.interpolate(super().forward(features), scale_factor=2, mode="trilinear", align_corners=False)


class Decoder(nn.Module):
    """Skips → logits, finest first where deep supervision is on. Skips are added, not joined."""

    def __init__(
        self,
        classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        norm: str,
        upsampling: str,
        final_norm: bool,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.transpconvs = nn.ModuleList(
            LinearUpsampling(i, o)
            if upsampling == "linear"
            else nn.ConvTranspose3d(i, o, 3, stride=2, padding=1, output_padding=1, bias=False)
            for i, o in pairs
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(o, norm) for _ in range(n))) for (_, o), n in zip(pairs, blocks, strict=True)
        )
        if final_norm:
            self.final_norm = normalisation(norm, widths[0])
        self.seg_layers = nn.ModuleList(nn.Conv3d(o, classes, 1) for _, o in pairs)

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        *rest, features = skips
        coarser: list[Tensor] = []
        last = len(self.stages) - 1
        for index, skip in enumerate(reversed(rest)):
            features = self.stages[index](self.transpconvs[index](features) + skip)
            if self.deep_supervision and index < last:
                coarser.append(self.seg_layers[index](features))
        if hasattr(self, "final_norm"):
            features = functional.relu(self.final_norm(features))
        logits: Tensor = self.seg_layers[last](features)
        return [logits, *coarser[::-1]] if self.deep_supervision else logits


class SegResNet(nn.Module):
    """(B, channels, Z, Y, X) → logits (B, classes, Z, Y, X), or a list of them with deep supervision, finest first.

    Args:
        input_channels: of the image.
        num_classes: outputs.
        init_filters: width at the full resolution.
        blocks_down: blocks of each stage of the encoder.
        blocks_up: blocks of each stage of the decoder, the coarsest first.
        norm: of the encoder: ``batch`` (with the statistics of pre-training, frozen), ``group`` (of 8), ``instance`` or
            ``instance_plain`` (without weights).
        decoder_norm: of the decoder.
        upsampling: ``deconv`` (transposed convolution) or ``linear``.
        final_norm: whether normalisation and ReLU stand before the output.
        deep_supervision: whether every resolution of the decoder has an output.
    """

    key_to_encoder = "encoder.stages"
    key_to_stem = "encoder.stem"
    keys_to_in_proj = ("encoder.stem",)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        init_filters: int,
        blocks_down: Sequence[int],
        blocks_up: Sequence[int],
        norm: str,
        decoder_norm: str,
        upsampling: str,
        final_norm: bool,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.untold = {"norm": norm}
        self.encoder = Encoder(input_channels, init_filters, blocks_down, norm)
        widths = self.encoder.output_channels
        self.decoder = Decoder(num_classes, widths, blocks_up, decoder_norm, upsampling, final_norm, deep_supervision)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        logits: Tensor | list[Tensor] = self.decoder(self.encoder(image))
        return logits
