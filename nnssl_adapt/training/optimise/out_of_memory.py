"""When the device's memory is too small: a message with what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from nnssl_adapt.errors import TrainingError
from nnssl_adapt.planning.memory import StepSettings, by, suggest_smaller
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training.recipe.recipe import Recipe


@contextmanager
def explained_memory_errors(plan: FinetunePlan, recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Turn torch's error for too little memory into a TrainingError that says which patch or batch would fit."""
    with _memory_errors_as(lambda: _explanation(plan, recipe, device)):
        yield


@contextmanager
def explained_validation_memory(plan: FinetunePlan, device: torch.device) -> Iterator[None]:
    """Turn the same error into a TrainingError that says how to go on, where a trained network is validated.

    Whole cases are predicted then, one patch at a time: the batch of the training has no part in it.
    """
    where = "the GPU's memory" if device.type == "cuda" else "the memory"
    message = (
        f"validation: {where} is too small for a case's tiles of {by(plan.patch_size)} and its logits. The trained weights "
        "are saved: run the same command with --val where more is free"
    )
    with _memory_errors_as(lambda: message):
        yield


@contextmanager
def _memory_errors_as(explanation: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingError(explanation()) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU's allocator has no exception of its own
            raise
        raise TrainingError(explanation()) from error


def _explanation(plan: FinetunePlan, recipe: Recipe, device: torch.device) -> str:
    where = "the GPU's memory" if device.type == "cuda" else "the memory"
    what = f"{where} is too small for patch {by(plan.patch_size)} in batches of {plan.batch_size}"
    if device.type == "cuda":
        budget = int(torch.cuda.get_device_properties(device).total_memory)
        return f"{what}: {suggest_smaller(plan, budget, StepSettings.of(recipe))}"
    return f"{what}: try {_smaller(plan, recipe)}"


def _smaller(plan: FinetunePlan, recipe: Recipe) -> str:
    """Half the batch, made up for by accumulation; of a single sample, half the patch along its longest axis."""
    if plan.batch_size > 1:
        half = plan.batch_size // 2
        return (
            f"--batch {half} (with --set accumulate={2 * recipe.accumulate} for as large a step), or a smaller --patch"
        )
    sizes, strides = list(plan.patch_size), plan.architecture.total_stride
    axis = max(range(3), key=lambda a: sizes[a] / strides[a])
    sizes[axis] = max(strides[axis], sizes[axis] // 2 // strides[axis] * strides[axis])
    return f"--patch {' '.join(str(n) for n in sizes)}, or --set activation_checkpointing=true"
