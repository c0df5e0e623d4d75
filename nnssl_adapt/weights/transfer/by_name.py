"""What is paired by name: image channels, and the segmentation heads of supervised networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl_adapt.data.names import channel_key, label_key, pair_channels, pair_labels
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.weights.network import tensor_ops
from nnssl_adapt.weights.transfer.rules import Fitted, times
from nnssl_adapt.weights.transfer.settings import ChannelRule

BACKGROUND = "background"


# -- channels --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChannelPairing:
    """Which pre-training channel each channel of a network takes.

    Attributes:
        rule: the rule or map, without names.
        notes: one line a channel, where both sides have names.
        warnings: what was not paired by name although there are names.
    """

    rule: ChannelRule
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def pair_by_name(
    rule: str | Sequence[int | str | None], here: Sequence[str], there: Sequence[str], trained: int
) -> ChannelPairing:
    """Turn a choice of channels into numbers.

    Args:
        rule: ``auto``: by name where both sides have names, else ``repeat``; another rule, which is left as it is; or a map,
            in which names of pre-training channels become their numbers.
        here: names of the network's channels, in order; empty where they are not known.
        there: names of the pre-training's, in order; empty where they are not known.
        trained: how many channels the pre-training had.

    Raises ConfigurationError for a name in a map that no pre-training channel has.
    """
    if not isinstance(rule, str):
        numbers = tuple(_number_of(entry, there) if isinstance(entry, str) else entry for entry in rule)
        return ChannelPairing(numbers, _pairs_told(numbers, here, there))
    if rule != "auto":
        return _by_number(rule, here, there, trained)
    if not any(map(channel_key, here)) or not any(map(channel_key, there)):
        return ChannelPairing("repeat")
    origin = pair_channels(here, there)
    if all(source is None for source in origin):
        return _no_name_agrees(here, there)
    told = _pairs_told(origin, here, there)
    warnings = []
    if new := [name for name, source in zip(here, origin, strict=True) if source is None]:
        warnings.append(
            f"THE WEIGHTS HAVE NO CHANNEL {', '.join(new)} (they have {', '.join(there)}): it starts untrained. Say "
            f"--channels {new[0]}=NAME for every channel to take another one's kernel"
        )
    if unused := [name for index, name in enumerate(there) if index not in origin]:
        warnings.append(
            f"the dataset has no channel {', '.join(unused)}, with which the weights were trained: it is not used"
        )
    is_identity = origin == list(range(trained))
    return ChannelPairing("repeat" if is_identity else tuple(origin), told, tuple(warnings))


def _by_number(rule: str, here: Sequence[str], there: Sequence[str], trained: int) -> ChannelPairing:
    """A rule that somebody chose (or an older plan recorded): left as it is, but where names say another thing, it is told."""
    if rule == "mean" or len(here) != trained or len(there) != trained:
        return ChannelPairing(rule)
    numbers = tuple(range(trained))
    crossed = [
        f"{here[index]} takes the kernel of {there[index]}"
        for index, source in enumerate(pair_channels(here, there))
        if source not in (None, index)
    ]
    warnings = [f"CHANNELS ARE PAIRED BY NUMBER AGAINST THEIR NAMES ({rule}): {'; '.join(crossed)}"] if crossed else []
    return ChannelPairing(rule, _pairs_told(numbers, here, there), tuple(warnings))


def _no_name_agrees(here: Sequence[str], there: Sequence[str]) -> ChannelPairing:
    names = f"the dataset's {', '.join(here)}, the weights' {', '.join(there)}"
    if len(there) == 1:
        return ChannelPairing("repeat", (f"no channel has the same name on both sides: {names}",))
    return ChannelPairing(
        "repeat",
        warnings=(
            f"NO CHANNEL HAS THE SAME NAME ON BOTH SIDES ({names}): they are paired by number. Say which is which with "
            f"--channels, such as {here[0]}={there[0]}",
        ),
    )


def _number_of(name: str, there: Sequence[str]) -> int:
    found = pair_channels([name], there)[0]
    if found is None:
        known = ", ".join(there) if there else "without names: give their numbers, from 0"
        raise ConfigurationError(f"the weights have no channel {name!r}; their channels are {known}")
    return found


def _pairs_told(origin: Sequence[int | None], here: Sequence[str], there: Sequence[str]) -> tuple[str, ...]:
    if len(origin) != len(here) or not there or any(source is not None and source >= len(there) for source in origin):
        return ()
    return tuple(
        f"channel {name}: " + ("new" if source is None else f"that of the pre-training's {there[source]}")
        for name, source in zip(here, origin, strict=True)
    )


def origin_of_channels(rule: ChannelRule, trained: int, channels: int) -> list[int | None]:
    """For each channel of a network the pre-training channel whose kernel it takes; None where it takes none or a mixture."""
    if not isinstance(rule, str):
        return list(rule)
    if rule in ("auto", "repeat") and channels >= trained:
        return [index % trained for index in range(channels)]
    if rule == "zero":
        return [index if index < trained else None for index in range(channels)]
    return [0 if trained == 1 else None] * channels


# -- heads -----------------------------------------------------------------------------------------------------------


class HeadsDiffer(Exception):
    """No head can be taken over; the message says why."""


def match_heads(trained: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """For each of the network's heads the number of the pre-trained one with the same name, None where there is none.

    Case, separators and the order of words do not matter. Labels (the first of which is the background, each voxel having
    one) and regions (without background, each voxel having any) have other activations: heads of one can't serve the other.
    Raises HeadsDiffer.
    """
    if not trained:
        raise HeadsDiffer("what the checkpoint's heads stand for is not known")
    if not wanted:
        raise HeadsDiffer("what the network's heads stand for is not known")
    is_labels = [any(map(_is_background, names)) for names in (wanted, trained)]
    if is_labels[0] != is_labels[1]:
        kinds = ("labels", "regions") if is_labels[0] else ("regions", "labels")
        raise HeadsDiffer(f"the network predicts {kinds[0]}, the checkpoint {kinds[1]}")
    origin = pair_labels(wanted, trained)
    if all(source is None for name, source in zip(wanted, origin, strict=True) if not _is_background(name)):
        raise HeadsDiffer(
            f"no label name agrees ({_foreground(wanted)} here, {_foreground(trained)} in the checkpoint)"
        )
    return origin


def _foreground(names: Sequence[str]) -> str:
    """``liver, spleen``; of many the first three and how many more."""
    shown = [name for name in names if not _is_background(name)]
    return ", ".join(shown) if len(shown) <= 4 else f"{', '.join(shown[:3])} and {len(shown) - 3} more"


def _is_background(name: str) -> bool:
    return label_key(name) == (BACKGROUND,)


def fit_heads(
    value: Tensor, into: Tensor, trained: Sequence[str], wanted: Sequence[str], axis: int, in_axis: int | None
) -> Fitted:
    """The network's head (weight or bias) with those rows along ``axis`` taken over whose names agree.

    ``in_axis`` holds the features that it sees: of another width the leading ones are used, new ones with zeros.
    Raises HeadsDiffer.
    """
    for count, names, whose in (
        (value.shape[axis], trained, "checkpoint"),
        (into.shape[axis], wanted, "network"),
    ):
        if names and count != len(names):
            raise HeadsDiffer(f"the {whose} has {count} heads and {len(names)} names for them")
    origin = match_heads(trained, wanted)
    own = into.detach().to("cpu", torch.promote_types(value.dtype, into.dtype))
    others = [a for a in range(value.ndim) if a not in (axis, in_axis)]
    if value.ndim != into.ndim or any(value.shape[a] != into.shape[a] for a in others):
        raise HeadsDiffer(f"{times(value.shape)} in the checkpoint, {times(into.shape)} in the network")
    other_width = in_axis is not None and value.shape[in_axis] != into.shape[in_axis]
    if in_axis is not None and other_width:
        shape = [into.shape[a] if a == in_axis else n for a, n in enumerate(value.shape)]
        value = tensor_ops.copy_leading(value, own.new_zeros(shape), axis, in_axis)
    if not other_width and value.shape == into.shape and origin == list(range(len(wanted))):
        return Fitted(value)
    fresh = origin.count(None) * into.numel() // into.shape[axis]
    return Fitted(tensor_ops.copy_rows(value, own, origin, axis), (_told(wanted, origin),), fresh)


def _told(wanted: Sequence[str], origin: Sequence[int | None]) -> str:
    """``heads background, sc copied; lesion fresh``."""
    copied = [name for name, source in zip(wanted, origin, strict=True) if source is not None]
    fresh = [name for name, source in zip(wanted, origin, strict=True) if source is None]
    return f"heads {', '.join(copied)} copied" + (f"; {', '.join(fresh)} fresh" if fresh else "")
