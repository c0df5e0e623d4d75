"""Scalings of intensities that are named with numbers: ``window:-175:250``, ``range``, ``percentiles:0.5:99.5``.

For weights whose file does not say how their images were scaled. nnU-Net's plans can say two of them: a fixed window, as
CTNormalization with the numbers that compute exactly it, and the range of each image to 0 … 1. What they can't say is refused
with the reason: nnU-Net would preprocess in another way than the network was trained for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.weights.families.family import CT_SCHEME, Window

RANGE_SCHEME = "RescaleTo01Normalization"
FORMS = ("window:LOW:HIGH", "window:LOW:HIGH:TO_LOW:TO_HIGH", "range")

_INSTEAD = "use window:LOW:HIGH (fixed limits), range (each image to 0 … 1) or zscore"


@dataclass(frozen=True)
class Scaling:
    """A scaling as nnU-Net's plans have it.

    Attributes:
        scheme: nnU-Net's name.
        window: whose numbers the plan needs; None for a scheme without any.
    """

    scheme: str
    window: Window | None = None


def read_scaling(word: str) -> Scaling | None:
    """What ``word`` stands for; None for a word that is no scaling with numbers.

    Raises ConfigurationError for numbers that can't be read, and for what nnU-Net's plans can't say.
    """
    name, *texts = word.split(":")
    if name not in ("window", "range", "percentiles"):
        return None
    numbers = [_number(text, word) for text in texts]
    if name == "percentiles":
        raise ConfigurationError(
            f"--normalization {word}: nnU-Net's plans can't say percentiles of each image (its CTNormalization has those of the "
            f"whole dataset), so that nnU-Net would preprocess in another way: {_INSTEAD}"
        )
    if name == "range":
        if numbers not in ([], [0.0, 1.0]):
            raise ConfigurationError(
                f"--normalization {word}: of each image's range nnU-Net's plans can only say range, which is 0 … 1: {_INSTEAD}"
            )
        return Scaling(RANGE_SCHEME)
    if len(numbers) not in (2, 4):
        raise ConfigurationError(f"--normalization {word}: expected {FORMS[0]} or {FORMS[1]}, such as window:-175:250")
    low, high, *to = numbers
    try:
        return Scaling(CT_SCHEME, Window(low, high, (to[0], to[1]) if to else (0.0, 1.0)))
    except ValueError as error:
        raise ConfigurationError(f"--normalization {word}: {error}") from error


def _number(text: str, word: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise ConfigurationError(f"--normalization {word}: {text!r} is no number") from error
    if not math.isfinite(number):
        raise ConfigurationError(f"--normalization {word}: {text!r} is no finite number")
    return number
