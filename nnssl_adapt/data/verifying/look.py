"""One look at a case: its files are read once, and what is wrong with them and what they measure comes out together."""

from __future__ import annotations

import json
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from nnssl_adapt.data.dataset import RawCase
from nnssl_adapt.data.images import ImageGeometry, OpenImage, distinct_values, read_labels
from nnssl_adapt.data.labels import label_problem
from nnssl_adapt.data.nifti_header import placement_doubt
from nnssl_adapt.data.store import describe_source
from nnssl_adapt.data.verifying.findings import Finding
from nnssl_adapt.data.verifying.grids import TOLERANCE, compare_grids
from nnssl_adapt.data.verifying.measures import CaseMeasures, measured
from nnssl_adapt.data.voxels import FractionalLabels
from nnssl_adapt.errors import CaseError
from nnssl_adapt.files import atomic_path


@dataclass(frozen=True)
class LookRequest:
    """What to look for in a case.

    Attributes:
        labels: values that a label file may have.
        draws: foreground intensities to draw for the fingerprint; None: measure nothing.
        tolerance: grids that differ by less (in voxels; cosines) differ by rounding only.
        fix_geometry: give files that differ by rounding only the header of the first channel.
    """

    labels: tuple[int, ...]
    draws: int | None = None
    tolerance: float = TOLERANCE
    fix_geometry: bool = False


@dataclass(frozen=True)
class CaseLook:
    """What one case looks like.

    Attributes:
        findings: what is wrong or doubtful.
        orientation: code of the first channel, None where it can't be read.
        spacing: of the first channel, mm (Z, Y, X).
        digest: equal for equal images; None where a channel can't be read.
        measures: for the fingerprint; None where they were not asked for, or the case has errors.
    """

    findings: tuple[Finding, ...] = ()
    orientation: str | None = None
    spacing: tuple[float, ...] | None = None
    digest: str | None = None
    measures: CaseMeasures | None = None

    def save(self, path: Path, made_of: str) -> None:
        """Write it as ``.npz``, whole or not at all; ``made_of`` says of what."""
        arrays: dict[str, Any] = {} if self.measures is None else self.measures.to_arrays()
        said = {
            "findings": [asdict(finding) for finding in self.findings],
            "orientation": self.orientation,
            "spacing": self.spacing,
            "digest": self.digest,
        }
        with atomic_path(path) as temporary:
            np.savez(temporary, said=json.dumps(said), made_of=made_of, **arrays)

    @classmethod
    def load(cls, path: Path, made_of: str) -> CaseLook | None:
        """Read what :meth:`save` wrote; None if it is missing, damaged or made of something else."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if str(arrays["made_of"]) != made_of:
                    return None
                said = json.loads(str(arrays["said"]))
                return cls(
                    findings=tuple(Finding(**finding) for finding in said["findings"]),
                    orientation=said["orientation"],
                    spacing=None if said["spacing"] is None else tuple(said["spacing"]),
                    digest=said["digest"],
                    measures=CaseMeasures.from_arrays(arrays) if "shape" in arrays else None,
                )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None


def look_at_case(case: RawCase, request: LookRequest, parts: Path | None = None) -> CaseLook:
    """Read each file of a case once; say what is wrong with them, and measure the case where nothing is.

    With ``parts``, a folder, what was seen is kept there, and taken from there if the case's files have not changed.
    Raises OutputError if a header has to be fixed, or something kept, and can't be written.
    """
    if parts is None:
        return _seen(case, request)
    try:
        sources = [describe_source(path) for path in case.files]
    except OSError:  # a link that leads nowhere: there is nothing to compare it with next time
        return _seen(case, request)
    made_of = json.dumps({"request": asdict(request), "reader": case.reader, "sources": sources})
    path = parts / f"{case.identifier}.npz"
    look = CaseLook.load(path, made_of)
    if look is None:
        look = _seen(case, request)
        with suppress(FileNotFoundError):  # another process was done first, and has removed the folder
            look.save(path, made_of)
    return look


@dataclass
class _Reading:
    """What has been read of a case so far."""

    case: RawCase
    request: LookRequest
    findings: list[Finding] = field(default_factory=list)
    channels: list[np.ndarray] = field(default_factory=list)
    labels: np.ndarray | None = None
    reference: ImageGeometry | None = None
    digest: int | None = 0

    def add(self, path: Path) -> None:
        """Read one more file."""
        try:
            geometry = self._read_labels(path) if path == self.case.label else self._read_image(path)
        except CaseError as error:
            self.findings.append(unreadable(self.case.identifier, path, error))
            if path != self.case.label:
                self.digest = None
            return
        if (doubt := placement_doubt(path)) is not None:
            self._warn("header", f"{path}: {doubt}", "look at it beside its label, and write one header for both")
        if self.reference is None:
            self.reference = geometry
            return
        tolerance, fix = self.request.tolerance, self.request.fix_geometry
        self.findings += compare_grids(self.case, path, self.reference, geometry, tolerance, fix)

    def _read_image(self, path: Path) -> ImageGeometry:
        opened = OpenImage.open(path, self.case.reader)
        geometry = opened.geometry
        voxels = np.empty((opened.channels or 1, *geometry.size), np.float32)
        extremes = opened.read(voxels)
        if self.digest is not None:
            self.digest = isal_zlib.crc32(voxels.data, isal_zlib.crc32(str(voxels.shape).encode(), self.digest))
        if extremes.low == extremes.high:
            text = f"{path} is {extremes.low:g} everywhere"
            self._warn("constant", text, "is this the right image?")
        self.channels += list(voxels)
        return geometry

    def _read_labels(self, path: Path) -> ImageGeometry:
        labels, geometry = read_labels(path, self.case.reader)
        values = distinct_values(labels)
        if values == [0]:
            fix = "fine if there is nothing to segment; else the wrong file"
            self._warn("labels", f"{path} has no foreground", fix)
        elif (text := label_problem(path, values, self.request.labels)) is not None:
            fix = "add them to 'labels' in dataset.json, or correct the file"
            self.findings.append(Finding("error", self.case.identifier, "labels", text, fix))
        self.labels = labels[0]
        return geometry

    def _warn(self, check: str, text: str, fix: str) -> None:
        self.findings.append(Finding("warning", self.case.identifier, check, text, fix))

    def measures(self) -> CaseMeasures | None:
        wrong = any(finding.level == "error" for finding in self.findings)
        if self.request.draws is None or self.labels is None or self.reference is None or wrong:
            return None
        return measured(self.channels, self.labels, self.reference.spacing, self.request.draws)


def _seen(case: RawCase, request: LookRequest) -> CaseLook:
    reading = _Reading(case, request)
    for path in case.files:
        reading.add(path)
        if request.draws is None:
            reading.channels.clear()  # one file at a time in memory
    reference = reading.reference
    return CaseLook(
        findings=tuple(reading.findings),
        orientation=None if reference is None else reference.orientation,
        spacing=None if reference is None else reference.spacing,
        digest=None if reading.digest is None else f"{reading.digest:08x}",
        measures=reading.measures(),
    )


def unreadable(identifier: str, path: Path, error: CaseError) -> Finding:
    """What is said of a file that can't be read, with the fix that fits."""
    if isinstance(error, FractionalLabels) and error.by_rounding:
        fix = "rounding only: --fix makes a copy of the dataset with such labels repaired"
        return Finding("error", identifier, "rounding", str(error), fix)
    said = str(error).replace(str(path), "")
    check = next((check for check in ("NaN", "whole numbers") if check in said), "readable")
    fix = {
        "NaN": "replace those voxels in the file, e.g. by 0",
        "whole numbers": "threshold it, or resample it with nearest neighbours",
    }.get(check, "copy or make the file again")
    if path.is_symlink() and not path.exists():
        fix = "this link leads nowhere: get the file (git-annex, DataLad: git annex get), or remove the case's files"
    return Finding("error", identifier, check, str(error), fix)
