"""One function over many cases, in worker processes that can fail, be killed or be interrupted without harm."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from threadpoolctl import threadpool_limits

from nnssl_adapt.errors import NnsslAdaptError, OutputError, PreprocessingError
from nnssl_adapt.machine.memory import available_memory, give_back_freed_memory, reuse_freed_memory
from nnssl_adapt.machine.progress_bar import ProgressBar
from nnssl_adapt.text import size_text

logger = logging.getLogger(__name__)

_USABLE_SHARE = 0.85
_WORKER_BYTES = 300 << 20
"""A worker with its libraries, before it has read anything."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case: ``value`` is what the function returned, unless ``error`` says why it did not."""

    identifier: str
    value: Any = None
    error: Exception | None = None

    @property
    def complaint(self) -> str:
        """The error in one line; errors that are no user's fault are named by their class."""
        if isinstance(self.error, NnsslAdaptError):
            return str(self.error)
        if isinstance(self.error, MemoryError):
            return "not enough memory; run again with fewer workers"
        return f"{type(self.error).__name__}: {self.error}"


def over_cases(
    function: Callable[..., Any],
    tasks: Sequence[tuple[str, tuple[Any, ...]]],
    workers: int = 1,
    title: str = "",
    progress: bool | None = None,
    memory: Mapping[str, int] | None = None,
) -> Iterator[Outcome]:
    """Call ``function(*arguments)`` for every ``(identifier, arguments)`` and yield the outcomes as they come.

    A case that fails yields its error and does not stop the others. Workers are fresh ("spawn") processes with one
    computing thread each, and end with this process, whatever ends it.

    Args:
        function: at the top level of a module, since it is sent to other processes by name.
        tasks: what to call it with; identifiers are shown by the progress bar.
        workers: processes. With 1 or 0 no process is started and the cases are done one after the other right here.
        title: of the progress bar.
        progress: whether to draw one (on stderr).
        memory: bytes that each case will need (identifier → bytes), where known: no more cases are worked on at a time
            than fit into what the machine or the job has, and one that needs more than that is tried alone.

    Raises:
        OutputError: a case could not be written; there is no use in trying the others.
        PreprocessingError: a worker was killed.
    """
    if not tasks:
        return
    outcomes = (
        _in_this_process(function, tasks)
        if workers <= 1
        else _in_workers(function, tasks, min(workers, len(tasks)), Budget.of(memory, workers))
    )
    with (
        contextlib.closing(outcomes),
        ProgressBar(total=len(tasks), desc=title, unit="case", disable=not progress) as bar,
    ):
        for outcome in outcomes:
            if isinstance(outcome.error, OutputError):
                raise outcome.error
            if outcome.error is not None:
                logger.debug("case %s failed", outcome.identifier, exc_info=outcome.error)
            bar.set_postfix_str(outcome.identifier + (" FAILED" if outcome.error else ""), refresh=False)
            bar.update()
            yield outcome


def _in_this_process(
    function: Callable[..., Any], tasks: Sequence[tuple[str, tuple[Any, ...]]]
) -> Generator[Outcome, None, None]:
    for identifier, arguments in tasks:
        try:
            with threadpool_limits(1):
                value = function(*arguments)
        except Exception as error:  # whatever is wrong with this case, the others deserve their turn
            yield Outcome(identifier, error=error)
        else:
            yield Outcome(identifier, value)


@dataclass(frozen=True)
class Budget:
    """What cases need and what there is, in bytes; ``limit`` None: not known."""

    needs: Mapping[str, int]
    limit: int | None

    @classmethod
    def of(cls, needs: Mapping[str, int] | None, workers: int) -> Budget:
        available = available_memory() if needs else None
        limit = None if available is None else int(_USABLE_SHARE * available) - workers * _WORKER_BYTES
        return cls(needs or {}, limit)

    def allows(self, identifier: str, running: Iterable[str]) -> bool:
        """Whether a case may start beside the ones that are running. Alone, any may."""
        others = list(running)
        need = self.needs.get(identifier, 0)
        if self.limit is None or need + sum(self.needs.get(other, 0) for other in others) <= self.limit:
            return True
        if not others:
            logger.warning("%s may need %s, more than there is; trying", identifier, size_text(need))
            return True
        return False


def _in_workers(
    function: Callable[..., Any], tasks: Sequence[tuple[str, tuple[Any, ...]]], workers: int, budget: Budget
) -> Generator[Outcome, None, None]:
    # The function goes to the initializer too: unpickling it imports its libraries, whose threads are then limited.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=prepare_worker, initargs=(function,)
    )
    running: dict[Future[Any], str] = {}
    waiting = deque(tasks)
    finished = False
    try:
        while True:
            # No more than one case a worker is handed out, so that we know which ones a killed worker had.
            while len(running) < workers and waiting and budget.allows(waiting[0][0], running.values()):
                identifier, arguments = waiting.popleft()
                running[executor.submit(_one_case, function, arguments)] = identifier
            if not running:
                finished = True
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
                if error is not None and not isinstance(error, Exception):
                    raise error
                identifier = running.pop(future)
                yield Outcome(identifier, error=error) if error is not None else Outcome(identifier, future.result())
    except BrokenProcessPool as error:
        raise PreprocessingError(
            f"a worker process was killed while {', '.join(sorted(running.values()))} were being done, most likely because "
            f"memory ran out: run the same command with fewer than {workers} workers; finished cases are kept. "
            "(If this is your own script, is the call below `if __name__ == '__main__':`?)"
        ) from error
    finally:
        if not finished:
            kill_workers(executor)
        executor.shutdown(wait=True, cancel_futures=True)


def _one_case(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    finally:
        give_back_freed_memory()  # the next case may be small, and other workers' cases large


def kill_workers(executor: ProcessPoolExecutor) -> None:
    """End workers in the middle of their cases (they leave no half-written one); they ignore an interrupt themselves."""
    for process in list((getattr(executor, "_processes", None) or {}).values()):
        process.kill()


def prepare_worker(function: Callable[..., Any]) -> None:
    """Initializer of worker processes: one computing thread, deaf to Ctrl-C, and gone when their parent is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what to do
    threadpool_limits(1)
    reuse_freed_memory()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    logger.debug("worker %d ready for %s", os.getpid(), function.__name__)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """Workers of a parent that was killed outright would wait for work for ever."""
    parent.join()
    os._exit(1)
