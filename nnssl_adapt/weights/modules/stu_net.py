"""STU-Net (arXiv 2304.06716) in the structure of nnU-Net's networks: encoder, skips, decoder. It needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, cat, nn
from torch.nn import functional


class Block(nn.Module):
    """Two convolutions with instance normalisation, and what passes them by, through a convolution where shapes differ."""

    recomputed_as_one = True

    def __init__(
        self, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int] = (1, 1, 1), first: bool = False
    ) -> None:
        super().__init__()
        size, steps, padding = _triple(kernel), _triple(stride), _triple([k // 2 for k in kernel])
        self.conv1 = nn.Conv3d(inputs, outputs, size, stride=steps, padding=padding)
        self.norm1 = nn.InstanceNorm3d(outputs, affine=True)
        self.conv2 = nn.Conv3d(outputs, outputs, size, padding=padding)
        self.norm2 = nn.InstanceNorm3d(outputs, affine=True)
        if first:
            self.conv3 = nn.Conv3d(inputs, outputs, 1, stride=steps)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(functional.leaky_relu(self.norm1(self.conv1(features)), 0.01)))
        passed = self.conv3(features) if hasattr(self, "conv3") else features
        return functional.leaky_relu(inner + passed, 0.01)


def _triple(numbers: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = numbers
    return z, y, x


class Stage(nn.Module):
    """Blocks of one resolution; the first has the stride."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, kernel: Sequence[int], stride: Sequence[int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        more = (Block(outputs, outputs, kernel) for _ in range(blocks - 1))
        self.blocks = nn.Sequential(Block(inputs, outputs, kernel, stride, first=True), *more)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.blocks(features)
        return found


class Encoder(nn.Module):
    """(B, channels, Z, Y, X) → skips, from the full resolution down."""

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.strides = [list(stride) for stride in strides]
        self.output_channels = list(widths)
        described = zip((channels, *widths[:-1]), widths, blocks, kernels, strides, strict=True)
        self.stages = nn.ModuleList(Stage(*stage) for stage in described)

    def forward(self, image: Tensor) -> list[Tensor]:
        skips = []
        features = image
        for stage in self.stages:
            features = stage(features)
            skips.append(features)
        return skips


class Upsampling(nn.Conv3d):
    """The nearest voxel's values at the next resolution, then a convolution of single voxels."""

    def __init__(self, inputs: int, outputs: int, step: Sequence[int]) -> None:
        super().__init__(inputs, outputs, 1)
        self.step = tuple(float(size) for size in step)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(functional.interpolate(features, scale_factor=self.step, mode="nearest"))


class Decoder(nn.Module):
    """Skips → logits, finest first where deep supervision is on."""

    def __init__(
        self,
        classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        stages = range(len(widths) - 2, -1, -1)
        self.transpconvs = nn.ModuleList(Upsampling(widths[s + 1], widths[s], strides[s + 1]) for s in stages)
        self.stages = nn.ModuleList(Stage(2 * widths[s], widths[s], blocks[s], kernels[s]) for s in stages)
        self.seg_layers = nn.ModuleList(nn.Conv3d(widths[s], classes, 1) for s in stages)

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


class STUNet(nn.Module):
    """(B, channels, Z, Y, X) → logits (B, classes, Z, Y, X), or a list of them with deep supervision, finest first.

    Args:
        input_channels: of the image.
        num_classes: outputs.
        features_per_stage: width of each stage.
        n_blocks_per_stage: blocks of each stage of the encoder, and of the decoder's stage of the same resolution.
        kernel_sizes: of each stage (Z, Y, X), in encoder and decoder.
        strides: of each stage (Z, Y, X), the first of them 1.
        deep_supervision: whether every resolution of the decoder has an output.
    """

    key_to_encoder = "encoder.stages"
    key_to_stem = "encoder.stages.0"
    keys_to_in_proj = ("encoder.stages.0.blocks.0.conv1", "encoder.stages.0.blocks.0.conv3")

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        features_per_stage: Sequence[int],
        n_blocks_per_stage: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        described = features_per_stage, n_blocks_per_stage, kernel_sizes, strides
        self.encoder = Encoder(input_channels, *described)
        self.decoder = Decoder(num_classes, *described, deep_supervision)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        logits: Tensor | list[Tensor] = self.decoder(self.encoder(image))
        return logits


def _initialise(module: nn.Module) -> None:
    """As its authors do: He's normal distribution for a leaky ReLU of slope 0.01, no bias."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
