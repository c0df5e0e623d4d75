"""nnU-Net's five ways to normalise the intensities of a channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnssl_adapt.errors import CaseError

SCHEMES = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)

CT_STATISTICS = ("mean", "std", "percentile_00_5", "percentile_99_5")
"""Entries of the dataset's foreground statistics that CT normalisation needs."""

_SMALLEST = 1e-8
"""What is divided by at least, as in nnU-Net."""


def normalize_channel(
    channel: np.ndarray, scheme: str, inside: np.ndarray | None = None, statistics: Mapping[str, Any] | None = None
) -> None:
    """Normalise one channel in place, as nnU-Net's class of the same name does.

    Args:
        channel: float32 (Z, Y, X), overwritten.
        scheme: one of :data:`SCHEMES`.
        inside: bool (Z, Y, X): z-score is computed from and applied to these voxels only; None for all. The other
            schemes take no notice.
        statistics: the dataset's foreground statistics of this channel, for CT.

    Raises:
        CaseError: RGB intensities outside 0 to 255.
        ValueError: unknown scheme.
    """
    if scheme == "ZScoreNormalization":
        _z_score(channel, inside)
    elif scheme == "CTNormalization":
        if statistics is None:
            raise ValueError("CT normalisation needs the dataset's foreground statistics")
        np.clip(channel, statistics["percentile_00_5"], statistics["percentile_99_5"], out=channel)
        channel -= statistics["mean"]
        channel /= max(statistics["std"], _SMALLEST)
    elif scheme == "RescaleTo01Normalization":
        channel -= channel.min()
        channel /= max(channel.max(), _SMALLEST)
    elif scheme == "RGBTo01Normalization":
        low, high = channel.min(), channel.max()
        if low < 0 or high > 255:
            raise CaseError(f"RGB normalisation expects intensities from 0 to 255, got {low:g} to {high:g}")
        channel /= 255.0
    elif scheme != "NoNormalization":
        raise ValueError(f"unknown normalisation {scheme!r}; known: {', '.join(SCHEMES)}")


def _z_score(channel: np.ndarray, inside: np.ndarray | None) -> None:
    if inside is None:
        _standardize(channel)
    elif inside.any():
        values = channel[inside]
        _standardize(values)
        channel[inside] = values


def _standardize(values: np.ndarray) -> None:
    """Subtract the mean and divide by the standard deviation, both summed in double precision a slice at a time."""
    slices = values if values.ndim > 1 else np.array_split(values, max(1, values.size >> 18))
    mean = np.float32(sum(float(part.sum(dtype=np.float64)) for part in slices) / values.size)
    squares = 0.0
    for part in slices:
        part -= mean
        exact = part.astype(np.float64).reshape(-1)
        squares += float(exact @ exact)
    values /= np.float32(max(np.sqrt(squares / values.size), _SMALLEST))
