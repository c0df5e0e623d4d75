"""Pictures that a person can judge a segmentation by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnssl_adapt.files import atomic_path
from nnssl_adapt.geometry.orientation import Turn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UPRIGHT = "RPI"
"""Axes (Z, Y, X) run to the head, to the front and to the patient's left: as pictures are drawn from below, right is left."""

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c")


def draw_overlay(
    path: str | Path,
    image: np.ndarray,
    reference: np.ndarray,
    prediction: np.ndarray,
    class_names: Sequence[str],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
    direction: Sequence[float] | None = None,
) -> Path:
    """Save :func:`overlay_figure` as the PNG file ``path``, and return it."""
    figure = overlay_figure(image, reference, prediction, class_names, spacing, title, direction)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return Path(path)


def overlay_figure(
    image: np.ndarray,
    reference: np.ndarray | None,
    prediction: np.ndarray | None,
    class_names: Sequence[str],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
    direction: Sequence[float] | None = None,
) -> Figure:
    """Image, reference and prediction (those that are given) side by side in three planes.

    The planes go through the centre of the reference's foreground. The same class has the same colour in both. However
    the image is stored, with its ``direction`` the first row is axial, the second coronal, the third sagittal; head and
    front are up, the patient's right is on the left. Slices are numbered as in the file. A picture (one slice, without a
    direction) is drawn by itself, its first row on top.

    Args:
        image: one channel, (Z, Y, X).
        reference: label map (Z, Y, X) with values 1, 2, … for the names in ``class_names``.
        prediction: label map (Z, Y, X).
        class_names: names of labels 1, 2, …
        spacing: millimetres (Z, Y, X), so that pixels are drawn in proportion.
        title: headline.
        direction: nine cosines, ITK's; None: not known, so that planes are drawn as they are stored, and have no names.
    """
    from matplotlib.lines import Line2D

    from nnssl_adapt.figures import ShownFigure

    turn = Turn() if direction is None else Turn.to(UPRIGHT, direction)
    image, spacing = turn.apply(image), [spacing[axis] for axis in turn.axes]
    given = {
        what: None if labels is None else turn.apply(labels)
        for what, labels in (("reference", reference), ("prediction", prediction))
    }
    columns = {"image": None, **{what: labels for what, labels in given.items() if labels is not None}}
    is_picture = len(image) == 1 and direction is None
    planes, origin = ((0,), "upper") if is_picture else ((0, 1, 2), "lower")
    height = 10 * len(planes) / 3
    figure = ShownFigure(figsize=(10 / 3 * max(2, len(columns)), height), layout="constrained", facecolor="white")
    axes = figure.subplots(len(planes), len(columns), squeeze=False)
    labelled = [labels for labels in columns.values() if labels is not None]
    centre = _centre(next((labels for labels in labelled if (labels > 0).any()), np.zeros(image.shape, bool)))
    low, high = np.percentile(image, (1, 99.5))
    for row, axis in enumerate(planes):
        index = centre[axis]
        across, down = (a for a in (2, 1, 0) if a != axis)
        for column, (what, labels) in enumerate(columns.items()):
            plot = axes[row][column]
            plot.imshow(
                image.take(index, axis),
                cmap="gray",
                vmin=low,
                vmax=max(high, low + 1e-6),
                origin=origin,
                aspect=spacing[down] / spacing[across],
            )
            if labels is not None:
                plot.imshow(_coloured(labels.take(index, axis), len(class_names)), origin=origin, aspect="auto")
            plot.set_aspect(spacing[down] / spacing[across])
            plot.set_title(f"{what}, {_slice_name(turn, direction is not None, axis, index, image.shape)}", fontsize=9)
            if direction is not None:
                side = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1.5}
                plot.text(0.02, 0.5, "IPR"[across], color="#ffd700", fontsize=8, transform=plot.transAxes, bbox=side)
            plot.set_axis_off()
    handles = [Line2D([], [], color=class_colour(i), label=name) for i, name in enumerate(class_names) if labelled]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, max(1, len(handles))), fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _slice_name(turn: Turn, known: bool, axis: int, index: int, shape: Sequence[int]) -> str:
    """A slice's plane and its number in the file."""
    stored = shape[axis] - 1 - index if turn.flips[axis] else index
    number = f"{'zyx'[turn.axes[axis]]} = {stored}"
    return f"{('axial', 'coronal', 'sagittal')[axis]}, {number}" if known else number


def _coloured(labels: np.ndarray, classes: int) -> np.ndarray:
    """RGBA picture (rows, columns, 4) of a label slice: transparent background, half-transparent classes."""
    from matplotlib.colors import to_rgba

    picture = np.zeros((*labels.shape, 4))
    for index in range(classes):
        picture[labels == index + 1] = to_rgba(class_colour(index), alpha=0.45)
    return picture


def _centre(labels: np.ndarray) -> tuple[int, ...]:
    """Centre of the foreground (Z, Y, X); of the image where there is none."""
    where = np.nonzero(labels > 0)
    if len(where[0]) == 0:
        return tuple(n // 2 for n in labels.shape)
    return tuple(round(float(axis.mean())) for axis in where)


def class_colour(index: int) -> str:
    """The colour of a class by its place among the classes, ``#rrggbb``."""
    return _COLOURS[index % len(_COLOURS)]
