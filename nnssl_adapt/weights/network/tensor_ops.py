"""Fitting one tensor to another network: pure functions, tensor in, new tensor out, the input never changed.

Axis order of weights: convolutions (out, in, Z, Y, X), tokens (1, N, C). Token order is the order in which a
transformer flattens its grid: ``whd`` takes the grid's axes as they are, last axis fastest; ``hwd`` exchanges the first
two before flattening, as nnssl's masked autoencoders do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

Grid = tuple[int, int, int]

TOKEN_ORDERS = ("whd", "hwd")


def adapt_input_channels(weight: Tensor, channels: int, rule: str = "repeat") -> Tensor:
    """Return an input convolution (out, in, Z, Y, X) that takes another number of channels.

    Args:
        channels: how many the new one takes.
        rule: ``repeat``: channel ``i`` of the new kernel is channel ``i mod in`` of the old one, scaled so that what an old
            channel did is shared among its copies: copies of one image (the channels, cycled) give what they gave before.
            Fewer channels: as ``mean``. ``mean``: every channel gets the sum of all old kernels divided by ``channels``, so
            that an image given in every channel does the same as before. ``zero``: the leading channels as they are, new
            ones zero, and what is too many is left out.
    """
    old = weight.shape[1]
    if channels < 1:
        raise ValueError(f"a network needs at least one input channel, not {channels}")
    if rule == "zero":
        kept = min(old, channels)
        return torch.cat(
            [weight[:, :kept], weight.new_zeros(weight.shape[0], channels - kept, *weight.shape[2:])], dim=1
        )
    if rule == "repeat" and channels >= old:
        return map_input_channels(weight, [index % old for index in range(channels)])
    if rule not in ("repeat", "mean"):
        raise ValueError(f"unknown channel rule {rule!r}")
    summed = _exactly(weight).sum(dim=1, keepdim=True)
    return summed.expand(-1, channels, *weight.shape[2:]) / channels


def map_input_channels(weight: Tensor, chosen: Sequence[int | None]) -> Tensor:
    """Return an input convolution (out, len(chosen), Z, Y, X) whose channels are the chosen ones of the old one.

    A channel that is chosen several times is divided among its copies; None gives a kernel of zeros.
    """
    origin = [-1 if channel is None else channel for channel in chosen]
    if max(origin) >= weight.shape[1] or min(origin) < -1:
        raise ValueError(f"channels {list(chosen)} of a kernel with {weight.shape[1]} channels")
    scale = [0.0 if channel < 0 else 1 / origin.count(channel) for channel in origin]
    exact = _exactly(weight)[:, [max(channel, 0) for channel in origin]]
    factors = torch.tensor(scale, dtype=exact.dtype, device=weight.device)
    return exact * factors.reshape(1, -1, *([1] * (weight.ndim - 2)))


def _exactly(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# -- kernels ---------------------------------------------------------------------------------------------------------


def resize_kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Return a convolution's kernel (out, in, Z, Y, X) with other widths ``size`` (Z, Y, X).

    An axis grows by zeros around the kernel, its middle staying the middle as dynamic_network_architectures pads
    ((width - 1) // 2 voxels before): the convolution computes what it did. It shrinks by averaging over area with the sum
    kept: on images that don't change along that axis it computes what it did.
    """
    for axis, new in enumerate(size, start=2):
        old = weight.shape[axis]
        if new > old:
            before = (new - 1) // 2 - (old - 1) // 2
            padding = [0, 0] * (weight.ndim - 1 - axis) + [before, new - old - before]
            weight = pad(weight, padding)
        elif new < old:
            weight = _along(weight, axis, _area(old, new) * (old / new))
    return weight.clone()


def resize_patch_embedding(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Return a patch embedding (out, in, Z, Y, X), a convolution with steps as wide as its kernel, for another patch size.

    The kernel that gives for a resized patch the token that the old one gave for the patch itself, as close as least
    squares come: with patches up-sampled linearly exactly; smaller ones stand for themselves with every voxel repeated.
    (Resizing by the pseudo-inverse is due to FlexiViT, arXiv 2212.08013.)
    """
    for axis, new in enumerate(size, start=2):
        old = weight.shape[axis]
        if new != old:
            resizing = _linear(old, new) if new > old else _area(old, new)
            weight = _along(weight, axis, torch.linalg.pinv(resizing.T))
    return weight.clone()


def resize_upsampling(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Return a transposed convolution (in, out, Z, Y, X), whose steps are as wide as its kernel, for another step.

    Every voxel is painted as a block. A larger block is the old one with its voxels repeated, a smaller one its average
    over area: either way the output is the old one resized by area.
    """
    for axis, new in enumerate(size, start=2):
        if new != weight.shape[axis]:
            weight = _along(weight, axis, _area(weight.shape[axis], new))
    return weight.clone()


def _along(weight: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Every line of the tensor along ``axis`` multiplied by a matrix (new, old), in float64."""
    lines = weight.to(torch.float64).movedim(axis, -1)
    result = (lines @ matrix.to(weight.device).T).movedim(-1, axis)
    return result.to(torch.promote_types(weight.dtype, torch.float32))


def _area(old: int, new: int) -> Tensor:
    """Matrix (new, old) that resizes a line by averaging over area: each row is one new cell's shares of the old ones."""
    starts, ends = torch.arange(new, dtype=torch.float64), torch.arange(1, new + 1, dtype=torch.float64)
    step = old / new
    cells = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(ends[:, None] * step, cells + 1) - torch.maximum(starts[:, None] * step, cells)
    return overlap.clamp(min=0) / step


def _linear(old: int, new: int) -> Tensor:
    """Matrix (new, old) that resizes a line linearly."""
    lines = torch.eye(old, dtype=torch.float64)[None]
    return interpolate(lines, size=new, mode="linear", align_corners=False)[0].T


# -- widths ----------------------------------------------------------------------------------------------------------


def copy_leading(
    value: Tensor, into: Tensor, out_axis: int = 0, in_axis: int | None = 1, parts: tuple[int, int] = (1, 1)
) -> Tensor:
    """Return ``into`` with the leading features replaced by those of ``value``, as far as both have them.

    Args:
        value: trained weights; ``into``: those of a wider or narrower network.
        out_axis: axis of the features computed. Further ones stay as ``into`` has them.
        in_axis: axis of the features used, None where there is none (a bias). What the leading features get from further
            ones is zero, so that they compute exactly what they did.
        parts: how many inputs of equal width are joined along ``in_axis`` in ``value`` and in ``into`` (two in a U-Net's
            decoder); each part's features lead within it.
    """
    result = into.clone()
    out = min(value.shape[out_axis], into.shape[out_axis])
    rows, trained = result.narrow(out_axis, 0, out), value.narrow(out_axis, 0, out)
    if in_axis is None:
        rows.copy_(trained)
        return result
    rows.zero_()
    old, new = value.shape[in_axis] // parts[0], into.shape[in_axis] // parts[1]
    width = min(old, new)
    for part in range(min(parts)):
        rows.narrow(in_axis, part * new, width).copy_(trained.narrow(in_axis, part * old, width))
    return result


def copy_rows(value: Tensor, into: Tensor, origin: Sequence[int | None], axis: int = 0) -> Tensor:
    """Return ``into`` with place ``i`` along ``axis`` taken from place ``origin[i]`` of ``value``, left alone where None."""
    result = into.clone()
    for place, source in enumerate(origin):
        if source is not None:
            result.select(axis, place).copy_(value.select(axis, source))
    return result


# -- tokens ----------------------------------------------------------------------------------------------------------


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
    The result is (1, M, C).
    """
    if tokens.ndim != 3 or tokens.shape[0] != 1 or tokens.shape[1] != math.prod(source_grid):
        raise ValueError(f"positions of shape {tuple(tokens.shape)} don't fill a grid of {source_grid}")
    volume = _to_volume(tokens, source_grid, source_order)
    if target_grid != source_grid:
        volume = interpolate(_exactly(volume), size=target_grid, mode="trilinear", align_corners=False)
    return _to_tokens(volume, target_order)


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


def drop_prefix_tokens(tokens: Tensor, count: int) -> Tensor:
    """Positions (1, N, C) without those of leading class or register tokens, which a segmentation network does not have."""
    return tokens[:, count:]


def same_values(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal in shape and every value (one storage under several names is, without a look)."""
    first = tensors[0]
    return all(_is_same_memory(first, other) or torch.equal(first, other) for other in tensors[1:])


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
