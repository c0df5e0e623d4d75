"""How far a prediction is, and when it will be done: counted in tiles, since images differ in size."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType

from nnssl_adapt.machine.progress_bar import ProgressBar

_SECONDS_IN_LOGS = 30.0


class TileBar:
    """A progress bar on stderr. Its remaining time is of all tiles of all images and folds, foreseen by their headers.

    Args:
        images: how many there are.
        shown: whether to draw it.
    """

    def __init__(self, images: int, shown: bool) -> None:
        self.images = images
        self._finished = 0
        self._expected: dict[str, int] = {}
        self._total = 0
        self._started: set[str] = set()
        self._current = ""
        self._done = 0
        self._terminal = sys.stderr.isatty()
        # A line for every tile would fill log files.
        interval = 0.1 if self._terminal else _SECONDS_IN_LOGS
        self._bar = ProgressBar(
            total=0, desc="Predicting", unit="tile", disable=not shown, mininterval=interval, maxinterval=interval
        )

    def expect(self, tiles: Mapping[str, int]) -> None:
        """Note how many tiles each image will have at most."""
        self._expected = dict(tiles)
        self._add(sum(tiles.values()))
        self._show()

    def start(self, identifier: str, tiles: int) -> None:
        """An image has come to the network, and has so many tiles once it is cropped."""
        self._current, self._done = identifier, 0
        self._started.add(identifier)
        self._add(tiles - self._expected.get(identifier, 0))
        self._expected[identifier] = tiles
        self._show()

    def advance(self, done: int) -> None:
        """So many of the image's tiles are done; fewer than before when it was begun again."""
        if done > self._done:
            self._bar.update(done - self._done)
            self._done = done

    def finish(self, identifier: str) -> None:
        """An image is written, or has failed."""
        self._finished += 1
        if identifier not in self._started:  # it could not be read
            self._add(-self._expected.get(identifier, 0))
        self._show()

    def _add(self, tiles: int) -> None:
        self._total += tiles
        self._bar.total = self._total

    def _show(self) -> None:
        self._bar.set_postfix_str(
            f"{self._finished}/{self.images} images {self._current}".rstrip(), refresh=self._terminal
        )

    def __enter__(self) -> TileBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
