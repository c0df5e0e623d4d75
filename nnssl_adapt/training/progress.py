"""What a run shows: its history, progress.png, a log file, and a live line."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from nnssl_adapt.files import atomic_path, explain_write_errors, make_folder, write_text

logger = logging.getLogger(__name__)

EMA_DECAY = 0.9
"""Share of the past in the smoothed pseudo-Dice that chooses ``checkpoint_best`` (nnU-Net's)."""


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
    """

    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    dice_per_class_or_region: list[list[float]] = field(default_factory=list)
    mean_fg_dice: list[float] = field(default_factory=list)
    ema_fg_dice: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    epoch_start_timestamps: list[float] = field(default_factory=list)
    epoch_end_timestamps: list[float] = field(default_factory=list)

    def add(
        self, train_loss: float, val_loss: float, dice: Sequence[float], learning_rate: float, start: float, end: float
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

    def __len__(self) -> int:
        return len(self.train_losses)

    @property
    def durations(self) -> list[float]:
        """Seconds that each epoch took."""
        stamps = zip(self.epoch_start_timestamps, self.epoch_end_timestamps, strict=True)
        return [end - start for start, end in stamps]

    def to_dict(self) -> dict[str, list[Any]]:
        return {name: list(values) for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, list[Any]]) -> History:
        return cls(**{name: list(content[name]) for name in cls.__dataclass_fields__})

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
        }
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in figures.items()}

    def write_metrics(self, path: Path) -> None:
        """Write all epochs as JSON lines. The file is made anew each time: what a killed run left over never stays."""
        lines = (json.dumps(self.epoch_figures(epoch)) for epoch in range(len(self)))
        write_text(path, "".join(f"{line}\n" for line in lines))

    def plot(self, path: Path, class_names: Sequence[str] = ()) -> None:
        """Draw losses and pseudo-Dice, pseudo-Dice of each class, learning rate and epoch time into a PNG."""
        figure = Figure(figsize=(11, 15), dpi=80)
        figure.subplots_adjust(
            left=0.08, right=0.92, top=0.98, bottom=0.05, hspace=0.15
        )  # automatic layout takes longer
        FigureCanvasAgg(figure)
        losses, classes, rates, times = figure.subplots(4, 1)
        epochs = range(len(self))
        dots: dict[str, Any] = {"marker": "."} if len(self) < 20 else {}
        losses.plot(epochs, self.train_losses, color="tab:blue", label="training loss", **dots)
        losses.plot(epochs, self.val_losses, color="tab:red", label="validation loss", **dots)
        losses.set_ylabel("loss")
        losses.legend(loc="lower left")
        dice = losses.twinx()
        dice.plot(epochs, self.mean_fg_dice, color="tab:green", linestyle=":", label="pseudo-Dice", **dots)
        dice.plot(epochs, self.ema_fg_dice, color="tab:green", label="pseudo-Dice, smoothed", **dots)
        dice.set_ylabel("pseudo-Dice")
        dice.legend(loc="lower right")
        for index, name in enumerate(class_names):
            classes.plot(epochs, [values[index] for values in self.dice_per_class_or_region], label=name, **dots)
        classes.set_ylabel("pseudo-Dice of each class")
        if 0 < len(class_names) <= 20:
            classes.legend(loc="lower right", fontsize="small")
        rates.plot(epochs, self.lrs, color="tab:blue", **dots)
        rates.set_ylabel("learning rate")
        times.plot(epochs, self.durations, color="tab:blue", **dots)
        times.set_ylim(bottom=0)
        times.set_ylabel("seconds an epoch")
        times.set_xlabel("epoch")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


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
    """The live line of one epoch, on a terminal; elsewhere nothing, since every epoch is logged when it ends.

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
        if shown and sys.stderr.isatty():
            title = f"epoch {epoch + 1}/{epochs}"
            self._bar = tqdm(total=steps, initial=done, desc=title, leave=False, dynamic_ncols=True, unit="it")

    def step(self, loss: float) -> None:
        """Advance by one batch with this loss."""
        if self._bar is not None:
            self._bar.set_postfix({"loss": f"{loss:.4f}", **self._figures}, refresh=False)
            self._bar.update()

    def __enter__(self) -> EpochDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def log_epoch(history: History, epochs: int, class_names: Sequence[str]) -> None:
    """Log the last epoch: losses, pseudo-Dice, learning rate, seconds, and when the training will be over."""
    logger.info(
        "epoch %d/%d  loss %.4f  validation loss %.4f  pseudo-Dice %.4f (smoothed %.4f)  lr %.3g  %.1f s/epoch  ETA %s",
        len(history),
        epochs,
        history.train_losses[-1],
        history.val_losses[-1],
        history.mean_fg_dice[-1],
        history.ema_fg_dice[-1],
        history.lrs[-1],
        history.durations[-1],
        _remaining(history, epochs),
    )
    each = ", ".join(f"{n} {v:.4f}" for n, v in zip(class_names, history.dice_per_class_or_region[-1], strict=True))
    logger.debug("pseudo-Dice: %s", each)


def _remaining(history: History, epochs: int) -> timedelta:
    """Time until the last epoch is over, at the pace of the last five."""
    recent = history.durations[-5:]
    return timedelta(seconds=round(sum(recent) / len(recent) * (epochs - len(history))))
