"""U-Nets with max pooling in the structure of nnU-Net's networks: encoder, skips, decoder. They need torch alone.

Those of Models Genesis (UNet3D) and of FOMO25's baseline, which differ in widths, normalisation and activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, cat, nn
from torch.nn import functional


class OwnStatistics(nn.Module):
    """Normalisation of each channel by the mean and variance of what passes through it, never by stored ones.

    In training over the batch. In evaluation over each image alone, which is the same for a batch of one: what is predicted
    for an image must not depend on those that happen to be computed with it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            return functional.batch_norm(features, None, None, self.weight, self.bias, training=True)
        return functional.instance_norm(features, None, None, self.weight, self.bias)


class Layer(nn.Module):
    """Convolution, normalisation, (leaky) ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: str, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.conv = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.norm = OwnStatistics(outputs) if norm == "own_statistics" else nn.InstanceNorm3d(outputs, affine=True)

    def forward(self, features: Tensor) -> Tensor:
        return functional.leaky_relu(self.norm(self.conv(features)), self.slope)


class Stage(nn.Module):
    """Two convolutions of one resolution, behind the pooling that leads to it."""

    recomputed_as_one = True

    def __init__(self, inputs: int, between: int, outputs: int, norm: str, slope: float, pools: bool = False) -> None:
        super().__init__()
        self.pools = pools
        self.convs = nn.Sequential(Layer(inputs, between, norm, slope), Layer(between, outputs, norm, slope))

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.convs(functional.max_pool3d(features, 2) if self.pools else features)
        return found


class Encoder(nn.Module):
    """(B, channels, Z, Y, X) → skips, from the full resolution down."""

    def __init__(self, channels: int, first: Sequence[int], widths: Sequence[int], norm: str, slope: float) -> None:
        super().__init__()
        self.strides = [[1, 1, 1], *([[2, 2, 2]] * (len(widths) - 1))]
        self.output_channels = list(widths)
        inputs = (channels, *widths[:-1])
        described = zip(inputs, first, widths, strict=True)
        self.stages = nn.ModuleList(Stage(*sizes, norm, slope, number > 0) for number, sizes in enumerate(described))

    def forward(self, image: Tensor) -> list[Tensor]:
        skips = []
        features = image
        for stage in self.stages:
            features = stage(features)
            skips.append(features)
        return skips


class Decoder(nn.Module):
    """Skips → logits, finest first where deep supervision is on. What is up-sampled stands before its skip."""

    def __init__(
        self, classes: int, widths: Sequence[int], narrows: bool, norm: str, slope: float, deep_supervision: bool
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        ups = [(below, here if narrows else below) for below, here in pairs]
        self.transpconvs = nn.ModuleList(nn.ConvTranspose3d(below, up, 2, stride=2) for below, up in ups)
        joined = zip(ups, pairs, strict=True)
        self.stages = nn.ModuleList(Stage(up + here, here, here, norm, slope) for (_, up), (_, here) in joined)
        self.seg_layers = nn.ModuleList(nn.Conv3d(here, classes, 1) for _, here in pairs)

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        *rest, features = skips
        coarser: list[Tensor] = []
        last = len(self.stages) - 1
        for index, skip in enumerate(reversed(rest)):
            features = self.stages[index](cat((self.transpconvs[index](features), skip), dim=1))
            if self.deep_supervision and index < last:
                coarser.append(self.seg_layers[index](features))
        logits: Tensor = self.seg_layers[last](features)
        return [logits, *coarser[::-1]] if self.deep_supervision else logits


class MaxPoolUNet(nn.Module):
    """(B, channels, Z, Y, X) → logits (B, classes, Z, Y, X), or a list of them with deep supervision, finest first.

    Args:
        input_channels: of the image.
        num_classes: outputs.
        features_per_stage: width of each stage.
        first_features_per_stage: width between the two convolutions of each of the encoder's stages.
        narrows: whether up-sampling has the width of the stage that it leads to; else that of the one it comes from.
        norm: ``instance``, or ``own_statistics`` (of the batch in training, of each image in evaluation).
        slope: of the leaky ReLU; 0 is a ReLU.
        deep_supervision: whether every resolution of the decoder has an output.
    """

    key_to_encoder = "encoder.stages"
    key_to_stem = "encoder.stages.0"
    keys_to_in_proj = ("encoder.stages.0.convs.0.conv",)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        features_per_stage: Sequence[int],
        first_features_per_stage: Sequence[int],
        narrows: bool,
        norm: str,
        slope: float,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.untold = {"norm": norm, "slope": slope}
        self.encoder = Encoder(input_channels, first_features_per_stage, features_per_stage, norm, slope)
        self.decoder = Decoder(num_classes, features_per_stage, narrows, norm, slope, deep_supervision)
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        logits: Tensor | list[Tensor] = self.decoder(self.encoder(image))
        return logits
