"""How pre-trained weights are fitted to a network: the choices, checked when they are made."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nnssl_adapt.data.names import pair_channels
from nnssl_adapt.errors import ConfigurationError

SCOPES = ("auto", "encoder", "encoder+decoder", "none")
CHANNEL_RULES = ("auto", "repeat", "mean", "zero")
TOKEN_ORDER_CHOICES = ("auto", "hwd", "whd")

ChannelRule = str | tuple[int | None, ...]
"""A rule's name, or for each channel of the network the pre-training channel that it takes, None for a new one."""

NEW_CHANNEL = "new"
"""In a channel map: this channel of the network has learned nothing."""


@dataclass(frozen=True)
class TransferSettings:
    """Choices of a transfer. They are kept in the plan, so that training does what planning showed.

    Attributes:
        scope: which part of the network is filled: ``encoder`` (with its stem), ``encoder+decoder`` (and segmentation
            heads whose label names agree), ``none``; ``auto`` is ``encoder+decoder`` for supervised weights, else ``encoder``.
        channels: which kernel each image channel takes. ``auto``: that of the pre-training channel with the same name where
            both sides have names, else as ``repeat``. ``repeat``: by number, cycled, scaled so that copies of one image do
            what it did; ``mean``: every channel gets the average kernel; ``zero``: the first ones as they are, new ones
            silent. Or for each channel of the network the number or name of the pre-training channel, None for a new one.
        token_order: order in which the checkpoint flattened its tokens: ``hwd``, ``whd``, or ``auto`` to find out.
        waive: patterns (``encoder.stages.5.*``) of tensors, of the network or the checkpoint, that may be left behind.

    Raises ConfigurationError naming the field and what it may be.
    """

    scope: str = "auto"
    channels: str | tuple[int | str | None, ...] = "auto"
    token_order: str = "auto"
    waive: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("scope", self.scope, SCOPES)
        _check_choice("token order", self.token_order, TOKEN_ORDER_CHOICES)
        if isinstance(self.channels, str):
            _check_choice("channel rule", self.channels, CHANNEL_RULES)
        elif not isinstance(self.channels, (list, tuple)):
            raise ConfigurationError(
                f"channels are {_shown(self.channels)}, expected a rule or a list with an entry a channel"
            )
        else:
            channels = tuple(self.channels)
            bad = [c for c in channels if not _is_channel(c)]
            if bad or not channels or all(channel is None for channel in channels):
                raise ConfigurationError(
                    f"channel map {_shown(list(self.channels))}: give for each channel of the network the number of a "
                    "pre-training channel (or its name), or None for a new one, and at least one number"
                )
            object.__setattr__(self, "channels", channels)
        patterns = (self.waive,) if isinstance(self.waive, str) else self.waive
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ConfigurationError(f"waivers are {_shown(patterns)}, expected patterns of tensors' names")
        patterns = tuple(patterns)
        object.__setattr__(self, "waive", patterns)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TransferSettings:
        """What :meth:`to_dict` gave, also after a way through JSON; missing entries have their defaults."""
        if not isinstance(content, Mapping):
            raise ConfigurationError(f"the transfer settings are {_shown(content)}, expected a mapping")
        unknown = sorted(map(str, set(content) - set(cls.__dataclass_fields__)))
        if unknown:
            raise ConfigurationError(f"unknown transfer setting {_shown(', '.join(unknown))}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return cls(**values)

    @property
    def channel_numbers(self) -> ChannelRule:
        """``channels`` with numbers only, where no names are known: ``auto`` is ``repeat``.

        Raises ConfigurationError when they hold the name of a channel: who knows the weights' names has to look it up first.
        """
        if isinstance(self.channels, str):
            return "repeat" if self.channels == "auto" else self.channels
        names = [entry for entry in self.channels if isinstance(entry, str)]
        if names:
            raise ConfigurationError(f"the weights name no channel {names[0]!r}: give its number, from 0")
        return tuple(entry for entry in self.channels if not isinstance(entry, str))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_channels(text: str, channel_names: Sequence[str]) -> str | tuple[int | str | None, ...]:
    """Read ``--channels``: a rule, or a map such as ``T1=T1w,T2=0,FLAIR=new``.

    Args:
        text: one of :data:`CHANNEL_RULES`, or ``NAME=NAME|NUMBER|new`` for every channel of the dataset, separated by commas:
            left its name (or number) in dataset.json, right the name or number of the pre-training's. Case and
            separators do not matter.
        channel_names: the dataset's channels, in order.

    Names of pre-training channels stay names: they are looked up when the weights are known. Raises ConfigurationError for a
    channel of the dataset that is unknown, missing or named twice.
    """
    if text.strip().lower() in CHANNEL_RULES:
        return text.strip().lower()
    numbers = {str(index): index for index in range(len(channel_names))}
    chosen: dict[int, int | str | None] = {}
    expected = f"expected {', '.join(CHANNEL_RULES)} or a map of the channels {', '.join(channel_names)}"
    for entry in text.split(","):
        name, equals, value = (part.strip() for part in entry.partition("="))
        index = numbers.get(name)
        if index is None:
            lowered = [known.strip().casefold() for known in channel_names]
            index = (
                lowered.index(name.casefold())
                if name.casefold() in lowered
                else pair_channels([name], channel_names)[0]
            )
        if index is None or not equals or not value or (set(value) <= set("+-.0123456789") and not value.isdigit()):
            raise ConfigurationError(
                f"--channels {text}: can't read {entry.strip()!r}; {expected} such as {channel_names[0]}=0"
            )
        if index in chosen:
            raise ConfigurationError(f"--channels {text}: channel {name} is there twice")
        chosen[index] = int(value) if value.isdigit() else None if value.lower() == NEW_CHANNEL else value
    missing = [name for index, name in enumerate(channel_names) if index not in chosen]
    if missing:
        raise ConfigurationError(f"--channels {text}: nothing is said of {', '.join(missing)}; {expected}")
    return TransferSettings(channels=tuple(chosen[index] for index in range(len(channel_names)))).channels


def _is_channel(entry: Any) -> bool:
    """Whether it is an entry of a channel map: a number, a name, or None."""
    if isinstance(entry, int) and not isinstance(entry, bool):
        return entry >= 0
    return entry is None or (isinstance(entry, str) and bool(entry.strip()))


def _check_choice(what: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigurationError(f"unknown {what} {_shown(value)}: {', '.join(choices)}")


def _shown(value: Any) -> str:
    """A value of a plan that somebody may have edited, in one short line."""
    return textwrap.shorten(repr(value), 100, placeholder=" …") if len(repr(value)) > 100 else repr(value)
