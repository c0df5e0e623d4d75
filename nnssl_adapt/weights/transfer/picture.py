"""A transfer as a picture: one bar a module of the network, coloured by what became of its numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.errors import OutputError
from nnssl_adapt.weights.transfer.rows import (
    ADAPTED,
    COPIED,
    FRESH,
    REST,
    TargetRow,
    coverage,
    decoder_coverage,
    fraction_pretrained,
    head_modules,
    percent,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {COPIED: "#0072B2", ADAPTED: "#E69F00", FRESH: "#D5D5D5"}
"""Blue, orange and grey of Okabe and Ito's palette, which colour-blind readers tell apart; lightness differs as well."""

_LABELS = {COPIED: "copied", ADAPTED: "adapted", FRESH: "fresh (as initialised)"}
_TITLE = 100
"""Letters that fit into the first line above it."""

_BAR = 0.3
"""Height of one bar with its gap, in inches."""


@dataclass
class _Bar:
    """Numbers (weights) of one module by fate."""

    numbers: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.numbers.values())


def draw_rows(rows: Sequence[TargetRow], title: str = "", path: str | Path | None = None) -> Figure:
    """Draw the rows of a transfer report, and write the picture to ``path`` if given (format by its suffix).

    From top to bottom as an image goes through the network: stem, stages or blocks of the encoder, decoder, segmentation
    heads. Bars are as long as the shares of their numbers, since the deepest stage has a thousand times more of them than
    the first; how many there are stands beside it. Nothing of pyplot is touched.

    Raises OutputError when the file can't be written.
    """
    from nnssl_adapt.figures import ShownFigure

    bars = _bars(rows)
    figure = ShownFigure(figsize=(8, 1.5 + _BAR * max(len(bars), 3)), layout="constrained")
    axes = figure.add_subplot()
    _draw_bars(axes, bars)
    _describe(figure, axes, _title(rows, title), bars)
    if path is not None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise OutputError(f"the picture of the transfer can't be written to {path}: {error}") from error
    return figure


def _draw_bars(axes: Axes, bars: dict[str, _Bar]) -> None:
    places = range(len(bars))
    start = [0.0] * len(bars)
    for fate, colour in _COLOURS.items():
        shares = [bar.numbers[fate] / bar.total if bar.total else 0.0 for bar in bars.values()]
        hatch = "////" if fate == ADAPTED else None
        axes.barh(places, shares, left=start, height=0.74, color=colour, edgecolor="white", linewidth=0.6, hatch=hatch)
        start = [a + b for a, b in zip(start, shares, strict=True)]
    for place, bar in zip(places, bars.values(), strict=True):
        axes.text(1.015, place, _short(bar.total), va="center", ha="left", fontsize=8, color="#555555")


def _describe(figure: Figure, axes: Axes, title: str, bars: dict[str, _Bar]) -> None:
    from matplotlib.patches import Patch

    axes.set_yticks(range(len(bars)), list(bars), fontsize=9)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1.09)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"], fontsize=8)
    axes.set_xlabel("share of the module's numbers", fontsize=9)
    axes.text(1.015, -0.62, "numbers", va="bottom", ha="left", fontsize=8, color="#555555")
    axes.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    used = [fate for fate in _COLOURS if any(bar.numbers[fate] for bar in bars.values())]
    handles = [
        Patch(
            facecolor=_COLOURS[fate], edgecolor="white", hatch="////" if fate == ADAPTED else None, label=_LABELS[fate]
        )
        for fate in used
    ]
    figure.suptitle(title, x=0.012, ha="left", fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=max(len(handles), 1), frameon=False, fontsize=9)


def _title(rows: Sequence[TargetRow], title: str) -> str:
    """Two lines: what was moved and how much of it arrived. A path is shortened to its last two parts."""
    what, _, source = title.partition(" from ")
    parts = Path(source).parts
    shown = source if len(parts) < 3 else "…/" + "/".join(parts[-2:])
    first = f"{what} from {shown}" if source else what or "Transfer"
    second = (
        f"pre-trained: {percent(coverage(rows), 0)} of the encoder, {percent(decoder_coverage(rows), 0)} of the decoder, "
        f"{percent(fraction_pretrained(rows), 0)} of all parameters"
    )
    return f"{first if len(first) <= _TITLE else first[: _TITLE - 1] + '…'}\n{second}"


def _short(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


# -- modules ---------------------------------------------------------------------------------------------------------

_STAGE = re.compile(r"(?:encoder|decoder)\.(?P<part>stages|transpconvs|seg_layers)\.(?P<number>\d+)\.")
_BLOCK = re.compile(r"eva\.blocks\.(?P<number>\d+)\.")


def _bars(rows: Sequence[TargetRow]) -> dict[str, _Bar]:
    """Modules in the order in which an image goes through them."""
    heads = head_modules(rows)
    bars: dict[str, _Bar] = {}
    # The mask token is a buffer that only pre-training uses.
    shown = (row for row in rows if row.alias_of is None and row.name != "mask_token")
    for row in sorted(shown, key=lambda row: _position(row, heads)):
        bar = bars.setdefault(_module(row, heads), _Bar(dict.fromkeys(_COLOURS, 0)))
        if row.fate == FRESH:
            bar.numbers[FRESH] += row.numbers
        else:
            bar.numbers[row.fate] += row.pretrained_numbers
            bar.numbers[FRESH] += row.fresh_numbers
    return bars


def _module(row: TargetRow, heads: frozenset[str]) -> str:
    name = row.name
    if any(name.startswith(f"{head}.") for head in heads):
        return "segmentation heads"
    if match := _BLOCK.match(name):
        return f"block {match['number']}"
    if match := _STAGE.match(name):
        return f"{'encoder' if row.part != REST else 'decoder'} stage {match['number']}"
    known = {"down_projection": "patch embedding", "up_projection": "decoder"}
    if name == "eva.pos_embed":
        return "positions"
    if name.startswith("eva.norm"):
        return "last norm"
    return (
        "stem" if name.startswith("encoder.stem.") else known.get(name.split(".")[0], name.rpartition(".")[0] or name)
    )


_ORDER = ("stem", "patch embedding", "positions", "encoder", "block", "last", "decoder", "segmentation")


def _position(row: TargetRow, heads: frozenset[str]) -> tuple[int, int]:
    module = _module(row, heads)
    kind = next((i for i, word in enumerate(_ORDER) if module == word or module.split()[0] == word), len(_ORDER))
    number = re.search(r"\d+$", module)
    return kind, int(number[0]) if number else -1
