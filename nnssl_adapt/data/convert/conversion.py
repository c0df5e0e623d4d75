"""What every conversion does: copy case after case into a new raw dataset, so that it can be stopped and gone on with.

A case is done when its note lies in ``.nnssl_adapt/converted``; ``dataset.json`` is written when all cases are. So a
conversion that was broken off is no dataset yet, and the same command goes on with it.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from nnssl_adapt.data.convert.dataset_json import write_dataset_json
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import (
    FLAT_IMAGE_ENDINGS,
    count_channels,
    distinct_values,
    geometry_doubts,
    geometry_problems,
    read_geometry,
    read_image,
    read_labels,
)
from nnssl_adapt.data.parallel import over_cases
from nnssl_adapt.errors import CaseError, ConfigurationError, DatasetError, DatasetNotFound, OutputError
from nnssl_adapt.files import TEMPORARY_PREFIX, atomic_path, explain_write_errors, make_folder, write_json, write_text
from nnssl_adapt.paths import find_dataset_name, raw_folder

logger = logging.getLogger(__name__)

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
LINKS = ("symbolic", "hard")
_NOTES = Path(".nnssl_adapt") / "converted"
_MARKER = Path(".nnssl_adapt") / "conversion.json"
_TABLE = "conversion"
_COLUMNS = ("case", "subject", "target", "source", "volume")


@dataclass(frozen=True)
class SourceFile:
    """One source file and the files it becomes: one, or one for each volume of a 4D image (paths in the dataset)."""

    source: Path
    targets: tuple[str, ...]


@dataclass(frozen=True)
class SourceCase:
    """One case: its image files in channel order, its label, and whose it is (for folds that keep subjects together)."""

    identifier: str
    part: str
    images: tuple[SourceFile, ...]
    label: SourceFile | None = None
    subject: str | None = None

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """All of them."""
        return self.images if self.label is None else (*self.images, self.label)


@dataclass(frozen=True)
class Target:
    """The dataset to write.

    Attributes:
        folder: ``nnUNet_raw/DatasetNNN_Name``.
        link: None to copy; ``symbolic`` or ``hard`` to link files that need no rewriting.
    """

    folder: Path
    link: str | None = None

    @classmethod
    def named(cls, number: int, name: str, link: str | None = None) -> Target:
        """Dataset ``number`` called ``name`` in ``nnUNet_raw``. Raises ConfigurationError when either is no good or taken."""
        if not 1 <= number <= 999:
            raise ConfigurationError(f"dataset id {number}: expected a number from 1 to 999")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ConfigurationError(
                f"dataset name {name!r}: expected letters, digits, '_', '-' and '.', e.g. SpinalCord"
            )
        if link is not None and link not in LINKS:
            raise ConfigurationError(f"link {link!r}: expected one of {', '.join(LINKS)}")
        folder = raw_folder() / f"Dataset{number:03d}_{name}"
        try:
            taken = find_dataset_name(number)
        except DatasetNotFound as error:
            if "several names" in str(error):
                raise ConfigurationError(str(error)) from None
            taken = folder.name
        if taken != folder.name:
            raise ConfigurationError(f"dataset id {number} is taken by {taken}: choose another with -d")
        return cls(folder, link)


def training_case(
    identifier: str,
    images: Sequence[Path],
    label: Path | None,
    ending: str,
    subject: str | None = None,
    part: str = "Tr",
) -> SourceCase:
    """A case under nnU-Net's names. A single 4D image becomes a file for each of its volumes. Raises CaseError."""
    if len(images) == 1 and (volumes := count_channels(images[0])) > 1:
        names = tuple(f"images{part}/{identifier}_{number:04d}{ending}" for number in range(volumes))
        sources: tuple[SourceFile, ...] = (SourceFile(images[0], names),)
    else:
        sources = tuple(
            SourceFile(path, (f"images{part}/{identifier}_{number:04d}{ending}",)) for number, path in enumerate(images)
        )
    labelled = None if label is None else SourceFile(label, (f"labels{part}/{identifier}{ending}",))
    return SourceCase(identifier, part, sources, labelled, subject)


def ending_of(path: Path) -> str:
    """The image ending of a file. Raises CaseError for formats we don't read."""
    name = path.name.lower()
    for ending in ENDINGS:
        if name.endswith(ending):
            return ending
    kind = "2D pictures are not supported" if name.endswith(FLAT_IMAGE_ENDINGS) else "not a supported format"
    raise CaseError(f"{path}: {kind}; convert them to one of {', '.join(ENDINGS)}")


def common_ending(paths: Iterable[Path]) -> str:
    """The one that all files have, else ``.nii.gz``, into which the others will be rewritten. Raises CaseError."""
    endings = {ending_of(path) for path in paths}
    return endings.pop() if len(endings) == 1 else ".nii.gz"


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
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DatasetError(
            f"{len(problems)} of {len(cases)} cases could not be converted (the others were); mend them and run the same "
            "command again:\n  " + "\n  ".join(sorted(problems)[:20]) + more
        )
    _write_table(target.folder, kind, source, cases)
    return values


def finish(target: Target, channel_names: Any, labels: Any, ending: str, **more: Any) -> RawDataset:
    """Write ``dataset.json`` for what was converted, and open the dataset."""
    number = len(list((target.folder / "labelsTr").glob(f"*{ending}")))
    write_dataset_json(target.folder, channel_names, labels, number, ending, **more)
    return RawDataset.open(target.folder)


def named_labels(values: Mapping[str, Sequence[int]], names: Mapping[str, int] | None) -> dict[str, int]:
    """The label table: the names given, or ``label_1``, … for what the files hold.

    Raises DatasetError when values are not consecutive from 0, or files hold values without a name (lists the cases).
    """
    found = sorted({value for some in values.values() for value in some})
    if names is not None:
        strange = {
            case: sorted(set(some) - set(names.values()))
            for case, some in values.items()
            if set(some) - set(names.values())
        }
        if strange:
            listed = "; ".join(f"{case}: {', '.join(map(str, some))}" for case, some in sorted(strange.items())[:10])
            raise DatasetError(f"label values without a name ({listed}): name them all with --label-names NAME=VALUE")
        return dict(names)
    table = sorted({0, *found})
    if table != list(range(len(table))):
        raise DatasetError(
            f"the labels hold the values {', '.join(map(str, table[:20]))}; nnU-Net needs 0 (background), 1, 2, … without a "
            "gap: renumber them in your files, or name all values with --label-names if some are missing by chance"
        )
    return {"background" if value == 0 else f"label_{value}": value for value in table}


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
    kept = _read_json(note)
    if isinstance(kept, dict) and kept.get("state") == _state(case, target):
        return list(kept["values"]), []
    note.unlink(missing_ok=True)
    doubts = _check(case)
    values = [] if case.label is None else distinct_values(read_labels(case.label.source)[0])
    try:
        for file in case.files:
            _bring(file, target)
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
            raise CaseError(f"{file.source}: {problem} than that of {case.images[0].source}")
        doubts += [
            f"{case.identifier}: {file.source}: {doubt} than that of {case.images[0].source}; are they aligned?"
            for doubt in geometry_doubts(reference, geometry)
        ]
    return doubts


def _bring(file: SourceFile, target: Target) -> None:
    """Link, copy, rewrite in another format, or split one file."""
    places = [target.folder / name for name in file.targets]
    if len(places) > 1 or (file.targets[0].startswith("images") and _is_4d(file.source)):
        read_image([file.source])  # a truncated 4D file would otherwise be filled up with zeros
        image = sitk.ReadImage(str(file.source))
        for number, place in enumerate(places):
            _write(image[..., number], place)
    elif ending_of(file.source) != ending_of(places[0]):
        read_image([file.source])
        _write(sitk.ReadImage(str(file.source)), places[0])
    elif target.link is None:
        if file.targets[0].startswith("images"):
            read_image([file.source])  # what is damaged should not be found out in training
        with atomic_path(places[0]) as temporary:
            shutil.copyfile(file.source, temporary)
    else:
        _link(file.source, places[0], target.link)


def _is_4d(path: Path) -> bool:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return bool(reader.GetDimension() == 4)


def _write(image: sitk.Image, place: Path) -> None:
    with atomic_path(place) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), True)
        except RuntimeError as error:
            raise OutputError(f"can't write {place}: {str(error).strip().splitlines()[-1]}") from error


def _link(source: Path, place: Path, kind: str) -> None:
    """A link under a temporary name first, so that an older file is replaced in one step."""
    make_folder(place.parent)
    with explain_write_errors(place), tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=place.parent) as folder:
        temporary = Path(folder) / place.name
        try:
            if kind == "symbolic":
                temporary.symlink_to(source.resolve())
            else:
                os.link(source.resolve(), temporary)
        except OSError as error:
            raise OutputError(
                f"can't make a {kind} link {place} to {source} ({error.strerror}): leave --link out to copy"
            ) from error
        temporary.replace(place)


def _state(case: SourceCase, target: Target) -> dict[str, Any]:
    """What a finished case's note says: of which files it was made, how, and how large the copies are."""
    state = []
    for file in case.files:
        source = file.source.stat()
        sizes = [place.stat().st_size if (place := target.folder / name).is_file() else -1 for name in file.targets]
        state.append([str(file.source), source.st_size, source.st_mtime_ns, list(file.targets), sizes])
    return {"files": state, "link": target.link}


# -- the target as a whole ------------------------------------------------------------------------------------------


def _claim(folder: Path, marker: dict[str, str]) -> None:
    """Only a folder that the same conversion began may be gone on with, without the half-written files of one that was killed."""
    if folder.exists() and _read_json(folder / _MARKER) != marker and any(folder.iterdir()):
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
        content = _read_json(note)
        for _, _, _, targets, _ in (content or {}).get("state", {}).get("files", []):
            for name in targets:
                (folder / name).unlink(missing_ok=True)
        logger.warning("%s: no longer in the source, removed", note.stem)
        note.unlink()


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
