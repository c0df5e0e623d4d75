"""Do processes on the devices of this machine reach each other? They add up tensors, as training adds up gradients."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as torch_distributed

from nnssl_adapt.errors import OtherRankFailed

_MEETING = 60.0
"""Seconds that processes have to find each other and to talk."""

_ERRORS = (RuntimeError, ValueError, OSError, AssertionError)


def processes_talk(count: int, device_type: str) -> float:
    """Sum tensors over ``count`` new processes, one a card (NCCL) or all on the CPU (gloo). Returns the slowest's GB/s.

    Raises OtherRankFailed: one of them gives no answer, gets a wrong sum, or fails; the message says why.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        arguments = [(rank, count, device_type, meeting, answers) for rank in range(count)]
        processes = [context.Process(target=_meet, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        try:
            results = _answers(processes, answers)
        finally:
            for process in processes:
                process.kill()
                process.join()
    wrong = [result for result in results if isinstance(result, str)]
    if wrong:
        raise OtherRankFailed(wrong[0])
    return min(float(result) for result in results)


def _answers(processes: Sequence[Any], answers: Any) -> list[Any]:
    until = time.monotonic() + _MEETING + 30
    results: list[Any] = []
    while len(results) < len(processes):
        try:
            results.append(answers.get(timeout=1))
        except queue.Empty:  # also a process that broke down has had a second for its last words
            if time.monotonic() > until or any(process.exitcode not in (None, 0) for process in processes):
                missing = len(processes) - len(results)
                raise OtherRankFailed(f"no answer from {missing} of {len(processes)} processes") from None
    return results


def _meet(rank: int, count: int, device_type: str, meeting: str, answers: Any) -> None:
    """One of the processes: puts its bandwidth, or what is wrong, into ``answers``."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch_distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=_MEETING),
        )
        tensor = torch.full((1 << (24 if device.type == "cuda" else 16),), float(rank + 1), device=device)
        torch_distributed.all_reduce(tensor)
        right = bool((tensor == count * (count + 1) / 2).all())
        seconds = statistics.median(_seconds_of_a_sum(tensor) for _ in range(5))
        answers.put(tensor.nbytes / seconds / 1e9 if right else f"rank {rank} of {count} got a wrong sum")
    except _ERRORS as error:
        answers.put(f"rank {rank} of {count}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    with contextlib.suppress(*_ERRORS):
        torch_distributed.destroy_process_group()


def _seconds_of_a_sum(tensor: torch.Tensor) -> float:
    started = time.perf_counter()
    torch_distributed.all_reduce(tensor)
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - started
