"""The weights that a training starts from: the checkpoint that a plan was made for, or random ones."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.errors import ConfigurationError, DigestMismatch, NnsslAdaptError, SourceError
from nnssl_adapt.planning.entries import pretrain_info
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.preflight import find_other_orientations
from nnssl_adapt.planning.provenance import KEY, NOT_LOADED, Provenance, WeightsRecord
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.folder import source_of
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint, open_checkpoint
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.transfer.report import TransferReport
from nnssl_adapt.weights.transfer.rows import FRESH, REST, percent
from nnssl_adapt.weights.transfer.transfer import scratch_report, transfer_weights

logger = logging.getLogger(__name__)

AT_TRAINING = "training"
"""Value of ``given`` in a plan's ``nnssl_adapt`` entries: the weights were named by the training's command."""


def freezing_warnings(recipe: Recipe, report: TransferReport) -> list[str]:
    """What stays as random as it was made, since it is frozen and the checkpoint had nothing for it. For the log.

    Args:
        recipe: of the run.
        report: of the transfer that the run starts from.
    """
    frozen_encoder = recipe.freeze != "none" or recipe.lora_rank > 0
    warnings = []
    if frozen_encoder and report.coverage < 1:
        fresh = [row.name for row in report.rows if row.part != REST and row.fate == FRESH and row.alias_of is None]
        example = f" ({fresh[0]}, …)" if fresh else ""
        warnings.append(
            f"the encoder is frozen, and {percent(1 - report.coverage)} of it is not pre-trained{example}: that part stays as "
            "random as it is. Fine-tune everything, or use layer_decay (--llrd 0.75)"
        )
    if recipe.freeze == "all_but_head" and report.decoder_coverage < 1:
        warnings.append(
            f"only the head learns, and {percent(1 - report.decoder_coverage)} of the decoder under it is not pre-trained: it "
            "stays random, so the result says little about the weights. Use --freeze encoder, which lets the decoder learn"
        )
    return warnings


def build_initial_network(plan: FinetunePlan, num_heads: int, seed: int) -> nn.Module:
    """Build the plan's network on the CPU with random weights that only depend on ``seed`` (uses torch's generator)."""
    torch.manual_seed(seed)
    stages = 0 if plan.previous_stage is None else len(plan.stage_channels(plan.labels))
    return build_network(
        plan.architecture,
        in_channels=plan.num_channels + stages,
        num_classes=num_heads,
        patch_size=plan.patch_size,
        deep_supervision=False,
    )


@dataclass(frozen=True)
class StartingWeights:
    """What a network started from.

    Attributes:
        report: what became of every tensor.
        plan: the run's, which names the weights.
        weights: what they are: source, revision, SHA-256, licence, …; None for random ones.
        citations: of the weights' authors, as ``{type, name, apa_citations | bibtex_citations}``.
    """

    report: TransferReport
    plan: FinetunePlan
    weights: dict[str, Any] | None = None
    citations: tuple[dict[str, Any], ...] = ()


def fill_with_starting_weights(
    network: nn.Module,
    plan: FinetunePlan,
    checkpoint: Checkpoint | str | Path | None,
    from_scratch: bool,
    options: Mapping[str, Any] | None = None,
) -> StartingWeights:
    """Put the pre-trained weights into ``network`` (changes it), or, from scratch, leave it; account for every tensor.

    ``options`` as of :func:`find_checkpoint`.

    Raises:
        ConfigurationError: pre-trained weights are wanted and neither given nor named in the plan.
        SourceError: they can't be found or fetched, or are others than the plan was made for.
        TransferError: they don't fit.
    """
    if from_scratch:
        return StartingWeights(scratch_report(network), naming_none(plan))
    found = find_checkpoint(plan, checkpoint, options)
    if not source_of(plan):  # nobody has compared the plan with the weights yet
        _compare_axes(plan, found)
    settings = plan.transfer_settings.to_dict()
    channel_names = tuple(plan.dataset_json.channel_names.values())
    report = transfer_weights(
        found,
        network,
        head_names=plan.labels.head_names,
        channel_names=channel_names,
        silent=len(plan.stage_channels(plan.labels)),
        **settings,
    )
    return StartingWeights(report, naming_weights(plan, found), described_weights(found), found.citations)


def described_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """What weights are, for the records of a run: where they are from, their digest, licence and trainer."""
    return {**checkpoint.origin.to_dict(), "licence": checkpoint.licence, "trainer_name": checkpoint.trainer_name}


def naming_weights(plan: FinetunePlan, checkpoint: Checkpoint) -> FinetunePlan:
    """The plan, naming the weights that were given to the training where it names none itself, as nnU-Net's don't."""
    if source_of(plan):
        return plan
    source = replace(WeightsRecord.of(checkpoint), licence=checkpoint.licence)
    ours = replace(Provenance.of(checkpoint, plan.transfer_settings), source=source, given=AT_TRAINING)
    entries = {**ours.to_dict(), **plan.content.get(KEY, {}), "source": source.to_dict(), "given": AT_TRAINING}
    content = {**plan.content, "pretrain_info": pretrain_info(checkpoint), KEY: entries}
    return FinetunePlan(content, plan.configuration, plan.path)


def naming_none(plan: FinetunePlan) -> FinetunePlan:
    """The plan, saying that the weights it was made for were not loaded: a baseline from random weights."""
    if not source_of(plan):
        return plan
    content = {**plan.content, KEY: replace(plan.provenance, given=NOT_LOADED).to_dict()}
    return FinetunePlan(content, plan.configuration, plan.path)


def naming_the_same(plan: FinetunePlan, recorded: FinetunePlan | None) -> FinetunePlan:
    """The plan, naming the weights that an earlier run's copy of it names, where it names none itself."""
    if source_of(plan) or recorded is None or not source_of(recorded):
        return plan
    content = {**plan.content, "pretrain_info": recorded.pretrain_info, KEY: recorded.provenance.to_dict()}
    return FinetunePlan(content, plan.configuration, plan.path)


def describe_citations(citations: Sequence[Mapping[str, Any]]) -> str:
    """What to cite, a line each (the whole of it where it is text, the name where it is BibTeX); empty for nothing."""
    lines = []
    for entry in citations:
        name = ": ".join(str(entry[key]) for key in ("type", "name") if entry.get(key))
        texts = entry.get("apa_citations") or ()
        texts = [texts] if isinstance(texts, str) else list(texts)
        lines += [textwrap.shorten(f"{name}: {text}", 300, placeholder=" …") for text in texts] or [name]
    if not lines:
        return ""
    return "\n  ".join(("please cite what this training starts from (debug.json has the entries):", *lines))


def _compare_axes(plan: FinetunePlan, checkpoint: Checkpoint) -> None:
    """Warn where a plan made by hand or by nnU-Net shows the weights other axes than they were trained on."""
    pretraining = checkpoint.plan
    advice = "nnUNetv2_preprocess_like_nnssl makes a plan that agrees"
    if pretraining.supervised and plan.transpose_forward != pretraining.transpose_forward:
        logger.warning(
            "plan %s puts the images' axes in the order %s, the weights were trained with %s: %s",
            plan.plans_name,
            list(plan.transpose_forward),
            list(pretraining.transpose_forward),
            advice,
        )
    if pretraining.orientation is None:
        return
    try:
        others = find_other_orientations(RawDataset.open(plan.dataset_name), pretraining.orientation)
    except NnsslAdaptError as error:
        logger.warning(
            "the weights were trained on %s images; whether these are can't be checked (%s)",
            pretraining.orientation,
            error,
        )
        return
    if others:
        logger.warning(
            "the weights were trained on %s images, but %d files of %s are not (%s: %s, …): %s (with --reorient)",
            pretraining.orientation,
            len(others),
            plan.dataset_name,
            *next(iter(others.items())),
            advice,
        )


def find_checkpoint(
    plan: FinetunePlan,
    given: Checkpoint | str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Open the checkpoint that the plan was made for, wherever it lies now; its digest decides.

    Looked for: ``given``; then the source that the plan names (found as
    :func:`~nnssl_adapt.weights.checkpoint.checkpoint.open_checkpoint` does, at the recorded revision); then the path that
    the plan keeps as a hint. ``options``: more of its arguments; they go before what the plan records.
    """
    checkpoint = given if isinstance(given, Checkpoint) else _open(plan, given, dict(options or {}))
    recorded = plan.provenance.source.sha256 if plan.provenance.source is not None else None
    if recorded and checkpoint.origin.sha256 != recorded:
        raise DigestMismatch(
            f"{checkpoint.origin} is not the checkpoint that plan {plan.plans_name} was made for "
            f"(sha256 {checkpoint.origin.sha256[:12]}…, expected {recorded[:12]}…): make a plan for it "
            "(nnUNetv2_preprocess_like_nnssl with another -n), or give the recorded one"
        )
    return checkpoint


def _open(plan: FinetunePlan, given: str | Path | None, options: dict[str, Any]) -> Checkpoint:
    choices = dict(plan.provenance.source_choices)
    if given is not None:
        path = Path(given)
        if path.is_file() and path.suffix.lower() != ".zip":  # the file itself: nothing is left to choose in it
            choices = {key: value for key, value in choices.items() if key not in ("filename", "fold")}
        return open_checkpoint(given, **{**choices, **options})
    source = plan.provenance.source
    hint = plan.pretrain_info.get("checkpoint_path")
    names = () if source is None else tuple(name for name in (source.source, source.repo_id) if name)
    if not names and hint is None:
        raise ConfigurationError(
            f"plan {plan.plans_name} names no pre-trained weights: give them with -pretrained_weights, train with "
            "--from_scratch, or make a plan with nnUNetv2_preprocess_like_nnssl"
        )
    if source is None or not names:
        return open_checkpoint(str(hint), **options)
    problems: list[SourceError] = []
    settings = {"revision": source.revision, **choices, **options}
    for name in dict.fromkeys(names):  # as typed: an address may name a file
        try:
            return open_checkpoint(name, **settings)
        except SourceError as error:
            problems.append(error)
    if hint and Path(hint).exists():  # relative sources mean nothing in another folder
        logger.info("%s is not found as such; using %s", names[0], hint)
        return open_checkpoint(hint, **{**choices, **options})
    raise problems[0]
