"""What there is to know about one family of published networks, as data.

A new family is one file with a :class:`Family`, and its name in ``registry.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nnssl_adapt.errors import UnreadableCheckpoint
from nnssl_adapt.weights.network.topology import Topology

Citation = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """How a family was trained, for files that hold no plan.

    Attributes:
        spacing: voxel size (Z, Y, X) in mm; None where it is not known, or where images kept their own.
        patch_size: voxels (Z, Y, X); None is four times the network's total stride.
        orientation: as in :class:`~nnssl_adapt.weights.checkpoint.adaptation_plan.AdaptationPlan`.
        supervised: whether it was trained to segment; None where its heads have to tell.
        axes: order of the image axes of its files, ``zyx`` or ``xyz``. Spacing and patch are (Z, Y, X) of what is made of
            them: for ``xyz`` the numbers here are those before the exchange.
        citations: what to cite.
        told: one sentence on what was taken from here, for the user.
    """

    spacing: tuple[float, float, float] | None = None
    patch_size: tuple[int, int, int] | None = None
    orientation: str | None = None
    supervised: bool | None = None
    axes: str = "zyx"
    citations: tuple[Citation, ...] = ()
    told: str = ""


@dataclass(frozen=True)
class KeyMap:
    """Names of tensors in a family's files → names in the network that is built for it.

    Attributes:
        marker: the whole name of a tensor that only this family's files have.
        rules: (pattern of the whole name, replacement); None as a replacement leaves the tensor under its own name, as a part
            that only pre-training needs. The first that fits counts.
    """

    marker: str
    rules: tuple[tuple[str, str | None], ...]

    def fits(self, names: Iterable[str]) -> bool:
        return any(re.fullmatch(self.marker, name) for name in names)

    def translate(self, names: Iterable[str], where: str) -> dict[str, str]:
        """The file's name → our name. Raises UnreadableCheckpoint for a name that no rule knows."""
        return {name: self._translated(name, where) for name in names}

    def _translated(self, name: str, where: str) -> str:
        for pattern, replacement in self.rules:
            match = re.fullmatch(pattern, name)
            if match:
                return name if replacement is None else match.expand(replacement)
        raise UnreadableCheckpoint(
            f"{where} holds {name[:120]!r}, which no file of its kind has: is it another network?"
        )


@dataclass(frozen=True)
class Family:
    """One family of networks, known by the names or by the sizes of its tensors.

    Attributes:
        name: for messages, in words that follow "it is": ``a network of nnU-Net version 1``.
        facts: how it was trained.
        key_map: for files with other names than the network has.
        recognises: whether a network without a plan is one of the family.
        refusal: why its files can't be used, and what can be done; None for those that can.
    """

    name: str
    facts: Facts
    key_map: KeyMap | None = None
    recognises: Callable[[Topology], bool] | None = None
    refusal: str | None = None
