"""The weights that a training starts from: the checkpoint that a plan was made for, or random ones."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from nnssl_adapt.errors import ConfigurationError, DigestMismatch, SourceError
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.weights.architectures import build_network
from nnssl_adapt.weights.checkpoint import Checkpoint, open_checkpoint
from nnssl_adapt.weights.transfer import TransferReport, scratch_report, transfer_weights

logger = logging.getLogger(__name__)


def build_initial_network(plan: FinetunePlan, num_heads: int, seed: int) -> nn.Module:
    """Build the plan's network on the CPU with random weights that only depend on ``seed`` (uses torch's generator)."""
    torch.manual_seed(seed)
    return build_network(
        plan.architecture,
        in_channels=plan.num_channels,
        num_classes=num_heads,
        patch_size=plan.patch_size,
        deep_supervision=False,
    )


def fill_with_starting_weights(
    network: nn.Module, plan: FinetunePlan, checkpoint: Checkpoint | str | Path | None, from_scratch: bool
) -> TransferReport:
    """Put the pre-trained weights into ``network`` (changes it), or, from scratch, leave it; account for every tensor.

    Raises:
        ConfigurationError: pre-trained weights are wanted and neither given nor named in the plan.
        SourceError: they can't be found or fetched, or are others than the plan was made for.
        TransferError: they don't fit.
    """
    if from_scratch:
        return scratch_report(network)
    settings = plan.transfer_settings.to_dict()
    return transfer_weights(find_checkpoint(plan, checkpoint), network, head_names=plan.labels.head_names, **settings)


def find_checkpoint(plan: FinetunePlan, given: Checkpoint | str | Path | None = None) -> Checkpoint:
    """Open the checkpoint that the plan was made for, wherever it lies now; its digest decides.

    Looked for: ``given``; then the source that the plan names (found as
    :func:`~nnssl_adapt.weights.checkpoint.open_checkpoint` does, at the recorded revision); then the path that the plan
    keeps as a hint.
    """
    checkpoint = given if isinstance(given, Checkpoint) else _open(plan, given)
    recorded = plan.provenance.get("source", {}).get("sha256")
    if recorded and checkpoint.origin.sha256 != recorded:
        raise DigestMismatch(
            f"{checkpoint.origin} is not the checkpoint that plan {plan.plans_name} was made for "
            f"(sha256 {checkpoint.origin.sha256[:12]}…, expected {recorded[:12]}…): make a plan for it "
            "(nnUNetv2_preprocess_like_nnssl with another -n), or give the recorded one"
        )
    return checkpoint


def _open(plan: FinetunePlan, given: str | Path | None) -> Checkpoint:
    choices = plan.provenance.get("source_choices", {})
    if given is not None:
        return open_checkpoint(given, **choices)
    source = plan.provenance.get("source", {})
    hint = plan.pretrain_info.get("checkpoint_path")
    if not source and hint is None:
        raise ConfigurationError(
            f"plan {plan.plans_name} names no pre-trained weights: train with --from_scratch, or make a plan with "
            "nnUNetv2_preprocess_like_nnssl"
        )
    if not source and hint is not None:
        return open_checkpoint(hint)
    try:
        return open_checkpoint(source.get("repo_id") or source["source"], revision=source.get("revision"), **choices)
    except SourceError:
        if hint and Path(hint).exists():  # relative sources mean nothing in another folder
            logger.info("%s is not found as such; using %s", source["source"], hint)
            return open_checkpoint(hint, **choices)
        raise
