"""Where a stage runs, how large it is, and where its figures go; clocks and counters for both a GPU and a rehearsal."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GIB = 2**30

FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    ImportError,
    OSError,
    LookupError,
    AssertionError,
    AttributeError,
    EOFError,
)
"""What a part that does not work raises: it becomes a row, and the stage goes on."""


@dataclass(frozen=True)
class Setting:
    """A stage on a device.

    Attributes:
        folder: of the results.
        stage: its number.
        rehearse: on the CPU, with tiny sizes: finds mistakes, measures nothing.
    """

    folder: Path
    stage: int
    rehearse: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def choose(self, real: Any, rehearsed: Any) -> Any:
        """The first on a GPU, the second in a rehearsal."""
        return rehearsed if self.rehearse else real

    def write(self, name: str, value: Any, unit: str = "", **more: Any) -> None:
        """Append a figure to the results, at once. ``more``: plain values; ``passed`` says whether it is right."""
        card = torch.cuda.get_device_name() if self.on_gpu else "cpu"
        row = {
            "stage": self.stage,
            "name": name,
            "value": value,
            "unit": unit,
            "device": card,
            "on_gpu": self.on_gpu,
            **more,
        }
        with (self.folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        said = f"{value:.4g}" if isinstance(value, float) else str(value)
        wrong = "  WRONG" if more.get("passed") is False else ""
        print(f"  {name}: {said} {unit}{self._of_goal(more)}{wrong}", flush=True)

    def judge(
        self,
        name: str,
        value: float,
        unit: str = "",
        at_least: float | None = None,
        at_most: float | None = None,
        **more: Any,
    ) -> None:
        """Write a figure that has a goal, and whether it is met."""
        if at_least is not None:
            goal, met = f"at least {at_least:g}", value >= at_least
        else:
            assert at_most is not None
            goal, met = f"at most {at_most:g}", value <= at_most
        self.write(name, value, unit, goal=goal, met=met, **more)

    @staticmethod
    def _of_goal(more: dict[str, Any]) -> str:
        return f", goal {more['goal']}: {'met' if more['met'] else 'MISSED'}" if "goal" in more else ""

    @contextlib.contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """A failure becomes a row, and the stage goes on. Afterwards the memory is given back."""
        with self.surviving_part(name):
            yield
        self.tidy()

    @contextlib.contextmanager
    def surviving_part(self, name: str) -> Iterator[None]:
        """A failure becomes a row; what was compiled for the part around it stays."""
        problem = ""
        try:
            yield
        except FAILURES as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if problem:  # not in the handler, whose traceback keeps tensors in memory
            self.write(name, "failed", error=problem)

    def tidy(self) -> None:
        """Give back what earlier parts held: tensors, and what the compiler keeps of networks."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def compiler(self) -> Iterator[None]:
        """In a rehearsal torch.compile gives back what it gets: making kernels takes minutes."""
        original = torch.compile
        if self.rehearse:
            torch.compile = lambda model, **_: model
        try:
            yield
        finally:
            torch.compile = original

    # -- clocks ----------------------------------------------------------------------------------------------------------

    def seconds(self, work: Callable[[], Any], repeats: int = 10, warm_up: int = 3) -> list[float]:
        """Seconds of each of ``repeats`` calls, one right after the other, by events on a GPU; the first calls tune and
        compile, and are left out. In a rehearsal both are one."""
        repeats, warm_up = (1, 1) if self.rehearse else (repeats, warm_up)
        for _ in range(warm_up):
            work()
        self.wait()
        if not self.on_gpu:
            times = [time.perf_counter()]
            for _ in range(repeats):
                work()
                times.append(time.perf_counter())
            return [b - a for a, b in itertools.pairwise(times)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        self.wait()
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]

    def median(self, work: Callable[[], Any], repeats: int = 10, warm_up: int = 3) -> float:
        return statistics.median(self.seconds(work, repeats, warm_up))

    def once(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of a single call on the clock on the wall, its end waited for; and what it returned."""
        self.wait()
        started = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - started, result

    # -- memory ----------------------------------------------------------------------------------------------------------

    def count_peak(self) -> Callable[[], tuple[int | None, int | None]]:
        """Begin to watch the memory; what is returned tells bytes: the most that was allocated beyond what is now, and the
        most that torch has reserved. None for both in a rehearsal."""
        if not self.on_gpu:
            return lambda: (None, None)
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: (torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved())
