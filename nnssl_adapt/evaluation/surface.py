"""How far the surfaces of two masks lie apart, in millimetres.

SciPy's k-d tree does the work: it is exact, anisotropic spacing is only a scaling of the points, and it needs memory for
surfaces instead of volumes. (The library that is called ``surface-distance`` had its last release in 2018 and MedPy is
under the GPL; MedPy's and MONAI's distances are these.)

The surface of a mask is its voxels with a face neighbour outside it; beyond the image is outside. Each counts the same.
:func:`area_dice` weighs by area instead, as DeepMind's ``surface-distance`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.cropping import nonzero_box


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances from every surface voxel of one mask to the nearest one of the other.

    Attributes:
        from_prediction: float64 mm, one entry a surface voxel of the prediction; empty if either mask is.
        from_reference: likewise, of the reference.
    """

    from_prediction: np.ndarray
    from_reference: np.ndarray

    @property
    def hausdorff95(self) -> float:
        """HD95 in mm: the larger of the two directions' 95th percentiles (linear between ranks), as Metrics Reloaded."""
        return max(self._percentile(self.from_prediction), self._percentile(self.from_reference))

    @staticmethod
    def _percentile(distances: np.ndarray) -> float:
        return float(np.percentile(distances, 95)) if distances.size else float("nan")

    @property
    def average(self) -> float:
        """ASSD in mm: the mean over both surfaces' voxels together; NaN if a mask is empty."""
        both = np.concatenate([self.from_prediction, self.from_reference])
        return float(both.mean()) if both.size else float("nan")

    def dice_at(self, tolerance: float) -> float:
        """Normalised surface Dice: the share of both surfaces' voxels that lie within ``tolerance`` (mm) of the other."""
        both = np.concatenate([self.from_prediction, self.from_reference])
        # Distances are square roots: one that is the tolerance on paper may come out a rounding above it.
        return float((both <= tolerance * (1 + 1e-9)).mean()) if both.size else float("nan")


def surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
    """Distances between the surfaces of two masks.

    Args:
        prediction: bool (Z, Y, X).
        reference: bool of the same shape.
        spacing: millimetres between voxels, (Z, Y, X).
    """
    if not prediction.any() or not reference.any():
        return SurfaceDistances(np.zeros(0), np.zeros(0))
    box = tuple(slice(*extent) for extent in nonzero_box((prediction | reference)[None]))
    ours, theirs = surface(prediction[box]), surface(reference[box])
    return SurfaceDistances(_to(ours, theirs, spacing), _to(theirs, ours, spacing))


def surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask that have a face neighbour outside it, bool of the mask's shape."""
    inside = mask.copy()
    for axis in range(mask.ndim):  # many times as fast as scipy.ndimage.binary_erosion
        along, result = np.moveaxis(mask, axis, 0), np.moveaxis(inside, axis, 0)
        result[1:] &= along[:-1]
        result[:-1] &= along[1:]
        result[[0, -1]] = False
    found: np.ndarray = mask & ~inside
    return found


def _to(here: np.ndarray, there: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance from each voxel of one surface to the other surface. Voxels of both need no search."""
    apart = np.argwhere(here & ~there)
    distances = np.zeros(int(np.count_nonzero(here)))
    if apart.size:
        scale = np.asarray(spacing, np.float64)
        distances[: len(apart)] = cKDTree(np.argwhere(there) * scale).query(apart * scale)[0]
    return distances


def area_dice(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    """Surface Dice as DeepMind defines it (arXiv 1809.04430): the share of both surfaces' area within the tolerance.

    A surface element lies wherever a cube of 2 × 2 × 2 voxels is partly inside; its area follows from which of them are.

    Args:
        prediction: bool (Z, Y, X), not empty.
        reference: bool of the same shape, not empty.
        spacing: mm, (Z, Y, X).
        tolerance: mm.

    Raises ConfigurationError without MONAI, which has the table of areas.
    """
    areas = areas_of_surface_elements(spacing)
    (ours, our_areas), (theirs, their_areas) = (_elements(mask, areas, spacing) for mask in (prediction, reference))
    limit = tolerance * (1 + 1e-9)
    near = our_areas[cKDTree(theirs).query(ours)[0] <= limit].sum()
    near += their_areas[cKDTree(ours).query(theirs)[0] <= limit].sum()
    return float(near / (our_areas.sum() + their_areas.sum()))


def areas_of_surface_elements(spacing: Sequence[float]) -> np.ndarray:
    """Area in mm² of the surface in a cube of 2 × 2 × 2 voxels: float64 (256), by the cube's code.

    Bit 7 of the code is the voxel at the cube's origin, bit 0 the one opposite; the last axis changes fastest.
    """
    try:
        from monai.metrics.utils import get_code_to_measure_table
    except ImportError as error:
        raise ConfigurationError(
            "surface Dice by area needs MONAI, which is not installed: pip install 'nnssl-adapt[monai]'",
            next_command="pip install 'nnssl-adapt[monai]'",
        ) from error
    table, _ = get_code_to_measure_table(tuple(float(mm) for mm in spacing))
    return np.asarray(table, np.float64)


def _elements(mask: np.ndarray, areas: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Places (float64 (elements, 3), mm) and areas (mm²) of a mask's surface elements."""
    padded = np.pad(mask, 1).astype(np.uint8)
    codes = np.zeros([n - 1 for n in padded.shape], np.uint8)
    for bit in range(8):
        corner = ((7 - bit) >> 2 & 1, (7 - bit) >> 1 & 1, (7 - bit) & 1)
        cut = tuple(slice(c, c + n) for c, n in zip(corner, codes.shape, strict=True))
        codes |= padded[cut] << np.uint8(bit)
    places = np.argwhere((codes != 0) & (codes != 255))
    return places * np.asarray(spacing, np.float64), areas[codes[tuple(places.T)]]
