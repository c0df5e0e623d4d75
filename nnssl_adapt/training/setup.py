"""What a run is made of: recipe, plan and batches that go together, and torch's global settings while it lasts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl_adapt.data.previous_stage import PreviousStage
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.paths import downloads_folder
from nnssl_adapt.planning.patch import describe_fit, fit_patch
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training.batches.ahead import prepared_ahead
from nnssl_adapt.training.batches.augment import SpatialRange, Target, plain_transforms, training_transforms
from nnssl_adapt.training.batches.augment_gpu import DeviceAugmentation, device_transforms
from nnssl_adapt.training.batches.patches import (
    TRAINING,
    VALIDATION,
    Batches,
    BatchSchedule,
    PatchSampler,
    PhaseData,
    annotated_key,
    iterate_batches,
)
from nnssl_adapt.training.device.layout import Layout, LayoutTrial, faster_layout, possible_layouts
from nnssl_adapt.training.fused.norm import has_kernels
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.loop import Batch
from nnssl_adapt.training.optimise.network_options import wants_compiling
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.identity import RunIdentity
from nnssl_adapt.training.start import new_network

logger = logging.getLogger(__name__)

_YES, _NO = ("true", "1", "t", "yes", "y"), ("false", "0", "f", "no", "n")


def ignored_variables(environment: Mapping[str, str]) -> list[str]:
    """What is said of nnU-Net's environment variables that are set and have no effect on a training here."""
    found = []
    if environment.get("nnUNet_extTrainer"):
        found.append(
            "nnUNet_extTrainer is ignored in training: trainers of your own are recipes here (--recipe FILE, --set field=value)"
        )
    workers = environment.get("nnUNet_n_proc_DA", "")
    if workers and not workers.isdigit():
        found.append(f"nnUNet_n_proc_DA={workers} is ignored: expected a whole number of processes (or use --workers)")
    compiles = environment.get("nnUNet_compile", "")
    if compiles and compiles.lower() not in (*_YES, *_NO):
        found.append(f"nnUNet_compile={compiles} is taken as no: expected true or false (or use --compile on|off)")
    return found


def without_pretraining(recipe: Recipe) -> Recipe:
    """The recipe with random weights, and a folder of its own: the pre-trained run must not be overwritten by its baseline."""
    name = recipe.trainer_name
    return recipe.override(
        from_scratch=True, trainer_name=name if name.endswith("_from_scratch") else f"{name}_from_scratch"
    )


def adapted_plan(plan: FinetunePlan, recipe: Recipe) -> FinetunePlan:
    """The plan with the recipe's patch and batch, the patch fitted to the network's strides and the images."""
    if recipe.patch_size is None and recipe.batch_size is None:
        return plan
    patch = plan.patch_size
    if recipe.patch_size is not None:
        wanted = recipe.patch_size if not plan.is_planar else (1, *recipe.patch_size[1:])
        extent = plan.settings_of_configuration.get("median_image_size_in_voxels") or wanted
        extent = (1, *extent)[-3:]  # a 2D plan has that of a slice
        patch = fit_patch(wanted, plan.architecture.total_stride, extent)
        if message := describe_fit(wanted, patch, extent):
            logger.warning(message)
    return plan.replaced(patch_size=patch, batch_size=recipe.batch_size)


def batch_bytes(plan: FinetunePlan, recipe: Recipe) -> int:
    """Bytes of a batch as workers hand it over: float32 images and int16 labels, which a GPU still has to turn and cut."""
    of_patch = recipe.augmentation != "gpu"
    voxels = math.prod(plan.patch_size if of_patch else SpatialRange.of(plan.patch_size, plan.is_planar).read_size)
    channels = plan.num_channels + len(plan.stage_channels(plan.labels))
    return plan.batch_size * voxels * (4 * channels + 2)


def batches_of_fold(
    plan: FinetunePlan,
    store: CaseStore,
    recipe: Recipe,
    cases: tuple[Sequence[str], Sequence[str]],
    start: tuple[int, int],
    ranks: Ranks,
    workers: int,
    pin_memory: bool,
    copies: Path | None = None,
    previous: PreviousStage | None = None,
) -> Generator[Batch]:
    """All batches of a run from some point on, in the order in which the loop takes them. To be closed when no more are wanted.

    Args:
        plan: says patch, batch and labels.
        store: of the preprocessed cases.
        recipe: says the rest.
        cases: for training, and for validation.
        start: epoch, and its optimiser steps that are done.
        ranks: the processes that share each batch.
        workers: processes that make batches ahead.
        pin_memory: whether they go to a GPU.
        copies: folder with copies of cases, now or later.
        previous: of a cascade, the segmentations of its previous stage.
    """
    labels, patch, key = plan.labels, plan.patch_size, annotated_key(plan.labels)
    spatial, masks = SpatialRange.of(patch, plan.is_planar), plan.settings.use_mask_for_norm
    mirror_axes, stage = plan.axes_to_mirror(recipe.mirror_axes), plan.stage_channels(labels)
    chain: Any = plain_transforms(labels, stage)
    if recipe.augmentation == "gpu":
        chain = device_transforms(spatial, mirror_axes, labels, stage)
    elif recipe.augmentation == "default":
        chain = training_transforms(patch, spatial, mirror_axes, masks, labels, stage)
    read_size = patch if recipe.augmentation == "none" else spatial.read_size
    training, validation = (tuple(names) for names in cases)
    phases = {
        TRAINING: PhaseData(training, PatchSampler(read_size, patch, key), chain),
        VALIDATION: PhaseData(validation, PatchSampler(patch, patch, key), plain_transforms(labels, stage)),
    }
    batches = Batches(
        store.folder,
        phases,
        plan.batch_size,
        recipe.foreground_fraction,
        recipe.seed,
        rank=ranks.rank,
        size=ranks.size,
        copies=copies,
        previous=previous,
    )
    epoch, step = start
    schedule = BatchSchedule(
        recipe.epochs,
        recipe.iterations_per_epoch * recipe.accumulate,
        recipe.validation_iterations,
        epoch,
        step * recipe.accumulate,
    )
    return iterate_batches(batches, schedule, workers, pin_memory)


def finished_on_device(
    batches: Generator[Batch], plan: FinetunePlan, recipe: Recipe, device: torch.device
) -> Generator[Batch]:
    """The batches as the loop takes them: augmented on the device, one batch ahead, if the recipe wants that there."""
    if recipe.augmentation != "gpu":
        return batches
    augmentation = DeviceAugmentation(plan.labels, plan.settings.use_mask_for_norm, plan.stage_channels(plan.labels))
    return prepared_ahead(batches, augmentation, device)


def layout_of_run(
    identity: RunIdentity,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    loss: Callable[[Any, Tensor], Tensor],
    ranks: Ranks,
) -> Layout:
    """The memory layout of a run: of those that its recipe leaves open the fastest, measured on CUDA."""
    possible = possible_layouts(identity.recipe, device)
    if len(possible) == 1:
        return possible[0]
    plan, recipe, rule = identity.plan, identity.recipe, Target(identity.plan.labels)
    samples = len(ranks.samples(plan.batch_size))
    trial = LayoutTrial(
        recipe=recipe,
        device=device,
        autocast_dtype=autocast_dtype,
        build=lambda: new_network(identity),
        loss=loss,
        image=torch.randn(samples, plan.num_channels + len(plan.stage_channels(plan.labels)), *plan.patch_size),
        target=torch.zeros((samples, rule.channels, *plan.patch_size), dtype=rule.dtype),
    )
    key = {
        "card": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "network": identity.network,
        "patch": list(plan.patch_size),
        "samples": samples,
        "precision": str(autocast_dtype),
        "asked": [recipe.channels_last, recipe.fused_norm, has_kernels()],
        "compile": wants_compiling(recipe, device),
        "deep_supervision": recipe.deep_supervision,
        "activation_checkpointing": recipe.activation_checkpointing,
    }
    return faster_layout(possible, trial.seconds, downloads_folder() / "layouts.json", key)


@contextmanager
def restored_random_state(device: torch.device) -> Iterator[None]:
    """Restores torch's random state on exit."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
