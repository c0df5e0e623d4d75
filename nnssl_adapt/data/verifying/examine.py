"""Is a raw dataset fit for training, and what is it like? Every file is read once, for the verdict and the fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnssl_adapt.data.dataset import DatasetJson, RawDataset
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.verifying.files import find_cases
from nnssl_adapt.data.verifying.findings import Finding, Verdict
from nnssl_adapt.data.verifying.fingerprint import TOTAL_DRAWS, DatasetFingerprint
from nnssl_adapt.data.verifying.grids import TOLERANCE
from nnssl_adapt.data.verifying.look import CaseLook, LookRequest, look_at_case
from nnssl_adapt.data.verifying.measures import CaseMeasures, memory_to_measure
from nnssl_adapt.data.verifying.together import compare_cases, owner_function
from nnssl_adapt.errors import ConfigurationError, DatasetError
from nnssl_adapt.machine.workers import over_cases


@dataclass(frozen=True)
class Examination:
    """What was found in a dataset, and its fingerprint (None where it was not asked for or there are errors)."""

    verdict: Verdict
    fingerprint: DatasetFingerprint | None


def examine_dataset(
    folder: Path,
    workers: int = 1,
    progress: bool | None = None,
    parts: Path | None = None,
    tolerance: float = TOLERANCE,
    fix_geometry: bool = False,
    subject: str | None = None,
    measure: bool = True,
    title: str = "Verifying and measuring",
) -> Examination:
    """Check every file of a raw dataset and how the cases go together, and measure it as ``nnUNetv2_extract_fingerprint`` does.

    The command ``nnssl-adapt verify`` and the check before preprocessing are this function, so that both apply the same rules.
    The same voxels are drawn as by nnU-Net, so that percentiles, minimum and maximum are equal to nnU-Net's; mean and
    standard deviation are summed in double precision.

    Args:
        folder: the raw dataset's.
        workers: processes, one case each; no more at a time than the memory allows.
        progress: whether to draw a bar.
        parts: folder where what was seen of each case is kept, so that an interrupted run goes on where it stopped. The
            caller removes it when the fingerprint is safe.
        tolerance: grids that differ by less (in voxels; cosines) differ by rounding only.
        fix_geometry: give labels and further channels whose grid differs by rounding only the header of the first channel.
            Their voxels stay.
        subject: regular expression that finds the subject in a case's name (default: BIDS' ``sub-…``).
        measure: whether the fingerprint is asked for.
        title: of the progress bar.

    Raises:
        DatasetJsonError: dataset.json is missing or wrong (labels not consecutive, say): nothing else can be checked.
        DatasetError: a fingerprint is asked for, and no label file has any foreground.
        ConfigurationError: ``subject`` is no regular expression, or the tolerance no number below half a voxel.
    """
    if not 0 <= tolerance < 0.5:
        raise ConfigurationError(f"tolerance {tolerance}: expected a fraction of a voxel, from 0 to below 0.5")
    owner = owner_function(subject)
    description = DatasetJson.load(folder / "dataset.json")
    scheme = LabelScheme.from_dataset_json(description.raw, folder / "dataset.json")
    cases, findings = find_cases(folder, description)
    draws = int(TOTAL_DRAWS // len(cases)) if measure and cases else None
    request = LookRequest(tuple(scheme.values_in_files), draws, tolerance, fix_geometry)
    tasks = [(case.identifier, (case, request, parts)) for case in cases]
    needs = {case.identifier: memory_to_measure(case, draws or 0) for case in cases}
    looks: dict[str, CaseLook] = {}
    for outcome in over_cases(look_at_case, tasks, workers, title, progress, needs):
        if outcome.error is not None:
            failed = Finding("error", outcome.identifier, "readable", outcome.complaint, "copy or make the file again")
            looks[outcome.identifier] = CaseLook((failed,))
        else:
            looks[outcome.identifier] = outcome.value
    for identifier in sorted(looks):
        findings += looks[identifier].findings
    identifiers = [case.identifier for case in cases]
    findings += compare_cases(folder, looks, identifiers, owner)
    findings.sort(key=lambda finding: (finding.level, finding.case))
    verdict = Verdict(folder, len(cases), tuple(findings))
    if not (measure and verdict.is_good):
        return Examination(verdict, None)
    seen = [looks[identifier].measures for identifier in identifiers]
    return Examination(verdict, _fingerprint(folder, [m for m in seen if m is not None]))


def verify_dataset(
    folder: Path,
    workers: int = 1,
    progress: bool | None = None,
    tolerance: float = TOLERANCE,
    fix_geometry: bool = False,
    subject: str | None = None,
) -> Verdict:
    """The verdict of :func:`examine_dataset` alone."""
    options = {"tolerance": tolerance, "fix_geometry": fix_geometry, "subject": subject}
    return examine_dataset(folder, workers, progress, measure=False, title="Verifying", **options).verdict  # type: ignore[arg-type]


def fingerprint_dataset(
    dataset: RawDataset, workers: int = 1, progress: bool | None = None, parts: Path | None = None
) -> DatasetFingerprint:
    """The fingerprint of :func:`examine_dataset`. Raises DatasetError listing every error where the dataset has any."""
    examination = examine_dataset(dataset.folder, workers, progress, parts)
    examination.verdict.raise_if_bad()
    assert examination.fingerprint is not None
    return examination.fingerprint


def _fingerprint(folder: Path, measures: list[CaseMeasures]) -> DatasetFingerprint:
    if not any(len(values) for case in measures for values, _ in case.intensities):
        raise DatasetError(
            f"{folder.name}: no label file has a foreground voxel (value above 0) inside its image", path=folder
        )
    return DatasetFingerprint.of(measures)
