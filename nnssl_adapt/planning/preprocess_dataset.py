"""From a plan to everything that training needs on disk."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import SIMPLE_ITK
from nnssl_adapt.data.preprocess_cases import WHOLE, Shard, preprocess_cases
from nnssl_adapt.data.splits import load_or_make_splits
from nnssl_adapt.data.store import RECORDS_FOLDER, CaseStore
from nnssl_adapt.errors import PlanError
from nnssl_adapt.files import atomic_path, write_json
from nnssl_adapt.planning.dataset_files import copy_dataset_json
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.plans_file import refuse_to_replace_stranger

logger = logging.getLogger(__name__)


def preprocess_dataset(
    plan: FinetunePlan,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = True,
    shard: Shard = WHOLE,
    check: bool = False,
) -> CaseStore:
    """Preprocess the plan's dataset and save the plan beside it; what is already there and unchanged is kept.

    Writes below ``nnUNet_preprocessed/DatasetNNN_Name``: ``dataset.json``, ``splits_final.json`` (the one beside the raw
    dataset, else nnU-Net's own five folds), ``gt_segmentations/``, the case store, and, once every case stands, the plan.

    Args:
        plan: what to do; see :func:`make_plan`.
        workers: processes, one case each.
        overwrite: do every case again.
        progress: whether to draw a progress bar.
        shard: the part of the cases to do, so that several jobs can fill one store; the plan is saved by the one that
            finds all cases done.
        check: compare what is there with its checksums first; damaged cases are made again.

    Raises:
        PreprocessingError: some cases could not be done (the others were; run it again after mending them).
        PlanError: another plan has this plan's name, and ``overwrite`` is off.
        OutputError: the folder can't be written, or the disk is full.
    """
    raw = RawDataset.open(plan.dataset_name).read_with(str(plan.content.get("image_reader_writer", SIMPLE_ITK)))
    refuse_to_replace_another(plan, overwrite)
    copy_dataset_json(raw, plan.dataset_folder)
    load_or_make_splits(plan.dataset_folder, [case.identifier for case in raw.cases], raw.folder)
    _copy_reference_labels(raw, plan.dataset_folder / "gt_segmentations")
    store = preprocess_cases(
        raw,
        plan.settings,
        plan.store_folder,
        workers=workers,
        overwrite=overwrite,
        progress=progress,
        shard=shard,
        check=check,
    )
    missing = {case.identifier for case in raw.cases} - set(store.identifiers)
    if missing:
        logger.info(
            "part %s is done; %d cases are left to other parts, the last of which saves the plan", shard, len(missing)
        )
    else:
        plan.save()
    if shard != WHOLE:
        write_json(
            part_record(plan, shard), {"part": str(shard), "cases": len(store.identifiers), "of": len(raw.cases)}
        )
    return store


def part_record(plan: FinetunePlan, shard: Shard) -> Path:
    """The file that says that a part of the plan's cases is preprocessed."""
    name = f"{plan.plans_name}__{shard.number}_of_{shard.total}.json"
    return plan.dataset_folder / RECORDS_FOLDER / "parts" / name


def refuse_to_replace_another(plan: FinetunePlan, overwrite: bool = False) -> None:
    """Raise PlanError where a plan of this name was made from other weights or settings: runs may still need it."""
    refuse_to_replace_stranger(plan.plans_file)
    if overwrite or not plan.plans_file.is_file():
        return
    difference = _difference(FinetunePlan.load(plan.plans_file), plan)
    if difference is not None:
        raise PlanError(
            f"{plan.plans_file} exists and was made for {difference}: choose another name (-n), or --overwrite_pp to "
            "replace it"
        )


def _difference(old: FinetunePlan, new: FinetunePlan) -> str | None:
    """In what two plans differ that a training would notice, if in anything."""

    def weights(plan: FinetunePlan) -> tuple[object, object]:
        source = plan.provenance.source
        return None if source is None else source.sha256, plan.provenance.source_choices

    if weights(old) != weights(new):
        return "other pre-trained weights"
    if old.settings.digest() != new.settings.digest():
        return "other preprocessing settings"
    if old.transfer_settings != new.transfer_settings:
        return "another way of fitting the weights (--scope, --channels, --token-order, --waive)"
    if (old.architecture, old.patch_size) != (new.architecture, new.patch_size):
        return "another network or patch"
    return None


def _copy_reference_labels(raw: RawDataset, folder: Path) -> None:
    """nnU-Net's ``gt_segmentations``: the labels that validation is judged by."""
    for case in raw.cases:
        if case.label is None:
            continue
        target = folder / f"{case.identifier}{raw.file_ending}"
        source = case.label.stat()
        if target.is_file() and target.stat().st_size == source.st_size and target.stat().st_mtime >= source.st_mtime:
            continue
        with atomic_path(target) as temporary:
            shutil.copyfile(case.label, temporary)
