"""nnU-Net's rules: how deep a U-Net is, which kernels and strides it has, and how large its patch and batch are.

From the spacing and the median image alone, as in Isensee et al. 2021 (nnU-Net, Nature Methods 18, supplementary note 2)
and 2024 (nnU-Net Revisited, arXiv 2404.09556, the ResEnc presets). What comes out equals what nnU-Net 2's planners write.

Spacings are in mm, shapes and patches in voxels, in the plan's axis order (the coarsest axis first). What has two axes is
for nnU-Net's ``2d``: slices across the first axis, (Y, X).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from nnssl_adapt.errors import ConfigurationError, PlanError
from nnssl_adapt.planning.low_resolution import Coarser, coarser_images
from nnssl_adapt.weights.families.nnunet import PRIMUS_TRAINERS
from nnssl_adapt.weights.network.architectures import Architecture
from nnssl_adapt.weights.network.arguments import BLOCKS_PER_STAGE

Shape = tuple[int, ...]

SHORTEST_EDGE = 4
"""Voxels that an axis keeps, at least, at the network's coarsest resolution."""

SAME_SPACING = 2.0
"""Axes whose spacings differ by less than this factor are halved together and see the same kernels."""

START_VOLUME = 256**3
"""Voxels of the patch that planning starts from: more than any preset can afford."""

START_AREA = 2048**2
"""The same for slices."""

MIN_BATCH = 2

PLANAR_BATCH = 12
"""Slices that nnU-Net's budget for 2D networks is of."""

_FIRST_FEATURES, _MOST_FEATURES, _MOST_PLANAR_FEATURES = 32, 320, 512
_STAGES = 13


@dataclass(frozen=True)
class Preset:
    """One of nnU-Net's planners.

    Attributes:
        name: ``default``, ``ResEncM``, ``ResEncL`` or ``ResEncXL``.
        class_name: of the network.
        blocks: convolutions (or residual blocks) of each encoder stage.
        decoder_blocks: convolutions of each decoder stage.
        budget: feature-map values that a batch of two samples may have: nnU-Net's measure of memory, calibrated by it for
            ``memory_gb``.
        memory_gb: GPU memory (GB) that the preset is for.
        covered: the share of the dataset's voxels that a batch may have at most.
        planar_budget: the same as ``budget`` for a 2D network and a batch of twelve.
    """

    name: str
    class_name: str
    blocks: tuple[int, ...]
    decoder_blocks: int
    budget: float
    memory_gb: int
    covered: float
    planar_budget: float

    def values_at_most(self, axes: int) -> float:
        """Feature-map values of a patch of so many axes with which two samples are within the budget.

        Of slices, nnU-Net's ResEnc planners want all twelve to be.
        """
        if axes == 3:
            return self.budget
        return self.planar_budget * (PLANAR_BATCH / MIN_BATCH if self.class_name == "PlainConvUNet" else 1)

    def affordable_batch(self, values: int, axes: int) -> int:
        """Samples within the budget, of so many feature-map values each."""
        if axes == 3:
            return round(self.budget / values * MIN_BATCH)
        return round(self.planar_budget / values * PLANAR_BATCH)


_PLAIN = (2,) * _STAGES
_RESIDUAL = (1, 3, 4) + (6,) * (_STAGES - 3)
NNUNET_PRESETS = {
    preset.name: preset
    for preset in (
        Preset("default", "PlainConvUNet", _PLAIN, 2, 560e6, 8, 0.05, 85e6),
        Preset("ResEncM", "ResidualEncoderUNet", _RESIDUAL, 1, 680e6, 8, 1.0, 135e6),
        Preset("ResEncL", "ResidualEncoderUNet", _RESIDUAL, 1, 2100e6, 24, 1.0, 380e6),
        Preset("ResEncXL", "ResidualEncoderUNet", _RESIDUAL, 1, 3600e6, 40, 1.0, 560e6),
    )
}


@dataclass(frozen=True)
class Stages:
    """What a patch and its spacing ask of the network.

    Attributes:
        strides: downsampling of each stage, the first with none.
        kernels: kernel size of each stage: 1 along an axis as long as its voxels are far longer than the others.
        patch_size: voxels, made larger where the strides ask for it.
    """

    strides: tuple[Shape, ...]
    kernels: tuple[Shape, ...]
    patch_size: Shape

    @property
    def divisors(self) -> Shape:
        """What each axis of the patch is divisible by."""
        return tuple(math.prod(stride[axis] for stride in self.strides) for axis in range(len(self.patch_size)))

    @property
    def features(self) -> list[int]:
        """Feature maps of each stage."""
        most = _MOST_FEATURES if len(self.patch_size) == 3 else _MOST_PLANAR_FEATURES
        return [min(most, _FIRST_FEATURES * 2**stage) for stage in range(len(self.strides))]


@dataclass(frozen=True)
class PlannedNetwork:
    """The network, patch (Z, Y, X; of a 2D network Y, X) and batch of a configuration."""

    architecture: Architecture
    patch_size: Shape
    batch_size: int


def check_preset(name: str) -> Preset:
    """The preset of this name; ConfigurationError listing them.

    nnU-Net trains a Primus on the patch and batch that its default planner chose for a U-Net.
    """
    if name in PRIMUS_TRAINERS:
        return NNUNET_PRESETS["default"]
    if name not in NNUNET_PRESETS:
        known = ", ".join((*NNUNET_PRESETS, *PRIMUS_TRAINERS))
        raise ConfigurationError(f"--preset {name}: unknown; nnU-Net's presets are {known}")
    return NNUNET_PRESETS[name]


def stages_for(spacing: Sequence[float], patch_size: Sequence[float]) -> Stages:
    """Halve axes, stage by stage, until none is long enough.

    A stage halves all axes that are long enough and whose spacing is within a factor of two of the finest such axis. An
    axis is long enough with twice the shortest edge, or three times that if it is the only one. Kernels grow to 3 along an
    axis once its spacing is within a factor of two of the finest of all, and stay; at the last stage they are 3.
    """
    voxel, size = [float(s) for s in spacing], [float(n) for n in patch_size]
    axes_there_are = range(len(voxel))
    kernel: list[int] = [1 for _ in axes_there_are]
    strides: list[Shape] = [tuple(kernel)]
    kernels: list[Shape] = []
    while axes := _halved(voxel, size):
        kernel = [3 if s / min(voxel) < SAME_SPACING else k for s, k in zip(voxel, kernel, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in axes else 1 for axis in axes_there_are))
        for axis in axes:
            voxel[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
    kernels.append(tuple(3 for _ in axes_there_are))
    divisors = [math.prod(stride[axis] for stride in strides) for axis in axes_there_are]
    # An extent may end in one half, as a median does.
    fitted = [math.ceil(n / divisor) * divisor for n, divisor in zip(patch_size, divisors, strict=True)]
    return Stages(tuple(strides), tuple(kernels), tuple(int(n) for n in fitted))


def _halved(voxel: Sequence[float], size: Sequence[float]) -> list[int]:
    """The axes that the next stage halves."""
    long = [axis for axis in range(len(size)) if size[axis] >= 2 * SHORTEST_EDGE]
    if not long:
        return []
    finest = min(voxel[axis] for axis in long)
    alike = [axis for axis in long if voxel[axis] / finest < SAME_SPACING]
    alone_and_short = len(alike) == 1 and size[alike[0]] < 3 * SHORTEST_EDGE
    return [] if alone_and_short else alike


def plan_network(
    preset: str, spacing: Sequence[float], median_shape: Sequence[float], heads: int, dataset_voxels: float
) -> PlannedNetwork:
    """The network, patch and batch that nnU-Net's planner gives a dataset for ``3d_fullres``, or of two axes for ``2d``.

    Args:
        preset: name of one of :data:`NNUNET_PRESETS`.
        spacing: of the resampled images, mm.
        median_shape: of the resampled, cropped images, voxels.
        heads: labels in dataset.json, background and ignore label included (nnU-Net's count, also with regions).
        dataset_voxels: voxels of all images together: of the median one, times their number.

    Raises PlanError for images too small (or too flat) for a network that downsamples.
    """
    chosen = check_preset(preset)
    stages = _fit_stages(chosen, spacing, median_shape, heads)
    if len(stages.strides) == 1:
        raise PlanError(
            f"images of {_by(median_shape)} voxels (median, at {_by(spacing)} mm) are too small for a U-Net: the first "
            f"axis to be halved, one of the finest spacing, has fewer than {3 * SHORTEST_EDGE}. Choose another spacing, and "
            "the network of the weights: leave --keep-topology out"
        )
    values = feature_map_values(chosen, stages, heads)
    batch = chosen.affordable_batch(values, len(stages.patch_size))
    most = round(dataset_voxels * chosen.covered / math.prod(stages.patch_size))
    network = _architecture(chosen, stages)
    return PlannedNetwork(network, stages.patch_size, max(min(batch, most), MIN_BATCH))


def needs_low_resolution(preset: str, spacing: Sequence[float], median_shape: Sequence[float], heads: int) -> bool:
    """Whether nnU-Net would also plan ``3d_lowres``: patches see too little of the image.

    It then trains ``3d_fullres`` with the Dice of the whole batch, since a patch often has few classes.
    """
    return low_resolution(preset, spacing, median_shape, heads).is_worth_it


def low_resolution(preset: str, spacing: Sequence[float], median_shape: Sequence[float], heads: int) -> Coarser:
    """What images would be in ``3d_lowres``; arguments as of :func:`plan_network`."""
    chosen = check_preset(preset)

    def patch_at(spacing: Sequence[float], shape: Sequence[float]) -> Shape:
        return _fit_stages(chosen, spacing, shape, heads).patch_size

    return coarser_images(spacing, median_shape, patch_at(spacing, median_shape), patch_at)


def _fit_stages(preset: Preset, spacing: Sequence[float], median_shape: Sequence[float], heads: int) -> Stages:
    """Start from a patch with the shape of a cube in mm, and shorten it until its feature maps are within the budget.

    The axis of which the patch sees most gets shorter, by what the strides of the shortened patch ask for.
    """
    finer = 1 / np.asarray(spacing, dtype=np.float64)
    axes = len(finer)
    cube = finer * ((START_VOLUME if axes == 3 else START_AREA) / np.prod(finer)) ** (1 / axes)
    stages = stages_for(spacing, [min(round(float(n)), m) for n, m in zip(cube, median_shape, strict=True)])
    divisors = stages.divisors
    while feature_map_values(preset, stages, heads) > preset.values_at_most(axes):
        patch = list(stages.patch_size)
        axis = max(range(axes), key=lambda axis: (patch[axis] / median_shape[axis], axis))
        # The shorter patch may need fewer halvings: then the step is smaller too, and no size in between is passed over.
        shortened = [n - divisors[axis] * (i == axis) for i, n in enumerate(patch)]
        divisors = stages_for(spacing, shortened).divisors
        patch[axis] -= divisors[axis]
        stages = stages_for(spacing, patch)
        divisors = stages.divisors
        if min(patch) < 1:
            raise PlanError(
                f"no patch within the memory of preset {preset.name} for images of {_by(median_shape)} voxels"
            )
    return stages


def feature_map_values(preset: Preset, stages: Stages, heads: int) -> int:
    """Values in all convolutions' results for one sample: nnU-Net's measure of the memory that training takes.

    Counts what comes out of convolutions (also of skips and transposed ones), and of the last segmentation layer.
    """
    voxels = [math.prod(size) for size in _sizes(stages)]
    features, blocks = stages.features, preset.blocks
    residual = preset.class_name == "ResidualEncoderUNet"
    total = features[0] * voxels[0] if residual else 0  # the stem
    for stage, (wide, here) in enumerate(zip(features, voxels, strict=True)):
        convolutions = 2 * blocks[stage] if residual else blocks[stage]
        changes = stage > 0 and (wide != features[stage - 1] or here != voxels[stage - 1])
        total += (
            (convolutions + (residual and changes)) * wide * here
        )  # a block that changes anything has one in its skip
    transposed = 1
    total += sum((preset.decoder_blocks + transposed) * w * n for w, n in zip(features[:-1], voxels[:-1], strict=True))
    return total + (heads * voxels[0] if len(voxels) > 1 else 0)


def _sizes(stages: Stages) -> Iterator[tuple[int, ...]]:
    """Voxels (Z, Y, X) of each stage's feature maps."""
    return accumulate(
        stages.strides[1:],
        lambda size, stride: tuple(n // s for n, s in zip(size, stride, strict=True)),
        initial=stages.patch_size,
    )


def _architecture(preset: Preset, stages: Stages) -> Architecture:
    count, axes = len(stages.strides), len(stages.patch_size)
    kwargs = {
        "n_stages": count,
        "features_per_stage": stages.features,
        "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
        "kernel_sizes": [list(kernel) for kernel in stages.kernels],
        "strides": [list(stride) for stride in stages.strides],
        BLOCKS_PER_STAGE[preset.class_name]: list(preset.blocks[:count]),
        "n_conv_per_stage_decoder": [preset.decoder_blocks] * (count - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return Architecture(preset.class_name, kwargs)


def _by(numbers: Sequence[float]) -> str:
    return " × ".join(f"{n:g}" for n in numbers)
