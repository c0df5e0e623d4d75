"""What planning needs or leaves beside a dataset's plans: its fingerprint and its dataset.json."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.store import RECORDS_FOLDER
from nnssl_adapt.data.verifying.examine import examine_dataset
from nnssl_adapt.data.verifying.files import wrong_count
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint, changed_cases, remember_sources
from nnssl_adapt.files import atomic_path, make_folder
from nnssl_adapt.machine.lock import held
from nnssl_adapt.paths import preprocessed_folder

logger = logging.getLogger(__name__)


def load_or_make_fingerprint(
    raw: RawDataset, workers: int = 2, progress: bool = False, save: bool = True
) -> DatasetFingerprint:
    """Return the dataset's fingerprint from its preprocessed folder, verifying and measuring the images if it is missing.

    A fingerprint of another number of cases than the dataset has is made again, and so is one of ours when files have
    changed since. Of several processes, also on several machines, one makes it and the others wait for it.
    """
    path = preprocessed_folder() / raw.name / "dataset_fingerprint.json"
    known = _usable_fingerprint(path, raw)
    if known is not None:
        return known
    if not save:
        return _make_fingerprint(path, raw, workers, progress, save=False)
    with held(make_folder(path.parent / RECORDS_FOLDER) / "fingerprint.lock", patience=math.inf):
        known = _usable_fingerprint(path, raw)  # another process has made it meanwhile
        return known if known is not None else _make_fingerprint(path, raw, workers, progress)


def _usable_fingerprint(path: Path, raw: RawDataset) -> DatasetFingerprint | None:
    if not path.is_file():
        return None
    fingerprint = DatasetFingerprint.load(path)
    changed = changed_cases(path, raw)
    if len(fingerprint.spacings) == len(raw.cases) and not changed:
        logger.info("using the fingerprint %s", path)
        for finding in wrong_count(raw.json, len(raw.cases)):
            logger.warning("%s: %s", raw.name, finding.message)
        return fingerprint
    count, more = len(fingerprint.spacings), f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    why = (
        f"these cases have changed since: {', '.join(changed[:5])}{more}" if changed else f"it describes {count} cases"
    )
    logger.warning("%s is out of date (%s, the dataset has %d): making it again", path, why, len(raw.cases))
    return None


def _make_fingerprint(
    path: Path, raw: RawDataset, workers: int, progress: bool, save: bool = True
) -> DatasetFingerprint:
    logger.info("verifying and measuring %s (%d cases)", raw.name, len(raw.cases))
    parts = path.parent / ".nnssl_adapt_fingerprint" if save else None
    examination = examine_dataset(raw.folder, workers=workers, progress=progress, parts=parts)
    for finding in examination.verdict.warnings:
        logger.warning("%s: %s", finding.case, finding.message)
    examination.verdict.raise_if_bad()
    made = examination.fingerprint
    assert made is not None  # there are no errors
    if parts is not None:
        made.save(path)
        remember_sources(path, raw)
        shutil.rmtree(parts, ignore_errors=True)
    return made


def copy_dataset_json(raw: RawDataset, folder: Path) -> None:
    """Put the dataset's ``dataset.json`` beside the plans, byte for byte, where nnU-Net expects it."""
    make_folder(folder)
    content = (raw.folder / "dataset.json").read_bytes()
    target = folder / "dataset.json"
    if target.is_file() and target.read_bytes() == content:
        return
    json.loads(content)  # never replace a good copy by a broken one
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
