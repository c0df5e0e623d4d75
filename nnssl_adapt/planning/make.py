"""From a dataset and a checkpoint to a FinetunePlan."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.spacing import canonical_mode
from nnssl_adapt.planning.advice import AUTO
from nnssl_adapt.planning.dynamic import check_preset_use, plan_dynamic
from nnssl_adapt.planning.fit_gpu import fit_plan, memory_budget
from nnssl_adapt.planning.like_pretrained import plan_like_pretrained
from nnssl_adapt.planning.plan import PLANAR, FinetunePlan
from nnssl_adapt.planning.planar import plan_planar, refuse_other_sources, refuse_volumes_of_pictures
from nnssl_adapt.planning.plans_file import check_name, check_plans_name
from nnssl_adapt.planning.request import PlanRequest
from nnssl_adapt.planning.task import PlanningTask
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint, open_checkpoint
from nnssl_adapt.weights.transfer.by_name import pair_by_name
from nnssl_adapt.weights.transfer.settings import TransferSettings

logger = logging.getLogger(__name__)


def make_plan(
    dataset: int | str | Path | RawDataset,
    checkpoint: Checkpoint | str | Path | None,
    request: PlanRequest | str | None = None,
    workers: int = 2,
    progress: bool = False,
    fingerprint: DatasetFingerprint | None = None,
    **options: Any,
) -> FinetunePlan:
    """Plan the fine-tuning of ``checkpoint`` on ``dataset``; nothing is preprocessed yet.

    Needs no earlier step: a ``dataset_fingerprint.json`` that lies in the dataset's preprocessed folder is used (also
    one that nnU-Net made), else the raw dataset is verified and the fingerprint made and saved. That the weights fit, and
    that images lie as the weights want them, is made sure first, since it takes seconds.

    Args:
        dataset: id, name or folder of a raw dataset in nnU-Net format.
        checkpoint: what :func:`open_checkpoint` returned, or anything that it takes. None, for ``2d`` only: train from scratch.
        request: how to plan; a text is its mode, such as ``"median"``.
        workers: processes that read images when the fingerprint (or copies) have to be made.
        progress: whether to draw progress bars.
        fingerprint: of the dataset, where it is known; else it is read, or made and saved.
        options: fields of :class:`PlanRequest`, instead of those that ``request`` has: ``mode``, ``name``, ``spacing``, …

    Returns:
        An unsaved plan; call ``.save()``, or :func:`preprocess_dataset`, which saves it.

    Raises:
        DatasetError: the dataset is missing or inconsistent (all problems at once), or its images don't lie as the weights need
            them.
        TransferError: the weights don't fit the network; has the table of what does.
        PlanError: ``base_plans`` does not exist, or ``plans_name`` is somebody else's.
        ConfigurationError: mode, name, spacing or orientation make no sense.
        TypeError: an option is no field of :class:`PlanRequest`.

    Axes: in the modes that follow the pre-training (``like_pretrained``, ``no_resample``) images have the axis order that
    they had there, which for nnssl is their own. In the others the axis of the coarsest target spacing comes first, as in
    nnU-Net; but weights that want one orientation, and in mode ``fixed`` all of supervised networks, keep theirs.
    """
    if isinstance(request, str):
        request, options = None, {"mode": request, **options}
    request = _checked(replace(request or PlanRequest(), **options))
    raw = dataset if isinstance(dataset, RawDataset) else RawDataset.open(dataset)
    if request.plans_name is not None:
        request = replace(request, plans_name=check_plans_name(request.plans_name))
    if checkpoint is not None:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        refuse_other_sources(checkpoint.architecture, request.configurations)
        request = replace(request, transfer=_channels_by_name(request.settings, raw, checkpoint))
    elif PLANAR not in request.configurations:
        raise ConfigurationError(
            f"{', '.join(request.configurations)} needs pre-trained weights (-pc); only {PLANAR} is planned without"
        )
    refuse_volumes_of_pictures(raw, request.configurations)
    if request.preset is not None:
        check_preset_use(request, from_scratch=checkpoint is None)
    if request.fit_gpu is not None:
        memory_budget(request.fit_gpu)  # a mistake in it should not wait for the images
    task = PlanningTask(raw, checkpoint, request, workers, progress, fingerprint)
    if checkpoint is None or PLANAR in request.configurations:
        return plan_planar(task)
    plan = plan_dynamic(task) if request.keep_topology else plan_like_pretrained(task)
    return plan if request.fit_gpu is None else _fitted(plan, raw, request.fit_gpu)


def _fitted(plan: FinetunePlan, raw: RawDataset, requested: str) -> FinetunePlan:
    """With patch and batch of each configuration fitted to a GPU; a cascade, which inherits them, must fit too."""
    fitted, configurations = plan, plan.content["configurations"]
    of_cascades = {each.get("inherits_from") for each in configurations.values() if each.get("previous_stage")}
    for name, entries in sorted(configurations.items()):  # the full resolution first
        if "inherits_from" not in entries:
            more = len(raw.labels.foreground_labels) if name in of_cascades else 0
            view = fitted.seen_through(name)
            fitted = fit_plan(view, raw.labels.num_heads, len(raw.cases), requested, stage_channels=more)
    return fitted.seen_through(plan.configuration)


def _checked(request: PlanRequest) -> PlanRequest:
    """With the usual name of the mode. Raises ConfigurationError."""
    mode = request.mode if request.mode == AUTO else canonical_mode(request.mode)
    check_name(request.name)
    return replace(request, mode=mode)


def _channels_by_name(transfer: TransferSettings, raw: RawDataset, checkpoint: Checkpoint) -> TransferSettings:
    """The settings with the pre-training's number for each channel, which then decides about its normalisation too."""
    plan = checkpoint.plan
    pairing = pair_by_name(transfer.channels, raw.channel_names, plan.channel_names, plan.num_input_channels)
    for warning in pairing.warnings:
        logger.warning("%s", warning)
    return replace(transfer, channels=pairing.rule)
