"""The progress bar that everything here draws; where nobody watches, a plain line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

LINE_EVERY = 60.0
"""Seconds between two lines where the output is no terminal: a log file keeps every frame that a bar draws."""


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """tqdm with a lock of this process only, and plain lines instead of frames where the output is no terminal.

    tqdm's own lock is shared with forked children. One that is killed while it holds it would stop its parent for ever.
    """

    _lock = threading.RLock()
    _plain = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._next_line = time.monotonic() + LINE_EVERY
        self._last_line = ""
        super().__init__(*arguments, **options)
        self._plain = not self.disable and not getattr(self.fp, "isatty", lambda: False)()

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw a frame, or write a line if one is due or everything is done."""
        if self.fp is not None and getattr(self.fp, "isatty", lambda: False)():
            return super().display(msg, pos)
        if self._plain and (time.monotonic() >= self._next_line or (self.n and self.n == self.total)):
            self._write_line()
        return False

    def close(self) -> None:
        """End the bar. What was not said of a plain one is said."""
        if self._plain and not self.disable:
            self.leave = False
            if self.n:
                self._write_line()
        super().close()

    def _write_line(self) -> None:
        self._next_line = time.monotonic() + LINE_EVERY
        facts = self.format_dict
        postfix = f", {facts['postfix']}" if facts["postfix"] else ""
        share = f" ({self.n / self.total:.0%})" if self.total else ""
        done = f"{facts['prefix']}: {self.n}/{self.total or '?'} {facts['unit']}s{share}{postfix}"
        if done != self._last_line:
            self._last_line = done
            self.fp.write(f"{done}, {self.format_interval(facts['elapsed'])}{self._remaining(facts)}\n")

    def _remaining(self, facts: Mapping[str, Any]) -> str:
        left = (self.total or 0) - self.n
        if left <= 0 or not self.n:
            return ""
        return f", about {self.format_interval(left * facts['elapsed'] / self.n)} to go"
