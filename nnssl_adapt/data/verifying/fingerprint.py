"""The dataset fingerprint: nnU-Net's summary of a raw dataset, which plans are made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.store import RECORDS_FOLDER, describe_source
from nnssl_adapt.data.verifying.measures import CaseMeasures, merged
from nnssl_adapt.errors import DatasetError
from nnssl_adapt.files import sha256_of, write_json
from nnssl_adapt.text import read_json, read_record

TOTAL_DRAWS = 10e7
"""Foreground voxels drawn from the whole dataset, in equal parts from each case (nnU-Net's number)."""


_LONGEST = 1 << 24
"""More voxels along an axis than any image has."""


@dataclass(frozen=True)
class DatasetFingerprint:
    """What nnU-Net's ``dataset_fingerprint.json`` holds.

    Attributes:
        spacings: of each case, millimetres (Z, Y, X).
        shapes_after_crop: of each case, cropped to its nonzero region, voxels (Z, Y, X).
        intensity: channel index (as text) → mean, median, std, min, max, percentile_00_5 and percentile_99_5 of
            foreground intensities.
        median_relative_size_after_cropping: voxels kept by cropping, as a fraction.
    """

    spacings: tuple[tuple[float, ...], ...]
    shapes_after_crop: tuple[tuple[int, ...], ...]
    intensity: dict[str, dict[str, float]]
    median_relative_size_after_cropping: float

    @classmethod
    def of(cls, measures: Sequence[CaseMeasures]) -> DatasetFingerprint:
        """Put together what was measured of all cases; at least one has foreground."""
        channels = len(measures[0].intensities)
        return cls(
            spacings=tuple(case.spacing for case in measures),
            shapes_after_crop=tuple(case.shape for case in measures),
            intensity={
                str(channel): _statistics([case.intensities[channel] for case in measures])
                for channel in range(channels)
            },
            median_relative_size_after_cropping=float(np.median([case.relative_size for case in measures])),
        )

    @classmethod
    def load(cls, path: str | Path) -> DatasetFingerprint:
        """Read a file, ours or nnU-Net's. Raises DatasetError naming the file and what is wrong."""
        path = Path(path)
        try:
            content = read_json(path, DatasetError, "dataset fingerprint")
        except DatasetError as error:
            raise DatasetError(f"{error}: delete it, it is made again", path=path) from error
        try:
            fingerprint = cls(
                spacings=tuple(tuple(float(s) for s in spacing) for spacing in content["spacings"]),
                shapes_after_crop=tuple(tuple(int(n) for n in shape) for shape in content["shapes_after_crop"]),
                intensity={
                    str(channel): {str(name): float(value) for name, value in statistics.items()}
                    for channel, statistics in content["foreground_intensity_properties_per_channel"].items()
                },
                median_relative_size_after_cropping=float(content["median_relative_size_after_cropping"]),
            )
            problem = fingerprint._problem()
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            problem = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        if problem is not None:
            raise DatasetError(
                f"{path} is not a usable dataset fingerprint ({problem[:200]}): delete it, it is made again", path=path
            )
        return fingerprint

    def _problem(self) -> str | None:
        """What can't be planned from, if anything."""
        if not self.spacings or len(self.spacings) != len(self.shapes_after_crop):
            return f"{len(self.spacings)} spacings, {len(self.shapes_after_crop)} shapes"
        for spacing in self.spacings:
            if len(spacing) != 3 or not all(0 < s < math.inf for s in spacing):
                return f"spacing {spacing} is not three positive numbers"
        for shape in self.shapes_after_crop:
            if len(shape) != 3 or not 1 <= min(shape) <= max(shape) <= _LONGEST:
                return f"shape {shape} is not three numbers of voxels"
        if not math.isfinite(self.median_relative_size_after_cropping):  # nnU-Net writes NaN only for statistics
            return "the median relative size is no finite number"
        return None

    def save(self, path: str | Path) -> None:
        """Write the file as nnU-Net does. Raises OutputError if it can't be written."""
        write_json(path, self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "spacings": [list(spacing) for spacing in self.spacings],
            "shapes_after_crop": [list(shape) for shape in self.shapes_after_crop],
            "foreground_intensity_properties_per_channel": self.intensity,
            "median_relative_size_after_cropping": self.median_relative_size_after_cropping,
        }


# -- whether it still holds ---------------------------------------------------------------------------------------------


def remember_sources(path: Path, dataset: RawDataset) -> None:
    """Note which files the fingerprint at ``path`` was measured on; see :func:`changed_cases`."""
    write_json(_sources_file(path), {"sha256": sha256_of(path), "sources": _sources(dataset)})


def changed_cases(path: Path, dataset: RawDataset) -> list[str]:
    """Cases that were added, removed or changed (size or time of a file) since the fingerprint at ``path`` was made.

    Empty also where that is not known, as of a fingerprint that nnU-Net made.
    """
    noted = read_record(_sources_file(path))
    before = noted.get("sources") if noted.get("sha256") == sha256_of(path) else None
    if not isinstance(before, dict):
        return []
    now = _sources(dataset)
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _sources(dataset: RawDataset) -> dict[str, list[dict[str, Any]]]:
    return {case.identifier: [describe_source(file) for file in case.files] for case in dataset.cases}


def _sources_file(path: Path) -> Path:
    return path.parent / RECORDS_FOLDER / "fingerprint_sources.json"


# -- statistics ---------------------------------------------------------------------------------------------------------


def _statistics(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    values, counts = merged(np.concatenate([v for v, _ in parts]), np.concatenate([c for _, c in parts]))
    total = int(counts.sum())
    exact = values.astype(np.float64)
    mean = float((exact * counts).sum() / total)
    low, median, high = (_percentile(values, counts, total, q) for q in (0.5, 50.0, 99.5))
    return {
        "max": float(values[-1]),
        "mean": mean,
        "median": median,
        "min": float(values[0]),
        "percentile_00_5": low,
        "percentile_99_5": high,
        "std": float(np.sqrt((np.square(exact - mean) * counts).sum() / total)),
    }


def _percentile(values: np.ndarray, counts: np.ndarray, total: int, percent: float) -> float:
    """NumPy's (linear) percentile of values that occur ``counts`` times each."""
    position = percent / 100 * (total - 1)
    ends = np.cumsum(counts)
    below, above = (values[np.searchsorted(ends, rank, side="right")] for rank in _ranks(position, total))
    fraction = position - np.floor(position)
    difference = float(above - below)
    # NumPy starts from the nearer end, and so must we for the last bit.
    found: float = (
        float(above) - difference * (1 - fraction) if fraction >= 0.5 else float(below) + difference * fraction
    )
    return found


def _ranks(position: float, total: int) -> tuple[int, int]:
    lower = int(np.floor(position))
    return lower, min(lower + 1, total - 1)
