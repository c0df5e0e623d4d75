"""``dataset.json``, written: checked before it is, and whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.files import write_json


def write_dataset_json(
    folder: str | Path,
    channel_names: Sequence[str] | Mapping[Any, str],
    labels: Sequence[str] | Mapping[str, Any],
    num_training: int,
    file_ending: str = ".nii.gz",
    regions_class_order: Sequence[int] | None = None,
    **more: Any,
) -> Path:
    """Write ``folder/dataset.json`` and return its path.

    Args:
        folder: the raw dataset's.
        channel_names: in order, e.g. ``["T1w"]``, or channel number → name.
        labels: names in order of their values, the background (0) first; or name → value, or list of values for a region.
        num_training: how many training cases there are.
        file_ending: of images and labels.
        regions_class_order: needed with regions, see nnU-Net.
        more: further entries (``description``, ``licence``, ``image_orientation``, …), kept as they are.

    Raises:
        DatasetJsonError: the content is not what nnU-Net accepts.
        OutputError: the file can't be written.
    """
    path = Path(folder) / "dataset.json"
    channels = channel_names if isinstance(channel_names, Mapping) else dict(enumerate(channel_names))
    values = labels if isinstance(labels, Mapping) else {name: value for value, name in enumerate(labels)}
    content: dict[str, Any] = {
        "channel_names": {str(number): name for number, name in channels.items()},
        "labels": {name: list(v) if isinstance(v, (list, tuple)) else int(v) for name, v in values.items()},
        "numTraining": num_training,
        "file_ending": file_ending,
    }
    if regions_class_order is not None:
        content["regions_class_order"] = [int(value) for value in regions_class_order]
    content.update(more)
    DatasetJson.from_content(content, path)
    write_json(path, content)
    return path
