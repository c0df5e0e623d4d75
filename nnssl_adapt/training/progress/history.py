"""The figures of every epoch of a run."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl_adapt.files import write_text

EMA_DECAY = 0.9
"""Share of the past in the smoothed pseudo-Dice that chooses ``checkpoint_best`` (nnU-Net's)."""

OURS = ("device_busy", "data_waits", "peak_memory", "data_wait_steps", "kernel_busy", "kernel_idle")
"""Figures that nnU-Net has not. Checkpoints keep them apart: it takes the shortest of its lists for the number of epochs."""


@dataclass(frozen=True)
class DeviceFigures:
    """What the device did in an epoch.

    Attributes:
        busy: 0 to 1, of the epoch's time that it worked.
        waited: seconds that the process waited for batches.
        peak_memory: GiB that tensors occupied at most; NaN where that is not counted (other devices than CUDA's).
        waited_a_step: milliseconds that a training step waited for its batches, on the mean.
        kernel_busy: 0 to 1, of a training step's time that kernels ran, in the epochs of which steps were profiled.
        kernel_idle: milliseconds a training step in which no kernel ran; likewise.
    """

    busy: float = math.nan
    waited: float = math.nan
    peak_memory: float = math.nan
    waited_a_step: float = math.nan
    kernel_busy: float = math.nan
    kernel_idle: float = math.nan


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
        device_busy, data_waits, peak_memory, data_wait_steps, kernel_busy, kernel_idle: see :class:`DeviceFigures`; NaN in
            epochs of which nobody measured them.
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
    data_wait_steps: list[float] = field(default_factory=list)
    kernel_busy: list[float] = field(default_factory=list)
    kernel_idle: list[float] = field(default_factory=list)

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
        self.data_wait_steps.append(float(device.waited_a_step))
        self.kernel_busy.append(float(device.kernel_busy))
        self.kernel_idle.append(float(device.kernel_idle))

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
            "data_wait_ms_per_step": self.data_wait_steps[epoch],
            "kernel_busy": self.kernel_busy[epoch],
            "kernel_idle_ms_per_step": self.kernel_idle[epoch],
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

        Both files are made again each time: what a killed run left over never stays.
        """
        lines = (json.dumps(self.epoch_figures(epoch)) for epoch in range(len(self)))
        write_text(path, "".join(f"{line}\n" for line in lines))
        rows = [self.flat_figures(epoch, class_names) for epoch in range(len(self))]
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path.with_suffix(".csv"), table.getvalue())
