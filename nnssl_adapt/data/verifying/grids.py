"""Do the files of a case lie on one grid? The rule of verifying, measuring and preprocessing, and the fix for rounding."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnssl_adapt.data.dataset import RawCase
from nnssl_adapt.data.images import ImageGeometry, geometry_doubts, geometry_problems
from nnssl_adapt.data.verifying.findings import Finding
from nnssl_adapt.data.voxels import read_itk_image, write_image_file

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Default: what rounding explains, as a fraction of a voxel (origin, spacing) and of the cosines (direction)."""

_EXACT = 1e-6


def compare_grids(
    case: RawCase, path: Path, image: ImageGeometry, other: ImageGeometry, tolerance: float, fix_geometry: bool
) -> list[Finding]:
    """What is wrong with the grid of ``path``, a label or a further channel, beside that of the case's first channel.

    Another shape or spacing is an error (nnU-Net's tolerance), another origin or direction a warning. Grids that differ
    by no more than ``tolerance`` differ by rounding only; with ``fix_geometry`` such a file gets the image's header.
    Raises OutputError if it can't be written.
    """
    problems = list(geometry_problems(image, other))
    distance = grid_distance(image, other)
    if not problems and distance <= _EXACT:
        return []
    level = "error" if problems else "warning"
    where = f"that of {case.images[0].name}"
    if image.size != other.size:
        fix = "resample it to the image's grid (labels: nearest neighbours)"
    elif distance <= tolerance:
        if fix_geometry and image.picture is None:
            copy_header(case.images[0], path)
            logger.info("%s: has the header of %s now", path, case.images[0].name)
            return []
        fix = "rounding only: --fix-geometry" if image.picture is None else "rounding only: correct the .json beside it"
    else:
        fix = "look at both together; resample it to the image's grid, or correct the header that is wrong"
    said = problems or list(geometry_doubts(image, other))
    text = "; ".join(f"{what} from {where}" for what in said) or f"up to {distance:.2g} voxels away from {where}"
    return [Finding(level, case.identifier, "geometry", f"{path}: {text}", fix)]


def grid_distance(image: ImageGeometry, other: ImageGeometry) -> float:
    """How far apart two grids are, in the image's smallest voxels: corners of the voxels, and the spacing itself.

    Infinite for grids of another size. The spacing counts by itself since one slice has no second corner along its axis.
    """
    if image.size != other.size:
        return float("inf")
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in image.size[::-1]], indexing="ij")).reshape(3, -1)
    places = [
        np.asarray(g.direction).reshape(3, 3) @ (np.asarray(g.spacing[::-1])[:, None] * ends)
        + np.array(g.origin)[:, None]
        for g in (image, other)
    ]
    corners = np.linalg.norm(places[0] - places[1], axis=0).max()
    spacing = np.abs(np.subtract(image.spacing, other.spacing)).max()
    return float(max(corners, spacing) / min(image.spacing))


def copy_header(image: Path, label: Path) -> None:
    """Write a label (or another channel) again with the image's spacing, origin and direction; voxels and their type stay.

    A link is replaced by a file of its own, so that its source stays as it is. Raises OutputError.
    """
    reference = read_itk_image(image)
    fixed = sitk.GetImageFromArray(sitk.GetArrayFromImage(read_itk_image(label)))
    fixed.CopyInformation(reference)
    write_image_file(fixed, label)
