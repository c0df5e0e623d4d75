"""Is a raw dataset fit for training? Every problem at once, each with its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnssl_adapt.data.dataset import MAX_LISTED, RawCase, RawDataset
from nnssl_adapt.data.images import (
    ImageGeometry,
    distinct_values,
    geometry_doubts,
    geometry_problems,
    read_geometry,
    read_image,
    read_labels,
)
from nnssl_adapt.data.labels import label_problem
from nnssl_adapt.errors import CaseError, DatasetError
from nnssl_adapt.machine.workers import over_cases


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of a case; ``message`` names the file."""

    case: str
    file: Path
    message: str

    def __str__(self) -> str:
        return f"{self.case}: {self.message}"


@dataclass(frozen=True)
class VerificationReport:
    """What :func:`verify_dataset` found. Problems prevent training; warnings may be meant so."""

    dataset: str
    num_cases: int
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()

    def raise_if_bad(self) -> None:
        """Raise DatasetError with the problems (the first twenty) if there are any."""
        if self.problems:
            raise DatasetError(str(self))

    def __str__(self) -> str:
        if not self.problems:
            return f"{self.dataset}: {self.num_cases} cases, no problems, {len(self.warnings)} warning(s)"
        bad = len({problem.case for problem in self.problems})
        lines = [f"{self.dataset}: {bad} of {self.num_cases} cases can't be used, correct or remove them:"]
        lines += [f"  {problem}" for problem in self.problems[:MAX_LISTED]]
        if len(self.problems) > MAX_LISTED:
            lines.append(f"  ... and {len(self.problems) - MAX_LISTED} more problems")
        return "\n".join(lines)


def verify_dataset(dataset: RawDataset, workers: int = 1, progress: bool | None = None) -> VerificationReport:
    """Read every image and label of a dataset and report everything that is wrong.

    Problems: files that can't be read or are truncated; NaN or infinite voxels; channels or labels on another grid (shape,
    or spacing beyond nnU-Net's tolerance); label values that dataset.json does not have; labels without image. Warnings: another
    origin or direction; labels without foreground; images of zeros; another number of cases than ``numTraining`` says.
    """
    expected = dataset.labels.values_in_files
    tasks = [(case.identifier, (case, expected)) for case in dataset.cases]
    found: dict[str, tuple[list[Problem], list[str]]] = {}
    for outcome in over_cases(_verify_case, tasks, workers, "Verifying", progress):
        if outcome.error is not None:
            case = next(case for case in dataset.cases if case.identifier == outcome.identifier)
            found[case.identifier] = ([Problem(case.identifier, case.images[0], outcome.complaint)], [])
        else:
            found[outcome.identifier] = outcome.value
    warnings = [] if (text := _count_warning(dataset)) is None else [text]
    problems = _labels_without_image(dataset)
    for case in dataset.cases:
        problems += found[case.identifier][0]
        warnings += found[case.identifier][1]
    return VerificationReport(dataset.name, len(dataset.cases), tuple(problems), tuple(warnings))


def _count_warning(dataset: RawDataset) -> str | None:
    announced = dataset.json.num_training
    if announced is None or announced == len(dataset.cases):
        return None
    return f"{dataset.folder / 'dataset.json'}: 'numTraining' is {announced}, but there are {len(dataset.cases)} cases"


def _labels_without_image(dataset: RawDataset) -> list[Problem]:
    """Cases come from image files, so that a label whose image is missing would silently be left out of training."""
    if dataset.json.dataset is not None:  # dataset.json names the files itself
        return []
    known = {case.identifier for case in dataset.cases}
    folder, ending = dataset.folder / "labelsTr", dataset.file_ending
    lonely = sorted(p for p in folder.glob(f"*{ending}") if p.name.removesuffix(ending) not in known)
    return [
        Problem(name, path, f"{path} has no image: {dataset.folder / 'imagesTr' / f'{name}_0000{ending}'} is missing")
        for path in lonely
        if not (name := path.name.removesuffix(ending)).startswith(".")
    ]


def _verify_case(case: RawCase, expected: tuple[int, ...]) -> tuple[list[Problem], list[str]]:
    problems: list[Problem] = []
    warnings: list[str] = []
    reference: ImageGeometry | None = None
    for path in case.files:
        try:
            geometry = read_geometry(path)
        except CaseError as error:
            problems.append(Problem(case.identifier, path, str(error)))
            continue
        reference = reference or geometry
        for text in geometry_problems(reference, geometry):
            problems.append(Problem(case.identifier, path, f"{path}: {text} than that of {case.images[0]}"))
        for text in geometry_doubts(reference, geometry):
            warnings.append(f"{case.identifier}: {path}: {text} than that of {case.images[0]}; are they aligned?")
        try:
            if path == case.label:
                problems += _verify_labels(case.identifier, path, expected, warnings)
            elif not read_image([path])[0].any():
                warnings.append(f"{case.identifier}: {path} is zero everywhere")
        except CaseError as error:
            problems.append(Problem(case.identifier, path, str(error)))
    return problems, warnings


def _verify_labels(identifier: str, path: Path, expected: tuple[int, ...], warnings: list[str]) -> list[Problem]:
    values = distinct_values(read_labels(path)[0])
    if values == [0]:
        warnings.append(f"{identifier}: {path} has no foreground, only background")
    text = label_problem(path, values, expected)
    return [] if text is None else [Problem(identifier, path, text)]
