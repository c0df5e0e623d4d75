"""Outputs of several models paired by the names of their labels or regions: position says nothing across models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.names import pair_labels
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.text import and_more


def order_of_heads(
    ours: LabelScheme, our_file: str | Path, theirs: LabelScheme, their_file: str | Path
) -> tuple[int, ...]:
    """For each of our outputs the number of their output with the same name (case and separators do not matter).

    Args:
        ours: what the outputs mean that are wanted.
        our_file: the dataset.json that says so, for messages.
        theirs: what the outputs of the other model mean.
        their_file: likewise.

    Raises:
        ConfigurationError: one has labels and the other regions, or a name has no counterpart; both files are named.
    """
    if ours.has_regions != theirs.has_regions:
        kinds = ("regions", "labels") if theirs.has_regions else ("labels", "regions")
        raise ConfigurationError(f"{their_file} has {kinds[0]} and {our_file} {kinds[1]}: they can't be averaged")
    origin = pair_labels(ours.head_names, theirs.head_names)
    missing = [name for name, source in zip(ours.head_names, origin, strict=True) if source is None]
    extra = [name for number, name in enumerate(theirs.head_names) if number not in origin]
    if missing or extra:
        said = "; ".join(
            f"only {file} has {and_more(names)}" for file, names in ((our_file, missing), (their_file, extra)) if names
        )
        raise ConfigurationError(
            f"{their_file} has other labels than {our_file}: {said}. Outputs are paired by name: give the same label the same "
            "name in both",
            path=their_file,
        )
    return tuple(number for number in origin if number is not None)


def is_identity(order: Sequence[int]) -> bool:
    """Whether outputs are in our order already."""
    return list(order) == list(range(len(order)))
