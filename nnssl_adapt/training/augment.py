"""nnU-Net's default 3D augmentation: the same transforms of batchgeneratorsv2, in the same order, as likely.

In one thing it differs: nnU-Net lets Gaussian blur time two ways of computing itself and then takes the faster, which
makes results depend on the machine's mood. Its kernels are 5 voxels wide at most; they are always applied directly here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.patches import OUTSIDE

Patch = tuple[int, int, int]

DUMMY_2D_ABOVE = 3
"""Patches whose longest axis exceeds the first by more than this factor are rotated and scaled slice by slice."""

_ASSUMED_SMALLEST_SCALE = 0.85
"""What nnU-Net sizes the patch to read by; scaling goes down to 0.7, which it has never been adapted to."""


@dataclass(frozen=True)
class SpatialRange:
    """How far patches of a shape are turned, and how much must be read for it (nnU-Net's rules).

    Attributes:
        rotation: largest angle in radians, either way, about each axis.
        slice_by_slice: rotate and scale within (Y, X) only, since slices are far apart.
        read_size: voxels (Z, Y, X) to read for a patch.
    """

    rotation: float
    slice_by_slice: bool
    read_size: Patch

    @classmethod
    def of(cls, patch_size: Sequence[int]) -> SpatialRange:
        """The range for a patch (Z, Y, X) in voxels."""
        z, y, x = patch_size
        slice_by_slice = max(patch_size) / z > DUMMY_2D_ABOVE
        rotation = math.pi if slice_by_slice else math.radians(30)
        read_z, read_y, read_x = _rotated_extent((z, y, x), min(rotation, math.pi / 2))
        return cls(rotation, slice_by_slice, (z if slice_by_slice else read_z, read_y, read_x))


def _rotated_extent(patch: Patch, angle: float) -> Patch:
    """nnU-Net's size of a patch to read: its corner, turned by ``angle`` about one axis at a time, over the scale.

    Only one corner is turned and one way, so that some axes come out smaller than a rotation needs; what is missing is
    padded with zeros, as there.
    """
    z, y, x = patch
    cos, sin = math.cos(angle), math.sin(angle)
    corners = np.array(
        [
            (z, y, x),
            (z, y * cos + x * sin, x * cos - y * sin),
            (z * cos - x * sin, y, z * sin + x * cos),
            (z * cos + y * sin, y * cos - z * sin, x),
        ]
    )
    read_z, read_y, read_x = (int(n) for n in np.abs(corners).max(axis=0) / _ASSUMED_SMALLEST_SCALE)
    return read_z, read_y, read_x


def training_transforms(
    patch_size: Sequence[int],
    spatial: SpatialRange,
    mirror_axes: Sequence[int],
    use_mask_for_norm: Sequence[bool],
    labels: LabelScheme,
) -> ComposeTransforms:
    """The training chain: from ``spatial.read_size`` voxels to an augmented patch and the loss's target.

    Takes ``image`` float32 (C, Z, Y, X) and ``segmentation`` int16 (1, Z, Y, X) with -1 outside; both are changed in place.
    ``use_mask_for_norm`` has a flag for each channel: those channels are zero again outside the nonzero region.
    """
    chain: list[BasicTransform] = [*_spatial(patch_size, spatial), *_intensity(spatial)]
    if mirror_axes:
        chain.append(MirrorTransform(allowed_axes=tuple(mirror_axes)))
    masked = [channel for channel, mask in enumerate(use_mask_for_norm) if mask]
    if masked:
        chain.append(MaskImageTransform(apply_to_channels=masked, channel_idx_in_seg=0, set_outside_to=0))
    return ComposeTransforms([*chain, *_target(labels)])


def plain_transforms(labels: LabelScheme) -> ComposeTransforms:
    """The chain of validation, and of training without augmentation: only the loss's target is made."""
    return ComposeTransforms(_target(labels))


def _spatial(patch_size: Sequence[int], spatial: SpatialRange) -> list[BasicTransform]:
    rotate_and_scale = SpatialTransform(
        patch_size=tuple(patch_size[1:] if spatial.slice_by_slice else patch_size),
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        p_rotation=0.2,
        rotation=(-spatial.rotation, spatial.rotation),
        p_scaling=0.2,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=OUTSIDE,
    )
    if spatial.slice_by_slice:
        return [Convert3DTo2DTransform(), rotate_and_scale, Convert2DTo3DTransform()]
    return [rotate_and_scale]


def _intensity(spatial: SpatialRange) -> list[BasicTransform]:
    noise = GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_channel=1, synchronize_channels=True)
    blur = GaussianBlurTransform(
        blur_sigma=(0.5, 1.0), synchronize_channels=False, synchronize_axes=False, p_per_channel=0.5, benchmark=False
    )
    brightness = MultiplicativeBrightnessTransform(
        multiplier_range=BGContrast((0.75, 1.25)), synchronize_channels=False, p_per_channel=1
    )
    contrast = ContrastTransform(
        contrast_range=BGContrast((0.75, 1.25)), preserve_range=True, synchronize_channels=False, p_per_channel=1
    )
    low_resolution = SimulateLowResolutionTransform(
        scale=(0.5, 1),
        synchronize_channels=False,
        synchronize_axes=True,
        ignore_axes=(0,) if spatial.slice_by_slice else None,
        allowed_channels=None,
        p_per_channel=0.5,
    )
    return [
        RandomTransform(noise, apply_probability=0.1),
        RandomTransform(blur, apply_probability=0.2),
        RandomTransform(brightness, apply_probability=0.15),
        RandomTransform(contrast, apply_probability=0.15),
        RandomTransform(low_resolution, apply_probability=0.25),
        RandomTransform(_gamma(inverted=True), apply_probability=0.1),
        RandomTransform(_gamma(inverted=False), apply_probability=0.3),
    ]


def _gamma(inverted: bool) -> GammaTransform:
    return GammaTransform(
        gamma=BGContrast((0.7, 1.5)),
        p_invert_image=1 if inverted else 0,
        synchronize_channels=False,
        p_per_channel=1,
        p_retain_stats=1,
    )


def _target(labels: LabelScheme) -> list[BasicTransform]:
    chain: list[BasicTransform] = [RemoveLabelTansform(OUTSIDE, 0)]
    if labels.has_regions:
        regions = list(labels.regions)
        if labels.ignore_label is not None:  # the loss expects it as the last channel
            regions.append(labels.ignore_label)
        chain.append(ConvertSegmentationToRegionsTransform(regions=regions, channel_in_seg=0))
    return chain
