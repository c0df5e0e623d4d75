"""Segmentation heads: which of a supervised network's outputs another network can take over, by their names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnssl_adapt.weights.network import tensor_ops
from nnssl_adapt.weights.transfer.rules import Fitted, times

BACKGROUND = "background"


class HeadsDiffer(Exception):
    """No head can be taken over; the message says why."""


def match_heads(trained: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """For each of the network's heads the number of the pre-trained one with the same name, None where there is none.

    Case does not matter. Labels (the first of which is the background, each voxel having one) and regions (without
    background, each voxel having any) have other activations, so that heads of one can't serve the other.
    Raises HeadsDiffer.
    """
    if not trained:
        raise HeadsDiffer("what the checkpoint's heads stand for is not known")
    if not wanted:
        raise HeadsDiffer("what the network's heads stand for is not known")
    here, there = [_plain(name) for name in wanted], [_plain(name) for name in trained]
    if (BACKGROUND in here) != (BACKGROUND in there):
        kinds = ("labels", "regions") if BACKGROUND in here else ("regions", "labels")
        raise HeadsDiffer(f"the network predicts {kinds[0]}, the checkpoint {kinds[1]}")
    origin = [there.index(name) if name in there else None for name in here]
    if all(source is None for name, source in zip(here, origin, strict=True) if name != BACKGROUND):
        raise HeadsDiffer(
            f"no label name agrees ({_foreground(wanted)} here, {_foreground(trained)} in the checkpoint)"
        )
    return origin


def _foreground(names: Sequence[str]) -> str:
    """``liver, spleen``; of many the first three and how many more."""
    shown = [name for name in names if _plain(name) != BACKGROUND]
    return ", ".join(shown) if len(shown) <= 4 else f"{', '.join(shown[:3])} and {len(shown) - 3} more"


def _plain(name: str) -> str:
    return name.strip().casefold()


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
