"""Lesion by lesion: which connected parts of a reference were found, and which of a prediction are real.

Voxel overlap is ruled by the largest lesion. Papers on many small ones (multiple sclerosis, metastases, stroke) therefore
count lesions: the connected parts of a class. What a lesion is and when it counts as found are choices that change the
numbers, so they are a record (:class:`LesionRule`) that is written beside the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy import ndimage

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.cropping import nonzero_box

Matching = Literal["one-to-one", "any"]

LESION_MEASURES = (
    "LesionF1",
    "LesionSensitivity",
    "LesionPPV",
    "LesionDice",
    "LesionwiseDice",
    "LesionsReference",
    "LesionsPredicted",
)
"""``LesionDice``: mean Dice of the lesions that were found (panoptica's ``sq_dsc``). ``LesionwiseDice``: likewise, but every
missed and every invented lesion counts 0 (as in the BraTS challenges since 2023). The last two count lesions."""


@dataclass(frozen=True)
class LesionRule:
    """What a lesion is, and when it was found.

    Attributes:
        connectivity: 6, 18 or 26: voxels that share a face; or an edge; or a corner belong together.
        min_volume: mm³; smaller parts, of reference and prediction, are no lesions and don't count.
        overlap: how much must overlap, more than 0 and at most 1; see ``matching``.
        matching: ``one-to-one``: each lesion has at most one partner; pairs whose intersection over union is at least
            ``overlap`` are taken, best first. ``any``: a lesion of the reference is found if at least the fraction
            ``overlap`` of it was predicted (by however many parts), and a predicted one is real if at least that fraction
            of it lies in the reference.

    Raises:
        ConfigurationError: with every wrong value.
    """

    connectivity: int = 26
    min_volume: float = 0.0
    overlap: float = 0.1
    matching: Matching = "one-to-one"

    def __post_init__(self) -> None:
        mistakes = []
        if self.connectivity not in (6, 18, 26):
            mistakes.append(f"lesion connectivity {self.connectivity}: expected 6, 18 or 26")
        if not 0 <= self.min_volume < math.inf:
            mistakes.append(f"smallest lesion {self.min_volume} mm³: expected 0 or more")
        if not 0 < self.overlap <= 1:
            mistakes.append(f"lesion overlap {self.overlap}: expected more than 0 and at most 1")
        if self.matching not in get_args(Matching):
            mistakes.append(f"lesion matching {self.matching!r}: expected {' or '.join(get_args(Matching))}")
        if mistakes:
            raise ConfigurationError("; ".join(mistakes), mistakes=mistakes)

    def __str__(self) -> str:
        size = f" of at least {self.min_volume:g} mm³" if self.min_volume else ""
        found = (
            f"matched one to one where intersection over union is at least {self.overlap:g}"
            if self.matching == "one-to-one"
            else f"found or real if at least {100 * self.overlap:g} % of it overlaps"
        )
        return f"lesions: {self.connectivity}-connected parts{size}, {found}"

    def describe(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def lesion_measures(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], rule: LesionRule
) -> dict[str, float]:
    """:data:`LESION_MEASURES` of one class in one case.

    Sensitivity is NaN without lesions in the reference, PPV without predicted ones; F1 and LesionwiseDice are NaN without
    any, and 0 if one of the two has none; LesionDice is NaN if none was found.

    Args:
        prediction: bool (Z, Y, X).
        reference: bool of the same shape.
        spacing: mm, (Z, Y, X).
        rule: what a lesion is, and when it was found.
    """
    box = tuple(slice(*extent) for extent in nonzero_box((prediction | reference)[None]))
    smallest = rule.min_volume / math.prod(spacing)
    predicted, predicted_sizes = _parts(prediction[box], rule.connectivity, smallest)
    real, real_sizes = _parts(reference[box], rule.connectivity, smallest)
    shared = _shared_voxels(real, predicted, len(real_sizes), len(predicted_sizes))
    if rule.matching == "one-to-one":
        found, true, dices = _one_to_one(shared, real_sizes, predicted_sizes, rule.overlap)
    else:
        found, true, dices = _any_overlap(shared, real_sizes, predicted_sizes, rule.overlap)
    n_real, n_predicted = len(real_sizes), len(predicted_sizes)
    sensitivity = found / n_real if n_real else math.nan
    precision = true / n_predicted if n_predicted else math.nan
    return {
        "LesionF1": _f1(sensitivity, precision),
        "LesionSensitivity": sensitivity,
        "LesionPPV": precision,
        "LesionDice": float(np.mean(dices)) if len(dices) else math.nan,
        "LesionwiseDice": float(np.sum(dices)) / (n_real + n_predicted - true) if n_real + n_predicted else math.nan,
        "LesionsReference": n_real,
        "LesionsPredicted": n_predicted,
    }


def _f1(sensitivity: float, precision: float) -> float:
    """Harmonic mean; 0 where only one of the two has lesions, NaN where neither has."""
    if math.isnan(sensitivity) and math.isnan(precision):
        return math.nan
    if math.isnan(sensitivity) or math.isnan(precision) or sensitivity + precision == 0:
        return 0.0
    return 2 * sensitivity * precision / (sensitivity + precision)


def _parts(mask: np.ndarray, connectivity: int, smallest: float) -> tuple[np.ndarray, np.ndarray]:
    """Connected parts of at least ``smallest`` voxels, numbered from 1 (int32 of the mask's shape), and their sizes."""
    structure = ndimage.generate_binary_structure(3, {6: 1, 18: 2, 26: 3}[connectivity])
    numbers, count = ndimage.label(mask, structure)
    sizes = np.bincount(numbers.reshape(-1), minlength=count + 1)[1:]
    kept = sizes >= smallest * (1 - 1e-9)  # a volume that equals the limit on paper may come out a rounding below it
    renumbered = np.zeros(count + 1, np.int32)
    renumbered[1:][kept] = np.arange(1, int(kept.sum()) + 1)
    return renumbered[numbers], sizes[kept]


def _shared_voxels(real: np.ndarray, predicted: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """How many voxels each real lesion shares with each predicted one: int64 (real, predicted)."""
    both = (real > 0) & (predicted > 0)
    pairs = (real[both] - 1).astype(np.int64) * columns + (predicted[both] - 1)
    return np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)


def _one_to_one(
    shared: np.ndarray, real: np.ndarray, predicted: np.ndarray, overlap: float
) -> tuple[int, int, list[float]]:
    """Lesions found, predicted ones that are real, and the Dice of each pair."""
    rows, columns = np.nonzero(shared)
    together = shared[rows, columns]
    union = real[rows] + predicted[columns] - together
    iou = together / union
    dices: list[float] = []
    taken_rows: set[int] = set()
    taken_columns: set[int] = set()
    for index in np.argsort(-iou, kind="stable"):
        row, column = int(rows[index]), int(columns[index])
        if iou[index] < overlap:
            break
        if row in taken_rows or column in taken_columns:
            continue
        taken_rows.add(row)
        taken_columns.add(column)
        dices.append(2 * float(together[index]) / float(real[row] + predicted[column]))
    return len(dices), len(dices), dices


def _any_overlap(
    shared: np.ndarray, real: np.ndarray, predicted: np.ndarray, overlap: float
) -> tuple[int, int, list[float]]:
    """Likewise; the Dice of a lesion is that with all predicted parts that touch it, taken together."""
    found = shared.sum(1) >= overlap * real
    true = shared.sum(0) >= overlap * predicted
    dices = []
    for row in np.flatnonzero(found):
        touching = shared[row] > 0
        dices.append(2 * float(shared[row].sum()) / float(real[row] + predicted[touching].sum()))
    return int(found.sum()), int(true.sum()), dices
