"""What is about to be trained, told in the log and kept in debug.json."""

from __future__ import annotations

import logging
import os

import torch
from torch import nn

from nnssl_adapt.planning.provenance import package_version
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.folder import RunFolder
from nnssl_adapt.training.run.identity import RunIdentity
from nnssl_adapt.training.setup import ignored_variables
from nnssl_adapt.training.starting_weights import describe_citations

logger = logging.getLogger(__name__)


def describe_run(
    identity: RunIdentity,
    recipe: Recipe,
    network: nn.Module,
    folder: RunFolder,
    device: torch.device,
    *,
    autocast_dtype: torch.dtype | None,
    workers: int,
    stopping: str | None,
    is_main: bool,
) -> None:
    """Log what is about to run, and keep it in debug.json.

    Args:
        identity: of the run, as it begins or continues.
        recipe: with what was decided on this machine.
        network: that is trained.
        folder: of the run.
        device: that trains.
        autocast_dtype: of the network's computations, None for float32.
        workers: processes that make batches.
        stopping: when it will stop early, in words; None: when it is done.
        is_main: whether this process writes files.
    """
    plan = identity.plan
    parameters = sum(p.numel() for p in network.parameters())
    logger.info("%s\n%s\n%s", plan, recipe, f"  {parameters:,} parameters on {device}")
    logger.info(
        "fold %s: %d training and %d validation cases, %d data workers; results in %s",
        identity.fold,
        len(identity.training_cases),
        len(identity.validation_cases),
        workers,
        folder.path,
    )
    for warning in ignored_variables(os.environ):
        logger.warning("%s", warning)
    for line in (describe_citations(identity.citations), stopping):
        if line:
            logger.info("%s", line)
    content = {
        "nnssl_adapt": package_version(),
        "plans": plan.plans_name,
        "plans_file": str(plan.plans_file),
        "pretrained_weights": identity.weights,
        "citations": list(identity.citations),
        "fold": identity.fold,
        **identity.to_dict(),
        "recipe": recipe.to_dict(),
        "network": identity.network,
        "parameters": parameters,
        "patch_size": list(plan.patch_size),
        "batch_size": plan.batch_size,
        "batch_dice": plan.batch_dice if recipe.batch_dice is None else recipe.batch_dice,
        "autocast": str(autocast_dtype) if autocast_dtype else None,
        "data_workers": workers,
    }
    if is_main:
        folder.write_debug(content, device)
