"""How much of a training step a GPU's kernels run: measured by torch's profiler, over a few steps of some epochs.

What :class:`~nnssl_adapt.training.progress.clock.EpochClock` calls busy counts copies, and gaps in which the host prepares the
next kernel, as work. The profiler sees each kernel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

EVERY = 50
"""Epochs between two that are profiled. The first one is the second epoch: in the very first, networks are compiled."""

_STEPS = 5
"""Steps that are profiled."""

_LEFT_OUT = 10
"""Steps of the epoch before them, if it has as many: the first ones wait for data."""

_NO_KERNELS = ("Memcpy", "Memset")
"""How the profiler calls copies and fills, which other units of a GPU do."""


@dataclass(frozen=True)
class KernelFigures:
    """What kernels did in the profiled steps.

    Attributes:
        busy: 0 to 1, of the time from the first kernel to the last; NaN: not measured.
        idle_ms: milliseconds a step in which no kernel ran.
    """

    busy: float = math.nan
    idle_ms: float = math.nan


class KernelProfile:
    """Profiles a few steps of the epochs that :func:`is_profiled`. Call :meth:`before` and :meth:`after` around each step.

    Args:
        device: other devices than CUDA's are never profiled.
        enabled: False profiles nothing, as in all processes but one.
        start: begins a profile and returns it; it has ``stop()`` and ``events()``. None: torch's profiler of CUDA activity.
    """

    def __init__(self, device: torch.device, enabled: bool = True, start: Callable[[], Any] | None = None) -> None:
        self._device = device
        self._start = start or _start_profiler
        self._works = enabled and (device.type == "cuda" or start is not None)
        self._running: Any = None
        self._window = range(0)
        self._figures = KernelFigures()

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int = 0) -> None:
        """An epoch of so many steps begins, ``done`` of which an earlier run has taken."""
        self._figures = KernelFigures()
        first = done + min(_LEFT_OUT, max(0, steps - done - _STEPS))
        self._window = range(first, min(first + _STEPS, steps)) if is_profiled(epoch, epochs) else range(0)

    def before(self, step: int) -> None:
        """This step (from 0) begins."""
        if not self._works or self._running is not None or len(self._window) == 0 or step != self._window[0]:
            return
        self._wait()  # kernels of steps before are not looked at
        try:
            self._running = self._start()
        except RuntimeError as error:  # another profiler has the card, or its counters are for administrators
            self._give_up(error)

    def after(self, step: int) -> None:
        """This step is over."""
        if self._running is None or step != self._window[-1]:
            return
        self._wait()
        profile, self._running = self._running, None
        try:
            profile.stop()
            self._figures = kernel_figures(profile.events(), len(self._window))
        except RuntimeError as error:
            self._give_up(error)

    def take(self) -> KernelFigures:
        """The figures of the epoch that ends; a profile that was not finished is thrown away."""
        if self._running is not None:
            self._running.stop()
            self._running = None
        return self._figures

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _give_up(self, error: RuntimeError) -> None:
        self._works = False
        logger.info("kernels are not profiled here (%s)", " ".join(str(error).split())[:200])


def is_profiled(epoch: int, epochs: int) -> bool:
    """Whether steps of an epoch (from 0) are profiled: the second, and every 50th from there; of a single epoch that one."""
    return epoch % EVERY == min(1, epochs - 1)


def kernel_figures(events: Iterable[Any], steps: int) -> KernelFigures:
    """What a profile's events say: those on a GPU that are kernels, each with a ``time_range`` in microseconds.

    Kernels on several streams that overlap count once.
    """
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name == "CUDA"
        and not event.name.startswith(_NO_KERNELS)
        and not getattr(event, "is_user_annotation", False)
    )
    if not kernels:
        return KernelFigures()
    worked, until = 0.0, kernels[0][0]
    for start, end in kernels:
        worked += max(0.0, end - max(start, until))
        until = max(until, end)
    span = until - kernels[0][0]
    return KernelFigures(worked / span if span > 0 else 1.0, (span - worked) / 1000 / steps)


def _start_profiler() -> Any:
    # Not the CPU's side: it would slow down the very steps that are measured.
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profile.start()
    return profile
