"""Numbers that a device has worked out, read one step late, so that nobody waits for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LateFigures:
    """Figures on their way to the host. :meth:`send` after a step, :meth:`take` when the next one has been asked for.

    On a CUDA device they are copied into pinned memory, and an event says when they are there. By the time that they are
    taken the device has done the step that they are of, and has the next one to do: it never runs dry. Elsewhere they are
    there at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._device = device
        self._pinned: Tensor | None = None
        self._sent: Tensor | None = None
        self._arrived: Any = None

    @property
    def on_their_way(self) -> bool:
        """Whether some were sent and not taken."""
        return self._sent is not None

    def send(self, figures: Tensor) -> None:
        """Start their copy; those that were sent before have been taken."""
        if self._sent is not None:
            raise RuntimeError("the figures that were sent before were not taken")
        if not self._on_cuda:
            self._sent = figures.detach().clone()
            return
        if self._pinned is None or self._pinned.shape != figures.shape or self._pinned.dtype != figures.dtype:
            self._pinned = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._arrived = torch.cuda.Event()
        self._sent = self._pinned.copy_(figures.detach(), non_blocking=True)
        self._arrived.record(torch.cuda.current_stream(self._device))

    def take(self) -> list[float]:
        """Wait for them, and return them."""
        if self._sent is None:
            raise RuntimeError("there are no figures on their way")
        if self._on_cuda:
            self._arrived.synchronize()
        values: list[float] = self._sent.tolist()
        self._sent = None
        return values
