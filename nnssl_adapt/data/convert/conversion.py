"""What every conversion does: copy case after case into a new raw dataset, so that it can be stopped and gone on with.

A case is done when its note lies in ``.nnssl_adapt/converted``; ``dataset.json`` is written when all cases are. So a
conversion that was broken off is no dataset yet, and the same command goes on with it.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnssl_adapt.data.convert.bring import bring
from nnssl_adapt.data.convert.cases import SourceCase, Target
from nnssl_adapt.data.convert.dataset_json import write_dataset_json
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import (
    distinct_values,
    geometry_doubts,
    geometry_problems,
    read_and_repair_labels,
    read_geometry,
)
from nnssl_adapt.errors import CaseError, ConfigurationError, DatasetError
from nnssl_adapt.files import TEMPORARY_PREFIX, write_json, write_text
from nnssl_adapt.machine.workers import over_cases
from nnssl_adapt.text import lines_and_more, read_record

logger = logging.getLogger(__name__)

_NOTES = Path(".nnssl_adapt") / "converted"
_MARKER = Path(".nnssl_adapt") / "conversion.json"
_TABLE = "conversion"
_COLUMNS = ("case", "subject", "target", "source", "volume")


def convert_cases(
    kind: str, source: str, target: Target, cases: Sequence[SourceCase], workers: int = 1, progress: bool | None = None
) -> dict[str, list[int]]:
    """Copy all cases that are not there yet, and write the table of who became what (``conversion.json`` and ``.csv``).

    Returns:
        Case → its distinct label values (for cases with labels).

    Raises:
        ConfigurationError: the target folder is something else's.
        DatasetError: cases that could not be converted (all listed; the others are done and kept).
        OutputError: the target can't be written.
    """
    _refuse_same_targets(cases)
    _refuse_sources_inside(target.folder, cases)
    _claim(target.folder, {"kind": kind, "source": source})
    _remove_orphans(target.folder, cases)
    values: dict[str, list[int]] = {}
    problems = []
    tasks = [(case_key(case), (case, target)) for case in cases]
    needs = {case_key(case): memory_to_convert(case) for case in cases}
    for outcome in over_cases(convert_case, tasks, workers, "Converting", progress, needs):
        if outcome.error is not None:
            problems.append(f"{outcome.identifier}: {outcome.complaint}")
            continue
        found, doubts = outcome.value
        for doubt in doubts:
            logger.warning("%s", doubt)
        values[outcome.identifier] = found
    if problems:
        others = " (the others were)" if len(problems) < len(cases) else ""
        raise DatasetError(
            f"{len(problems)} of {len(cases)} cases could not be converted{others}; correct them and run the same command "
            "again:\n" + lines_and_more(sorted(problems)),
            mistakes=sorted(problems),
        )
    _write_table(target.folder, kind, source, cases)
    return values


def finish(target: Target, channel_names: Any, labels: Any, ending: str, **more: Any) -> RawDataset:
    """Write ``dataset.json`` for what was converted, and open the dataset."""
    number = len(list((target.folder / "labelsTr").glob(f"*{ending}")))
    write_dataset_json(target.folder, channel_names, labels, number, ending, **more)
    return RawDataset.open(target.folder)


# -- one case -------------------------------------------------------------------------------------------------------


def case_key(case: SourceCase) -> str:
    """Unique among training and test cases, which may share names."""
    return case.identifier if case.part == "Tr" else f"{case.part}:{case.identifier}"


def memory_to_convert(case: SourceCase) -> int:
    """Bytes that :func:`convert_case` takes at most, from the header alone; 0 where that can't be read (converting will tell)."""
    try:
        voxels = math.prod(read_geometry(case.images[0].source).size)
    except CaseError:
        return 0
    volumes = max(len(file.targets) for file in case.images)
    return voxels * (8 * volumes + 10)  # as read, as SimpleITK holds it, and the labels


def convert_case(case: SourceCase, target: Target) -> tuple[list[int], list[str]]:
    """Check and copy one case; nothing of it stays behind when that fails. Return its label values and doubts."""
    note = target.folder / _NOTES / f"{case.part}_{case.identifier}.json"
    kept = read_record(note)
    if kept.get("state") == _state(case, target) and isinstance(kept.get("values"), list):
        return list(kept["values"]), []
    note.unlink(missing_ok=True)
    doubts = _check(case)
    values: list[int] = []
    if case.label is not None:
        labels, _, repaired = read_and_repair_labels(case.label.source)
        values = distinct_values(labels)
        if repaired:
            doubts.append(
                f"{case.label.source}: {repaired} voxels were a rounding error away from a whole number: repaired in the copy"
            )
    try:
        for file in case.files:
            bring(file, target)
        write_json(note, {"state": _state(case, target), "values": values})
    except BaseException:
        for file in case.files:
            for name in file.targets:
                (target.folder / name).unlink(missing_ok=True)
        raise
    return values, doubts


def _check(case: SourceCase) -> list[str]:
    """Raise CaseError for grids that don't fit together; return what may be a mistake."""
    reference = read_geometry(case.images[0].source)
    doubts = []
    for file in case.files[1:]:
        geometry = read_geometry(file.source)
        for problem in geometry_problems(reference, geometry):
            raise CaseError(
                f"{file.source}: {problem} from that of {case.images[0].source}; all files of a case must share one grid: "
                "resample it first"
            )
        doubts += [
            f"{case.identifier}: {file.source}: {doubt} from that of {case.images[0].source}; are they aligned?"
            for doubt in geometry_doubts(reference, geometry)
        ]
    return doubts


def _state(case: SourceCase, target: Target) -> dict[str, Any]:
    """What a finished case's note says: of which files it was made, how, and how large the copies are."""
    state = []
    for file in case.files:
        source = file.source.stat()
        sizes = [place.stat().st_size if (place := target.folder / name).is_file() else -1 for name in file.targets]
        values = [list(pair) for pair in file.renumbered]
        state.append([str(file.source), source.st_size, source.st_mtime_ns, list(file.targets), sizes, values])
    return {"files": state, "link": target.link}


# -- the target as a whole ------------------------------------------------------------------------------------------


def _claim(folder: Path, marker: dict[str, str]) -> None:
    """Only a folder that the same conversion began may be gone on with, without the half-written files of one that was killed."""
    if folder.exists() and read_record(folder / _MARKER) != marker and any(folder.iterdir()):
        raise ConfigurationError(
            f"{folder} exists and was not made by this conversion: choose another dataset with -d and --name, or remove it"
        )
    write_json(folder / _MARKER, marker)
    (folder / "dataset.json").unlink(missing_ok=True)  # until all cases are there, it is no dataset
    for left in folder.glob(f"*/{TEMPORARY_PREFIX}*"):  # nnU-Net would take them for cases
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _remove_orphans(folder: Path, cases: Sequence[SourceCase]) -> None:
    """Files of cases that are no longer in the source would be trained on."""
    wanted = {f"{case.part}_{case.identifier}.json" for case in cases}
    for note in sorted((folder / _NOTES).glob("*.json")):
        if note.name in wanted:
            continue
        content = read_record(note)
        for name in _noted_targets(content):
            (folder / name).unlink(missing_ok=True)
        logger.warning("%s: no longer in the source, removed", note.stem)
        note.unlink()


def _noted_targets(note: dict[str, Any]) -> list[str]:
    """The files that a case's note says it became; none of a note that is not ours, or of files elsewhere."""
    try:
        names = [str(name) for file in note["state"]["files"] for name in file[3]]
    except (KeyError, TypeError, IndexError):
        return []
    return [name for name in names if re.fullmatch(r"(images|labels)T[rs]/[^/]+", name)]


def _refuse_same_targets(cases: Sequence[SourceCase]) -> None:
    taken: dict[str, Path] = {}
    for case in cases:
        for file in case.files:
            for name in file.targets:
                if name in taken:
                    raise DatasetError(f"{taken[name]} and {file.source} would both become {name}: rename one of them")
                taken[name] = file.source


def _refuse_sources_inside(folder: Path, cases: Sequence[SourceCase]) -> None:
    for case in cases:
        for file in case.files:
            if folder.resolve() in file.source.resolve().parents:
                raise ConfigurationError(f"{file.source} lies in the target {folder}: choose another dataset with -d")


def _write_table(folder: Path, kind: str, source: str, cases: Sequence[SourceCase]) -> None:
    rows = [
        (case.identifier, case.subject or "", name, str(file.source), str(number) if len(file.targets) > 1 else "")
        for case in cases
        for file in case.files
        for number, name in enumerate(file.targets)
    ]
    write_json(
        folder / f"{_TABLE}.json",
        {"kind": kind, "source": source, "files": [dict(zip(_COLUMNS, row, strict=True)) for row in rows]},
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(rows)
    write_text(folder / f"{_TABLE}.csv", text.getvalue())
