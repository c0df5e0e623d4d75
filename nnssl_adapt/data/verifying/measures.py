"""What one case adds to the dataset fingerprint: its size, its spacing, and intensities drawn from its foreground."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawCase
from nnssl_adapt.data.images import count_channels, read_geometry
from nnssl_adapt.errors import CaseError
from nnssl_adapt.geometry.cropping import nonzero_box

_SEED = 1234
_DRAWS_AT_ONCE = 1 << 20
_LARGEST = 1 << 23
"""Whole numbers up to here, and their differences, are exact in float32."""

_MOST_VALUES = 1 << 16


@dataclass(frozen=True)
class CaseMeasures:
    """What the fingerprint needs to know of a case.

    Attributes:
        shape: cropped to the nonzero region, voxels (Z, Y, X).
        spacing: millimetres (Z, Y, X).
        relative_size: voxels kept by cropping, as a fraction.
        intensities: for each channel the foreground values drawn, ascending, and how often each was.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    relative_size: float
    intensities: tuple[tuple[np.ndarray, np.ndarray], ...]

    def to_arrays(self) -> dict[str, Any]:
        """Entries for an ``.npz`` file."""
        arrays: dict[str, Any] = {
            "shape": self.shape,
            "spacing": self.spacing,
            "relative_size": self.relative_size,
        }
        for channel, (values, counts) in enumerate(self.intensities):
            arrays |= {f"values_{channel}": values, f"counts_{channel}": counts}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> CaseMeasures:
        """The inverse of :meth:`to_arrays`. Raises KeyError or ValueError for other entries."""
        channels = sum(name.startswith("values_") for name in arrays)
        return cls(
            shape=tuple(int(n) for n in arrays["shape"]),
            spacing=tuple(float(s) for s in arrays["spacing"]),
            relative_size=float(arrays["relative_size"]),
            intensities=tuple((arrays[f"values_{c}"], arrays[f"counts_{c}"]) for c in range(channels)),
        )


def measured(
    channels: Sequence[np.ndarray], labels: np.ndarray, spacing: tuple[float, ...], draws: int
) -> CaseMeasures:
    """Measure a case and draw ``draws`` of its foreground intensities in each channel, with nnU-Net's generator.

    Args:
        channels: float32 (Z, Y, X) each.
        labels: integers (Z, Y, X); foreground is what lies above 0.
        spacing: of the image, mm (Z, Y, X).
        draws: how many.
    """
    box = tuple(slice(low, high) for low, high in nonzero_box(channels))
    foreground = labels[box] > 0
    random = np.random.RandomState(_SEED)
    return CaseMeasures(
        shape=foreground.shape,
        spacing=spacing,
        relative_size=float(np.prod(foreground.shape) / np.prod(labels.shape)),
        intensities=tuple(_drawn(channel[box][foreground], draws, random) for channel in channels),
    )


def memory_to_measure(case: RawCase, draws: int) -> int:
    """Bytes that looking at a case takes at most, from the header alone; 0 where that can't be read (reading will tell)."""
    try:
        geometry = read_geometry(case.images[0], case.reader)
        channels = max(len(case.images), count_channels(case.images[0], case.reader))
    except CaseError:
        return 0
    voxels = math.prod(geometry.size)
    # The channels, the labels, one channel's foreground (which may be all of it) and its hits; then what is drawn, kept of
    # every channel and sorted of one. A batch of draws is small beside them.
    drawn = min(draws, voxels)
    return voxels * (4 * channels + 26) + drawn * (12 * channels + 36) + min(draws, _DRAWS_AT_ONCE) * 8


def _drawn(voxels: np.ndarray, draws: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Draw with replacement, as ``random.choice(voxels, draws)``, and return the distinct values and their counts.

    Counts instead of the up to 1e8 values themselves: a dataset of few cases would need gigabytes.
    """
    count = len(voxels)
    if not count or not draws:
        return np.zeros(0, np.float32), np.zeros(0, np.int64)
    kind = np.int32 if count <= np.iinfo(np.int32).max else np.int64  # the same draws, in half the memory
    batches = (min(_DRAWS_AT_ONCE, draws - start) for start in range(0, draws, _DRAWS_AT_ONCE))
    table = _WholeNumbers.of(voxels)
    if table is not None:
        totals = np.zeros(table.span, np.int64)
        for size in batches:
            totals += table.count(random.randint(0, count, size, dtype=kind))
        return table.present(totals, voxels.dtype)
    hits = np.zeros(count, np.int64)
    for size in batches:
        hits += np.bincount(random.randint(0, count, size, dtype=kind), minlength=count)
    return merged(voxels, hits)


def merged(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and how often each occurs, of values that occur ``counts`` times."""
    used = counts > 0
    distinct, place = np.unique(values[used], return_inverse=True)
    totals = np.bincount(place.reshape(-1), weights=counts[used], minlength=len(distinct))
    return distinct, totals.astype(np.int64)


@dataclass(frozen=True)
class _WholeNumbers:
    """Values that are whole numbers close together, as most images' are: counted in a table, without sorting.

    ``codes`` are the values above ``low``; ``span`` is one more than the largest.
    """

    codes: np.ndarray
    low: int
    span: int

    @classmethod
    def of(cls, values: np.ndarray) -> _WholeNumbers | None:
        low, high = float(values.min()), float(values.max())
        if not -_LARGEST <= low <= high <= _LARGEST or high - low >= _MOST_VALUES or low != int(low):
            return None
        codes = (values - values.dtype.type(low)).astype(np.uint16)
        if not np.array_equal(codes, values - values.dtype.type(low)):
            return None
        return cls(codes, int(low), int(high - low) + 1)

    def count(self, places: np.ndarray) -> np.ndarray:
        """How often each value was met at ``places``."""
        totals = np.zeros(self.span, np.int64)
        for part in np.array_split(places, max(1, len(places) >> 17)):  # pieces that stay in the processor's cache
            totals += np.bincount(self.codes.take(part, mode="clip"), minlength=self.span)
        return totals

    def present(self, totals: np.ndarray, kind: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The values that were met, ascending, and how often."""
        met = np.flatnonzero(totals)
        return (met + self.low).astype(kind), totals[met]
