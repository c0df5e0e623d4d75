"""progress.png: a training at a glance."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_adapt.files import atomic_path
from nnssl_adapt.training.progress.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_NAMED = 20
"""Classes that a legend can name and colours can tell apart."""

_LONGEST_NAME = 22
_PAUSE = 20
"""Times as long as it took to draw."""

_PANEL_INCHES = 2.6


class ProgressPicture:
    """progress.png, drawn again with an epoch wherever that takes a small part of the time, and with the last.

    Epochs of a second would otherwise be slowed down to a half.

    Args:
        path: of the PNG.
        class_names: as many as the history has classes, or none.
    """

    def __init__(self, path: Path, class_names: Sequence[str] = ()) -> None:
        self._path = path
        self._class_names = class_names
        self._not_before = 0.0

    def show(self, history: History, last: bool) -> None:
        """An epoch is over, the ``last`` one perhaps. Raises OutputError."""
        started = time.monotonic()
        if started < self._not_before and not last:
            return
        draw_progress(history, self._path, self._class_names)
        self._not_before = time.monotonic() + _PAUSE * (time.monotonic() - started)


def draw_progress(history: History, path: Path, class_names: Sequence[str] = ()) -> None:
    """Draw losses, pseudo-Dice (mean and each class), learning rate, epoch time and the device's use into a PNG.

    ``class_names`` as many as the history has classes, or none. Figures that nobody measured have no panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [_losses, _dice, _rates, _seconds]
    if any(not math.isnan(value) for value in history.device_busy):
        panels.append(_device)
    height = _PANEL_INCHES * len(panels)
    figure = Figure(figsize=(11, height), dpi=80)
    FigureCanvasAgg(figure)
    # Set by hand, since the automatic layout takes longer than the drawing.
    figure.subplots_adjust(left=0.09, right=0.77, top=1 - 0.25 / height, bottom=0.6 / height, hspace=0.12)
    axes = figure.subplots(len(panels), 1, sharex=True)
    for draw, panel in zip(panels, axes, strict=True):
        draw(panel, history, class_names)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize="small", frameon=False)
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _losses(panel: Axes, history: History, class_names: Sequence[str]) -> None:
    _line(panel, history, history.train_losses, "training", color="tab:blue")
    _line(panel, history, history.val_losses, "validation", color="tab:red")
    panel.set_ylabel("loss")


def _dice(panel: Axes, history: History, class_names: Sequence[str]) -> None:
    from matplotlib import colormaps

    classes = len(history.dice_per_class_or_region[0]) if len(history) else 0
    colours = colormaps["tab10" if classes <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    named = classes == len(class_names) and 1 < classes <= _MOST_NAMED
    _line(panel, history, history.mean_fg_dice, "mean", color="black", linestyle=":", zorder=3)
    _line(panel, history, history.ema_fg_dice, "mean, smoothed", color="black", linewidth=2, zorder=3)
    for index in range(classes if classes > 1 else 0):
        values = [dice[index] for dice in history.dice_per_class_or_region]
        label = _short(class_names[index]) if named else None
        _line(panel, history, values, label, color=colours[index % len(colours)], linewidth=1, alpha=0.8)
    if classes > 1 and not named:
        panel.plot([], [], color=colours[0], linewidth=1, label=f"each of {classes} classes")
    panel.set_ylim(-0.02, 1.02)
    panel.set_ylabel("pseudo-Dice")


def _rates(panel: Axes, history: History, class_names: Sequence[str]) -> None:
    _line(panel, history, history.lrs, None, color="tab:blue")
    panel.set_ylim(0, 1.05 * max(history.lrs, default=1.0))
    panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    panel.yaxis.get_offset_text().set_x(-0.07)  # beside the ticks, not on the panel above
    panel.set_ylabel("learning rate")


def _seconds(panel: Axes, history: History, class_names: Sequence[str]) -> None:
    _line(panel, history, history.durations, "an epoch", color="tab:blue")
    if any(not math.isnan(value) for value in history.data_waits):
        _line(panel, history, history.data_waits, "of them waiting for data", color="tab:orange")
    panel.set_ylim(bottom=0)
    panel.set_ylabel("seconds")


def _device(panel: Axes, history: History, class_names: Sequence[str]) -> None:
    """How busy it was; its memory in words, since it hardly changes."""
    _line(panel, history, [100 * value for value in history.device_busy], "device busy", color="tab:green")
    known = [value for value in history.peak_memory if not math.isnan(value)]
    if known:
        panel.plot([], [], " ", label=f"memory: {max(known):.1f} GiB at most")
    panel.set_ylim(0, 103)
    panel.set_ylabel("% of the time")


def _line(panel: Axes, history: History, values: Sequence[float], label: str | None, **style: Any) -> None:
    marker = "." if len(history) < 20 else None  # a single epoch makes no line
    panel.plot(range(1, len(history) + 1), values, label=label, marker=marker, **style)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
