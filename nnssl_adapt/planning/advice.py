"""What each spacing mode would mean for a dataset, side by side, and which one is picked when nobody chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnssl_adapt.geometry.spacing import SPACING_MODES, Spacing, choose_spacing, median_spacing, resampled_shape
from nnssl_adapt.planning.memory import gib
from nnssl_adapt.planning.patch import fit_patch

AUTO = "auto"
"""The mode that leaves the choice to :func:`advise_spacing`."""

DETAIL_LOST = 1.5
"""``auto`` does not follow the pre-training where an axis would become coarser than the dataset's by more than this."""

VOXELS_INVENTED = 8.0
"""… nor where the median image would get more than this many times the voxels that it has."""


@dataclass(frozen=True)
class ModeOutlook:
    """What one spacing mode comes to. Axes are the images' own array order (Z, Y, X).

    Attributes:
        mode: ``like_pretrained``, ``median``, ``fixed`` or ``no_resample``.
        spacing: target spacing in mm, None where every image keeps its own.
        median_shape: voxels of the median image, resampled.
        patch_size: voxels, fitted to network and images.
        coverage: share (0 to 1) of the median image that one patch sees.
        voxels: voxels of the resampled median image, relative to now: above 1 they are interpolated, below 1 lost.
        tiles: patches needed to predict the median image (half overlapping).
        memory: bytes that training takes at batch 2, predicted; None where nobody asked.
    """

    mode: str
    spacing: Spacing | None
    median_shape: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    coverage: float
    voxels: float
    tiles: int
    memory: int | None = None


@dataclass(frozen=True)
class SpacingAdvice:
    """All modes that are possible, which of them ``auto`` picks, and why. ``print`` it for the table."""

    outlooks: tuple[ModeOutlook, ...]
    picked: str
    reason: str

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("mode", "spacing (mm)", "median image", "patch", "one patch sees", "voxels", "tiles an image", "memory")
        ]
        for outlook in self.outlooks:
            spacing = "each its own" if outlook.spacing is None else " × ".join(f"{s:.3g}" for s in outlook.spacing)
            rows.append(
                (
                    ("* " if outlook.mode == self.picked else "  ") + outlook.mode,
                    spacing,
                    _by(outlook.median_shape),
                    _by(outlook.patch_size),
                    f"{outlook.coverage:.0%}",
                    f"× {outlook.voxels:.2g}",
                    str(outlook.tiles),
                    "" if outlook.memory is None else gib(outlook.memory),
                )
            )
        if all(outlook.memory is None for outlook in self.outlooks):
            rows = [row[:-1] for row in rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append("axes are the images' (Z × Y × X); a plan of median or fixed has the coarsest first")
        return "\n".join([*lines, f"* auto picks {self.picked}: {self.reason}"])


def advise_spacing(
    pretrained: Spacing | None,
    spacings: Sequence[Sequence[float]],
    shapes: Sequence[Sequence[int]],
    wanted_patch: Sequence[int],
    divisors: Sequence[int],
    fixed: Spacing | None = None,
    memory_of: Callable[[Sequence[int]], int] | None = None,
) -> SpacingAdvice:
    """Compare the spacing modes for a dataset and pick one by a stated rule.

    The rule: follow the pre-training, since its features are tied to the size that things have in voxels; but not where
    that would throw away detail (an axis more than 1.5 times coarser than the dataset's) or mostly invent voxels (over
    8 times as many), nor where the pre-training had no spacing: then the dataset's median.

    Args:
        pretrained: mm (Z, Y, X) of the pre-training, None where it kept each image's own.
        spacings: of every image, mm.
        shapes: of every image, cropped, voxels.
        wanted_patch: of the pre-training, voxels.
        divisors: what each axis of a patch must be divisible by.
        fixed: a spacing to compare as well.
        memory_of: bytes that training takes at a patch, to be shown.
    """
    outlooks = []
    for mode in SPACING_MODES:
        if (mode == "fixed" and fixed is None) or (mode == "like_pretrained" and pretrained is None):
            continue
        choice = choose_spacing(
            mode, pretrained=pretrained, spacings=spacings, shapes=shapes, fixed=fixed if mode == "fixed" else None
        )
        outlook = _outlook(mode, choice.spacing, spacings, shapes, wanted_patch, divisors)
        outlooks.append(replace(outlook, memory=memory_of(outlook.patch_size)) if memory_of else outlook)
    picked, reason = _pick(pretrained, median_spacing(spacings, shapes), {o.mode: o for o in outlooks})
    return SpacingAdvice(tuple(outlooks), picked, reason)


def _outlook(
    mode: str,
    target: Spacing | None,
    spacings: Sequence[Sequence[float]],
    shapes: Sequence[Sequence[int]],
    wanted_patch: Sequence[int],
    divisors: Sequence[int],
) -> ModeOutlook:
    new_shapes = [
        tuple(shape) if target is None else resampled_shape(shape, spacing, target)
        for shape, spacing in zip(shapes, spacings, strict=True)
    ]
    median = np.median(np.asarray(new_shapes, dtype=float), axis=0)
    z, y, x = (max(1, round(float(n))) for n in median)
    patch = fit_patch(wanted_patch, divisors, median.tolist())  # unrounded, as the plan does it
    seen = math.prod(min(p, n) for p, n in zip(patch, (z, y, x), strict=True)) / (z * y * x)
    ratios = [math.prod(new) / math.prod(old) for new, old in zip(new_shapes, shapes, strict=True)]
    tiles = math.prod(max(1, math.ceil((n - p) / (p / 2)) + 1) for n, p in zip((z, y, x), patch, strict=True))
    return ModeOutlook(mode, target, (z, y, x), patch, seen, float(np.median(ratios)), tiles)


def _pick(pretrained: Spacing | None, median: Spacing, outlooks: dict[str, ModeOutlook]) -> tuple[str, str]:
    if pretrained is None:
        return "median", "the pre-training had no spacing of its own to follow"
    loss = max(trained / own for trained, own in zip(pretrained, median, strict=True))
    if loss > DETAIL_LOST:
        return (
            "median",
            f"at the pre-training's spacing an axis would become {loss:.2g} times coarser, and detail be lost",
        )
    gain = outlooks["like_pretrained"].voxels
    if gain > VOXELS_INVENTED:
        return (
            "median",
            f"at the pre-training's spacing images would have {gain:.2g} times as many voxels, mostly invented",
        )
    return (
        "like_pretrained",
        "things have the size, in voxels, that the network was pre-trained on, and no detail is lost",
    )


def _by(numbers: Sequence[int]) -> str:
    return " × ".join(str(n) for n in numbers)
