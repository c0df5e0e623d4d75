"""Everything that may be wrong with a raw dataset, as one table: what, where, and how to mend it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnssl_adapt.data.case_measures import memory_to_measure
from nnssl_adapt.data.dataset import DatasetJson, RawCase, RawDataset
from nnssl_adapt.data.images import (
    ImageGeometry,
    distinct_values,
    read_geometry,
    read_image,
    read_labels,
)
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.parallel import over_cases
from nnssl_adapt.data.splits import SPLITS_FILE
from nnssl_adapt.errors import CaseError, ConfigurationError, OutputError
from nnssl_adapt.files import atomic_path
from nnssl_adapt.geometry.orientation import orientation_code

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Default: what rounding explains, as a fraction of a voxel (origin, spacing) and of the cosines (direction)."""

_EXACT = 1e-6
_BIDS_SUBJECT = r"sub-[A-Za-z0-9]+"
_OUTLIER = 3.0


@dataclass(frozen=True)
class Finding:
    """One row: an ``error`` prevents training, a ``warning`` may be meant so; ``case`` is ``-`` for the whole dataset."""

    level: str
    case: str
    check: str
    message: str
    fix: str


@dataclass(frozen=True)
class Verdict:
    """What was found in a dataset of ``num_cases`` cases."""

    dataset: str
    num_cases: int
    findings: tuple[Finding, ...]

    @property
    def is_good(self) -> bool:
        """No errors; warnings are allowed."""
        return not any(finding.level == "error" for finding in self.findings)

    def __str__(self) -> str:
        counts = Counter(finding.level for finding in self.findings)
        title = f"{self.dataset}: {self.num_cases} cases, {counts['error']} error(s), {counts['warning']} warning(s)"
        rows = [f"{f.level:<8}{f.case}  [{f.check}] {f.message}\n{'':8}fix: {f.fix}" for f in self.findings]
        return "\n".join([title, *rows])

    def to_csv(self) -> str:
        """The table, with a header line."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("level", "case", "check", "message", "fix"))
        writer.writerows((f.level, f.case, f.check, f.message, f.fix) for f in self.findings)
        return text.getvalue()


@dataclass(frozen=True)
class _Seen:
    """What one case looks like; spacing in mm (Z, Y, X)."""

    findings: list[Finding]
    orientation: str | None = None
    spacing: tuple[float, ...] | None = None
    digest: str | None = None


def verify_all(
    folder: Path,
    workers: int = 1,
    progress: bool | None = None,
    tolerance: float = TOLERANCE,
    fix_geometry: bool = False,
    subject: str | None = None,
) -> Verdict:
    """Check every file of a raw dataset, and how the cases go together.

    Args:
        folder: the raw dataset's.
        workers: processes, one case each.
        progress: whether to draw a bar.
        tolerance: grids that differ by less (in voxels; cosines) differ by rounding only.
        fix_geometry: give labels whose grid differs by rounding only the header of their image. Their voxels stay.
        subject: regular expression that finds the subject in a case's name (default: BIDS' ``sub-…``).

    Raises:
        DatasetJsonError: dataset.json is missing or wrong (labels not consecutive, say): nothing else can be judged.
        ConfigurationError: ``subject`` is no regular expression, or the tolerance no number below half a voxel.
    """
    if not 0 <= tolerance < 0.5:
        raise ConfigurationError(f"tolerance {tolerance}: expected a fraction of a voxel, from 0 to below 0.5")
    owner = _owner_function(subject)
    description = DatasetJson.load(folder / "dataset.json")
    scheme = LabelScheme.from_dataset_json(description.raw, folder / "dataset.json")
    cases, findings = _find_cases(folder, description)
    seen: dict[str, _Seen] = {}
    tasks = [(case.identifier, (case, tuple(scheme.values_in_files), tolerance, fix_geometry)) for case in cases]
    needs = {case.identifier: memory_to_measure(case, 0) for case in cases}
    for outcome in over_cases(look_at_case, tasks, workers, "Verifying", progress, needs):
        if outcome.error is not None:
            finding = Finding("error", outcome.identifier, "readable", outcome.complaint, "copy or make the file again")
            seen[outcome.identifier] = _Seen([finding])
        else:
            seen[outcome.identifier] = outcome.value
    for identifier in sorted(seen):
        findings += seen[identifier].findings
    findings += _orientation_mix(seen) + _spacing_outliers(seen) + _duplicates(seen)
    findings += _leakage(folder, [case.identifier for case in cases], owner)
    findings.sort(key=lambda finding: (finding.level, finding.case))
    return Verdict(folder.name, len(cases), tuple(findings))


# -- which files there are ------------------------------------------------------------------------------------------


def _find_cases(folder: Path, description: DatasetJson) -> tuple[list[RawCase], list[Finding]]:
    """The cases whose files are all there, and what is missing from the others."""
    if description.dataset is not None:
        return list(RawDataset.open(folder).cases), []
    findings: list[Finding] = []
    ending, channels = description.file_ending, len(description.channel_names)
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(ending))
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in _visible(folder / "imagesTr"):
        match = pattern.fullmatch(path.name)
        if match is None:
            fix = f"rename it to CASE_0000{ending}, or move it away"
            findings.append(Finding("warning", "-", "names", f"{path} is no image's name, and not used", fix))
        else:
            groups[match[1]][int(match[2])] = path
    labels = {p.name.removesuffix(ending): p for p in _visible(folder / "labelsTr") if p.name.endswith(ending)}
    cases = []
    for name in sorted(groups.keys() | labels.keys()):
        lacking = [n for n in range(channels) if n not in groups[name]]
        extra = sorted(set(groups[name]) - set(range(channels)))
        missing = [f"imagesTr/{name}_{number:04d}{ending}" for number in lacking]
        missing += [] if name in labels else [f"labelsTr/{name}{ending}"]
        for file in missing:
            fix = "put it there, or remove the case's other files"
            findings.append(Finding("error", name, "present", f"{folder / file} is missing", fix))
        for number in extra:
            fix = "add the channel to channel_names, or remove the file"
            text = f"{groups[name][number]} is not one of the {channels} channels in dataset.json"
            findings.append(Finding("error", name, "present", text, fix))
        if not missing and not extra:
            cases.append(RawCase(name, tuple(groups[name][n] for n in range(channels)), labels[name]))
    total = len(groups.keys() | labels.keys())
    if total == 0:
        text = f"{folder / 'imagesTr'} has no images"
        findings.append(Finding("error", "-", "present", text, f"expected names like CASE_0000{ending}"))
    if description.num_training not in (None, total):
        text = f"'numTraining' is {description.num_training}, but there are {total} cases"
        findings.append(Finding("warning", "-", "numTraining", text, "correct dataset.json (nnU-Net refuses it)"))
    return cases, findings


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != ".") if folder.is_dir() else []


# -- one case -------------------------------------------------------------------------------------------------------


def look_at_case(case: RawCase, expected: tuple[int, ...], tolerance: float, fix_geometry: bool) -> _Seen:
    """Read a case's files, one after the other, and say what is wrong."""
    findings: list[Finding] = []
    digest = hashlib.sha256()
    reference: ImageGeometry | None = None
    complete = True
    for path in case.files:
        try:
            geometry = read_geometry(path)
            if path == case.label:
                findings += _look_at_labels(case.identifier, path, expected)
            else:
                voxels = read_image([path])[0]
                digest.update(str(voxels.shape).encode() + voxels.tobytes())
                if voxels.min() == voxels.max():
                    text = f"{path} is {voxels.flat[0]:g} everywhere"
                    findings.append(Finding("warning", case.identifier, "constant", text, "is this the right image?"))
        except CaseError as error:
            complete = False
            check = "NaN" if "NaN" in str(error) else "whole numbers" if "whole numbers" in str(error) else "readable"
            fix = {
                "NaN": "replace those voxels in the file, e.g. by 0",
                "whole numbers": "threshold it, or resample it with nearest neighbours",
            }.get(check, "copy or make the file again")
            findings.append(Finding("error", case.identifier, check, str(error), fix))
            continue
        if reference is None:
            reference = geometry
        else:
            findings += _compare(case, path, reference, geometry, tolerance, fix_geometry)
    if reference is None:
        return _Seen(findings)
    code = orientation_code(reference.direction)
    return _Seen(findings, code, reference.spacing, digest.hexdigest() if complete else None)


def _look_at_labels(identifier: str, path: Path, expected: tuple[int, ...]) -> list[Finding]:
    values = distinct_values(read_labels(path)[0])
    if values == [0]:
        fix = "fine if there is nothing to segment; else the wrong file"
        return [Finding("warning", identifier, "labels", f"{path} has no foreground", fix)]
    strange = sorted(set(values) - set(expected))
    if not strange:
        return []
    text = f"{path} has value(s) {', '.join(map(str, strange[:10]))}; dataset.json has {', '.join(map(str, expected))}"
    return [Finding("error", identifier, "labels", text, "add them to 'labels' in dataset.json, or correct the file")]


def _compare(
    case: RawCase, path: Path, image: ImageGeometry, other: ImageGeometry, tolerance: float, fix_geometry: bool
) -> list[Finding]:
    if image.size != other.size:
        text = f"{path} has shape {other.size} (Z, Y, X), its image {image.size}"
        fix = "resample it to the image's grid (labels: nearest neighbours)"
        return [Finding("error", case.identifier, "geometry", text, fix)]
    distance = grid_distance(image, other)
    if distance <= _EXACT:
        return []
    text = f"{path} is up to {distance:.2g} voxels away from {case.images[0].name}"
    if distance <= tolerance:
        if fix_geometry and path == case.label:
            copy_header(case.images[0], path)
            logger.info("%s: has its image's header now", path)
            return []
        fix = "rounding only: --fix-geometry" if path == case.label else "rounding only: harmless"
        return [Finding("warning", case.identifier, "geometry", text, fix)]
    # As nnU-Net: another spacing can't be used, another origin or direction is only suspicious.
    level = "warning" if np.allclose(image.spacing, other.spacing) else "error"
    fix = "look at both together; resample it to the image's grid, or correct the header that is wrong"
    return [Finding(level, case.identifier, "geometry", text, fix)]


def grid_distance(image: ImageGeometry, other: ImageGeometry) -> float:
    """How far apart two grids of the same size are: the largest distance between corners, in the image's smallest voxels."""
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in image.size[::-1]], indexing="ij")).reshape(3, -1)
    places = [
        np.asarray(g.direction).reshape(3, 3) @ (np.asarray(g.spacing[::-1])[:, None] * ends)
        + np.array(g.origin)[:, None]
        for g in (image, other)
    ]
    return float(np.linalg.norm(places[0] - places[1], axis=0).max() / min(image.spacing))


def copy_header(image: Path, label: Path) -> None:
    """Write the label again with its image's spacing, origin and direction; voxels and their type stay.

    A link is replaced by a file of its own, so that its source stays as it is. Raises OutputError.
    """
    voxels = sitk.ReadImage(str(label))
    before = sitk.GetArrayFromImage(voxels)
    reference = sitk.ReadImage(str(image))
    fixed = sitk.GetImageFromArray(before)
    fixed.CopyInformation(reference)
    with atomic_path(label) as temporary:
        try:
            sitk.WriteImage(fixed, str(temporary), True)
            after = sitk.GetArrayFromImage(sitk.ReadImage(str(temporary)))
        except RuntimeError as error:
            raise OutputError(f"can't write {label}: {str(error).strip().splitlines()[-1]}") from error
        if after.dtype != before.dtype or not np.array_equal(after, before):
            raise OutputError(f"{label} could not be written whole: is the disk full?")


# -- all cases together ---------------------------------------------------------------------------------------------


def _orientation_mix(seen: dict[str, _Seen]) -> list[Finding]:
    codes = {name: look.orientation for name, look in seen.items() if look.orientation}
    counts = Counter(codes.values())
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    shown = ", ".join(f"{code} {count}×" for code, count in counts.most_common())
    others = sorted(name for name, code in codes.items() if code != usual)
    text = f"images lie in different ways ({shown}; others than {usual}: {_some(others)})"
    return [
        Finding("warning", "-", "orientation", text, f"nnssl-adapt reorient -d ID {usual} makes a copy of one kind")
    ]


def _spacing_outliers(seen: dict[str, _Seen]) -> list[Finding]:
    spacings = {name: look.spacing for name, look in seen.items() if look.spacing}
    if len(spacings) < 3:
        return []
    median = np.median(np.array(list(spacings.values())), axis=0)
    findings = []
    for name, spacing in sorted(spacings.items()):
        ratio = np.asarray(spacing) / median
        if max(ratio.max(), (1 / ratio).max()) >= _OUTLIER:
            shown, usual = (" × ".join(f"{v:g}" for v in values) for values in (spacing, median))
            text = f"spacing {shown} mm (Z, Y, X), the dataset's median is {usual}"
            findings.append(Finding("warning", name, "spacing", text, "is the header right? Else leave the case out"))
    return findings


def _duplicates(seen: dict[str, _Seen]) -> list[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, look in seen.items():
        if look.digest is not None:
            groups[look.digest].append(name)
    return [
        Finding("warning", names[0], "duplicates", f"the same image as {_some(names[1:])}", "keep one of them")
        for names in (sorted(group) for group in groups.values())
        if len(names) > 1
    ]


def _leakage(folder: Path, names: Sequence[str], owner: Callable[[str], str | None]) -> list[Finding]:
    """Subjects on both sides of a fold; and several cases of a subject without folds that keep them together."""
    path = folder / SPLITS_FILE
    owners = {name: owner(name) for name in names}
    if not path.is_file():
        repeated = sorted(s for s, count in Counter(o for o in owners.values() if o).items() if count > 1)
        if not repeated:
            return []
        text = f"{len(repeated)} subjects have several cases ({_some(repeated)}), and there is no {SPLITS_FILE}"
        return [Finding("warning", "-", "leakage", text, f"write {path} with each subject on one side of every fold")]
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        sides = [(set(split["train"]), set(split["val"])) for split in splits]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "correct it, or remove it to get nnU-Net's own folds"
        return [Finding("error", "-", "folds", f"{path} is no list of train/val folds ({error})", fix)]
    findings = []
    for fold, (train, val) in enumerate(sides):
        unknown = sorted((train | val) - set(names))
        if unknown:
            text = f"{SPLITS_FILE}: fold {fold} names cases that are missing or incomplete: {_some(unknown)}"
            findings.append(Finding("error", "-", "folds", text, "correct it, or remove it to get nnU-Net's own folds"))
        if both := sorted(train & val):
            text = f"{SPLITS_FILE}: fold {fold} validates on training cases: {_some(both)}"
            findings.append(Finding("error", "-", "leakage", text, "take them out of 'train'"))
        sided = [{who for name in side if (who := owners.get(name))} for side in (train, val)]
        shared = sorted(sided[0] & sided[1])
        if shared:
            text = f"{SPLITS_FILE}: fold {fold} has subjects on both sides: {_some(shared)}"
            findings.append(Finding("error", "-", "leakage", text, "move all cases of a subject to one side"))
    return findings


def _owner_function(expression: str | None) -> Callable[[str], str | None]:
    try:
        compiled = re.compile(expression or _BIDS_SUBJECT)
    except re.error as error:
        raise ConfigurationError(f"--subject {expression!r} is no regular expression: {error}") from None

    def owner(name: str) -> str | None:
        match = compiled.search(name)
        return None if match is None else match.group(1) if match.groups() else match.group()

    return owner


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
