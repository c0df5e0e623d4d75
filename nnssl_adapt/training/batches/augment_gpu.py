"""The augmentation on the training device: workers only read, everything else happens where the network is.

What is drawn for a sample is the same as on the CPU, from the same seed; only the noise itself comes from the device's own
generator. Workers draw it, read the voxels that it takes, and send both. Two thirds of the patches are neither turned nor
scaled, and half of them are left alone altogether, so each sample gets what was drawn for it, one after the other: work that
a batch-wide mask would do for all of them to keep a third.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.batches.augment import (
    Augmentation,
    Drawn,
    SpatialRange,
    Target,
    finish,
    finish_stage,
    masked_channels,
    previous_codes,
    read_turned,
    turned_box,
)
from nnssl_adapt.training.batches.patches import Place
from nnssl_adapt.training.batches.reading import read_box
from nnssl_adapt.training.batches.spatial import Size, sample_into


@dataclass(frozen=True)
class Work:
    """What is left to do for a sample: what was drawn, and how voxels of the patch lie in what was read.

    ``matrix`` is 3×4 from voxels (Z, Y, X) of the patch to voxels read; None: what was read is the patch. ``read_size`` is
    the shape (Z, Y, X) of what was read.
    """

    drawn: Drawn
    matrix: np.ndarray | None
    patch_size: Size
    read_size: Size


@dataclass(frozen=True)
class DeviceReads:
    """Makes batches of what :class:`DeviceAugmentation` needs.

    Called with the places of a batch's samples, returns ``work``, a :class:`Work` of each. All else is one flat tensor of the
    whole batch, one sample after the other, so that each is pinned once and sent once: ``image`` float32 (C, Z, Y, X)
    and ``target`` label codes (Z, Y, X), both of the boxes that were read; of a cascade also ``previous``, label codes
    (Z, Y, X) of the previous stage in the patches.
    """

    labels: LabelScheme
    augmentation: Augmentation
    stage: tuple[int, ...] = ()

    def __call__(self, places: Sequence[Place]) -> dict[str, Any]:
        kind, channels = Target(self.labels).code_type, places[0].channels
        boxes, work = [], []
        for place in places:
            drawn = self.augmentation.draw(place.seed, place.channels)
            box, matrix = (place.patch_box, None) if drawn.matrix is None else turned_box(place, drawn)
            boxes.append(box)
            work.append(Work(drawn, matrix, place.patch_size, box.size))
        voxels = sum(math.prod(box.size) for box in boxes)
        images, codes = torch.empty(channels * voxels), torch.empty(voxels, dtype=kind)
        samples = zip(places, boxes, work, _parts(images, work, channels), _parts(codes, work), strict=True)
        for place, box, todo, image, code in samples:
            if todo.matrix is None:
                read_box(place, box, image, code[0], todo.drawn.mirrored)
            else:
                read_turned(place, box, image, code[0])
        batch = {"image": images, "target": codes, "work": work}
        if self.stage:
            previous = [previous_codes(place, each.drawn, kind) for place, each in zip(places, work, strict=True)]
            batch["previous"] = torch.stack(previous)
        return batch


def _parts(flat: Tensor, work: Sequence[Work], channels: int = 1) -> Iterator[Tensor]:
    """What was read of each sample (channels, Z, Y, X): views of a batch's flat tensor."""
    sizes = [channels * math.prod(todo.read_size) for todo in work]
    for part, todo in zip(flat.split(sizes), work, strict=True):
        yield part.view(channels, *todo.read_size)


class DeviceAugmentation:
    """Makes finished batches of what :class:`DeviceReads` read. ``image, target = augmentation(batch, device)``.

    The result is that of the CPU chain: ``image`` float32 (B, C, Z, Y, X), ``target`` (B, 1, Z, Y, X) int16 labels or
    (B, R, Z, Y, X) bool regions, on ``device``. It follows from the batch alone.

    Args:
        labels: what they mean.
        use_mask_for_norm: a flag for each channel: those channels are zero again outside the nonzero region.
        stage: labels of a cascade's previous stage.
    """

    def __init__(self, labels: LabelScheme, use_mask_for_norm: Sequence[bool], stage: Sequence[int] = ()) -> None:
        self.stage = tuple(stage)
        self.target = Target(labels)
        self.masked = masked_channels(use_mask_for_norm)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any], device: torch.device | str) -> tuple[Tensor, Tensor]:
        device = torch.device(device)
        work: list[Work] = batch["work"]
        sent = {name: part.to(device, non_blocking=True) for name, part in batch.items() if isinstance(part, Tensor)}
        channels = sent["image"].numel() // sent["target"].numel()
        images = list(_parts(sent["image"], work, channels))
        codes = [part[0] for part in _parts(sent["target"], work)]
        shape = (len(work), channels + len(self.stage), *work[0].patch_size)
        out = torch.empty(shape, device=device)
        target = torch.empty((len(work), self.target.channels, *shape[2:]), dtype=self.target.dtype, device=device)
        for index, todo in enumerate(work):
            image = out[index, :channels]
            if todo.matrix is None:
                image.copy_(images[index])
                patch = codes[index].clone()  # what follows changes it, and the batch is the caller's
            else:
                patch = codes[index].new_empty(todo.patch_size)
                sample_into(image, patch, images[index], codes[index], todo.matrix)
            finish(image, target[index], patch, todo.drawn, self.masked, self.target)
            if self.stage:
                finish_stage(out[index, channels:], sent["previous"][index], todo.drawn, self.stage)
        return out, target


def device_transforms(
    spatial: SpatialRange, mirror_axes: Sequence[int], labels: LabelScheme, stage: Sequence[int] = ()
) -> DeviceReads:
    """The workers' part of the training chain that goes on in :class:`DeviceAugmentation`."""
    return DeviceReads(labels, Augmentation(spatial, tuple(mirror_axes), len(stage)), tuple(stage))
