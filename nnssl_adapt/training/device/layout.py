"""Which memory layout a network is trained in: on a GPU the faster one, by a short trial at the start of a run.

Which is faster depends on the card, the versions of cuDNN and torch, the network and its patch; nobody can tell beforehand.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.data.preprocess import digest_of
from nnssl_adapt.errors import NnsslAdaptError
from nnssl_adapt.files import write_json
from nnssl_adapt.text import read_record
from nnssl_adapt.training.optimise.network_options import to_device, training_forward
from nnssl_adapt.training.recipe.recipe import Recipe

logger = logging.getLogger(__name__)

_WARM_UP, _TIMED = 3, 5
"""Steps: the first ones compile, and let cuDNN try its algorithms."""

_NAMES = {False: "channels first", True: "channels last"}


@dataclass(frozen=True)
class LayoutTrial:
    """A few steps of forward and backward pass in each layout, on a network and numbers that are thrown away.

    Attributes:
        recipe: of the run.
        device: where it trains.
        autocast_dtype: what the network computes in; None: float32.
        build: makes the network, on the CPU.
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

    def seconds(self, channels_last: bool) -> float:
        """Median of a step; infinite where the memory is too small."""
        try:
            found = self._seconds(self.recipe.override(channels_last=channels_last))
        except torch.OutOfMemoryError:
            found = math.inf
        if self.device.type == "cuda":  # not in the handler, whose traceback keeps tensors in memory
            torch.cuda.empty_cache()
        return found

    def _seconds(self, recipe: Recipe) -> float:
        network = to_device(self.build(), recipe, self.device).train()
        forward = training_forward(network, recipe, self.device)
        image, target = self.image.to(self.device), self.target.to(self.device)
        times = []
        for _ in range(_WARM_UP + _TIMED):
            self._wait()
            started = time.perf_counter()
            network.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
                loss = self.loss(forward(image), target)
            loss.backward()
            self._wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[_WARM_UP:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def faster_layout(trial: Callable[[bool], float], memory: Path, key: Mapping[str, Any]) -> bool:
    """Whether channels last is the faster layout, by ``trial`` (layout → seconds a step) or by an earlier one.

    ``memory`` is the file that remembers, ``key`` what the answer depends on (plain values). The log says what was measured.
    """
    digest = digest_of(dict(key))[:16]
    known = read_record(memory)
    entry = known.get(digest)
    if isinstance(entry, dict) and isinstance(entry.get("channels_last"), bool):
        found: bool = entry["channels_last"]
        logger.info("memory layout: %s, as measured before (%s)", _NAMES[found], memory)
        return found
    seconds = {layout: trial(layout) for layout in (False, True)}
    found = seconds[True] < seconds[False]
    text = ", ".join(f"{_NAMES[layout]} {1000 * each:.1f} ms" for layout, each in seconds.items())
    logger.info("memory layout: %s (forward and backward pass: %s)", _NAMES[found], text)
    if math.isfinite(min(seconds.values())):
        try:
            write_json(memory, {**known, digest: {"channels_last": found, "measured": text, **key}})
        except NnsslAdaptError as error:  # a home without room: it is measured again next time
            logger.info("memory layout: not remembered (%s)", error)
    return found
