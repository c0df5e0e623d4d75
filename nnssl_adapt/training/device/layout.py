"""Which memory layout a network is trained in: on a GPU the fastest one, by a short trial at the start of a run.

Which is fastest depends on the card, the versions of cuDNN and torch, the network and its patch; nobody can tell beforehand.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.data.preprocess import digest_of
from nnssl_adapt.errors import NnsslAdaptError
from nnssl_adapt.files import write_json
from nnssl_adapt.text import read_record
from nnssl_adapt.training.fused.failures import BACKEND_FAILURES, in_words
from nnssl_adapt.training.fused.modules import FusedNorm
from nnssl_adapt.training.fused.norm import has_kernels
from nnssl_adapt.training.optimise.network_options import to_device, training_forward
from nnssl_adapt.training.recipe.recipe import Recipe

logger = logging.getLogger(__name__)

_WARM_UP, _TIMED = 3, 5
"""Steps: the first ones compile, and let cuDNN try its algorithms."""

_SAME = 0.1
"""Share by which loss and norm of the gradient may differ between layouts: more than half precision explains."""


@dataclass(frozen=True)
class Layout:
    """How a network lies in memory, and what goes with that.

    Attributes:
        channels_last: torch's ``channels_last_3d``.
        fused_norm: normalisation and what follows it in one operation, made for channels last.
    """

    channels_last: bool = False
    fused_norm: bool = False

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with this layout."""
        return recipe.override(channels_last=self.channels_last, fused_norm="on" if self.fused_norm else "off")

    def __str__(self) -> str:
        return f"channels {'last' if self.channels_last else 'first'}{' with fused norms' * self.fused_norm}"


def possible_layouts(recipe: Recipe, device: torch.device) -> list[Layout]:
    """Layouts that a recipe leaves open on a device; a single one where there is nothing to try."""
    first, last, fused = Layout(), Layout(True), Layout(True, True)
    if recipe.fused_norm == "on":
        if device.type == "cuda" and not has_kernels():
            logger.warning("fused_norm on: Triton is not installed, so that it is slower than off (pip install triton)")
        return [fused]
    if device.type != "cuda":
        return [last if recipe.channels_last else first]
    lasts = [last, fused] if recipe.fused_norm == "auto" and has_kernels() else [last]
    return {None: [first, *lasts], True: lasts, False: [first]}[recipe.channels_last]


@dataclass(frozen=True)
class LayoutTrial:
    """A few steps of forward and backward pass in each layout, on a network and numbers that are thrown away.

    Attributes:
        recipe: of the run.
        device: where it trains.
        autocast_dtype: what the network computes in; None: float32.
        build: makes the network, on the CPU; always the same one.
        loss: of (logits, target).
        image: (B, C, Z, Y, X), of a batch as this process gets it, on the CPU.
        target: as the loss takes it, on the CPU.
    """

    recipe: Recipe
    device: torch.device
    autocast_dtype: torch.dtype | None
    build: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    image: Tensor
    target: Tensor
    _found: list[tuple[float, float]] = field(default_factory=list, init=False, compare=False)

    def seconds(self, layout: Layout) -> float:
        """Median of a step; infinite where the memory is too small, and for fused norms that don't work or don't occur."""
        failure: str | None = None
        try:
            found = self._seconds(layout)
        except torch.OutOfMemoryError:
            found = math.inf
        except BACKEND_FAILURES as error:
            if not layout.fused_norm:
                raise
            failure = in_words(error)
        if failure is not None:
            logger.warning("fused norms don't work here (%s); training does without (--fused-norm off)", failure)
            found = math.inf
        if self.device.type == "cuda":  # not in the handler, whose traceback keeps tensors in memory
            torch.cuda.empty_cache()
        return found

    def _seconds(self, layout: Layout) -> float:
        recipe = layout.of(self.recipe)
        network = to_device(self.build(), recipe, self.device).train()
        if layout.fused_norm and not any(isinstance(module, FusedNorm) for module in network.modules()):
            return math.inf
        forward = training_forward(network, recipe, self.device)
        image, target = self.image.to(self.device), self.target.to(self.device)
        times = []
        for step in range(_WARM_UP + _TIMED):
            self._wait()
            started = time.perf_counter()
            network.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
                loss = self.loss(forward(image), target)
            loss.backward()
            self._wait()
            times.append(time.perf_counter() - started)
            if step == 0:
                self._compare(float(loss.detach()), network)
        return statistics.median(times[_WARM_UP:])

    def _compare(self, loss: float, network: nn.Module) -> None:
        """Raise ValueError where loss and gradient are not those of the layout that was tried first."""
        gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
        norm = float(torch.stack([gradient.float().norm() for gradient in gradients]).norm())
        self._found.append((loss, norm))
        for name, one, other in zip(("loss", "norm of the gradient"), self._found[0], self._found[-1], strict=True):
            if math.isfinite(one) and not abs(one - other) <= _SAME * max(abs(one), 1e-3):
                raise ValueError(f"{name} {other:.4g} instead of {one:.4g}")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def faster_layout(
    possible: Sequence[Layout], trial: Callable[[Layout], float], memory: Path, key: Mapping[str, Any]
) -> Layout:
    """The fastest of ``possible`` layouts, by ``trial`` (layout → seconds a step) or by an earlier one.

    ``memory`` is the file that remembers, ``key`` what the answer depends on (plain values). The log says what was measured.
    """
    digest = digest_of(dict(key))[:16]
    known = read_record(memory)
    remembered = _remembered(known.get(digest))
    if remembered is not None and remembered in possible:
        logger.info("memory layout: %s, as measured before (%s)", remembered, memory)
        return remembered
    seconds = {layout: trial(layout) for layout in possible}
    found = min(possible, key=lambda layout: seconds[layout])  # of equals the first
    text = ", ".join(f"{layout} {1000 * each:.1f} ms" for layout, each in seconds.items() if math.isfinite(each))
    logger.info("memory layout: %s (forward and backward pass: %s)", found, text or "the memory is too small for all")
    if math.isfinite(seconds[found]):
        entry = {"channels_last": found.channels_last, "fused_norm": found.fused_norm, "measured": text, **key}
        try:
            write_json(memory, {**known, digest: entry})
        except NnsslAdaptError as error:  # a home without room: it is measured again next time
            logger.info("memory layout: not remembered (%s)", error)
    return found


def _remembered(entry: Any) -> Layout | None:
    if not isinstance(entry, dict):
        return None
    last, fused = entry.get("channels_last"), entry.get("fused_norm")
    return Layout(last, fused) if isinstance(last, bool) and isinstance(fused, bool) else None
