"""What nnU-Net does not measure: precision, recall, distances of surfaces, error of the volume, and single lesions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from nnssl_adapt.data.labels import LabelOrRegion
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.evaluation.lesions import LESION_MEASURES, LesionRule, lesion_measures
from nnssl_adapt.evaluation.surface import area_dice, areas_of_surface_elements, surface_distances
from nnssl_adapt.geometry.cropping import nonzero_box

Empty = Literal["nan", "0", "1"]
Surface = Literal["voxels", "area"]

MEASURES = ("Precision", "Recall", "HD95", "ASSD", "NSD", "VolumeError", "RelativeVolumeError")
"""HD95 and ASSD in mm, VolumeError in ml (prediction minus reference), RelativeVolumeError as a share of the reference."""

_EMPTY = {
    "nan": "a class in neither reference nor prediction has no value (NaN) and is left out of means, as in nnU-Net; HD95 "
    "and ASSD have none if only one of the two has the class",
    "1": "a class in neither reference nor prediction counts as perfect (Dice 1, HD95 0); a missed or invented one as "
    "the worst (Dice 0, HD95 and ASSD the image's diagonal)",
    "0": "a class in neither reference nor prediction counts as the worst (Dice 0, HD95 and ASSD the image's diagonal), "
    "and so does a missed or invented one",
}


@dataclass(frozen=True)
class Judging:
    """How predictions are measured, beyond what nnU-Net does.

    Attributes:
        tolerance: of the normalised surface Dice, mm.
        surface: what the normalised surface Dice weighs: ``voxels``: every surface voxel alike, or ``area``: the area of surface
            elements, as DeepMind's ``surface-distance`` does (needs the extra ``monai``, whose table of areas it uses).
        lesions: count lesions by this rule as well; None: don't.
        empty: what a class in neither reference nor prediction counts: ``nan`` (nothing, as in nnU-Net), ``1``
            (perfect) or ``0`` (worst). With the last two a case counts always: a missed class has its image's diagonal
            for a distance.

    Raises:
        ConfigurationError: the tolerance is negative or no number; ``empty`` is none of the three.
    """

    tolerance: float = 1.0
    empty: Empty = "nan"
    surface: Surface = "voxels"
    lesions: LesionRule | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise ConfigurationError(f"tolerance {self.tolerance} mm: expected 0 or more")
        if self.empty not in _EMPTY:
            raise ConfigurationError(f"empty {self.empty!r}: expected {', '.join(_EMPTY)}")
        if self.surface not in get_args(Surface):
            raise ConfigurationError(f"surface {self.surface!r}: expected {' or '.join(get_args(Surface))}")
        if self.surface == "area":
            areas_of_surface_elements((1.0, 1.0, 1.0))  # fails here, before hours of work, where MONAI is missing

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what is measured beside nnU-Net's metrics."""
        return MEASURES if self.lesions is None else (*MEASURES, *LESION_MEASURES)

    @property
    def explanation(self) -> str:
        """What becomes of empty classes, in one sentence."""
        return _EMPTY[self.empty]

    def describe(self) -> dict[str, Any]:
        """What goes into summary.json: everything that is needed to understand the numbers."""
        weights = {"voxels": "surface voxels count alike", "area": "surface elements count by their area (DeepMind's)"}
        return {
            **({} if self.lesions is None else {"lesions": {**self.lesions.describe(), "means": str(self.lesions)}}),
            "surface": self.surface,
            "surface_means": weights[self.surface],
            "empty": self.empty,
            "empty_means": self.explanation,
            "tolerance_mm": self.tolerance,
            "units": {"HD95": "mm", "ASSD": "mm", "VolumeError": "ml", "RelativeVolumeError": "share of reference"},
        }


def add_measures(
    metrics: Mapping[LabelOrRegion, dict[str, float]],
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    judging: Judging,
    ignore_label: int | None = None,
) -> None:
    """Add :data:`MEASURES` of every class to ``metrics``, which has nnU-Net's, and apply the rule for empty classes.

    Voxels that the reference leaves to ignore belong to neither mask.

    Args:
        metrics: by class; changed in place.
        prediction: int16 (Z, Y, X).
        reference: likewise.
        spacing: mm, (Z, Y, X).
        judging: tolerance and rule.
        ignore_label: of the reference.
    """
    diagonal = math.sqrt(sum(((n - 1) * s) ** 2 for n, s in zip(reference.shape, spacing, strict=True)))
    box = tuple(slice(*extent) for extent in nonzero_box(((prediction != 0) | (reference != 0))[None]))
    prediction, reference = prediction[box], reference[box]
    annotated = None if ignore_label is None else reference != ignore_label
    for entry, counted in metrics.items():
        _add_counts(counted, spacing)
        if counted["n_pred"] and counted["n_ref"]:
            ours, theirs = _mask(prediction, entry), _mask(reference, entry)
            if annotated is not None:
                ours &= annotated
            distances = surface_distances(ours, theirs, spacing)
            counted["HD95"], counted["ASSD"] = distances.hausdorff95, distances.average
            if judging.surface == "area":
                counted["NSD"] = area_dice(ours, theirs, spacing, judging.tolerance)
            else:
                counted["NSD"] = distances.dice_at(judging.tolerance)
        else:
            _apply_rule(counted, judging.empty, diagonal)
        if judging.lesions is not None:
            _add_lesions(counted, _mask(prediction, entry), _mask(reference, entry), annotated, spacing, judging)


def _add_lesions(
    counted: dict[str, float],
    prediction: np.ndarray,
    reference: np.ndarray,
    annotated: np.ndarray | None,
    spacing: Sequence[float],
    judging: Judging,
) -> None:
    assert judging.lesions is not None
    if annotated is not None:
        prediction &= annotated
    measured = lesion_measures(prediction, reference, spacing, judging.lesions)
    if judging.empty != "nan" and not measured["LesionsReference"] and not measured["LesionsPredicted"]:
        shares = (name for name in LESION_MEASURES if not name.startswith("Lesions"))
        measured |= dict.fromkeys(shares, float(judging.empty))
    counted |= measured


def _mask(labels: np.ndarray, entry: LabelOrRegion) -> np.ndarray:
    if not isinstance(entry, tuple):
        found: np.ndarray = labels == entry
        return found
    mask: np.ndarray = labels == entry[0]
    for value in entry[1:]:
        mask |= labels == value
    return mask


def _add_counts(metrics: dict[str, float], spacing: Sequence[float]) -> None:
    """Precision, recall and volumes."""
    n_pred, n_ref, tp = metrics["n_pred"], metrics["n_ref"], metrics["TP"]
    metrics["Precision"] = tp / n_pred if n_pred else math.nan
    metrics["Recall"] = tp / n_ref if n_ref else math.nan
    metrics["VolumeError"] = (n_pred - n_ref) * math.prod(spacing) / 1000
    metrics["RelativeVolumeError"] = (n_pred - n_ref) / n_ref if n_ref else math.nan


def _apply_rule(metrics: dict[str, float], empty: Empty, diagonal: float) -> None:
    """Distances, and whatever the rule sets, of a class that at least one of prediction and reference lacks."""
    nowhere = not metrics["n_pred"] and not metrics["n_ref"]
    if empty == "nan":
        metrics["HD95"] = metrics["ASSD"] = math.nan
        metrics["NSD"] = math.nan if nowhere else 0.0
        return
    perfect = nowhere and empty == "1"
    for name in ("Dice", "IoU", "Precision", "Recall", "NSD"):
        metrics[name] = float(perfect)
    metrics["HD95"] = metrics["ASSD"] = 0.0 if perfect else diagonal
