"""What one case adds to the dataset fingerprint; kept on disk until all cases are measured."""

from __future__ import annotations

import json
import math
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import RawCase
from nnssl_adapt.data.images import count_channels, read_geometry, read_image, read_labels
from nnssl_adapt.data.store import describe_source
from nnssl_adapt.errors import CaseError
from nnssl_adapt.files import atomic_path
from nnssl_adapt.geometry.cropping import nonzero_box

_SEED = 1234
_DRAWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class MeasuredCase:
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
    intensities: list[tuple[np.ndarray, np.ndarray]]

    def save(self, path: Path, made_of: str) -> None:
        """Write it as ``.npz``, whole or not at all; ``made_of`` says of what."""
        arrays: dict[str, Any] = {
            "shape": self.shape,
            "spacing": self.spacing,
            "relative_size": self.relative_size,
            "made_of": made_of,
        }
        for channel, (values, counts) in enumerate(self.intensities):
            arrays |= {f"values_{channel}": values, f"counts_{channel}": counts}
        with atomic_path(path) as temporary:
            np.savez(temporary, **arrays)

    @classmethod
    def load(cls, path: Path, made_of: str) -> MeasuredCase | None:
        """Read what :meth:`save` wrote; None if it is missing, damaged or made of something else."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if str(arrays["made_of"]) != made_of:
                    return None
                channels = sum(name.startswith("values_") for name in arrays.files)
                return cls(
                    shape=tuple(int(n) for n in arrays["shape"]),
                    spacing=tuple(float(s) for s in arrays["spacing"]),
                    relative_size=float(arrays["relative_size"]),
                    intensities=[(arrays[f"values_{c}"], arrays[f"counts_{c}"]) for c in range(channels)],
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


def measure_case(case: RawCase, draws: int, parts: Path | None = None) -> MeasuredCase:
    """Read a case and draw ``draws`` of its foreground intensities in each channel, with nnU-Net's generator.

    With ``parts``, a folder, the result is kept there, and taken from there if the case's files have not changed.
    Raises CaseError.
    """
    if parts is None:
        return _measured(case, draws)
    made_of = json.dumps({"draws": draws, "sources": [describe_source(path) for path in case.files]})
    path = parts / f"{case.identifier}.npz"
    measured = MeasuredCase.load(path, made_of)
    if measured is None:
        measured = _measured(case, draws)
        with suppress(FileNotFoundError):  # another process was done first, and has removed the folder
            measured.save(path, made_of)
    return measured


def memory_to_measure(case: RawCase, draws: int) -> int:
    """Bytes that :func:`measure_case` takes at most, from the header alone; 0 where that can't be read (reading will tell)."""
    try:
        geometry = read_geometry(case.images[0])
        channels = max(len(case.images), count_channels(case.images[0]))
    except CaseError:
        return 0
    voxels = math.prod(geometry.size)
    # The channels, the labels, one channel's foreground (which may be all of it) and its hits; then what is drawn, kept of
    # every channel and sorted of one. A batch of draws is small beside them.
    drawn = min(draws, voxels)
    return voxels * (4 * channels + 26) + drawn * (12 * channels + 36) + min(draws, _DRAWS_AT_ONCE) * 8


def _measured(case: RawCase, draws: int) -> MeasuredCase:
    image, geometry = read_image(case.images)
    if case.label is None:
        raise CaseError(f"case {case.identifier} has no labels")
    labels, label_geometry = read_labels(case.label)
    if label_geometry.size != geometry.size:
        raise CaseError(f"{case.label} has shape {label_geometry.size}, its image {geometry.size}")
    box = tuple(slice(low, high) for low, high in nonzero_box(image))
    foreground = labels[0][box] > 0
    random = np.random.RandomState(_SEED)
    shape = foreground.shape
    return MeasuredCase(
        shape=shape,
        spacing=geometry.spacing,
        relative_size=float(np.prod(shape) / np.prod(geometry.size)),
        intensities=[_drawn(channel[box][foreground], draws, random) for channel in image],
    )


def _drawn(voxels: np.ndarray, draws: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Draw with replacement, as ``random.choice(voxels, draws)``, and return the distinct values and their counts.

    Counts instead of the up to 1e8 values themselves: a dataset of few cases would need gigabytes.
    """
    if not len(voxels):
        return np.zeros(0, np.float32), np.zeros(0, np.int64)
    hits = np.zeros(len(voxels), np.int64)
    for start in range(0, draws, _DRAWS_AT_ONCE):
        hits += np.bincount(random.randint(0, len(voxels), min(_DRAWS_AT_ONCE, draws - start)), minlength=len(voxels))
    return merged(voxels, hits)


def merged(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and how often each occurs, of values that occur ``counts`` times."""
    used = counts > 0
    distinct, place = np.unique(values[used], return_inverse=True)
    merged = np.bincount(place.reshape(-1), weights=counts[used], minlength=len(distinct))
    return distinct, merged.astype(np.int64)
