"""Figures that a notebook shows. matplotlib is loaded with this module: import it where a figure is drawn."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that any notebook shows as a picture, although nobody loaded pyplot, which teaches notebooks to show figures."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png")
        return stream.getvalue()
