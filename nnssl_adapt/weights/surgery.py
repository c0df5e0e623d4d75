"""Fitting one tensor to another network: pure functions, tensor in, new tensor out, the input never changed.

Axis order of weights: convolutions (out, in, Z, Y, X), tokens (1, N, C). Token order is the order in which a
transformer flattens its grid: ``whd`` takes the grid's axes as they are, last axis fastest; ``hwd`` exchanges the first
two before flattening, as nnssl's masked autoencoders do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Grid = tuple[int, int, int]

TOKEN_ORDERS = ("whd", "hwd")


def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Make an input convolution (out, in, Z, Y, X) take another number of channels.

    Channel ``i`` of the new kernel is channel ``i mod in`` of the old one, scaled so that what an old channel did is
    shared among its copies: copies of one image through the new stem give what the image (in the first channel, cycled)
    gave through the old. Fewer channels: the kernels of all old channels are averaged into the new ones and scaled to keep
    their sum, so that an image that used to be given in every channel still gives the same.

    Sums are taken in float32 (or better); the result has the input's dtype.
    """
    old = weight.shape[1]
    if channels < 1:
        raise ValueError(f"a network needs at least one input channel, not {channels}")
    if channels == old:
        return weight.clone()
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if channels < old:
        adapted = exact.sum(dim=1, keepdim=True).expand(-1, channels, *weight.shape[2:]) / channels
    else:
        origin = torch.arange(channels, device=weight.device) % old
        copies = torch.bincount(origin, minlength=old).to(exact.dtype)
        scale = (1 / copies)[origin].reshape(1, channels, *([1] * (weight.ndim - 2)))
        adapted = exact[:, origin] * scale
    return adapted.to(weight.dtype)


def resample_positions(
    tokens: Tensor,
    source_grid: Grid,
    target_grid: Grid,
    source_order: str = "whd",
    target_order: str = "whd",
) -> Tensor:
    """Carry a learned positional embedding (1, N, C) to another grid and token order.

    The source is read on its own grid (in its own order), interpolated trilinearly there if the grids differ, and
    flattened in the target's order. Interpolating tokens in the wrong order would mix two axes, hence one function.
    Computed in float32 or better; the result has the input's dtype and shape (1, M, C).
    """
    if tokens.ndim != 3 or tokens.shape[0] != 1 or tokens.shape[1] != math.prod(source_grid):
        raise ValueError(f"positions of shape {tuple(tokens.shape)} don't fill a grid of {source_grid}")
    volume = _to_volume(tokens, source_grid, source_order)
    if target_grid != source_grid:
        exact = volume.to(torch.promote_types(volume.dtype, torch.float32))
        volume = interpolate(exact, size=target_grid, mode="trilinear", align_corners=False)
    return _to_tokens(volume, target_order).to(tokens.dtype)


def _to_volume(tokens: Tensor, grid: Grid, order: str) -> Tensor:
    """(1, N, C) → (1, C, *grid)."""
    channels = tokens.shape[-1]
    if _check_order(order) == "hwd":
        flat = tokens.reshape(1, grid[1], grid[0], grid[2], channels).transpose(1, 2)
    else:
        flat = tokens.reshape(1, *grid, channels)
    return flat.permute(0, 4, 1, 2, 3)


def _to_tokens(volume: Tensor, order: str) -> Tensor:
    """(1, C, *grid) → (1, N, C)."""
    flat = volume.permute(0, 2, 3, 4, 1)
    if _check_order(order) == "hwd":
        flat = flat.transpose(1, 2)
    return flat.reshape(1, -1, volume.shape[1])


def _check_order(order: str) -> str:
    if order not in TOKEN_ORDERS:
        raise ValueError(f"unknown token order {order!r}: {' or '.join(TOKEN_ORDERS)}")
    return order


def swap_rotary_axes(weight: Tensor, heads: int) -> Tensor:
    """Exchange the first two axes of the rotary positions in a query or key projection (weight or bias).

    Rows (heads · width, …): each head's rows are three equal parts, one rotated by the position along each axis of
    the grid. Exchanging the first two parts of query and key alike makes them attend as if the axes' positions had been
    exchanged, exactly: the scores are sums over rows, in which order does not matter.
    """
    rows = weight.shape[0]
    width = rows // heads
    if rows % heads or width % 3:
        raise ValueError(f"{rows} rows are not {heads} heads of three equal parts")
    third = width // 3
    order = torch.cat(
        [torch.arange(third, 2 * third), torch.arange(third), torch.arange(2 * third, width)],
    ).to(weight.device)
    return weight.reshape(heads, width, *weight.shape[1:])[:, order].reshape(weight.shape).clone()


def find_token_grid(tokens: int, candidates: Iterable[Grid | None]) -> Grid | None:
    """The grid that a number of tokens fills: the first candidate that fits, else a cube, else None."""
    for grid in candidates:
        if grid is not None and math.prod(grid) == tokens:
            return grid
    side = round(tokens ** (1 / 3))
    return (side, side, side) if side**3 == tokens else None


def drop_prefix_tokens(tokens: Tensor, count: int) -> Tensor:
    """Positions (1, N, C) without those of leading class or register tokens, which a segmentation network has not."""
    return tokens[:, count:]


def same_values(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal in shape and every value (one storage under several names is, without a look)."""
    first = tensors[0]
    return all(_is_same_memory(first, other) or torch.equal(first, other) for other in tensors[1:])


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
