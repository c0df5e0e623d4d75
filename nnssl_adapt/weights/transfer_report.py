"""The account of a transfer: what became of every tensor of the network and of the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nnssl_adapt.files import write_json

COPIED, ADAPTED, FRESH = "copied", "adapted", "fresh"
USED, DROPPED = "used", "dropped"


@dataclass(frozen=True)
class TargetRow:
    """What became of one tensor of the network.

    Attributes:
        name: in the network's state dict; a tensor with two names has two rows.
        fate: ``copied``, ``adapted`` or ``fresh``.
        reason: how it was adapted, or why it is fresh.
        source: the checkpoint's tensor it was made from, or None.
        source_shape, target_shape: of the two tensors.
        part: ``encoder``, ``stem`` or ``rest``.
        alias_of: the first name of the same tensor, when this is another one.
    """

    name: str
    fate: str
    reason: str
    source: str | None
    source_shape: tuple[int, ...] | None
    target_shape: tuple[int, ...]
    part: str
    alias_of: str | None = None


@dataclass(frozen=True)
class SourceRow:
    """What became of one tensor of the checkpoint: ``used`` or ``dropped``, and why."""

    name: str
    fate: str
    reason: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TransferReport:
    """The account of a transfer. ``print`` it for a table; ``save`` it beside the model.

    Attributes:
        rows: one a name in the network's state dict.
        source_rows: one a tensor of the checkpoint.
        notes: what was decided or mended on the way.
        origin: where the weights are from (as :class:`~nnssl_adapt.weights.source.Origin`), None from scratch.
    """

    rows: tuple[TargetRow, ...]
    source_rows: tuple[SourceRow, ...] = ()
    notes: tuple[str, ...] = ()
    origin: Mapping[str, Any] | None = None
    title: str = field(default="", compare=False)

    @property
    def coverage(self) -> float:
        """Fraction (0 to 1) of the encoder's and stem's numbers that came from the checkpoint."""
        encoder = [row for row in self.rows if row.part != "rest" and row.alias_of is None]
        total = sum(math.prod(row.target_shape) for row in encoder)
        return sum(math.prod(row.target_shape) for row in encoder if row.fate != FRESH) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON."""
        return {
            "coverage": self.coverage,
            "origin": dict(self.origin) if self.origin else None,
            "notes": list(self.notes),
            "target": [asdict(row) for row in self.rows],
            "source": [asdict(row) for row in self.source_rows],
        }

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all, and return the path."""
        write_json(path, self.to_dict())
        return Path(path)

    def __str__(self) -> str:
        lines = [self.title] if self.title else []
        target = _grouped((row.name, row.fate, row.reason, row.target_shape) for row in self.rows if not row.alias_of)
        lines += _table(("network", "fate", "tensors", "numbers", "how or why"), target)
        if self.source_rows:
            source = _grouped((row.name, row.fate, row.reason, row.shape) for row in self.source_rows)
            lines += ["", *_table(("checkpoint", "fate", "tensors", "numbers", "why"), source)]
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"{self.coverage:.1%} of the encoder is pre-trained")
        return "\n".join(lines)


# -- the table -------------------------------------------------------------------------------------------------------


def _grouped(rows: Iterable[tuple[str, str, str, tuple[int, ...]]]) -> list[tuple[str, ...]]:
    """Rows of one module with one fate and reason, added up; in the order in which they first turn up."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, fate, reason, shape in rows:
        count = groups.setdefault((_module(name), fate, reason), [0, 0])
        count[0] += 1
        count[1] += math.prod(shape)
    return [(module, fate, str(n), f"{size:,}", reason) for (module, fate, reason), (n, size) in groups.items()]


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
