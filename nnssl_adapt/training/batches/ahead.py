"""What is left to do for a batch on the device is done one batch ahead, while the network has the one before."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]


def prepared_ahead(
    batches: Generator[Batch], prepare: Callable[[Batch, torch.device], tuple[Tensor, Tensor]], device: torch.device
) -> Generator[Batch]:
    """Yield ``batches`` in their order; of those with ``work`` left, ``image`` and ``target`` as ``prepare`` makes them.

    A thread does it, on CUDA devices on a stream of its own: neither the host nor the device waits between two steps. What
    it yields is what ``prepare`` makes without it. Closing it closes ``batches`` as well; errors come with the batch that
    they belong to, or with the one before.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def following() -> tuple[Batch, Any] | None:
        batch = next(batches, None)
        if batch is None or "work" not in batch:
            return None if batch is None else (batch, None)
        with _on(stream):
            image, target = prepare(batch, device)
            return {"image": image, "target": target}, None if stream is None else stream.record_event()

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        try:
            ahead = thread.submit(following)
            while (found := ahead.result()) is not None:
                ahead = thread.submit(following)
                yield _taken(*found)
        finally:
            thread.submit(batches.close).result()  # where it ran: it can't be closed while it runs


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _taken(batch: Batch, done: Any) -> Batch:
    """The batch, for the current stream: what is asked of it comes after ``done``, and its memory is kept until then."""
    if done is not None:
        current = torch.cuda.current_stream(batch["image"].device)
        current.wait_event(done)
        for tensor in batch.values():
            tensor.record_stream(current)
    return batch
