"""Where the sums over tiles are kept: on the GPU if they fit, in half precision if that makes them fit, else in main memory."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from nnssl_adapt.inference.tile_batches import free_memory

_SHARE_FOR_SUMS = 0.75
"""Of the memory that a GPU has free, what may go to an image and its logits; the network needs the rest."""


Tiles = Generator[tuple[int, int], None, Tensor]
"""Work that stops after each tile, so that its driver can do something else: yields the number of tiles that are done and
the number there are, and returns logits (K, Z, Y, X)."""


@dataclass(frozen=True)
class SumsPlace:
    """Where sums are kept, and in which type."""

    device: torch.device
    dtype: torch.dtype


def sums_places(
    device: torch.device, dtype: torch.dtype, num_heads: int, image: Tensor, copies: int = 1
) -> list[SumsPlace]:
    """The places that are worth a try, the best first; the last one is main memory.

    By what a CUDA device has free; another one does not say, and is tried.

    Args:
        device: of the network.
        dtype: that is wanted of the sums.
        num_heads: outputs of the network.
        image: (C, Z, Y, X).
        copies: how many such sums are on the device at a time.
    """
    main_memory = SumsPlace(torch.device("cpu"), dtype)
    if device.type == "cpu":
        return [main_memory]
    types = [dtype, torch.float16] if dtype == torch.float32 else [dtype]
    places = [SumsPlace(device, each) for each in types if _has_room(device, each, num_heads, image, copies)]
    return [*places, main_memory]


def _has_room(device: torch.device, dtype: torch.dtype, num_heads: int, image: Tensor, copies: int) -> bool:
    if device.type != "cuda":
        return dtype != torch.float16
    needed = (copies * num_heads + 1) * image[0].numel() * dtype.itemsize + image.numel() * image.element_size()
    return needed < _SHARE_FOR_SUMS * free_memory(device)


def sum_of(total: Tensor | None, logits: Tensor) -> Tensor:
    """The sum of both (changes ``total``), where both are: in main memory, if one of them had no room elsewhere."""
    if total is None:
        return logits
    if total.device != logits.device:
        total, logits = total.cpu(), logits.cpu()
    return total.float().add_(logits) if total.dtype != logits.dtype else total.add_(logits)


def part_of(tiles: Tiles, index: int, parts: int) -> Tiles:
    """Tiles of one of several networks, counted as those of all."""
    with closing(tiles):
        while True:
            try:
                done, total = next(tiles)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits
            yield index * total + done, parts * total
