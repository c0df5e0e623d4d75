"""Networks with one stem a dataset (nnssl's MultiTalent): which stem to take.

Their encoders have ``encoder.stem.<id>.convs.0…`` where others have ``encoder.stem.convs.0…``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nnssl_adapt.errors import ConfigurationError

MEAN = "mean"
"""The stem that is the average of all that have the same shapes."""

_STEM = re.compile(r"(?P<stem>(?:.+\.)?stem)\.(?P<id>[^.]+)\.(?P<rest>convs\..+)")


def choose_stem(tensors: Mapping[str, Tensor], stem: str | None, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors with one stem under the name that a network with a single stem has, and notes.

    Args:
        tensors: of the checkpoint; returned as they are when they have a single stem.
        stem: the dataset's id, or ``mean``; None is the mean of all stems of one shape. Averages are taken in float32.
        where: the file, for the message.

    The other stems stay under their own names. Raises ConfigurationError for an unknown id, or where there is nothing to
    choose.
    """
    stems = stems_of(tensors)
    if not stems:
        if stem is not None:
            raise ConfigurationError(f"{where} has a single stem: leave out the choice of {stem!r} (--stem)")
        return dict(tensors), []
    if stem is None or stem == MEAN:
        chosen, others = _alike(tensors, stems)
    elif stem in stems:
        chosen, others = [stem], [other for other in stems if other != stem]
    else:
        raise ConfigurationError(
            f"{where} has no stem {stem!r}; it has {', '.join(stems)} (or {MEAN}): choose with --stem ID"
        )
    result = {name: tensor for name, tensor in tensors.items() if _id_of(name) not in chosen}
    result |= _merged(tensors, stems, chosen)
    return result, [_note(chosen, others, asked=stem is not None)]


def stems_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Dataset's id → {the name in a network with a single stem: the name in the file}."""
    stems: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _STEM.fullmatch(name)
        if match and match["id"] != "convs":
            stems.setdefault(match["id"], {})[f"{match['stem']}.{match['rest']}"] = name
    return stems


def is_other_stem(name: str) -> bool:
    """Whether a tensor belongs to one dataset's stem among several."""
    return _id_of(name) is not None


def _id_of(name: str) -> str | None:
    match = _STEM.fullmatch(name)
    return match["id"] if match and match["id"] != "convs" else None


def _alike(tensors: Mapping[str, Tensor], stems: Mapping[str, dict[str, str]]) -> tuple[list[str], list[str]]:
    """The largest group of stems with the same names and shapes (the first of equals), and the others."""
    groups: dict[object, list[str]] = {}
    for stem, names in stems.items():
        signature = tuple(sorted((short, tuple(tensors[name].shape)) for short, name in names.items()))
        groups.setdefault(signature, []).append(stem)
    chosen = max(groups.values(), key=len)
    return chosen, [stem for stem in stems if stem not in chosen]


def _merged(
    tensors: Mapping[str, Tensor], stems: Mapping[str, dict[str, str]], chosen: Sequence[str]
) -> dict[str, Tensor]:
    """The chosen stems' average under the plain names; a tensor with two names stays one tensor."""
    known: dict[tuple[int, ...], Tensor] = {}
    merged: dict[str, Tensor] = {}
    for short in stems[chosen[0]]:
        members = [tensors[stems[stem][short]] for stem in chosen]
        if len(members) == 1 or not members[0].is_floating_point():
            merged[short] = members[0]
            continue
        # The very same memory and shape is the same tensor under a second name. (On the meta device nothing has memory.)
        key = tuple(member.data_ptr() for member in members) + tuple(members[0].shape)
        if key not in known or members[0].is_meta:
            known[key] = torch.stack([member.float() for member in members]).mean(dim=0)
        merged[short] = known[key]
    return merged


def _note(chosen: Sequence[str], others: Sequence[str], asked: bool) -> str:
    left = f"; left out: {', '.join(others)}" if others else ""
    if len(chosen) > 1:
        how = "" if asked else " (choose one with --stem ID)"
        return f"it has one stem a dataset: took the mean of {', '.join(chosen)}{how}{left}"
    return f"it has one stem a dataset: took that of {chosen[0]}{left}"
