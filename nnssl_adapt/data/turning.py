"""Images turned into another orientation: voxels are only put into another order, and keep their place in space."""

from __future__ import annotations

import numpy as np

from nnssl_adapt.data.images import ImageGeometry
from nnssl_adapt.geometry.orientation import Turn


def turn_geometry(geometry: ImageGeometry, turn: Turn) -> ImageGeometry:
    """The geometry of the turned voxels. What nibabel found (``affines``) is of the stored ones, and left out."""
    if turn.is_none:
        return geometry
    spacing, size = geometry.spacing, geometry.size
    matrix = np.asarray(geometry.direction, dtype=float).reshape(3, 3)
    origin = np.asarray(geometry.origin, dtype=float)
    turned = np.empty((3, 3))
    for new, (old, flip) in enumerate(zip(turn.axes, turn.flips, strict=True)):
        column = matrix[:, 2 - old]  # ITK's columns are x, y, z; ours are the axes Z, Y, X
        if flip:
            origin = origin + column * spacing[old] * (size[old] - 1)
        turned[:, 2 - new] = -column if flip else column
    z, y, x = turn.axes
    return ImageGeometry(
        spacing=(spacing[z], spacing[y], spacing[x]),
        origin=(float(origin[0]), float(origin[1]), float(origin[2])),
        direction=tuple(float(v) for v in turned.ravel()),
        size=(size[z], size[y], size[x]),
    )


def turn_image(image: np.ndarray, geometry: ImageGeometry, code: str) -> tuple[np.ndarray, ImageGeometry, Turn]:
    """Turn an image (C, Z, Y, X) to the orientation ``code`` (:mod:`nnssl_adapt.geometry.orientation`).

    Returns the voxels (contiguous), their geometry, and the turn, whose ``undo`` leads back.
    """
    turn = Turn.to(code, geometry.direction)
    return np.ascontiguousarray(turn.apply(image)), turn_geometry(geometry, turn), turn
