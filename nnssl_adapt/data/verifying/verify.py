"""Everything that may be wrong with a raw dataset, as one table: what, where, and how to mend it."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnssl_adapt.data.dataset import DatasetJson, RawCase
from nnssl_adapt.data.images import (
    ImageGeometry,
    distinct_values,
    read_geometry,
    read_image,
    read_labels,
)
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.verifying.case_measures import memory_to_measure
from nnssl_adapt.data.verifying.files import Finding, find_cases
from nnssl_adapt.data.verifying.together import Seen, compare_cases, owner_function
from nnssl_adapt.errors import CaseError, ConfigurationError, OutputError
from nnssl_adapt.files import atomic_path
from nnssl_adapt.geometry.orientation import orientation_code
from nnssl_adapt.machine.workers import over_cases

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Default: what rounding explains, as a fraction of a voxel (origin, spacing) and of the cosines (direction)."""

_EXACT = 1e-6


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
        fix_geometry: give labels and further channels whose grid differs by rounding only the header of the first channel.
            Their voxels stay.
        subject: regular expression that finds the subject in a case's name (default: BIDS' ``sub-…``).

    Raises:
        DatasetJsonError: dataset.json is missing or wrong (labels not consecutive, say): nothing else can be judged.
        ConfigurationError: ``subject`` is no regular expression, or the tolerance no number below half a voxel.
    """
    if not 0 <= tolerance < 0.5:
        raise ConfigurationError(f"tolerance {tolerance}: expected a fraction of a voxel, from 0 to below 0.5")
    owner = owner_function(subject)
    description = DatasetJson.load(folder / "dataset.json")
    scheme = LabelScheme.from_dataset_json(description.raw, folder / "dataset.json")
    cases, findings = find_cases(folder, description)
    seen: dict[str, Seen] = {}
    tasks = [(case.identifier, (case, tuple(scheme.values_in_files), tolerance, fix_geometry)) for case in cases]
    needs = {case.identifier: memory_to_measure(case, 0) for case in cases}
    for outcome in over_cases(look_at_case, tasks, workers, "Verifying", progress, needs):
        if outcome.error is not None:
            finding = Finding("error", outcome.identifier, "readable", outcome.complaint, "copy or make the file again")
            seen[outcome.identifier] = Seen([finding])
        else:
            seen[outcome.identifier] = outcome.value
    for identifier in sorted(seen):
        findings += seen[identifier].findings
    findings += compare_cases(folder, seen, [case.identifier for case in cases], owner)
    findings.sort(key=lambda finding: (finding.level, finding.case))
    return Verdict(folder.name, len(cases), tuple(findings))


# -- one case -------------------------------------------------------------------------------------------------------


def look_at_case(case: RawCase, expected: tuple[int, ...], tolerance: float, fix_geometry: bool) -> Seen:
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
            said = str(error).replace(str(path), "")
            check = next((check for check in ("NaN", "whole numbers") if check in said), "readable")
            fix = {
                "NaN": "replace those voxels in the file, e.g. by 0",
                "whole numbers": "threshold it, or resample it with nearest neighbours",
            }.get(check, "copy or make the file again")
            if path.is_symlink() and not path.exists():
                fix = "this link leads nowhere: get the file (git-annex, DataLad: git annex get), or remove the case's files"
            findings.append(Finding("error", case.identifier, check, str(error), fix))
            continue
        if reference is None:
            reference = geometry
        else:
            findings += _compare(case, path, reference, geometry, tolerance, fix_geometry)
    if reference is None:
        return Seen(findings)
    code = orientation_code(reference.direction)
    return Seen(findings, code, reference.spacing, digest.hexdigest() if complete else None)


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
    # As nnU-Net: another spacing can't be used, another origin or direction is only suspicious.
    level = "warning" if np.allclose(image.spacing, other.spacing) else "error"
    if distance <= tolerance:
        if fix_geometry:
            copy_header(case.images[0], path)
            logger.info("%s: has the header of %s now", path, case.images[0].name)
            return []
        return [Finding(level, case.identifier, "geometry", text, "rounding only: --fix-geometry")]
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
    """Write a label (or another channel) again with the image's spacing, origin and direction; voxels and their type stay.

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
