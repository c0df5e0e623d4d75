"""nnU-Net's rule for ``3d_lowres``: whether images are seen at a low resolution too, at which, and the cascade behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnssl_adapt.errors import PlanError
from nnssl_adapt.planning.plan import CASCADE, CONFIGURATION, LOW_RESOLUTION
from nnssl_adapt.text import dimensions

SEEN_AT_LEAST = 0.25
"""Where a patch sees less than this share of the median image, it is made coarser until the patch sees as much."""

FEWER_VOXELS = 2
"""A low resolution is worth a network of its own where the median image has that many times fewer voxels in it."""

_COARSER_EACH_TIME = 1.03


@dataclass(frozen=True)
class Coarser:
    """What images are at the spacing where a patch sees a quarter of them. Axes are the plan's.

    Attributes:
        spacing: mm.
        median_shape: voxels of the median image, not rounded.
        fewer: how many times fewer voxels than at full resolution.
    """

    spacing: tuple[float, ...]
    median_shape: tuple[float, ...]
    fewer: float

    @property
    def is_worth_it(self) -> bool:
        """Whether nnU-Net plans ``3d_lowres``."""
        return self.fewer >= FEWER_VOXELS

    @property
    def rounded_shape(self) -> tuple[int, ...]:
        return tuple(round(n) for n in self.median_shape)


def coarser_images(
    spacing: Sequence[float],
    median_shape: Sequence[float],
    patch_size: Sequence[int],
    patch_at: Callable[[Sequence[float], Sequence[int]], Sequence[int]],
) -> Coarser:
    """Make images coarser, by 3% a time, until a patch sees a quarter of the median one.

    Axes that are more than twice as fine as the coarsest are made coarser first, until they are alike.

    Args:
        spacing: of the full resolution, mm.
        median_shape: of the median image there, voxels.
        patch_size: there, voxels.
        patch_at: the patch (voxels) for a spacing (mm) and the median image there (voxels).
    """
    fine, shape = np.asarray(spacing, dtype=np.float64), np.asarray(median_shape, dtype=np.float64)
    coarse, new_shape, patch = fine.copy(), shape, patch_size
    full_voxels = voxels = float(np.prod(shape))
    while math.prod(patch) / voxels < SEEN_AT_LEAST:
        much_finer = coarse.max() / coarse > 2
        coarse[much_finer if much_finer.any() else slice(None)] *= _COARSER_EACH_TIME
        new_shape = fine / coarse * shape
        voxels = float(np.prod(new_shape))
        patch = patch_at(coarse.tolist(), [round(float(n)) for n in new_shape])
    return Coarser(tuple(coarse.tolist()), tuple(float(n) for n in new_shape), full_voxels / voxels)


def refusal(dataset_name: str, patch_size: Sequence[int], median_shape: Sequence[float], found: Coarser) -> PlanError:
    """Why there is no low resolution for these images, and what to do."""
    seen = min(1.0, math.prod(patch_size) / math.prod(median_shape))
    image = dimensions([round(n) for n in median_shape])
    if found.fewer == 1:
        why = f"a patch of {dimensions(patch_size)} voxels sees {seen:.0%} of the median image ({image})"
    else:
        why = f"the median image ({image}) would only have {found.fewer:.2g} times fewer voxels"
    return PlanError(
        f"the images of {dataset_name} are too small for {LOW_RESOLUTION}: {why}. nnU-Net plans it where a patch sees less than "
        f"{SEEN_AT_LEAST:.0%}, and there are {FEWER_VOXELS} times fewer voxels. Leave it and {CASCADE} out: -c {CONFIGURATION}"
    )


def stages(full: dict[str, Any], low: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations of a low and a full resolution, and of the cascade from the one to the other."""
    return {
        LOW_RESOLUTION: {**low, "next_stage": CASCADE},
        CONFIGURATION: full,
        CASCADE: {"inherits_from": CONFIGURATION, "previous_stage": LOW_RESOLUTION},
    }
