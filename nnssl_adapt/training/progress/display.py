"""What is seen of a run: its log file, a live line, and a line for each epoch."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from nnssl_adapt.files import explain_write_errors, make_folder
from nnssl_adapt.machine.progress_bar import ProgressBar
from nnssl_adapt.training.progress.history import History

logger = logging.getLogger(__name__)

LINE_EVERY = 300.0
"""Seconds after which a long epoch says where it is, where there is no terminal for a live line."""


@contextmanager
def log_file(folder: Path) -> Iterator[Path]:
    """Copy what the package logs into ``training_log_<date and time>.txt`` (nnU-Net's name) of ``folder``."""
    path = make_folder(folder) / f"training_log_{datetime.now():%Y_%m_%d_%H_%M_%S}.txt"
    package = logging.getLogger("nnssl_adapt")
    with explain_write_errors(path):
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s: %(message)s"))
    level = package.level
    package.addHandler(handler)
    if not package.isEnabledFor(logging.INFO):  # the file is wanted even where nobody configured logging
        package.setLevel(logging.INFO)
    try:
        yield path
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


class EpochDisplay:
    """The live line of one epoch, on a terminal. Elsewhere a plain line in the log every few minutes, if it takes that long.

    It has the loss of the last batch, the last epoch's pseudo-Dice and seconds, the learning rate, and when all will be
    over. Use as a context manager; :meth:`step` after each batch.
    """

    def __init__(
        self, history: History, epoch: int, epochs: int, steps: int, done: int, learning_rate: float, shown: bool
    ) -> None:
        self._bar: Any = None
        self._loss = math.nan
        self._figures = {"lr": f"{learning_rate:.2e}"}
        if len(history):
            self._figures["pseudo-Dice"] = f"{history.mean_fg_dice[-1]:.4f}"
            self._figures["s/epoch"] = f"{history.durations[-1]:.1f}"
            self._figures["all done in"] = str(_remaining(history, epochs))
        self._title = f"epoch {epoch + 1}/{epochs}"
        self._done, self._steps = done, steps
        self._shown, self._last_line = shown, time.monotonic()
        if shown and sys.stderr.isatty():
            self._bar = ProgressBar(
                total=steps, initial=done, desc=self._title, leave=False, dynamic_ncols=True, unit="it"
            )

    def step(self, loss: float | None) -> None:
        """Advance by one batch with this loss; None: not known yet, the last one stays."""
        self._done += 1
        loss = self._loss = self._loss if loss is None else loss
        if self._bar is not None:
            self._bar.set_postfix({"loss": f"{loss:.4f}", **self._figures}, refresh=False)
            self._bar.update()
        elif self._shown and time.monotonic() - self._last_line >= LINE_EVERY and self._done < self._steps:
            self._last_line = time.monotonic()
            logger.info("%s  step %d/%d  loss %.4f", self._title, self._done, self._steps, loss)

    def __enter__(self) -> EpochDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def log_epoch(history: History, epochs: int, class_names: Sequence[str]) -> None:
    """Log the last epoch: losses, pseudo-Dice, learning rate, seconds, the device, and when the training will be over."""
    logger.info(
        "epoch %d/%d  loss %.4f  validation loss %.4f  pseudo-Dice %.4f (smoothed %.4f)  lr %.3g  %.1f s/epoch%s  ETA %s",
        len(history),
        epochs,
        history.train_losses[-1],
        history.val_losses[-1],
        history.mean_fg_dice[-1],
        history.ema_fg_dice[-1],
        history.lrs[-1],
        history.durations[-1],
        _device(history),
        _remaining(history, epochs),
    )
    each = ", ".join(f"{n} {v:.4f}" for n, v in zip(class_names, history.dice_per_class_or_region[-1], strict=True))
    logger.debug("pseudo-Dice: %s", each)


def _device(history: History) -> str:
    busy, memory = history.device_busy[-1], history.peak_memory[-1]
    text = "" if math.isnan(busy) else f"  busy {busy:.0%}"
    if not math.isnan(kernels := history.kernel_busy[-1]):
        text += f" (kernels {kernels:.0%})"
    return text if math.isnan(memory) else f"{text}  {memory:.1f} GiB"


def _remaining(history: History, epochs: int) -> timedelta:
    """Time until the last epoch is over, at the pace of the last five."""
    recent = history.durations[-5:]
    return timedelta(seconds=round(sum(recent) / len(recent) * (epochs - len(history))))
