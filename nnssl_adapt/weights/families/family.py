"""What there is to know about one family of published networks, as data.

A new family is one file with a :class:`Family`, and its name in ``registry.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nnssl_adapt.errors import UnreadableCheckpoint
from nnssl_adapt.weights.network.network_parts import Tensors
from nnssl_adapt.weights.network.topology import Topology

Citation = Mapping[str, Any]

CT_SCHEME, Z_SCORE = "CTNormalization", "ZScoreNormalization"

SECOND_HAND = "second-hand, not checked against a file or code: "
"""Before a fact in a note. Facts of a family and of its entries in the catalogue have the same words, and are told once."""


@dataclass(frozen=True)
class Window:
    """Intensities clipped to ``low`` … ``high`` (Hounsfield units for CT) and scaled to ``to[0]`` … ``to[1]``.

    nnU-Net's CTNormalization computes ``(clip(x, percentile_00_5, percentile_99_5) - mean) / std``. With the numbers of
    :meth:`statistics` that is this window exactly, so that nnU-Net preprocesses the same from the plan alone.
    """

    low: float
    high: float
    to: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not (self.low < self.high and self.to[0] < self.to[1]):
            raise ValueError(f"a window goes from a lower to a higher number, got {self}")

    def statistics(self) -> dict[str, float]:
        """nnU-Net's intensity statistics of a channel (``foreground_intensity_properties_per_channel``)."""
        std = (self.high - self.low) / (self.to[1] - self.to[0])
        mean = self.low - self.to[0] * std
        limits = {"min": self.low, "percentile_00_5": self.low, "percentile_99_5": self.high, "max": self.high}
        return {"mean": mean, "median": (self.low + self.high) / 2, "std": std, **limits}

    def __str__(self) -> str:
        return f"{self.low:g} … {self.high:g} clipped and scaled to {self.to[0]:g} … {self.to[1]:g}"


@dataclass(frozen=True)
class Facts:
    """How a family was trained, for files that hold no plan.

    Attributes:
        spacing: voxel size (Z, Y, X) in mm; None where it is not known, or where images kept their own.
        patch_size: voxels (Z, Y, X); None is four times the network's total stride.
        scheme: nnU-Net's name of the normalisation; that of a window is CTNormalization.
        window: fixed limits of the intensities, where it had any.
        unlike: how its normalisation differed from ``scheme``, where nnU-Net's files can't say it; it is told to the user.
        labels: what the outputs of a supervised network stand for, in order, the background first.
        orientation: as in :class:`~nnssl_adapt.weights.checkpoint.adaptation_plan.AdaptationPlan`: for arrays that MONAI reads
            as RAS it is ``LPI`` with ``axes`` xyz, for SPL ``RAI`` with zyx.
        supervised: whether it was trained to segment; None where its heads have to tell.
        axes: order of the image axes of its files, ``zyx`` or ``xyz``. Spacing and patch are (Z, Y, X) of what is made of
            them: for ``xyz`` the numbers here are those before the exchange.
        citations: what to cite.
        told: one sentence on what was taken from here, for the user.
        second_hand: facts that no file or code was seen for; each is told when such a file is opened.
    """

    spacing: tuple[float, float, float] | None = None
    patch_size: tuple[int, int, int] | None = None
    scheme: str = Z_SCORE
    window: Window | None = None
    unlike: str = ""
    labels: tuple[str, ...] = ()
    orientation: str | None = None
    supervised: bool | None = None
    axes: str = "zyx"
    citations: tuple[Citation, ...] = ()
    told: str = ""
    second_hand: tuple[str, ...] = ()

    @property
    def normalization(self) -> str:
        """nnU-Net's name of the scheme."""
        return self.scheme if self.window is None else CT_SCHEME

    def notes(self) -> list[str]:
        """What was taken from here, what nnU-Net's files can't say, and what is second-hand."""
        window = [] if self.window is None else [f"intensities as in its training: {self.window}"]
        unlike = [f"its images were normalised in another way: {self.unlike}"] if self.unlike else []
        unseen = [f"{SECOND_HAND}{fact}" for fact in self.second_hand]
        return [*([self.told] if self.told else []), *window, *unlike, *unseen]


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
        recognises: whether a network without a plan is one of the family, by its size.
        named: pattern of the file's name, or of a name that the catalogue knows it by, which has to fit as well; None for any.
        dataset: pattern of the dataset's name in nnU-Net's plans, for model folders that have a peculiarity.
        image_channels: numbers of the input channels that are images, where others are not; those are left behind.
        fits: whether tensors with the key map's marker are this family's, where other families have the same names.
        arguments: of its network, for what the tensors don't tell.
        refusal: why its files can't be used, and what can be done; None for those that can.
        beside: for families that write what they know into a pickle beside the weights (``X.model.pkl``): (its content as
            plain values, its path, the path of the weights) → fields of an AdaptationPlan, and ``arguments``.
        prepare: what is done to the tensors, under our names, so that the network built for them computes the same; returns
            them and notes for the user.
    """

    name: str
    facts: Facts
    key_map: KeyMap | None = None
    recognises: Callable[[Topology], bool] | None = None
    named: str | None = None
    dataset: str | None = None
    image_channels: tuple[int, ...] | None = None
    fits: Callable[[Tensors], bool] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None
    beside: Callable[[Any, str, str], dict[str, Any]] | None = None
    prepare: Callable[[Tensors], tuple[dict[str, Any], tuple[str, ...]]] | None = None

    def names_tensors(self, tensors: Tensors, filenames: Iterable[str]) -> bool:
        """Whether these are the tensors of a file of the family, by their names; ``filenames``: that the file is known by."""
        if self.key_map is None or not self.key_map.fits(tensors) or not self.is_named(filenames):
            return False
        return self.fits is None or self.fits(tensors)

    def is_named(self, filenames: Iterable[str]) -> bool:
        """Whether a file that is known by these names may be of the family."""
        return self.named is None or any(re.fullmatch(self.named, name) for name in filenames)
