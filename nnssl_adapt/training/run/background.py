"""One thread that does slow things in order while the training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType

logger = logging.getLogger(__name__)

Job = Callable[[], None]


class Background:
    """Runs jobs one after the other in a thread of its own. Use as a context manager.

    What a job raises is raised again here: by the next :meth:`submit`, :meth:`check` or :meth:`wait`, at the latest when
    the block ends. If the block ends with an exception, that one goes on and the job's is logged. After Ctrl-C nothing is
    waited for.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[str, Job] = {}
        self._busy = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(self, name: str, job: Job) -> None:
        """Have ``job`` done soon. One of the same name that has not begun is dropped for it: the newest counts."""
        self.check()
        with self._changed:
            self._waiting[name] = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="background", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what a job raised, once."""
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Return when everything is done. Raises what a job raised."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)
        self.check()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                job = self._waiting.pop(next(iter(self._waiting)))
                self._busy = True
            try:
                job()
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
            finally:
                del job  # it holds a copy of the network
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None or issubclass(kind, Exception):
                self.wait()
        except Exception as own:
            if error is None or own is error:
                raise
            logger.error("besides: %s", own)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
