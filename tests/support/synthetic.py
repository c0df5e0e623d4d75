"""Tiny made-up datasets for tests: blobs that are brighter than what surrounds them, and a border of zeros."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

LABEL_NAMES = ("background", "core", "rim", "shell", "extra", "further")


def make_dataset(
    folder: str | Path,
    name: str = "Dataset991_Tiny",
    cases: int = 5,
    channels: int = 1,
    shape: Sequence[int] = (20, 28, 24),
    spacing: Sequence[float] = (2.0, 1.0, 1.3),
    labels: int = 3,
    regions: bool = False,
    ignore: bool = False,
    seed: int = 0,
    file_ending: str = ".nii.gz",
    dtype: str = "int16",
) -> Path:
    """Write a raw dataset ``folder/name`` and return its path.

    ``shape`` (Z, Y, X) grows by one voxel on each axis from case to case, so that cases differ. ``labels`` counts the
    background. With ``regions`` labels are nested unions; with ``ignore`` one more value marks some voxels as ignored.
    """
    root = Path(folder) / name
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(cases):
        size = tuple(int(n) + number % 3 for n in shape)
        image, label = make_case(random, size, channels, labels, ignore)
        identifier = f"case_{number:02d}"
        for channel in range(channels):
            voxels = (
                np.rint(image[channel]).astype(dtype) if np.dtype(dtype).kind in "iu" else image[channel].astype(dtype)
            )
            write_image(root / "imagesTr" / f"{identifier}_{channel:04d}{file_ending}", voxels, spacing)
        write_image(root / "labelsTr" / f"{identifier}{file_ending}", label.astype(np.uint8), spacing)
    write_dataset_json(root, cases, channels, labels, regions, ignore, file_ending)
    return root


def make_case(
    random: np.random.Generator, shape: Sequence[int], channels: int, labels: int, ignore: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Make an image (C, Z, Y, X) float64 with a zero border and its labels (Z, Y, X) int."""
    body = np.zeros(shape, bool)
    body[tuple(slice(max(1, n // 10), n - max(1, n // 8)) for n in shape)] = True
    smooth = ndimage.gaussian_filter(random.normal(size=shape), [max(1.0, n / 12) for n in shape])
    body[tuple(slice(n // 3, n // 3 + 2) for n in shape)] = False  # a hole, and a notch in a corner of the border
    body[tuple(slice(0, max(1, n // 10) + 2) for n in shape)] = False
    inside = smooth[body]
    edges = np.quantile(inside, np.linspace(0.6, 1.0, labels)[:-1])
    label = np.digitize(smooth, edges) * body
    image = np.stack(
        [
            (200 + 90 * label * (1 if channel % 2 == 0 else -0.5) + random.normal(0, 12, shape)) * body
            for channel in range(channels)
        ]
    )
    if ignore:
        label[tuple(slice(n // 2, n // 2 + 3) for n in shape)] = labels
    return image, label


def write_image(path: Path, voxels: np.ndarray, spacing: Sequence[float], origin: Sequence[float] = (1, -2, 3)) -> None:
    """Write voxels (Z, Y, X) with a spacing (Z, Y, X, mm) and an origin (x, y, z, mm)."""
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([float(s) for s in spacing[::-1]])
    image.SetOrigin([float(o) for o in origin])
    sitk.WriteImage(image, str(path), True)


def write_dataset_json(
    root: Path, cases: int, channels: int, labels: int, regions: bool, ignore: bool, file_ending: str = ".nii.gz"
) -> None:
    """Write dataset.json. Regions unite a label with all higher ones, so the first region is the whole foreground."""
    names: dict[str, object] = {"background": 0}
    for value in range(1, labels):
        names[LABEL_NAMES[value]] = list(range(value, labels)) if regions else value
    content: dict[str, object] = {
        "channel_names": {str(c): f"MR{c}" for c in range(channels)},
        "labels": names,
        "numTraining": cases,
        "file_ending": file_ending,
    }
    if ignore:
        names["ignore"] = labels
    if regions:
        content["regions_class_order"] = list(range(1, labels))
    (root / "dataset.json").write_text(json.dumps(content, indent=1))
