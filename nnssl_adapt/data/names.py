"""Names of channels and labels compared: the same thing is written in many ways, and position says nothing.

The one table of synonyms of the package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_CHANNELS: tuple[tuple[str, ...], ...] = (
    ("t1", "t1w", "t1n", "t1weighted", "t1native", "t1pre", "mprage", "t1mprage"),
    ("t1ce", "t1c", "t1gd", "t1gad", "t1post", "t1wce", "t1wgd", "t1cw", "ct1", "cet1", "t1contrast", "t1km"),
    ("t2", "t2w", "t2weighted", "t2tse"),
    ("flair", "t2flair", "t2f", "t2wflair", "flairw"),
    ("t2star", "t2starw", "t2s"),
    ("pd", "pdw", "protondensity"),
    ("dwi", "dw", "diffusion", "diffusionweighted"),
    ("adc", "adcmap", "apparentdiffusioncoefficient"),
    ("swi", "sw", "susceptibilityweighted"),
    ("ct", "computedtomography"),
    ("pet", "fdgpet", "petfdg", "suv", "petsuv"),
    ("mt", "mtr", "magnetizationtransfer", "magnetisationtransfer"),
)
"""Spellings of one image contrast, without case and separators; ``*`` is written ``star``. The first stands for all."""

_CANONICAL = {name: names[0] for names in _CHANNELS for name in names}

_NO_NAMES = {"", "image", "img", "channel", "ch", "data", "input", "scan", "volume", "mr", "mri", "nonorm", "zscore"}
_NO_NAMES |= {"none", "rescaleto01", "rgbto01", "norm"}
"""What is called a channel that has no name: what is said of any image, or only of its normalisation."""

_SPELLINGS = {"tumour": "tumor", "oesophagus": "esophagus", "grey": "gray", "haemorrhage": "hemorrhage"}
"""British words in labels, as most datasets write them."""


def channel_key(name: str) -> str | None:
    """What two names of the same contrast have in common (``T1w`` and ``t1`` both give ``t1``); None for no real name."""
    plain = re.sub(r"[\W_]+", "", name.casefold().replace("*", "star"))
    plain = re.sub(r"^(?:channel|image|img|ch)?\d*$", "", plain)
    return None if plain in _NO_NAMES else _CANONICAL.get(plain, plain)


def label_key(name: str) -> tuple[str, ...]:
    """What two names of the same label have in common: their words, whatever case, separators and order they have."""
    words = re.split(r"[\W_]+", name.casefold())
    return tuple(sorted(_SPELLINGS.get(word, word) for word in words if word))


def same_channel(one: str, other: str) -> bool:
    """Whether two channels are called the same contrast."""
    key = channel_key(one)
    return key is not None and key == channel_key(other)


def pair_channels(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """For each wanted channel the number of the known one with the same name, None where there is none.

    Names that are equal letter by letter go first, so that ``T1`` and ``T1w`` may stand side by side. A name that could mean
    several is paired with none of them.
    """
    return _paired(wanted, known, channel_key)


def pair_labels(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """The same for labels, regions or what else outputs stand for."""
    return _paired(wanted, known, lambda name: label_key(name) or None)


def _paired(wanted: Sequence[str], known: Sequence[str], key: Callable[[str], object]) -> list[int | None]:
    wanted_keys, known_keys = [key(name) for name in wanted], [key(name) for name in known]
    origin: list[int | None] = []
    for name, own in zip(wanted, wanted_keys, strict=True):
        exact = [index for index, other in enumerate(known) if other == name and own is not None]
        alike = [index for index, other in enumerate(known_keys) if own is not None and other == own]
        is_clear = len(alike) == 1 and wanted_keys.count(own) == 1
        origin.append(exact[0] if len(exact) == 1 else alike[0] if is_clear else None)
    return origin
