"""Which spacing images are resampled to, and what shape they then have.

Spacings are millimetres, shapes voxels, both in array order (Z, Y, X) unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnssl_adapt.errors import ConfigurationError

Spacing = tuple[float, float, float]

SPACING_MODES = ("like_pretrained", "median", "fixed", "no_resample")
_ALIASES = {"default_nnunet": "median"}

ANISOTROPY_THRESHOLD = 3.0
"""Ratio of spacings above which nnU-Net treats an axis as out of plane."""


@dataclass(frozen=True)
class SpacingChoice:
    """What a mode came to.

    Attributes:
        mode: the mode that took effect; differs from what was asked for when ``note`` says why.
        spacing: target spacing (Z, Y, X) in mm, or None when every image keeps its own.
        note: what the user should know, or empty.
    """

    mode: str
    spacing: Spacing | None
    note: str = ""


def canonical_mode(name: str) -> str:
    """One of :data:`SPACING_MODES`; ``default_nnunet`` is nnssl's word for ``median``. Unknown: ConfigurationError."""
    mode = _ALIASES.get(name, name)
    if mode not in SPACING_MODES:
        known = ", ".join((*SPACING_MODES, *_ALIASES))
        raise ConfigurationError(f"unknown spacing mode {name!r}; expected one of {known}")
    return mode


def checked_spacing(values: Sequence[float], what: str = "spacing") -> Spacing:
    """Three positive finite millimetres as floats, or a ConfigurationError that names ``what``."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(math.isfinite(n) and n > 0 for n in numbers):
        raise ConfigurationError(f"{what} {values}: expected three positive numbers of millimetres (Z Y X)")
    z, y, x = numbers
    return z, y, x


def check_fixed(mode: str, fixed: Sequence[float] | None) -> None:
    """Raise ConfigurationError unless a spacing is given where ``mode`` is ``fixed``, a good one, and only there."""
    if (mode == "fixed") != (fixed is not None):
        problem = (
            "needs a spacing: add -os Z Y X"
            if fixed is None
            else f"takes no spacing, got {list(fixed)}: use mode fixed"
        )
        raise ConfigurationError(f"spacing mode {mode} {problem}")
    if fixed is not None:
        checked_spacing(fixed)


def choose_spacing(
    mode: str,
    *,
    pretrained: Sequence[float] | None,
    spacings: Sequence[Sequence[float]],
    shapes: Sequence[Sequence[int]],
    fixed: Sequence[float] | None = None,
) -> SpacingChoice:
    """Decide the target spacing.

    Args:
        mode: see :data:`SPACING_MODES`.
        pretrained: the pre-training's spacing, or None where it kept every image's own.
        spacings: of every image of the dataset.
        shapes: of every image, cropped.
        fixed: for mode ``fixed``, and only for it.

    Raises ConfigurationError when ``fixed`` is missing, malformed, or given with another mode.
    """
    mode = canonical_mode(mode)
    check_fixed(mode, fixed)
    if fixed is not None:
        return SpacingChoice(mode, checked_spacing(fixed))
    if mode == "no_resample":
        return SpacingChoice(mode, None)
    if mode == "like_pretrained":
        if pretrained is not None:
            return SpacingChoice(mode, checked_spacing(pretrained, "the pre-training's spacing"))
        note = (
            "the checkpoint was pre-trained on images in their own spacing, so there is none to follow: using the "
            "dataset's median (-am no_resample keeps every image's own instead)"
        )
        return SpacingChoice("median", median_spacing(spacings, shapes), note)
    return SpacingChoice(mode, median_spacing(spacings, shapes))


def median_spacing(spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> Spacing:
    """nnU-Net's target spacing of a dataset: the median, but a finer one along an axis of few thick slices.

    Where the coarsest axis has more than three times the spacing of the others and less than a third of their voxels,
    its 10th percentile is taken (no finer than the others' spacing), since the median would blur its thinner slices
    (Isensee et al. 2021, supplementary note on target spacing).
    """
    all_spacings = np.asarray(spacings, dtype=np.float64)
    target = np.percentile(all_spacings, 50, axis=0)
    size = np.percentile(np.asarray(shapes, dtype=np.float64), 50, axis=0)
    coarsest = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != coarsest]
    finest_allowed = float(max(target[others]))
    thick = target[coarsest] > ANISOTROPY_THRESHOLD * finest_allowed
    few = size[coarsest] * ANISOTROPY_THRESHOLD < min(size[others])
    if thick and few:
        thin = float(np.percentile(all_spacings[:, coarsest], 10))
        target[coarsest] = thin if thin >= finest_allowed else finest_allowed + 1e-5
    z, y, x = (float(s) for s in target)
    return z, y, x


def resampled_shape(
    shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[int, int, int]:
    """Voxels an image has at another spacing; rounded half to even, as nnU-Net does. Bad spacings: ConfigurationError.

    An axis that is thinner than half a voxel keeps one; nnU-Net's rounding leaves nothing of such an image.
    """
    spacing, new_spacing = checked_spacing(spacing), checked_spacing(new_spacing)
    z, y, x = (max(1, round(old / new * int(n))) for n, old, new in zip(shape, spacing, new_spacing, strict=True))
    return z, y, x


def separate_z_axis(
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    force: bool | None = None,
    threshold: float = ANISOTROPY_THRESHOLD,
) -> int | None:
    """The axis along which nnU-Net resamples by nearest neighbour, slice by slice in the others; None for none.

    It is the coarsest axis of the source, or else of the target, if that is more than ``threshold`` times as coarse as
    the finest one, and no other axis is equally coarse. ``force`` switches the test of the ratio off: always (True) or never.
    """
    old, new = np.asarray(spacing, dtype=np.float64), np.asarray(new_spacing, dtype=np.float64)
    if force is not None:
        deciding = old if force else None
    elif old.max() / old.min() > threshold:
        deciding = old
    elif new.max() / new.min() > threshold:
        deciding = new
    else:
        deciding = None
    if deciding is None:
        return None
    coarsest = np.flatnonzero(deciding.max() / deciding == 1)
    return int(coarsest[0]) if len(coarsest) == 1 else None
