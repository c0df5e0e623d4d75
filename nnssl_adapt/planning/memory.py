"""How much memory of a GPU (or of the machine) training takes, and the largest patch and batch that fit.

A prediction, not a measurement: the network is run on torch's meta device with every tensor counted while it lives (see
:mod:`nnssl_adapt.planning.traced_step`). What libraries take for themselves is a margin on top. Compiled networks
(``torch.compile``) keep the same number of bytes for the backward pass, or less (counted by torch's partitioner in a test; for
ResEnc-L at 160³, batch 2, in bfloat16, 8.2 GiB either way).
Fused normalisations (``fused_norm``) keep the same tensors as separate ones, and so does either memory layout.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.planning.patch import at_least_two_voxels
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.traced_step import trace_step
from nnssl_adapt.weights.network.architectures import Architecture, build_network, without_memory

GIB = 2**30

CONTEXT = GIB
"""Allowed for what CUDA, cuBLAS and cuDNN take whatever the network. With it, predictions for nnU-Net's four presets come
to 0 to 10% less than the memory that its documentation gives for them (7.7, 9.1, 22.7 and 36.6 GB)."""

FRAGMENTED = 0.04
"""Share of the traced memory that torch's allocator can't hand out again, since its blocks have other sizes."""

MIN_BATCH = 2
"""nnU-Net's smallest batch."""

_STATES = {"sgd": 1, "adam": 2, "adamw": 2}
"""Numbers that each optimiser keeps for a weight."""


@dataclass(frozen=True)
class StepSettings:
    """What of a training decides its memory. Fields are called as in a recipe; see :meth:`of`.

    Attributes:
        precision: ``auto`` (half precision on CUDA, float32 elsewhere), ``bf16``, ``fp16`` or ``fp32``.
        optimizer: ``sgd``, ``adamw`` or ``adam``.
        deep_supervision: whether a CNN is judged at every resolution.
        activation_checkpointing: whether blocks are computed again in the backward pass.
        ema_decay: None where no average of the weights is kept.
        accumulate: batches that a step gathers gradients of.
        freeze: ``none``, ``encoder``, ``all_but_head`` or ``stages:K``.
        device: ``cuda`` or ``cpu``.
        one_pass_loss: whether the loss keeps no copies of the logits, as that of ``dice_ce`` does.
    """

    precision: str = "auto"
    optimizer: str = "sgd"
    deep_supervision: bool = False
    activation_checkpointing: bool = False
    ema_decay: float | None = None
    accumulate: int = 1
    freeze: str = "none"
    device: str = "cuda"
    one_pass_loss: bool = False

    @classmethod
    def of(cls, recipe: Any, device: str = "cuda") -> StepSettings:
        """The settings of a recipe, or of anything with attributes of these names; what it lacks is left as by default."""
        names = [field.name for field in dataclasses.fields(cls) if field.name not in ("device", "one_pass_loss")]
        plain = getattr(recipe, "loss", None) == "dice_ce" and not getattr(recipe, "class_weights", None)
        known = {name: getattr(recipe, name) for name in names if hasattr(recipe, name)}
        return cls(**known, device=device, one_pass_loss=plain)

    @property
    def half(self) -> torch.dtype | None:
        """Precision of autocast, None for float32."""
        chosen = self.precision
        if chosen == "auto":
            chosen = "bf16" if self.device == "cuda" else "fp32"
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[chosen]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes when it takes most. ``print`` it for three lines.

    Attributes:
        what: network, patch, batch and precision, for messages.
        weights: parameters and buffers, and their running average if there is one.
        gradients: those that exist at that moment.
        optimizer: its momentum or moments.
        activations: what the forward pass keeps for the backward pass, with the batch.
        working: what the largest step needs besides.
        margin: taken by CUDA, by cuDNN's workspace and lost to fragmentation; 0 on the CPU.
    """

    what: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    margin: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.margin

    def to_dict(self) -> dict[str, int]:
        """Bytes by part and in all, fit for JSON."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "what"}
        return {**parts, "total": self.total}

    def __str__(self) -> str:
        return (
            f"{self.what}: about {gib(self.total)}\n"
            f"  when it takes most: weights {gib(self.weights)}, gradients by then {gib(self.gradients)}, "
            f"optimiser {gib(self.optimizer)}\n"
            f"  activations {gib(self.activations)}, working memory {gib(self.working)}, margin {gib(self.margin)}"
        )


def estimate_memory(
    architecture: Architecture,
    channels: int,
    heads: int,
    patch_size: Sequence[int],
    batch_size: int,
    step: StepSettings = StepSettings(),
) -> MemoryEstimate:
    """Predict the most memory that training takes. Nothing is allocated; takes less than a second.

    Args:
        architecture: of the network.
        channels: of the image.
        heads: outputs of the network.
        patch_size: voxels (Z, Y, X), divisible by the network's strides (else ArchitectureError).
        batch_size: samples of one forward pass.
        step: precision, optimiser and the rest that matters.
    """
    with without_memory(architecture):
        supervised = step.deep_supervision and architecture.kind.has_deep_supervision
        network = build_network(architecture, channels, heads, patch_size, deep_supervision=supervised).train()
    _freeze(network, step.freeze)
    traced = trace_step(
        network,
        channels,
        patch_size,
        batch_size,
        half=step.half,
        recompute=step.activation_checkpointing,
        fused_attention=_fused_attention(step),
        one_pass_loss=step.one_pass_loss,
    )
    weights = sum(_nbytes(tensor) for tensor in (*network.parameters(), *network.buffers()))
    trained = sum(_nbytes(weight) for weight in network.parameters() if weight.requires_grad)
    gradients = trained if step.accumulate > 1 else traced.gradients_at_peak
    working = max(0, traced.peak - traced.kept - traced.gradients_at_peak)
    activations = traced.kept
    if gradients + activations + working < 2 * trained:  # the optimiser's step, which has a copy of the weights in work
        gradients, activations, working = trained, 0, trained
    estimate = MemoryEstimate(
        what=f"{architecture.preset or architecture.class_name} at patch {by(patch_size)}, batch {batch_size}, {_name(step)}",
        weights=weights * (1 if step.ema_decay is None else 2),
        gradients=gradients,
        optimizer=_STATES[step.optimizer] * trained,
        activations=activations,
        working=working,
        margin=0,
    )
    if step.device != "cuda":
        return estimate
    margin = CONTEXT + traced.convolution + int(FRAGMENTED * estimate.total)
    return dataclasses.replace(estimate, margin=margin)


def largest_fit(
    architecture: Architecture,
    channels: int,
    heads: int,
    median_shape: Sequence[float],
    budget: int,
    step: StepSettings = StepSettings(),
    batch_voxels: float = 0,
) -> tuple[tuple[int, int, int], int]:
    """The largest patch no larger than the median image that trains within ``budget`` bytes, then the largest batch.

    The patch keeps the shape of the image as far as the strides allow: from the whole median image, the axis of which most
    is seen is shortened until it fits (nnU-Net's rule), and then lengthened again wherever that still fits.

    Args:
        architecture, channels, heads: of the network.
        median_shape: voxels (Z, Y, X) of the median image, resampled.
        budget: bytes.
        step: precision, optimiser and the rest that matters.
        batch_voxels: the most voxels that a batch of more than two should have, since the dataset has no more to offer.

    Returns:
        Patch (Z, Y, X) in voxels, divisible by the network's strides, and batch (at least 2).

    Raises ConfigurationError, with what it takes, where not even the smallest patch fits.
    """

    @functools.cache
    def fits(patch: tuple[int, int, int], batch: int = MIN_BATCH) -> bool:
        return estimate_memory(architecture, channels, heads, patch, batch, step).total <= budget

    path = shrinking_patches(architecture, median_shape)
    if not fits(path[-1]):
        needed = estimate_memory(architecture, channels, heads, path[-1], MIN_BATCH, step)
        single = estimate_memory(architecture, channels, heads, path[-1], 1, step)
        raise ConfigurationError(
            f"{gib(budget)} of memory are too few for {architecture}: its smallest patch, {by(path[-1])}, needs about "
            f"{gib(needed.total)} at batch {MIN_BATCH} ({gib(single.total)} at batch 1). Use a larger GPU or a smaller network"
        )
    patch = path[_first(lambda index: fits(path[index]), len(path) - 1)]
    patch = _lengthened(patch, path[0], architecture.total_stride, median_shape, fits)
    batch = max(MIN_BATCH, round(batch_voxels / math.prod(patch)))
    smaller = _first(lambda less: fits(patch, batch - less), batch - MIN_BATCH)
    return patch, batch - smaller


def shrinking_patches(architecture: Architecture, median_shape: Sequence[float]) -> list[tuple[int, int, int]]:
    """Patches from the largest within the median image to the smallest that the network takes, one step at a time.

    Each step takes one stride off the axis of which the patch sees most. The smallest leaves two voxels at the network's
    coarsest resolution, as :func:`nnssl_adapt.planning.patch.fit_patch` does.
    """
    strides = architecture.total_stride
    within = [max(1, int(n // s)) * s for n, s in zip(median_shape, strides, strict=True)]
    patch = at_least_two_voxels(within, strides, median_shape)
    path = [tuple(patch)]
    while math.prod(patch) > 2 * math.prod(strides):
        reducible = [axis for axis in range(3) if patch[axis] > strides[axis]]
        axis = max(reducible, key=lambda axis: (patch[axis] / median_shape[axis], axis))
        patch[axis] -= strides[axis]
        path.append(tuple(patch))
    return [(z, y, x) for z, y, x in path]


def suggest_smaller(
    plan: FinetunePlan, budget: int, step: StepSettings = StepSettings(), heads: int | None = None
) -> str:
    """What to type so that a training that ran out of memory fits: flags, with the memory they should come to.

    The prediction was evidently too low for what was tried, so that what is suggested stays below the prediction for that
    too.

    Args:
        plan: with the patch and batch that were too large.
        budget: bytes that there are.
        step: precision, optimiser and the rest that matters.
        heads: outputs of the network; None: as the dataset beside the plan says.
    """
    heads = plan.labels.num_heads if heads is None else heads
    channels = plan.num_channels
    if plan.previous_stage is not None:
        channels += len(plan.stage_channels(plan.labels))

    @functools.cache
    def total(patch: tuple[int, int, int], batch: int) -> int:
        return estimate_memory(plan.architecture, channels, heads, patch, batch, step).total

    tried = total(plan.patch_size, plan.batch_size)
    limit = min(budget, math.ceil(0.85 * tried))
    head = f"patch {by(plan.patch_size)} at batch {plan.batch_size} takes about {gib(tried)} of {gib(budget)}"
    suggestions = []
    if plan.batch_size > 1:
        fewer = _first(lambda fewer: total(plan.patch_size, plan.batch_size - fewer) <= limit, plan.batch_size - 1)
        batch = plan.batch_size - max(1, fewer)
        if (needed := total(plan.patch_size, batch)) <= limit:
            suggestions.append(f"--batch {batch} (about {gib(needed)})")
    path = shrinking_patches(plan.architecture, plan.patch_size)
    index = _first(lambda index: total(path[index], plan.batch_size) <= limit, len(path) - 1)
    if (needed := total(path[index], plan.batch_size)) <= limit:
        suggestions.append(f"--patch {' '.join(str(n) for n in path[index])} (about {gib(needed)})")
    if not step.activation_checkpointing:
        again = dataclasses.replace(step, activation_checkpointing=True)
        needed = estimate_memory(plan.architecture, channels, heads, plan.patch_size, plan.batch_size, again).total
        if needed <= limit:
            suggestions.append(f"--set activation_checkpointing=true (slower, about {gib(needed)})")
    if not suggestions:
        return f"{head}, and not even the smallest patch fits: use a larger GPU or a smaller network"
    return f"{head}. These should fit: {'; or '.join(suggestions)}"


def gib(size: float) -> str:
    """``1.5 GiB``; below a tenth of one in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def by(numbers: Sequence[float]) -> str:
    """``64 × 96 × 32``."""
    return " × ".join(str(round(n)) for n in numbers)


def _first(holds: Callable[[int], bool], last: int) -> int:
    """The first number from 0 to ``last`` from which on ``holds``, by bisection; ``last`` is taken for granted."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _lengthened(
    patch: tuple[int, int, int],
    limit: Sequence[int],
    strides: Sequence[int],
    median_shape: Sequence[float],
    fits: Callable[[tuple[int, int, int]], bool],
) -> tuple[int, int, int]:
    """``patch`` with axes made longer, that of which least is seen first, as long as ``limit`` and memory allow."""
    candidates = [axis for axis in range(3) if patch[axis] < limit[axis]]
    while candidates:
        axis = min(candidates, key=lambda axis: (patch[axis] / median_shape[axis], axis))
        z, y, x = (n + strides[axis] * (i == axis) for i, n in enumerate(patch))
        if (z, y, x)[axis] <= limit[axis] and fits((z, y, x)):
            patch = z, y, x
        else:
            candidates.remove(axis)
    return patch


def _freeze(network: nn.Module, freeze: str) -> None:
    """Freeze what a recipe's ``freeze`` freezes: everything but the decoder, or but the last layers.

    Frozen stages (``stages:K``) are counted as if they learned: what is predicted is then too much, never too little.
    """
    trained = {"none": ("",), "encoder": ("decoder.", "up_projection."), "all_but_head": _HEADS}.get(freeze, ("",))
    for name, weight in network.named_parameters():
        weight.requires_grad_(name.startswith(trained) and not (freeze == "encoder" and ".encoder." in f".{name}"))


_HEADS = ("decoder.seg_layers.", "up_projection.")


def _fused_attention(step: StepSettings) -> Callable[[Tensor], bool]:
    """On CUDA float32 attention has no kernel for heads that are no multiple of 4 wide, and stores its matrix."""
    return lambda query: step.device != "cuda" or query.element_size() == 2 or query.shape[-1] % 4 == 0


def _name(step: StepSettings) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[step.half]


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
