"""A copy of a raw dataset whose labels are whole numbers: values a rounding error away (0.99999) are rounded."""

from __future__ import annotations

import shutil
from pathlib import Path

from nnssl_adapt.data.convert.cases import SourceCase, SourceFile, Target
from nnssl_adapt.data.convert.conversion import convert_cases
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.endings import files_with
from nnssl_adapt.data.splits import SPLITS_FILE
from nnssl_adapt.data.verifying.findings import Verdict
from nnssl_adapt.errors import DatasetError
from nnssl_adapt.files import atomic_path, write_json
from nnssl_adapt.paths import free_dataset_id, raw_folder
from nnssl_adapt.text import lines_and_more

REPAIRABLE = "rounding"
"""The check whose findings a copy repairs."""

_ENDING = "_repaired"
_ID_STEP = 500


def repair_dataset(verdict: Verdict, workers: int = 1, progress: bool | None = None) -> RawDataset:
    """Copy a raw dataset, with labels repaired that are a rounding error away from whole numbers; the original stays.

    The copy lies in ``nnUNet_raw`` as ``DatasetMMM_<Name>_repaired`` (MMM: 500 more, or the next free number). A copy that an
    earlier call made or began is brought up to date.

    Args:
        verdict: on the dataset, see :func:`nnssl_adapt.data.verifying.examine.verify_dataset`.
        workers: processes, one case each.
        progress: whether to draw a bar.

    Raises:
        DatasetError: the dataset has other errors too, which a copy would keep; or cases can't be copied.
        OutputError: the copy can't be written.
    """
    others = [f"{finding.case}: {finding.message}" for finding in verdict.errors if finding.check != REPAIRABLE]
    if others:
        raise DatasetError(
            f"{verdict.folder.name}: {len(others)} errors can't be repaired by --fix, correct these first:\n"
            + lines_and_more(others),
            path=verdict.folder,
            mistakes=others,
        )
    raw = RawDataset.open(verdict.folder)
    target = Target(_earlier_copy(raw) or raw_folder() / _new_name(raw.name))
    convert_cases("repair", str(raw.folder), target, [*_training_cases(raw), *_test_images(raw)], workers, progress)
    source = raw.folder / SPLITS_FILE
    if source.is_file():
        with atomic_path(target.folder / SPLITS_FILE) as temporary:
            shutil.copyfile(source, temporary)
    write_json(target.folder / "dataset.json", {key: value for key, value in raw.json.raw.items() if key != "dataset"})
    return RawDataset.open(target.folder)


def _training_cases(raw: RawDataset) -> list[SourceCase]:
    ending = raw.file_ending
    return [
        SourceCase(
            case.identifier,
            "Tr",
            tuple(
                SourceFile(path, (f"imagesTr/{case.identifier}_{channel:04d}{ending}",))
                for channel, path in enumerate(case.images)
            ),
            None if case.label is None else SourceFile(case.label, (f"labelsTr/{case.identifier}{ending}",)),
        )
        for case in raw.cases
    ]


def _test_images(raw: RawDataset) -> list[SourceCase]:
    folder = raw.folder / "imagesTs"
    return [
        SourceCase(path.name, "Ts", (SourceFile(path, (f"imagesTs/{stem}{raw.file_ending}",)),))
        for stem, path in files_with(folder, raw.file_ending).items()
        if path.is_file()
    ]


def _new_name(name: str) -> str:
    number = free_dataset_id(int(name[7:10]) + _ID_STEP if name[7:10].isdigit() else _ID_STEP)
    return f"Dataset{number:03d}_{name.partition('_')[2] or name}{_ENDING}"


def _earlier_copy(raw: RawDataset) -> Path | None:
    short = raw.name.partition("_")[2] or raw.name
    found = sorted(raw_folder().glob(f"Dataset[0-9][0-9][0-9]_{short}{_ENDING}"))
    return found[0] if found else None
