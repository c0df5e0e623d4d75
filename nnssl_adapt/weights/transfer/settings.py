"""How pre-trained weights are fitted to a network: the choices, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nnssl_adapt.errors import ConfigurationError

SCOPES = ("auto", "encoder", "encoder+decoder", "none")
CHANNEL_RULES = ("repeat", "mean", "zero")
TOKEN_ORDER_CHOICES = ("auto", "hwd", "whd")

NEW_CHANNEL = "new"
"""In a channel map: this channel of the network has learned nothing."""


@dataclass(frozen=True)
class TransferSettings:
    """Choices of a transfer. They are kept in the plan, so that training does what planning showed.

    Attributes:
        scope: which part of the network is filled: ``encoder`` (with its stem), ``encoder+decoder`` (and segmentation
            heads whose label names agree), ``none``; ``auto`` is ``encoder+decoder`` for supervised weights, else ``encoder``.
        channels: how the stem takes another number of image channels: ``repeat`` (cycled, scaled so that copies of one
            image do what it did), ``mean`` (every channel gets the average kernel), ``zero`` (the first ones as they are,
            new ones silent), or for each channel of the network the pre-training channel it takes, None for a new one.
        token_order: order in which the checkpoint flattened its tokens: ``hwd``, ``whd``, or ``auto`` to find out.
        waive: patterns (``encoder.stages.5.*``) of tensors, of the network or the checkpoint, that may be left behind.

    Raises ConfigurationError naming the field and what it may be.
    """

    scope: str = "auto"
    channels: str | tuple[int | None, ...] = "repeat"
    token_order: str = "auto"
    waive: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("scope", self.scope, SCOPES)
        _check_choice("token order", self.token_order, TOKEN_ORDER_CHOICES)
        if isinstance(self.channels, str):
            _check_choice("channel rule", self.channels, CHANNEL_RULES)
        else:
            channels = tuple(self.channels)
            bad = [c for c in channels if c is not None and (isinstance(c, bool) or not isinstance(c, int) or c < 0)]
            if bad or not channels or all(channel is None for channel in channels):
                raise ConfigurationError(
                    f"channel map {list(self.channels)}: give for each channel of the network the number of a "
                    "pre-training channel, or None for a new one, and at least one number"
                )
            object.__setattr__(self, "channels", channels)
        patterns = (self.waive,) if isinstance(self.waive, str) else tuple(self.waive)
        object.__setattr__(self, "waive", patterns)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TransferSettings:
        """What :meth:`to_dict` gave, also after a way through JSON; missing entries have their defaults."""
        unknown = sorted(set(content) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigurationError(f"unknown transfer setting {', '.join(unknown)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_channels(text: str, channel_names: Sequence[str]) -> str | tuple[int | None, ...]:
    """Read ``--channels``: a rule, or a map such as ``T1=0,T2=0,FLAIR=new``.

    Args:
        text: ``repeat``, ``mean``, ``zero``, or ``NAME=NUMBER|new`` for every channel of the dataset, separated by commas;
            a name may also be the channel's number in dataset.json. Case does not matter.
        channel_names: the dataset's channels, in order.

    Raises ConfigurationError for a channel that is unknown, missing or named twice.
    """
    if text.strip().lower() in CHANNEL_RULES:
        return text.strip().lower()
    known = {name.lower(): index for index, name in enumerate(channel_names)}
    numbers = {str(index): index for index in range(len(channel_names))}
    chosen: dict[int, int | None] = {}
    expected = f"expected {', '.join(CHANNEL_RULES)} or a map of the channels {', '.join(channel_names)}"
    for entry in text.split(","):
        name, equals, value = (part.strip() for part in entry.partition("="))
        index = known.get(name.lower(), numbers.get(name))
        if index is None or not equals or not (value.isdigit() or value.lower() == NEW_CHANNEL):
            raise ConfigurationError(
                f"--channels {text}: can't read {entry.strip()!r}; {expected} such as {channel_names[0]}=0"
            )
        if index in chosen:
            raise ConfigurationError(f"--channels {text}: channel {name} is there twice")
        chosen[index] = int(value) if value.isdigit() else None
    missing = [name for index, name in enumerate(channel_names) if index not in chosen]
    if missing:
        raise ConfigurationError(f"--channels {text}: nothing is said of {', '.join(missing)}; {expected}")
    return TransferSettings(channels=tuple(chosen[index] for index in range(len(channel_names)))).channels


def _check_choice(what: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigurationError(f"unknown {what} {value!r}: {', '.join(choices)}")
