"""How many tiles go through a network together on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

_MOST_TILES = 8
"""A tile with all its mirrored copies."""

_MOST_ELEMENTS = 2**31 - 1
"""Of a tensor on a GPU: many kernels count in 32 bits, and larger tensors take slower ways or none."""

_SHARE_FOR_TILES = 0.5
"""Of the memory that a GPU has free, what a batch of tiles may take by a rough count."""


@dataclass
class TileBatch:
    """How many tiles go through the network together. Halved after the memory was too small, for later images too."""

    size: int


_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], TileBatch]] = WeakKeyDictionary()
"""What has worked for a network so far, by device, patch and outputs."""


def tile_batch(network: nn.Module, num_heads: int, patch_size: Sequence[int], device: torch.device) -> TileBatch:
    """The batch of a network: one tile on a CPU, on a GPU what :func:`tiles_at_once` says and has worked since."""
    if device.type != "cuda":
        return TileBatch(1)
    known = _KNOWN.setdefault(network, {})
    key = (device, tuple(patch_size), num_heads)
    if key not in known:
        known[key] = TileBatch(tiles_at_once(patch_size, num_heads, widest_features(network), free_memory(device)))
    return known[key]


def widest_features(network: nn.Module) -> int:
    """Channels of the widest tensor of a U-Net at full resolution: its first features beside those from below.

    0 where the first convolution leaves full resolution, as a transformer's does.
    """
    first = next((module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))), None)
    return 0 if first is None or max(first.stride) > 1 else 2 * first.out_channels


def tiles_at_once(patch_size: Sequence[int], num_heads: int, features: int, free: int) -> int:
    """How many tiles go through a network on a GPU together: 1, 2, 4 or 8.

    No tensor gets more than 2³¹ − 1 elements. What is alive at a time fits into half of the free memory by a rough count:
    three tensors of ``features`` channels in half precision; the outputs in half precision, in float32 and mirrored back.

    Args:
        patch_size: voxels (Z, Y, X).
        num_heads: the network's outputs.
        features: channels of the widest tensor at full resolution.
        free: bytes.
    """
    voxels = math.prod(patch_size)

    def fits(tiles: int) -> bool:
        elements = tiles * voxels * max(num_heads, features)
        size = tiles * voxels * (3 * 2 * features + (2 + 4 + 4) * num_heads)
        return elements <= _MOST_ELEMENTS and size <= _SHARE_FOR_TILES * free

    tiles = _MOST_TILES
    while tiles > 1 and not fits(tiles):
        tiles //= 2
    return tiles


def free_memory(device: torch.device) -> int:
    """Bytes that a CUDA device has free, those that torch keeps for later included."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
