"""The account of a transfer: what became of every tensor of the network and of the checkpoint."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup
from pydantic import TypeAdapter

from nnssl_adapt.errors import TransferError
from nnssl_adapt.files import write_json
from nnssl_adapt.text import read_json
from nnssl_adapt.weights.transfer.picture import draw_rows
from nnssl_adapt.weights.transfer.rows import (
    SourceRow,
    TargetRow,
    coverage,
    decoder_coverage,
    fraction_pretrained,
    head_modules,
    percent,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TransferReport:
    """The account of a transfer. ``print`` it for a table; ``save`` it beside the model.

    Attributes:
        rows: one a name in the network's state dict.
        source_rows: one a tensor of the checkpoint.
        notes: what was decided or corrected on the way.
        origin: where the weights are from (as :class:`~nnssl_adapt.weights.sources.resolve.Origin`), None from scratch.
        title: the first line of the table.
        warnings: notes that should not be overlooked.
    """

    rows: tuple[TargetRow, ...]
    source_rows: tuple[SourceRow, ...] = ()
    notes: tuple[str, ...] = ()
    origin: Mapping[str, Any] | None = None
    title: str = field(default="", compare=False)
    warnings: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Fraction (0 to 1) of the encoder's and stem's numbers that came from the checkpoint."""
        return coverage(self.rows)

    @property
    def encoder_coverage(self) -> float:
        """The same as :attr:`coverage`."""
        return self.coverage

    @property
    def decoder_coverage(self) -> float:
        """The same fraction of the decoder, without its segmentation heads."""
        return decoder_coverage(self.rows)

    @property
    def parameter_coverage(self) -> float:
        """The same fraction of all the network's numbers."""
        return fraction_pretrained(self.rows)

    @property
    def head_modules(self) -> frozenset[str]:
        """Modules that make the outputs: a U-Net's ``decoder.seg_layers.N``, the last layer of a Primus's decoder."""
        return head_modules(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON; :meth:`from_dict` makes the report of it again."""
        return {
            "title": self.title,
            "coverage": self.coverage,
            "decoder_coverage": self.decoder_coverage,
            "parameter_coverage": self.parameter_coverage,
            "origin": dict(self.origin) if self.origin else None,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "target": [asdict(row) for row in self.rows],
            "source": [asdict(row) for row in self.source_rows],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TransferReport:
        """What :meth:`to_dict` gave, also after a way through JSON, and from versions that wrote fewer entries.

        Raises TransferError when it is something else.
        """
        try:
            return cls(
                rows=tuple(_row(TargetRow, entry) for entry in content["target"]),
                source_rows=tuple(_row(SourceRow, entry) for entry in content["source"]),
                notes=_texts(content.get("notes", ())),
                origin=None if content.get("origin") is None else dict(content["origin"]),
                title=str(content.get("title", "")),
                warnings=_texts(content.get("warnings", ())),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TransferError(f"this is not a transfer report: {' '.join(repr(error).split())[:300]}") from error

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all, and return the path."""
        write_json(path, self.to_dict())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> TransferReport:
        """Read what :meth:`save` wrote. Raises TransferError naming the file when it can't be read or is something else."""
        content = read_json(path, TransferError, "transfer report")
        try:
            return cls.from_dict(content)
        except TransferError as error:
            raise TransferError(f"{path}: {error}") from error

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the network as bars coloured by fate; see :func:`~nnssl_adapt.weights.transfer.picture.draw_rows`.

        A notebook shows the figure that is returned; with ``path`` it is also written there (format by its suffix).
        """
        return draw_rows(self.rows, self.title, path)

    def _repr_html_(self) -> str:
        """What a notebook shows: the picture and, on a click, the table."""
        stream = io.BytesIO()
        self.plot().savefig(stream, format="png", dpi=100)
        data = base64.b64encode(stream.getvalue()).decode("ascii")
        page = '<img src="data:image/png;base64,{}" style="max-width:100%" alt="transfer of weights">'
        page += "<details><summary>the table</summary><pre>{}</pre></details>"
        return str(Markup(page).format(data, str(self)))  # which escapes both

    def __str__(self) -> str:
        lines = [self.title] if self.title else []
        target = _grouped((row.name, row.fate, row.reason, row.target_shape) for row in self.rows if not row.alias_of)
        lines += _table(("network", "fate", "tensors", "numbers", "how or why"), target)
        if self.source_rows:
            source = _grouped((row.name, row.fate, row.reason, row.shape) for row in self.source_rows)
            lines += ["", *_table(("checkpoint", "fate", "tensors", "numbers", "why"), source)]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        lines.append(
            f"{percent(self.coverage)} of the encoder is pre-trained, {percent(self.decoder_coverage)} of the decoder, "
            f"{percent(self.parameter_coverage)} of all parameters"
        )
        return "\n".join(lines)


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} is no list of texts")
    return tuple(values)


Row = TypeVar("Row", TargetRow, SourceRow)


def _row(cls: type[Row], entry: Mapping[str, Any]) -> Row:
    """A row from JSON, in which shapes are lists. Raises ValueError or TypeError for values of other types."""
    row: Row = TypeAdapter(cls).validate_python({**entry})
    if any(n < 0 for value in vars(row).values() if isinstance(value, tuple) for n in value):
        raise ValueError(f"a shape with a negative number in the row of {row.name!r}")
    return row


# -- the table -------------------------------------------------------------------------------------------------------


def _grouped(rows: Iterable[tuple[str, str, str, tuple[int, ...]]]) -> list[tuple[str, ...]]:
    """Rows of one module with one fate and reason, added up; in the order in which they first turn up.

    Reasons that differ in numbers only are one, or a network with other widths would fill pages.
    """
    groups: dict[tuple[str, str, str], _Group] = {}
    for name, fate, reason, shape in rows:
        group = groups.setdefault((_module(name), fate, _NUMBERS.sub("#", reason)), _Group())
        group.tensors += 1
        group.numbers += math.prod(shape)
        group.reasons.setdefault(reason)
    return [
        (module, fate, str(group.tensors), f"{group.numbers:,}", _joined(list(group.reasons)))
        for (module, fate, _), group in groups.items()
    ]


_NUMBERS = re.compile(r"\d+(×\d+)*")


@dataclass
class _Group:
    tensors: int = 0
    numbers: int = 0
    reasons: dict[str, None] = field(default_factory=dict)


def _joined(reasons: list[str]) -> str:
    return reasons[0] + (f"; and {len(reasons) - 1} alike" if len(reasons) > 1 else "")


def _module(name: str) -> str:
    """The part of a network that a tensor's name is summed up under: at most two levels, no layer numbers."""
    words = name.split(".")[:-1] or [name]
    cut = next((index for index, word in enumerate(words) if word.isdigit()), len(words))
    return ".".join(words[: min(cut, 2)]) or name


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(width) if i in (2, 3) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
