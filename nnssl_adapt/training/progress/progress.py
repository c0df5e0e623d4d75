"""What a run shows: its history as figures, what the device did meanwhile, a log file, and a live line."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from nnssl_adapt.files import explain_write_errors, make_folder, write_text
from nnssl_adapt.machine.progress_bar import ProgressBar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

EMA_DECAY = 0.9
"""Share of the past in the smoothed pseudo-Dice that chooses ``checkpoint_best`` (nnU-Net's)."""

OURS = ("device_busy", "data_waits", "peak_memory")
"""Figures that nnU-Net has not. Checkpoints keep them apart: it takes the shortest of its lists for the number of epochs."""

LINE_EVERY = 300.0
"""Seconds after which a long epoch says where it is, where there is no terminal for a live line."""


@dataclass(frozen=True)
class DeviceFigures:
    """What the device did in an epoch.

    Attributes:
        busy: 0 to 1, of the epoch's time that it worked.
        waited: seconds that the process waited for batches.
        peak_memory: GiB that tensors occupied at most; NaN where that is not counted (other devices than CUDA's).
    """

    busy: float = math.nan
    waited: float = math.nan
    peak_memory: float = math.nan


@dataclass
class History:
    """Figures of every finished epoch, under nnU-Net's names (it is what checkpoints keep as ``logging``).

    Attributes (one entry an epoch):
        train_losses, val_losses: means over the epoch's batches.
        dice_per_class_or_region: pseudo-Dice of each foreground class, 0 to 1, NaN where it never occurred.
        mean_fg_dice: their mean.
        ema_fg_dice: that, smoothed over epochs.
        lrs: learning rate.
        epoch_start_timestamps, epoch_end_timestamps: seconds since 1970.
        device_busy, data_waits, peak_memory: see :class:`DeviceFigures`; NaN in epochs of which nobody measured them.
    """

    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    dice_per_class_or_region: list[list[float]] = field(default_factory=list)
    mean_fg_dice: list[float] = field(default_factory=list)
    ema_fg_dice: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    epoch_start_timestamps: list[float] = field(default_factory=list)
    epoch_end_timestamps: list[float] = field(default_factory=list)
    device_busy: list[float] = field(default_factory=list)
    data_waits: list[float] = field(default_factory=list)
    peak_memory: list[float] = field(default_factory=list)

    def add(
        self,
        train_loss: float,
        val_loss: float,
        dice: Sequence[float],
        learning_rate: float,
        start: float,
        end: float,
        device: DeviceFigures | None = None,
    ) -> None:
        """Append an epoch. The mean and the smoothed pseudo-Dice are worked out here; epochs without any keep the last."""
        known = [value for value in dice if not math.isnan(value)]
        mean = sum(known) / len(known) if known else math.nan
        previous = self.ema_fg_dice[-1] if self.ema_fg_dice else math.nan
        if math.isnan(previous):
            smoothed = mean
        else:
            smoothed = previous if math.isnan(mean) else EMA_DECAY * previous + (1 - EMA_DECAY) * mean
        self.train_losses.append(float(train_loss))
        self.val_losses.append(float(val_loss))
        self.dice_per_class_or_region.append([float(value) for value in dice])
        self.mean_fg_dice.append(mean)
        self.ema_fg_dice.append(smoothed)
        self.lrs.append(float(learning_rate))
        self.epoch_start_timestamps.append(float(start))
        self.epoch_end_timestamps.append(float(end))
        device = device or DeviceFigures()
        self.device_busy.append(float(device.busy))
        self.data_waits.append(float(device.waited))
        self.peak_memory.append(float(device.peak_memory))

    def __len__(self) -> int:
        return len(self.train_losses)

    @property
    def durations(self) -> list[float]:
        """Seconds that each epoch took."""
        stamps = zip(self.epoch_start_timestamps, self.epoch_end_timestamps, strict=True)
        return [end - start for start, end in stamps]

    def to_dict(self) -> dict[str, list[Any]]:
        """nnU-Net's figures, under its names and no others."""
        return {name: list(values) for name, values in vars(self).items() if name not in OURS}

    def our_figures(self) -> dict[str, list[float]]:
        """The figures that nnU-Net has not."""
        return {name: list(getattr(self, name)) for name in OURS}

    @classmethod
    def from_dict(cls, content: Mapping[str, list[Any]], ours: Mapping[str, list[float]] | None = None) -> History:
        """Make a history of :meth:`to_dict` and, where there are any, :meth:`our_figures`: older checkpoints have none."""
        history = cls(**{name: list(content[name]) for name in cls.__dataclass_fields__ if name not in OURS})
        for name in OURS:
            known = list((ours or {}).get(name, ()))[: len(history)]
            setattr(history, name, known + [math.nan] * (len(history) - len(known)))
        return history

    def epoch_figures(self, epoch: int) -> dict[str, Any]:
        """One epoch's figures with readable names; NaN becomes None, which JSON has."""
        figures = {
            "epoch": epoch,
            "train_loss": self.train_losses[epoch],
            "validation_loss": self.val_losses[epoch],
            "pseudo_dice": self.mean_fg_dice[epoch],
            "pseudo_dice_smoothed": self.ema_fg_dice[epoch],
            "pseudo_dice_per_class": [None if math.isnan(v) else v for v in self.dice_per_class_or_region[epoch]],
            "learning_rate": self.lrs[epoch],
            "seconds": self.durations[epoch],
            "device_busy": self.device_busy[epoch],
            "data_wait_seconds": self.data_waits[epoch],
            "peak_memory_gib": self.peak_memory[epoch],
        }
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in figures.items()}

    def flat_figures(self, epoch: int, class_names: Sequence[str] = ()) -> dict[str, Any]:
        """:meth:`epoch_figures` with one number or None each: the classes' as ``pseudo_dice/<name>``, or by their number."""
        figures = self.epoch_figures(epoch)
        each = figures.pop("pseudo_dice_per_class")
        names = class_names if len(class_names) == len(each) else [str(number) for number in range(1, len(each) + 1)]
        return {**figures, **{f"pseudo_dice/{name}": value for name, value in zip(names, each, strict=True)}}

    def write_metrics(self, path: Path, class_names: Sequence[str] = ()) -> None:
        """Write all epochs as JSON lines, and beside them, with the ending ``.csv``, as a table with a column a class.

        Both files are made anew each time: what a killed run left over never stays.
        """
        lines = (json.dumps(self.epoch_figures(epoch)) for epoch in range(len(self)))
        write_text(path, "".join(f"{line}\n" for line in lines))
        rows = [self.flat_figures(epoch, class_names) for epoch in range(len(self))]
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path.with_suffix(".csv"), table.getvalue())


class EpochClock:
    """Measures what the device does in an epoch: how much of the time it works, and how long it is kept waiting for data.

    On a CUDA device with events in its stream. It works from the moment a batch has come (or, if later, it is done with
    the one before) until it has done all that the step asked of it; pauses within a step, while the host prepares the next
    operation or compiles, count as work. Elsewhere, by the clock: whatever time a step takes once its batch has come.

    Make one for a run, pass the batches through :meth:`watched`, and for each epoch call :meth:`start`, :meth:`rest` after
    each step, and :meth:`stop`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._spans: list[list[Any]] = []
        self._waited = 0.0
        self._started = time.perf_counter()

    def start(self) -> None:
        """An epoch begins."""
        self._spans, self._waited, self._started = [], 0.0, time.perf_counter()
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)

    def watched(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches; the device is taken to work from when one has come until :meth:`rest` or the next is wanted."""
        iterator = iter(batches)
        while True:
            self.rest()
            began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            self._spans.append([self._mark()])
            yield batch

    def rest(self) -> None:
        """The step is over: nothing more is asked of the device until the next batch."""
        if self._spans and len(self._spans[-1]) == 1:
            self._spans[-1].append(self._mark())

    def stop(self) -> DeviceFigures:
        """The epoch is over. Waits until the device is done with it."""
        self.rest()
        if not self._on_cuda:
            worked = sum(end - begin for begin, end in self._spans)
            return DeviceFigures(self._share(worked), self._waited)
        torch.cuda.synchronize(self._device)
        worked = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        return DeviceFigures(self._share(worked), self._waited, torch.cuda.max_memory_allocated(self._device) / 2**30)

    def _share(self, worked: float) -> float:
        return min(1.0, worked / max(time.perf_counter() - self._started, 1e-9))

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


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

    def step(self, loss: float) -> None:
        """Advance by one batch with this loss."""
        self._done += 1
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
    return text if math.isnan(memory) else f"{text}  {memory:.1f} GiB"


def _remaining(history: History, epochs: int) -> timedelta:
    """Time until the last epoch is over, at the pace of the last five."""
    recent = history.durations[-5:]
    return timedelta(seconds=round(sum(recent) / len(recent) * (epochs - len(history))))
