"""From a plan to everything that training needs on disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import SIMPLE_ITK
from nnssl_adapt.data.pictures import TIFF_3D
from nnssl_adapt.data.preprocess_cases import WHOLE, Shard, preprocess_cases
from nnssl_adapt.data.splits import load_or_make_splits
from nnssl_adapt.data.store import RECORDS_FOLDER, CaseStore
from nnssl_adapt.errors import PlanError
from nnssl_adapt.files import atomic_path, write_json
from nnssl_adapt.planning.dataset_files import copy_dataset_json
from nnssl_adapt.planning.plan import CONFIGURATION, FinetunePlan
from nnssl_adapt.planning.plans_file import read_plans, refuse_to_replace_unknown

logger = logging.getLogger(__name__)


def preprocess_dataset(
    plan: FinetunePlan,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = True,
    shard: Shard = WHOLE,
    check: bool = False,
    configurations: Sequence[str] = (),
) -> CaseStore:
    """Preprocess the plan's dataset and save the plan beside it; what is already there and unchanged is kept.

    Writes below ``nnUNet_preprocessed/DatasetNNN_Name``: ``dataset.json``, ``splits_final.json`` (the one beside the raw
    dataset, else nnU-Net's own five folds), ``gt_segmentations/``, the case stores, and, once every case stands, the plan.
    Configurations that an earlier plan of this name has stay in it.

    Args:
        plan: what to do; see :func:`make_plan`.
        workers: processes, one case each.
        overwrite: do every case again.
        progress: whether to draw a progress bar.
        shard: the part of the cases to do, so that several jobs can fill one store; the plan is saved by the one that
            finds all cases done.
        check: compare what is there with its checksums first; damaged cases are made again.
        configurations: of the plan, whose cases are made; by default the one that it is seen through. A cascade's are those
            of both stages.

    Returns:
        The store of the configuration that the plan is seen through, or else of the first.

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
    asked = map(plan.seen_through, configurations or (plan.configuration,))
    views = {view.store_folder: view for wanted in asked for view in _with_previous_stage(wanted)}
    stores = [
        preprocess_cases(
            raw,
            view.settings,
            folder,
            workers=workers,
            overwrite=overwrite,
            progress=progress,
            shard=shard,
            check=check,
        )
        for folder, view in views.items()
    ]
    identifiers = {case.identifier for case in raw.cases}
    missing: set[str] = set()
    for store in stores:
        missing |= identifiers.difference(store.identifiers)
    if missing:
        logger.info(
            "part %s is done; %d cases are left to other parts, the last of which saves the plan", shard, len(missing)
        )
    else:
        _with_earlier_configurations(plan).save()
    if shard != WHOLE:
        done = len(identifiers) - len(missing)
        write_json(part_record(plan, shard), {"part": str(shard), "cases": done, "of": len(raw.cases)})
    return next((store for store in stores if store.folder == plan.store_folder), stores[0])


def _with_previous_stage(plan: FinetunePlan) -> Iterator[FinetunePlan]:
    if plan.previous_stage is not None:
        yield plan.seen_through(plan.previous_stage)
    yield plan


def part_record(plan: FinetunePlan, shard: Shard) -> Path:
    """The file that says that a part of the plan's cases is preprocessed."""
    other = "" if plan.configuration == CONFIGURATION else f"__{plan.configuration}"
    name = f"{plan.plans_name}{other}__{shard.number}_of_{shard.total}.json"
    return plan.dataset_folder / RECORDS_FOLDER / "parts" / name


def refuse_to_replace_another(plan: FinetunePlan, overwrite: bool = False) -> None:
    """Raise PlanError where a plan of this name was made from other weights or settings: runs may still need it."""
    refuse_to_replace_unknown(plan.plans_file)
    if overwrite or not plan.plans_file.is_file():
        return
    difference = _difference(_saved(plan.plans_file), plan)
    if difference is not None:
        raise PlanError(
            f"{plan.plans_file} exists and was made for {difference}: choose another name (-n), or --overwrite_pp to "
            "replace it"
        )


def _saved(path: Path) -> FinetunePlan:
    """A plan seen through any of its configurations."""
    configurations = list(read_plans(path).get("configurations") or [CONFIGURATION])
    return FinetunePlan.load(path, CONFIGURATION if CONFIGURATION in configurations else configurations[0])


def _with_earlier_configurations(plan: FinetunePlan) -> FinetunePlan:
    """The plan with the configurations that one of its name has besides, where the two agree in the rest."""
    if not plan.plans_file.is_file():
        return plan
    old = _saved(plan.plans_file)
    if _difference(old, plan) is not None:
        return plan
    return FinetunePlan(_joined(old, plan), plan.configuration, plan.path)


def _joined(old: FinetunePlan, new: FinetunePlan) -> dict[str, Any]:
    """The content of the new plan, with the old one's other configurations."""
    return {**new.content, "configurations": {**old.content["configurations"], **new.content["configurations"]}}


def _difference(old: FinetunePlan, new: FinetunePlan) -> str | None:
    """In what two plans differ that a training by the old one would notice, if in anything."""

    def weights(plan: FinetunePlan) -> tuple[object, object]:
        source = plan.provenance.source
        return None if source is None else source.sha256, plan.provenance.source_choices

    if weights(old) != weights(new):
        return "other pre-trained weights"
    if old.transfer_settings != new.transfer_settings:
        return "another way of fitting the weights (--scope, --channels, --token-order, --waive)"
    joined = _joined(old, new)
    for name in old.content["configurations"]:
        before, after = old.seen_through(name), FinetunePlan(joined, name)
        if before.settings.digest() != after.settings.digest():
            return "other preprocessing settings"
        if (before.architecture, before.patch_size) != (after.architecture, after.patch_size):
            return "another network or patch"
    return None


def _copy_reference_labels(raw: RawDataset, folder: Path) -> None:
    """nnU-Net's ``gt_segmentations``: the labels that validation is compared with."""
    for case in raw.cases:
        if case.label is None:
            continue
        _copy_if_new(case.label, folder / f"{case.identifier}{raw.file_ending}")
        beside = case.label.with_suffix(".json")  # the spacing of a TIFF stack
        if case.reader == TIFF_3D and beside.is_file():
            _copy_if_new(beside, folder / f"{case.identifier}.json")


def _copy_if_new(source: Path, target: Path) -> None:
    found = source.stat()
    if target.is_file() and target.stat().st_size == found.st_size and target.stat().st_mtime >= found.st_mtime:
        return
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
