"""From a dataset and a checkpoint to a FinetunePlan."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.reorient import reorient_dataset
from nnssl_adapt.data.store import RECORDS_FOLDER
from nnssl_adapt.data.verifying.examine import examine_dataset
from nnssl_adapt.data.verifying.files import wrong_count
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint, changed_cases, remember_sources
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.files import atomic_path, make_folder
from nnssl_adapt.geometry.spacing import Spacing, canonical_mode, check_fixed, checked_spacing, choose_spacing
from nnssl_adapt.machine.lock import held
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.planning.advice import AUTO, SpacingAdvice, advise_spacing
from nnssl_adapt.planning.base_plans import BasePlans, find_topology
from nnssl_adapt.planning.content import plans_content
from nnssl_adapt.planning.dynamic import dynamic_content
from nnssl_adapt.planning.fit_gpu import fit_plan, memory_budget, usual_step
from nnssl_adapt.planning.memory import MIN_BATCH, by, estimate_memory
from nnssl_adapt.planning.naming import check_name, check_plans_name, refuse_to_replace_stranger
from nnssl_adapt.planning.nnunet_plan import PLANNED_HERE, nnunet_plan, preset_for
from nnssl_adapt.planning.normalization import FROM_PRETRAINING, parse_normalization
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.preflight import check_orientation, check_transfer, find_other_orientations
from nnssl_adapt.planning.topology import check_preset
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint, open_checkpoint
from nnssl_adapt.weights.network.architectures import nearest_patch
from nnssl_adapt.weights.transfer.by_name import pair_by_name
from nnssl_adapt.weights.transfer.settings import TransferSettings

logger = logging.getLogger(__name__)

_SPACING_UNKNOWN = (
    "the file does not say at which spacing this network was trained: using the dataset's median. Where you know it, give it "
    "with -am fixed -os Z Y X"
)


def make_plan(
    dataset: int | str | Path | RawDataset,
    checkpoint: Checkpoint | str | Path,
    mode: str = "like_pretrained",
    name: str = "pretrained",
    spacing: Sequence[float] | None = None,
    base_plans: str | None = None,
    transfer: TransferSettings | None = None,
    plans_name: str | None = None,
    keep_topology: bool = False,
    reorient: str | None = None,
    ignore_orientation: bool = False,
    normalization: str = FROM_PRETRAINING,
    workers: int = 2,
    progress: bool = False,
    fingerprint: DatasetFingerprint | None = None,
    preset: str | None = None,
    fit_gpu: str | None = None,
) -> FinetunePlan:
    """Plan the fine-tuning of ``checkpoint`` on ``dataset``; nothing is preprocessed yet.

    Needs no earlier step: a ``dataset_fingerprint.json`` that lies in the dataset's preprocessed folder is used (also
    one that nnU-Net made), else the raw dataset is verified and the fingerprint made and saved. That the weights fit, and
    that images lie as the weights want them, is made sure first, since it takes seconds.

    Args:
        dataset: id, name or folder of a raw dataset in nnU-Net format.
        checkpoint: what :func:`open_checkpoint` returned, or anything that it takes.
        mode: where the spacing comes from. ``like_pretrained``: the pre-training's (the dataset's median when the
            pre-training kept every image's own); ``median`` (also ``default_nnunet``): nnU-Net's rule; ``fixed``: ``spacing``;
            ``no_resample``: every image keeps its own; ``auto``: see :func:`spacing_advice`, whose table is logged.
        name: short name of the pre-training, part of the plan's file name.
        spacing: millimetres (Z, Y, X) in the image's array order, for mode ``fixed`` only.
        base_plans: name of an existing nnU-Net plans file whose reader, intensity statistics and Dice setting are
            taken over; by default ``nnUNetPlans`` where it exists.
        transfer: how the weights will be fitted to the network (by default as suits most).
        plans_name: full name of the plan, e.g. ``nnUNetPlans_contrast_agnostic``, instead of one made up of ``name``,
            spacing and normalisation.
        keep_topology: keep the network, spacing, patch and everything else of ``base_plans`` and fit the weights to it; the
            plan is called ``ptPlans_dynamic__NAME``. Where there are no nnU-Net plans, its rules are followed here.
        reorient: a code such as ``RPI``: plan for copies of the images in this orientation, see :func:`reorient_dataset`.
            The plan is then of another dataset, ``plan.dataset_name``.
        ignore_orientation: go on although images lie another way than the weights want.
        normalization: ``from_pretraining``, ``from_data`` or a scheme, see :func:`choose_normalization`.
        workers: processes that read images when the fingerprint (or copies) have to be made.
        progress: whether to draw progress bars.
        fingerprint: of the dataset, where it is known; else it is read, or made and saved.
        preset: with ``keep_topology``: follow this planner of nnU-Net (``default``, ``ResEncM``, ``ResEncL`` or
            ``ResEncXL``) although there may be plans; by default the one that the weights fit, where there are none.
        fit_gpu: choose patch and batch for the memory of a GPU: ``auto`` or an amount, see :func:`fit_plan`.

    Returns:
        An unsaved plan; call ``.save()``, or :func:`preprocess_dataset`, which saves it.

    Raises:
        DatasetError: the dataset is missing or inconsistent (all problems at once), or lies another way than the weights want.
        TransferError: the weights don't fit the network; has the table of what does.
        PlanError: ``base_plans`` does not exist, or ``plans_name`` is somebody else's.
        ConfigurationError: mode, name, spacing or orientation make no sense.

    Axes: in the modes that follow the pre-training (``like_pretrained``, ``no_resample``) images have the axis order that
    they had there, which for nnssl is their own. In the others the axis of the coarsest target spacing comes first, as in
    nnU-Net; but weights that want one orientation, and in mode ``fixed`` all of supervised networks, keep theirs.
    """
    mode = mode if mode == AUTO else canonical_mode(mode)
    check_name(name)
    raw = dataset if isinstance(dataset, RawDataset) else RawDataset.open(dataset)
    if plans_name is not None:
        plans_name = check_plans_name(plans_name)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    transfer = _channels_by_name(transfer or TransferSettings(), raw, checkpoint)
    orient = partial(_oriented, checkpoint, reorient, ignore_orientation, plans_name, workers, progress)
    if preset is not None:
        _check_preset_use(preset, keep_topology, base_plans)
    if fit_gpu is not None:
        memory_budget(fit_gpu)  # a mistake in it should not wait for the images
    know = partial(_known_fingerprint, fingerprint, workers, progress)
    if keep_topology:
        _refuse_spacing(mode, spacing)
        raw = orient(raw)  # a plan knows the order of its images' axes, so it must be the oriented dataset's
        topology = _topology(raw, checkpoint, base_plans, preset, know)
        check_transfer(raw, checkpoint, topology.architecture, topology.patch_size, transfer)
        _compare_axes(topology, checkpoint)
        know(raw)
        plans_name = plans_name or f"ptPlans_dynamic__{name}"
        return _fitted(FinetunePlan(dynamic_content(raw, checkpoint, topology, plans_name, transfer)), raw, fit_gpu)
    check_fixed(mode, spacing)
    parse_normalization(normalization, raw)
    patch = nearest_patch(checkpoint.architecture, checkpoint.plan.patch_size)
    check_transfer(raw, checkpoint, checkpoint.architecture, patch, transfer)
    raw = orient(raw)
    base = BasePlans.find(raw.name, base_plans)
    fingerprint = know(raw)
    if mode == AUTO:
        advice = spacing_advice(checkpoint, fingerprint)
        logger.info("%s", advice)
        mode = advice.picked
    choice = choose_spacing(
        mode,
        pretrained=_spacing_of_images(checkpoint),
        spacings=fingerprint.spacings,
        shapes=fingerprint.shapes_after_crop,
        fixed=None if spacing is None else tuple(float(s) for s in spacing),
    )
    if choice.note:
        logger.warning(_SPACING_UNKNOWN if checkpoint.plan.supervised else choice.note)
    content = plans_content(raw, checkpoint, fingerprint, base, choice, name, plans_name, transfer, normalization)
    return _fitted(FinetunePlan(content), raw, fit_gpu)


def _channels_by_name(transfer: TransferSettings, raw: RawDataset, checkpoint: Checkpoint) -> TransferSettings:
    """The settings with the pre-training's number for each channel, which then decides about its normalisation too."""
    plan = checkpoint.plan
    pairing = pair_by_name(transfer.channels, raw.channel_names, plan.channel_names, plan.num_input_channels)
    for warning in pairing.warnings:
        logger.warning("%s", warning)
    return replace(transfer, channels=pairing.rule)


def spacing_advice(
    checkpoint: Checkpoint,
    fingerprint: DatasetFingerprint,
    fixed: Sequence[float] | None = None,
    heads: int | None = None,
) -> SpacingAdvice:
    """Compare what the spacing modes would mean for a dataset, and pick one; see :func:`advise_spacing` for the rule.

    With ``heads``, the outputs of the network for the dataset, also what memory each would take.
    """
    plan, network = checkpoint.plan, checkpoint.architecture
    axes = [plan.transpose_forward.index(axis) for axis in range(3)]  # of the weights, in the images' own order
    wanted, divisors = plan.recommended_patch_size or plan.patch_size, network.total_stride

    def memory_of(patch: Sequence[int]) -> int:
        of_weights = [patch[axis] for axis in plan.transpose_forward]
        step = usual_step(network)
        return estimate_memory(network, len(fingerprint.intensity), heads or 1, of_weights, MIN_BATCH, step).total

    return advise_spacing(
        pretrained=_spacing_of_images(checkpoint),
        spacings=fingerprint.spacings,
        shapes=fingerprint.shapes_after_crop,
        wanted_patch=[wanted[axis] for axis in axes],
        divisors=[divisors[axis] for axis in axes],
        fixed=None if fixed is None else checked_spacing(fixed),
        memory_of=None if heads is None else memory_of,
    )


def _topology(
    raw: RawDataset,
    checkpoint: Checkpoint,
    name: str | None,
    preset: str | None,
    know: Callable[[RawDataset], DatasetFingerprint],
) -> FinetunePlan:
    """The plan whose network is kept: a file of nnU-Net's, or one by its rules where there is none or a preset is asked for."""
    if preset is None and (found := find_topology(raw.name, name)) is not None:
        return found
    chosen = preset or preset_for(checkpoint.architecture)
    topology = nnunet_plan(raw, know(raw), chosen)
    logger.info(
        "network planned here by nnU-Net's rules, preset %s%s: %s, patch %s, batch %d",
        chosen,
        "" if preset else " (as the weights; --preset chooses another)",
        topology.architecture,
        by(topology.patch_size),
        topology.batch_size,
    )
    return topology


def _refuse_spacing(mode: str, spacing: Sequence[float] | None) -> None:
    """The spacing of a kept network can't be chosen as well."""
    if mode != "like_pretrained" or spacing is not None:
        raise ConfigurationError(
            "--keep-topology keeps the spacing of the nnU-Net plans too: leave -am and -os out, or leave --keep-topology out"
        )


def _check_preset_use(preset: str, keep_topology: bool, base_plans: str | None) -> None:
    check_preset(preset)
    if not keep_topology:
        raise ConfigurationError(
            f"--preset {preset} is a network of nnU-Net's planner: add --keep-topology, or leave --preset out to train the "
            "network of the weights"
        )
    if base_plans is not None:
        raise ConfigurationError(
            f"--preset {preset} plans a network, -pl {base_plans} names one that is planned already: leave one of them out"
        )


def _known_fingerprint(
    known: DatasetFingerprint | None, workers: int, progress: bool, raw: RawDataset
) -> DatasetFingerprint:
    return known if known is not None else load_or_make_fingerprint(raw, workers=workers, progress=progress)


def _fitted(plan: FinetunePlan, raw: RawDataset, fit_gpu: str | None) -> FinetunePlan:
    return plan if fit_gpu is None else fit_plan(plan, raw.labels.num_heads, len(raw.cases), fit_gpu)


def _oriented(
    checkpoint: Checkpoint,
    reorient: str | None,
    ignore_orientation: bool,
    plans_name: str | None,
    workers: int,
    progress: bool,
    raw: RawDataset,
) -> RawDataset:
    """The dataset in the orientation asked for, known to be the one that the weights want unless that is ignored.

    Nobody else has a plan ``plans_name`` for it.
    """
    if reorient is not None:
        if find_other_orientations(raw, reorient):
            raw = reorient_dataset(raw, reorient, workers=workers, progress=progress)
        else:
            logger.info("all images of %s are %s already: no copies are needed", raw.name, reorient.upper())
    wanted = checkpoint.plan.orientation
    if wanted is not None and not ignore_orientation:
        check_orientation(raw, wanted)
    if plans_name is not None:
        refuse_to_replace_stranger(preprocessed_folder() / raw.name / f"{plans_name}.json")
    return raw


def _spacing_of_images(checkpoint: Checkpoint) -> Spacing | None:
    """The pre-training's spacing (mm) in the order of an image's own axes (Z, Y, X)."""
    plan = checkpoint.plan
    if plan.spacing is None:
        return None
    z, y, x = (plan.spacing[plan.transpose_forward.index(axis)] for axis in range(3))
    return z, y, x


def _compare_axes(base: FinetunePlan, checkpoint: Checkpoint) -> None:
    """Kernels trained along one axis and used along another are not wrong, but worth a word."""
    if tuple(base.transpose_forward) != checkpoint.plan.transpose_forward:
        logger.warning(
            "%s puts the images' axes in the order %s, the weights were trained with %s",
            "nnU-Net's rule" if base.plans_name == PLANNED_HERE else f"plan {base.plans_name}",
            list(base.transpose_forward),
            list(checkpoint.plan.transpose_forward),
        )


def load_or_make_fingerprint(
    raw: RawDataset, workers: int = 2, progress: bool = False, save: bool = True
) -> DatasetFingerprint:
    """Return the dataset's fingerprint from its preprocessed folder, verifying and measuring the images if it is missing.

    A fingerprint of another number of cases than the dataset has is made anew, and so is one of ours when files have
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
    logger.warning("%s is out of date (%s, the dataset has %d): making it anew", path, why, len(raw.cases))
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
