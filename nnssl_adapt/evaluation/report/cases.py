"""Every validation case as it is looked through: read, turned upright, drawn, in the order of its mean Dice."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.data.dataset import DatasetJson, RawCase, listed_cases
from nnssl_adapt.data.images import ImageGeometry, read_image, read_labels
from nnssl_adapt.errors import CaseError, ConfigurationError, NnsslAdaptError
from nnssl_adapt.evaluation.overlay import UPRIGHT, class_colour
from nnssl_adapt.evaluation.report.content import CaseResult, number, worst_first, worst_median_best
from nnssl_adapt.evaluation.report.strips import (
    ADDED,
    HIT,
    MISSED,
    PLANES,
    SIDES,
    SIZES,
    THUMBNAIL,
    WRONG,
    Strips,
    UprightCase,
    class_palette,
    draw_strips,
)
from nnssl_adapt.evaluation.report.viewer import Budget, Volume, embed
from nnssl_adapt.geometry.orientation import Turn
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.machine.memory import available_memory
from nnssl_adapt.machine.resources import Resources
from nnssl_adapt.paths import preprocessed_folder, raw_folder

logger = logging.getLogger(__name__)

FULL = 20
"""Cases with strips; the next ones have one small slice a plane."""
DRAWN = 200
"""Cases that are drawn at all: reading thousands of images takes hours, and nobody looks at them."""
CASE_BYTES = 440_000
"""Of a case's pictures, so that 20 of them, as base64, with curves and tables stay below 15 MB."""
_THREADS = 4
_CASE_MEMORY = 3 * 2**30  # of a large one that is read and drawn


@dataclass(frozen=True)
class Subject:
    """A validation case with its files.

    Attributes:
        model: the trained model that segmented it.
        case: what its validation says.
    """

    model: ModelFolder
    case: CaseResult

    @cached_property
    def files(self) -> RawCase:
        """Where the dataset says that the files lie; by nnU-Net's names where dataset.json does not list them."""
        folder, ending = raw_folder() / self.model.plan.dataset_name, self.model.file_ending
        name, path = self.case.name, folder / "dataset.json"
        listing = DatasetJson.load(path).dataset if path.is_file() else None
        if listing is not None and name in listing:
            return listed_cases({name: listing[name]}, folder, path)[0]
        return RawCase(name, (folder / "imagesTr" / f"{name}_0000{ending}",), folder / "labelsTr" / f"{name}{ending}")

    @property
    def reference(self) -> Path:
        """The reference as it was used, or where else it lies."""
        label = self.files.label
        known = [self.case.reference, *([label] if label is not None else [])]
        with contextlib.suppress(ConfigurationError):  # nnUNet_preprocessed need not be set
            folder = preprocessed_folder() / self.model.plan.dataset_name / "gt_segmentations"
            known.insert(1, folder / f"{self.case.name}{self.model.file_ending}")
        return next((path for path in known if path.is_file()), known[0])

    @property
    def file_name(self) -> str:
        """Of the image's first channel, also where it can't be found."""
        try:
            return self.files.images[0].name
        except (NnsslAdaptError, OSError):
            return f"{self.case.name}_0000{self.model.file_ending}"

    def read(self) -> StoredCase:
        """Image, reference and prediction. Raises CaseError or another of ours when a file is not as it should be."""
        reader = self.model.image_reader
        image, geometry = read_image(self.files.images[:1], reader)
        reference, prediction = (read_labels(path, reader)[0][0] for path in (self.reference, self.case.prediction))
        for path, labels in ((self.reference, reference), (self.case.prediction, prediction)):
            if labels.shape != image.shape[1:]:
                raise CaseError(f"{path} has shape {labels.shape}, the image {image.shape[1:]}", path=path)
        shown = [value for value in self.model.labels.all_labels if value != 0]
        ignored = ~np.isin(reference, [0, *shown])  # what nobody annotated is neither right nor wrong
        drawn = [np.where(ignored | ~np.isin(labels, shown), 0, labels) for labels in (reference, prediction)]
        return StoredCase(image[0], drawn[0], drawn[1], geometry)


@dataclass(frozen=True)
class StoredCase:
    """Arrays (Z, Y, X) of one case as they are stored: one channel, and label maps with 0 where nothing is drawn."""

    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    geometry: ImageGeometry

    def upright(self) -> UprightCase:
        known = self.geometry.picture is None  # of pictures such as PNG nothing tells which way they lie
        turn = Turn.to(UPRIGHT, self.geometry.direction) if known else Turn()
        image, reference, prediction = (turn.apply(array) for array in (self.image, self.reference, self.prediction))
        spacing = [self.geometry.spacing[axis] for axis in turn.axes]
        numbers = [_numbers(turn, axis, image.shape[axis]) for axis in range(3)]
        return UprightCase(
            image=image,
            reference=reference,
            prediction=prediction,
            spacing=(spacing[0], spacing[1], spacing[2]),
            numbers=(numbers[0], numbers[1], numbers[2]),
            names=PLANES if known else ("along z", "along y", "along x"),
            sides=SIDES if known else ("", "", ""),
        )

    def volumes(self) -> Volume:
        return embed(
            (("image", self.image), ("reference", self.reference), ("prediction", self.prediction)), self.geometry
        )


def _numbers(turn: Turn, axis: int, length: int) -> list[str]:
    letter, stored = "zyx"[turn.axes[axis]], range(length)
    return [f"{letter} = {index}" for index in (reversed(stored) if turn.flips[axis] else stored)]


def case_section(
    model: ModelFolder, cases: Sequence[CaseResult], viewer_megabytes: float | None = None
) -> dict[str, Any]:
    """What the template ``cases.html`` shows of these cases, and what its script reads (``data``).

    A case whose files are missing or unreadable is there with the reason, and without pictures. With
    ``viewer_megabytes``, the volumes of the worst cases are there too, as far as they fit.
    """
    ranked = worst_first(cases)
    badges = {id(case): what for what, case in worst_median_best(cases)} if len(ranked) > 2 else {}
    subjects = [Subject(model, case) for case in ranked[:DRAWN]]
    budget = None if viewer_megabytes is None else Budget(viewer_megabytes)
    with ThreadPoolExecutor(_threads()) as threads:
        embedded = [budget is not None and index < FULL for index in range(len(subjects))]
        drawn = list(threads.map(_drawn, subjects, range(len(subjects)), embedded))
    entries = [
        _entry(subject, one, index, badges.get(id(subject.case), ""), budget)
        for index, (subject, one) in enumerate(zip(subjects, drawn, strict=True))
    ]
    values, names = class_names(model)
    colours = {"hit": HIT, "missed": MISSED, "added": ADDED, "wrong": WRONG}
    about = [(case.fold, case.name, case.mean_dice) for case in ranked]
    return {
        "cases": entries,
        "notes": _notes(len(ranked), sum(not one.strips.planes for one in drawn)),
        "classes": [
            {"value": value, "name": name, "colour": class_colour(index)}
            for index, (value, name) in enumerate(zip(values, names, strict=True))
        ],
        "colours": colours,
        "data": {
            # Marks are kept by the browser under this key: another training's marks are other marks.
            "key": hashlib.sha256(repr((model.plan.dataset_name, model.path.name, about)).encode()).hexdigest()[:16],
            "palette": {**colours, "classes": class_palette(values)},
            "classes": dict(zip(values, names, strict=True)),
            "cases": [_data(entry) for entry in entries],
        },
    }


def class_names(model: ModelFolder) -> tuple[list[int], list[str]]:
    """The label values that are drawn, and their names; of regions, which overlap, only the values have none."""
    values = [value for value in model.labels.all_labels if value != 0]
    names = [f"label {value}" for value in values] if model.labels.has_regions else list(model.labels.class_names)
    return values, names


def _threads() -> int:
    memory = available_memory()
    fitting = _THREADS if memory is None else memory // _CASE_MEMORY
    return max(1, min(_THREADS, Resources.here().cores, fitting))


@dataclass(frozen=True)
class _Drawn:
    strips: Strips = field(default_factory=Strips)
    volume: Volume | None = None
    problem: str = ""


def _drawn(subject: Subject, index: int, embedded: bool) -> _Drawn:
    """The pictures and volumes of a case, or none and why."""
    try:
        stored = subject.read()
        if index >= FULL:
            return _Drawn(draw_strips(stored.upright(), sizes=(THUMBNAIL,)))
        strips = draw_strips(stored.upright(), SIZES, CASE_BYTES)
        return _Drawn(strips, stored.volumes() if embedded else None)
    except (NnsslAdaptError, OSError) as error:
        logger.info("no pictures of %s: %s", subject.case.name, error)
        return _Drawn(problem=f"not drawn: {error}")


def _entry(subject: Subject, drawn: _Drawn, index: int, badge: str, budget: Budget | None) -> dict[str, Any]:
    case, volume, problem = subject.case, drawn.volume, drawn.problem
    if budget is not None and volume is not None and (why := budget.take(volume)):
        volume, problem = None, why
    return {
        "index": index,
        "name": case.name,
        "fold": case.fold,
        "dice": number(case.mean_dice),
        "badge": badge,
        "classes": [(name, number(metrics.get("Dice", math.nan))) for name, metrics in case.metrics.items()],
        "file": subject.file_name,
        "problem": problem,
        "thumbnail": index >= FULL,
        "planes": drawn.strips.planes,
        "codes": drawn.strips.codes,
        "volumes": volume,
    }


def _data(entry: dict[str, Any]) -> dict[str, Any]:
    planes = [
        {"name": p.name, "numbers": p.numbers, "ratio": p.ratio, "start": p.start, "side": p.side}
        for p in entry["planes"]
    ]
    return {**{key: entry[key] for key in ("name", "fold", "dice", "file", "codes")}, "planes": planes}


def _notes(cases: int, without: int) -> list[str]:
    notes = [
        "Pictures are upright, with the patient's right on the left, and cut to where labels are. A wrong voxel is drawn "
        "also where a picture is smaller than the image."
    ]
    if cases > FULL:
        notes.append(
            f"The worst {FULL} cases have strips; the others have one slice a plane, the one with most errors."
        )
    if cases > DRAWN:
        notes.append(f"The worst {DRAWN} of {cases} cases are here; the table above has all.")
    if without:
        notes.append(f"{without} of {min(cases, DRAWN)} cases are not drawn; each says why.")
    return notes
