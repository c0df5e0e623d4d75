"""Fitting a plan's patch and batch to the memory of a GPU: ``--fit-gpu``."""

from __future__ import annotations

import copy
import logging
import math
import re
from typing import Any

import torch

from nnssl_adapt.errors import ConfigurationError, DeviceUnavailable, PlanError
from nnssl_adapt.planning.memory import (
    GIB,
    MemoryEstimate,
    StepSettings,
    by,
    estimate_memory,
    gib,
    largest_fit,
)
from nnssl_adapt.planning.plan import CONFIGURATION, FinetunePlan
from nnssl_adapt.planning.provenance import KEY
from nnssl_adapt.weights.network.architectures import Architecture

logger = logging.getLogger(__name__)

AUTO = "auto"

COVERED = 0.05
"""A batch has at most this share of the dataset's voxels (nnU-Net's rule), or its smallest number of samples."""

_UNITS = {"": GIB, "gb": 10**9, "gib": GIB, "g": GIB, "mb": 10**6, "mib": 2**20, "m": 2**20}


def memory_budget(text: str) -> int:
    """Bytes of ``16GB``, ``15.5GiB`` or ``24`` (GiB), or those of the GPU that is here for ``auto``.

    GB are taken as the 10⁹ bytes that they are, so that a card's name may be typed: one of "16 GB" has a little less than
    16 GiB to give.

    Raises DeviceUnavailable for ``auto`` where there is no GPU, ConfigurationError for what can't be read.
    """
    requested = text.strip().lower()
    if requested == AUTO:
        if not torch.cuda.is_available():
            raise DeviceUnavailable(
                "--fit-gpu auto: this machine has no CUDA device. Give the memory of the GPU that will be used, such as "
                "--fit-gpu 24GB"
            )
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", requested)
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ConfigurationError(f"--fit-gpu {text}: expected auto or an amount of memory such as 16GB")
    return int(float(match[1]) * _UNITS[match[2]])


def usual_step(architecture: Architecture) -> StepSettings:
    """How the published recipes train such a network."""
    return StepSettings(optimizer=architecture.kind.optimizer)


def plan_memory(
    plan: FinetunePlan, heads: int, step: StepSettings | None = None, stage_channels: int = 0
) -> MemoryEstimate:
    """What training by a plan takes, by default as the published recipes train.

    ``heads``: outputs of the network; ``stage_channels``: of a cascade, for the labels of its previous stage.
    """
    step = step or usual_step(plan.architecture)
    channels = plan.num_channels + stage_channels
    return estimate_memory(plan.architecture, channels, heads, plan.patch_size, plan.batch_size, step)


def fit_plan(
    plan: FinetunePlan,
    heads: int,
    cases: int,
    requested: str = AUTO,
    step: StepSettings | None = None,
    stage_channels: int = 0,
) -> FinetunePlan:
    """Return a copy of ``plan`` with the largest patch, then batch, that train in the memory of a GPU.

    The patch is no larger than the median image; the batch has at most a twentieth of the dataset's voxels (nnU-Net's rule)
    but two samples. Why they were chosen is kept under ``nnssl_adapt.fit_gpu``. Preprocessed cases stay the same.

    Args:
        plan: any plan, with the size of its median image.
        heads: outputs of the network.
        cases: of the dataset.
        requested: as :func:`memory_budget` takes it.
        step: how it will be trained; by default as in the published recipes.
        stage_channels: further channels of a cascade that has the same patch.

    Raises ConfigurationError where not even the smallest patch fits, PlanError for a plan without its median image, and
    what :func:`memory_budget` raises.
    """
    budget = memory_budget(requested)
    step = step or usual_step(plan.architecture)
    shape = plan.settings_of_configuration.get("median_image_size_in_voxels")
    if not shape:
        raise PlanError(
            f"plan {plan.plans_name} has no median_image_size_in_voxels, which --fit-gpu needs: make the plan again"
        )
    median = [float(n) for n in shape]
    voxels = COVERED * cases * math.prod(median)
    channels = plan.num_channels + stage_channels
    patch, batch = largest_fit(plan.architecture, channels, heads, median, budget, step, voxels)
    fitted = plan.replaced(patch_size=patch, batch_size=batch)
    estimate = plan_memory(fitted, heads, step, stage_channels)
    reason = (
        f"the largest patch within the median image ({by(median)}), then batch, that train in {gib(budget)}: "
        f"{by(patch)}, batch {batch}, about {gib(estimate.total)}"
    )
    logger.info("--fit-gpu %s: %s (before: %s, batch %d)", requested, reason, by(plan.patch_size), plan.batch_size)
    content = copy.deepcopy(fitted.content)
    record: dict[str, Any] = {
        "asked": requested,
        "budget_bytes": budget,
        "estimate_bytes": estimate.to_dict(),
        "patch_before": list(plan.patch_size),
        "batch_before": plan.batch_size,
        "reason": reason,
    }
    ours = content.get(KEY, {})
    if plan.configuration != CONFIGURATION:  # beside that of the full resolution
        record = {**ours.get("fit_gpu", {}), plan.configuration: record}
    content[KEY] = {**ours, "fit_gpu": record}
    return FinetunePlan(content, plan.configuration, plan.path)
