"""Images on their way: while the network works on one, the next are read and preprocessed and the last are exported.

An image is let in when what it needs at most, by its header, fits into memory beside those that are under way.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nnssl_adapt.errors import OutputError, PredictionError
from nnssl_adapt.inference.sliding_window import Allocate
from nnssl_adapt.inference.steps import PreparedImage, SharedMemory, Steps, export_in_worker, prepare_in_worker
from nnssl_adapt.inference.sums import Tiles
from nnssl_adapt.inference.task import ImageTask
from nnssl_adapt.machine.workers import Budget, kill_workers, prepare_worker

logger = logging.getLogger(__name__)

Predict = Callable[[ImageTask, np.ndarray, Allocate], Tiles]
"""From a preprocessed image (C, Z, Y, X) to logits (K, Z, Y, X) in memory of the given kind, one tile after the other."""

_THREADS = 2


class ImageSteps(Protocol):
    """What is done before and after the network; :class:`~nnssl_adapt.inference.steps.Steps` for images in files."""

    def prepare(self, task: ImageTask) -> PreparedImage:
        """Read an image, and preprocess it unless it is."""

    def export(self, task: ImageTask, logits: Tensor | np.ndarray, prepared: PreparedImage) -> np.ndarray:
        """Labels (Z, Y, X), written where they belong."""


@dataclass(frozen=True)
class Result:
    """What became of an image: ``labels`` where it has no target, unless ``error`` says why not."""

    task: ImageTask
    labels: np.ndarray | None = None
    error: Exception | None = None


@dataclass
class Pipeline:
    """Takes images through reading, network and export.

    Attributes:
        steps: what is done before and after the network.
        predict: the network.
        workers: processes that read and export; 0: threads of this process do.
        memory: bytes that each image needs (identifier → bytes).
        settle: is told at once what became of an image, while the network works on another one, which may take hours.
        watch: is told after each tile how many of the image's are done.
        decide: makes labels of logits where they are, or leaves them; in the thread of the network.
    """

    steps: ImageSteps
    predict: Predict
    workers: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    settle: Callable[[Result], None] | None = None
    watch: Callable[[int], None] | None = None
    decide: Callable[[Tensor, PreparedImage], Tensor] = lambda logits, prepared: logits

    def run(self, tasks: Sequence[ImageTask]) -> Iterator[Result]:
        """Yield what became of each image, after ``settle`` was told.

        Raises:
            OutputError: an image could not be written, and the next could not be either.
            PredictionError: a worker process was killed.
        """
        if self.workers > 0 and SharedMemory.is_available() and isinstance(self.steps, Steps):
            with _processes(self.workers) as pool:
                yield from _Run(self, _Processes(self.steps, pool), tasks).results()
        else:
            with _threads() as pool:
                yield from _Run(self, _Threads(self.steps, pool), tasks).results()


class _Run:
    """One pass over images."""

    def __init__(self, pipeline: Pipeline, hands: _Threads | _Processes, tasks: Sequence[ImageTask]) -> None:
        self.predict = pipeline.predict
        self.settle = pipeline.settle
        self.watch = pipeline.watch
        self.decide = pipeline.decide
        self.hands = hands
        self.size = max(1, pipeline.workers)
        self.budget = Budget.of(pipeline.memory, pipeline.workers)
        self.waiting = deque(tasks)
        self.preparing: dict[Future[Any], ImageTask] = {}
        self.ready: deque[tuple[ImageTask, Future[Any]]] = deque()
        self.running: str | None = None
        self.exporting: dict[Future[Any], ImageTask] = {}
        self.finished: list[Result] = []

    def results(self) -> Iterator[Result]:
        try:
            while True:
                self._move_on()
                yield from self._taken()
                if self.ready and len(self.exporting) <= self.size:
                    self._run_network(*self.ready.popleft())
                elif self.preparing or self.exporting:
                    wait([*self.preparing, *self.exporting], return_when=FIRST_COMPLETED)
                else:
                    return
        except BrokenProcessPool as error:
            yield from self._taken()
            raise PredictionError(
                f"a worker process was killed while {', '.join(self._in_hand())} were being read or exported, most likely "
                "because memory ran out: run the same command with --continue and fewer workers (-np); finished images are "
                "kept. (If this is your own script, is the call below `if __name__ == '__main__':`?)"
            ) from error

    def _move_on(self) -> None:
        """See what is done, and let images in that there is room for. Done between two tiles too."""
        if (stop := self._settle_exports()) is not None:
            wait(self.exporting)  # others may still be written, and are to be on record
            self._settle_exports()
            raise stop
        for future in [f for f in self.preparing if f.done()]:
            if isinstance(future.exception(), BrokenProcessPool):
                future.result()
            self.ready.append((self.preparing.pop(future), future))
        while (
            self.waiting
            and len(self.preparing) + len(self.ready) < self.size
            and self.budget.allows(self.waiting[0].identifier, self._in_hand())
        ):
            task = self.waiting.popleft()
            self.preparing[self.hands.prepare(task)] = task

    def _settle_exports(self) -> Exception | None:
        """Tell what became of the images whose export is over; the error after which there is no use in going on."""
        stop: Exception | None = None
        for future in [f for f in self.exporting if f.done()]:
            task = self.exporting.pop(future)
            try:
                result = Result(task, future.result())
            except (OutputError, BrokenProcessPool) as error:
                self.exporting[future], stop = task, error
                continue
            except Exception as error:
                result = Result(task, error=error)
            self._finish(result)
        return stop

    def _in_hand(self) -> list[str]:
        tasks = [*self.preparing.values(), *(task for task, _ in self.ready), *self.exporting.values()]
        return [task.identifier for task in tasks] + ([self.running] if self.running is not None else [])

    def _finish(self, result: Result) -> None:
        if self.settle is not None:
            self.settle(result)
        self.finished.append(result)

    def _taken(self) -> Iterator[Result]:
        while self.finished:
            yield self.finished.pop(0)

    def _run_network(self, task: ImageTask, future: Future[Any]) -> None:
        self.running = task.identifier
        try:
            prepared = self.hands.prepared(future)
            for doubt in prepared.doubts:
                logger.warning("%s: %s", task.identifier, doubt)
            self._move_on()  # the next image may come in now
            logits = self._driven(self.predict(task, prepared.data, self.hands.allocate))
            logits = self.decide(logits, prepared)
            self.exporting[self.hands.export(task, logits, prepared)] = task
        except (OutputError, BrokenProcessPool):
            raise
        except Exception as error:
            self._finish(Result(task, error=error))
        finally:
            self.running = None

    def _driven(self, tiles: Tiles) -> Tensor:
        """Let the network do one tile after the other, and see to the other images in between."""
        with closing(tiles):
            while True:
                try:
                    done, _ = next(tiles)
                except StopIteration as end:
                    logits: Tensor = end.value
                    return logits
                if self.watch is not None:
                    self.watch(done)
                self._move_on()


class _Threads:
    """Work in threads of this process: nothing is copied."""

    def __init__(self, steps: ImageSteps, pool: Executor) -> None:
        self.steps = steps
        self.pool = pool
        self.allocate: Allocate = lambda shape, dtype: torch.zeros(shape, dtype=dtype)

    def prepare(self, task: ImageTask) -> Future[PreparedImage]:
        return self.pool.submit(self.steps.prepare, task)

    def prepared(self, future: Future[PreparedImage]) -> PreparedImage:
        return future.result()

    def export(self, task: ImageTask, logits: Tensor, prepared: PreparedImage) -> Future[Any]:
        return self.pool.submit(self.steps.export, task, logits, prepared)


class _Processes:
    """Work in other processes; images and logits lie in memory that both sides map."""

    def __init__(self, steps: Steps, pool: Executor) -> None:
        self.steps = steps
        self.pool = pool
        self._logits: tuple[SharedMemory, int] | None = None
        self._images: dict[Future[Any], SharedMemory] = {}

    def prepare(self, task: ImageTask) -> Future[Any]:
        memory = SharedMemory()
        future = self.pool.submit(prepare_in_worker, self.steps, task, memory.path)
        self._images[future] = memory
        return future

    def prepared(self, future: Future[Any]) -> PreparedImage:
        memory = self._images.pop(future)
        try:
            shape, prepared = future.result()
            whole: PreparedImage = replace(prepared, data=memory.array(shape, np.float32))
            return whole
        finally:
            memory.close()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = SharedMemory()
        tensor = torch.from_numpy(memory.array(shape, _numpy_name(dtype), new=True))
        if self._logits is not None:
            self._logits[0].close()
        self._logits = memory, tensor.data_ptr()
        return tensor

    def export(self, task: ImageTask, logits: Tensor, prepared: PreparedImage) -> Future[Any]:
        if self._logits is None or self._logits[1] != logits.data_ptr() or not logits.is_contiguous():
            logits = self.allocate(tuple(logits.shape), logits.dtype).copy_(logits)
        assert self._logits is not None
        memory, _ = self._logits
        self._logits = None
        shape, dtype = tuple(logits.shape), _numpy_name(logits.dtype)
        known = replace(prepared, data=np.empty(0, np.float32))
        future = self.pool.submit(export_in_worker, self.steps, task, memory.path, shape, dtype, known)
        future.add_done_callback(lambda _: memory.close())
        return future


def _numpy_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _threads() -> Iterator[Executor]:
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="prepare_and_export")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _processes(workers: int) -> Iterator[Executor]:
    """Fresh processes with one computing thread each. Left by an error, they are killed; they leave nothing half-written."""
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=prepare_worker, initargs=(export_in_worker,)
    )
    try:
        yield pool
    except BaseException:
        kill_workers(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
