"""How a loss in one pass is computed on this device: by torch's operations, those compiled, or Triton's kernels.

Which is fastest on a GPU depends on the card, the versions and the number of classes. So each way does the first batch's
work a few times, and the fastest of those that give the same numbers is kept. On a CPU it is torch's operations.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnssl_adapt.training.fused import loss_slabs
from nnssl_adapt.training.fused.failures import BACKEND_FAILURES, in_words
from nnssl_adapt.training.fused.norm import has_kernels

logger = logging.getLogger(__name__)

_TIMED = 3
_SAME = 1e-2
"""Share by which sums of two ways may differ; it is 1e-5 where both are right, and much where one is wrong."""


@dataclass(frozen=True)
class Way:
    """A way to compute sums over all voxels, and the gradient that follows from theirs.

    Attributes:
        name: for the log.
        label_sums: of logits (B, K, V), labels (B, 1, V) and the label that counts for nothing: the summed cross-entropy (a
            scalar), and float32 (3, B, K): of each class the probability where it is true, that everywhere, its voxels.
        label_gradient: of these and the gradients of both: that of the logits, in their type and layout.
        region_sums: of logits (B, R, V), bool target (B, R, V) or with a last channel (B, R + 1, V) of voxels that count for
            nothing, and whether there is one: summed binary cross-entropy, and float32 (3, B, R).
        region_gradient: as that of labels.
    """

    name: str
    label_sums: Callable[..., tuple[Tensor, Tensor]]
    label_gradient: Callable[..., Tensor]
    region_sums: Callable[..., tuple[Tensor, Tensor]]
    region_gradient: Callable[..., Tensor]


def _slabs(name: str, compiled: bool) -> Way:
    return Way(
        name,
        functools.partial(loss_slabs.label_sums, compiled=compiled),
        functools.partial(loss_slabs.label_gradient, compiled=compiled),
        functools.partial(loss_slabs.region_sums, compiled=compiled),
        functools.partial(loss_slabs.region_gradient, compiled=compiled),
    )


PLAIN = _slabs("torch's operations", compiled=False)
COMPILED = _slabs("compiled", compiled=True)


@functools.cache
def triton_way() -> Way:
    """Triton's kernels; ImportError where it is not installed."""
    from nnssl_adapt.training.fused import loss_kernels as kernels

    pieces = kernels.label_sums, kernels.label_gradient, kernels.region_sums, kernels.region_gradient
    return Way("Triton", *pieces)


_chosen: dict[tuple[Any, ...], Way] = {}
"""By device, type, classes, layout, labels or regions, and whether compiling is allowed."""


def way_for(logits: Tensor, target: Tensor, rule: int | bool, regions: bool, compiles: bool) -> Way:
    """The way for such logits (B, K, V) on their device; on a GPU measured with the first ones.

    Args:
        logits, target, rule: as a :class:`Way` takes them, regions or labels.
        regions: which of them.
        compiles: whether torch.compile may be used.
    """
    if logits.device.type != "cuda":
        return PLAIN
    key = logits.device, logits.dtype, logits.shape[1], logits.stride(1) == 1, regions, compiles
    if key not in _chosen:
        _chosen[key] = fastest(
            possible_ways(compiles), functools.partial(_work, logits, target, rule, regions), logits.device
        )
    return _chosen[key]


def possible_ways(compiles: bool) -> list[Way]:
    """Those that a GPU has here, the one that always works first."""
    ways = [PLAIN]
    if has_kernels():
        try:
            ways.append(triton_way())
        except BACKEND_FAILURES as error:  # Triton is there, and can't be loaded
            logger.warning("loss: Triton is not used (%s)", in_words(error))
    return [*ways, COMPILED] if compiles else ways


def _work(logits: Tensor, target: Tensor, rule: int | bool, regions: bool, way: Way) -> Tensor:
    """Forward and backward pass; returns figures that tell whether they are right."""
    sums_of, gradient_of = (way.region_sums, way.region_gradient) if regions else (way.label_sums, way.label_gradient)
    entropy, sums = sums_of(logits, target, rule)
    weight = torch.ones((), device=logits.device) / logits[0, 0].numel()
    gradient = gradient_of(logits, target, rule, weight, torch.full_like(sums, -1.0) * weight)
    size = torch.linalg.vector_norm(gradient, dim=2, dtype=torch.float32)
    return torch.cat([entropy.view(1), sums.flatten(), size.flatten()])


def fastest(ways: Sequence[Way], work: Callable[[Way], Tensor], device: torch.device) -> Way:
    """The way that does ``work`` fastest. One that fails, or gives other figures than the first, is not used; the log says so.

    ``work`` returns figures of a forward and backward pass, which are the same to rounding for all ways.
    """
    expected = work(ways[0])
    seconds: dict[Way, float] = {}
    for way in ways:
        problem = None
        try:
            found = work(way)
            if not torch.allclose(
                found, expected, rtol=_SAME, atol=_SAME * float(expected.abs().mean()), equal_nan=True
            ):
                problem = "gives other numbers"
            seconds[way] = math.inf if problem else _seconds(work, way, device)
        except torch.OutOfMemoryError:
            problem = "needs too much memory"
        except BACKEND_FAILURES as error:
            problem = in_words(error)
        if problem is not None:
            if way is ways[0]:
                raise RuntimeError(f"the loss can't be computed: {problem}")
            seconds[way] = math.inf
            logger.warning("loss: %s is not used (%s)", way.name, problem)
    chosen = min(ways, key=lambda way: seconds[way])
    text = ", ".join(f"{way.name} {1000 * each:.1f} ms" for way, each in seconds.items() if math.isfinite(each))
    logger.info("loss: %s (%s)", chosen.name, text)
    return chosen


def _seconds(work: Callable[[Way], Tensor], way: Way, device: torch.device) -> float:
    times = []
    for _ in range(_TIMED):
        _wait(device)
        started = time.perf_counter()
        work(way)
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
