"""Rows of a transfer's account: what became of one tensor, and what fraction of them is pre-trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

COPIED, ADAPTED, FRESH = "copied", "adapted", "fresh"
USED, DROPPED = "used", "dropped"
REST = "rest"
"""The part of a network that is neither encoder nor stem."""


@dataclass(frozen=True)
class TargetRow:
    """What became of one tensor of the network.

    Attributes:
        name: in the network's state dict; a tensor with two names has two rows.
        fate: ``copied``, ``adapted`` or ``fresh``.
        reason: how it was adapted, or why it is fresh.
        source: the checkpoint's tensor it was made from, or, if it is fresh, could not be made from; None where there is none.
        source_shape, target_shape: of the two tensors.
        part: ``encoder``, ``stem`` or ``rest``.
        alias_of: the first name of the same tensor, when this is another one.
        fresh_numbers: how many numbers of an adapted tensor are the network's own, as new features are.
    """

    name: str
    fate: str
    reason: str
    source: str | None
    source_shape: tuple[int, ...] | None
    target_shape: tuple[int, ...]
    part: str
    alias_of: str | None = None
    fresh_numbers: int = 0

    @property
    def numbers(self) -> int:
        return math.prod(self.target_shape)

    @property
    def pretrained_numbers(self) -> int:
        return 0 if self.fate == FRESH else self.numbers - self.fresh_numbers


@dataclass(frozen=True)
class SourceRow:
    """What became of one tensor of the checkpoint: ``used`` or ``dropped``, and why."""

    name: str
    fate: str
    reason: str
    shape: tuple[int, ...]


def percent(fraction: float, digits: int = 1) -> str:
    """``99.9%``, rounded to nothing or all only where it is that."""
    smallest = 10.0 ** -(digits + 2)
    shown = fraction if fraction in (0, 1) else min(max(fraction, smallest), 1 - smallest)
    return f"{shown:.{digits}%}"


def fraction_pretrained(rows: Iterable[TargetRow]) -> float:
    """Of the numbers in tensors, each counted once whatever its names."""
    counted = [row for row in rows if row.alias_of is None]
    total = sum(row.numbers for row in counted)
    return sum(row.pretrained_numbers for row in counted) / total if total else 0.0


def coverage(rows: Sequence[TargetRow]) -> float:
    """Fraction (0 to 1) of the encoder's and stem's numbers that came from the checkpoint."""
    return fraction_pretrained(row for row in rows if row.part != REST)


def decoder_coverage(rows: Sequence[TargetRow]) -> float:
    """The same fraction of the decoder, without its segmentation heads."""
    heads = head_modules(rows)
    inside = (row for row in rows if row.part == REST and _is_decoder(row.name))
    return fraction_pretrained(row for row in inside if _layer(row.name) not in heads)


def head_modules(rows: Sequence[TargetRow]) -> frozenset[str]:
    """Modules that make the outputs: a U-Net's ``decoder.seg_layers.N``, the last layer of a Primus's decoder."""
    layers = {_layer(row.name) for row in rows if row.part == REST}
    decode = sorted((layer for layer in layers if layer.startswith("up_projection.decode.")), key=_number)
    return frozenset([layer for layer in layers if layer.startswith("decoder.seg_layers.")] + decode[-1:])


def _is_decoder(name: str) -> bool:
    return name.split(".")[0] in ("decoder", "up_projection")


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:3])


def _number(layer: str) -> int:
    return int(layer.rpartition(".")[2])
