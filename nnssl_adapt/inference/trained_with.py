"""The channels and labels that a checkpoint was trained with, which must have the order of those beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.names import pair_channels, pair_labels
from nnssl_adapt.errors import DatasetJsonError


def trained_with(checkpoint: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Channel names in order, and what a label scheme is read from, of a checkpoint's content; empty where it does not say.

    nnU-Net keeps the training's dataset.json (``init_args``), we the run's identity.
    """
    ours, theirs = checkpoint.get("nnssl_adapt"), checkpoint.get("init_args")
    identity = ours.get("identity") if isinstance(ours, Mapping) else None
    dataset = theirs.get("dataset_json") if isinstance(theirs, Mapping) else None
    if isinstance(identity, Mapping):
        names = identity.get("channels")
        channels = tuple(names) if isinstance(names, (list, tuple)) else ()
        content: Mapping[str, Any] = identity
    elif isinstance(dataset, Mapping):
        content = dataset
        try:
            channels = tuple(DatasetJson.from_content(dict(dataset)).channel_names.values())
        except DatasetJsonError:
            return (), {}
    else:
        return (), {}
    known = {key: content[key] for key in ("labels", "regions_class_order") if content.get(key) is not None}
    return tuple(str(name) for name in channels), known


def other_order(
    dataset: DatasetJson, channels: Sequence[str], labels: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """What has the same names as in ``dataset`` in another order: ``channels`` or ``labels``, the order then, and now.

    Names that are found on one side only are no reason: people give their channels and labels better names.
    """
    now = tuple(dataset.channel_names.values())
    if _is_other(pair_channels(now, channels)):
        yield "channels", ", ".join(channels), ", ".join(now)
    try:
        then = LabelScheme.from_dataset_json(labels)
    except DatasetJsonError:  # the checkpoint does not say
        return
    current = LabelScheme.from_dataset_json(dataset.raw)
    if then.has_regions == current.has_regions and _is_other(pair_labels(current.head_names, then.head_names)):
        yield ("regions" if then.has_regions else "labels"), ", ".join(then.head_names), ", ".join(current.head_names)


def _is_other(origin: Sequence[int | None]) -> bool:
    return any(source not in (None, number) for number, source in enumerate(origin))
