"""How busy the device is, and how long it waits for data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from nnssl_adapt.training.progress.history import DeviceFigures

Item = TypeVar("Item")


class EpochClock:
    """Measures what the device does in an epoch: how much of the time it works, and how long it is kept waiting for data.

    On a CUDA device with events in its stream. It works from the moment a batch has come (or, if later, it is done with
    the one before) until it has done all that the step asked of it; pauses within a step, while the host prepares the next
    operation or compiles, count as work. Elsewhere, by the clock: whatever time a step takes once its batch has come.

    Make one for a run, pass the batches through :meth:`watched`, and for each epoch call :meth:`start`, :meth:`rest` after
    each step, and :meth:`stop`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._spans: list[list[Any]] = []
        self._waited = 0.0
        self._waited_in_steps = math.nan
        self._started = time.perf_counter()

    def start(self) -> None:
        """An epoch begins."""
        self._spans, self._waited, self._started = [], 0.0, time.perf_counter()
        self._waited_in_steps = math.nan
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)

    def watched(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches; the device is taken to work from when one has come until :meth:`rest` or the next is wanted."""
        iterator = iter(batches)
        while True:
            self.rest()
            began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            self._spans.append([self._mark()])
            yield batch

    def rest(self) -> None:
        """The step is over: nothing more is asked of the device until the next batch."""
        if self._spans and len(self._spans[-1]) == 1:
            self._spans[-1].append(self._mark())

    def steps_done(self, steps: int) -> None:
        """The epoch's training steps are over, ``steps`` of them here; what comes now are batches for validation."""
        self._waited_in_steps = 1000 * self._waited / steps if steps else math.nan

    def stop(self) -> DeviceFigures:
        """The epoch is over. Waits until the device is done with it."""
        self.rest()
        if not self._on_cuda:
            worked = sum(end - begin for begin, end in self._spans)
            return DeviceFigures(self._share(worked), self._waited, waited_a_step=self._waited_in_steps)
        torch.cuda.synchronize(self._device)
        worked = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        peak = torch.cuda.max_memory_allocated(self._device) / 2**30
        return DeviceFigures(self._share(worked), self._waited, peak, self._waited_in_steps)

    def _share(self, worked: float) -> float:
        return min(1.0, worked / max(time.perf_counter() - self._started, 1e-9))

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
