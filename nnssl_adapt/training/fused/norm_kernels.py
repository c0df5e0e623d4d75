"""Triton kernels of instance normalisation with what follows it, on memory with channels last. Import it where Triton is.

All work on rows: a tensor (samples, voxels, channels), contiguous, so that a block of neighbouring voxels and channels is
read as it lies. Sums over voxels are made in two steps without atomics: the same numbers give the same result every time.
"""

# No `from __future__ import annotations` here: Triton looks at the annotations themselves.
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048
"""Numbers that a program has in work at once."""

_WIDEST = 64
"""Channels of a tile."""

_TILES_OF_A_CHUNK = 8
_MOST_CHUNKS = 512
"""Partial sums of a sample: enough to keep every multiprocessor busy, few enough to be added up by one program."""

_CHUNKS_AT_ONCE = 64


@triton.jit
def _chunk_moments(
    x,
    means,
    squares,
    voxels,
    channels,
    per_chunk,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean, and sum of squares around it, of each channel of a chunk of voxels."""
    chunk, sample = tl.program_id(0), tl.program_id(2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, voxels)
    base = x + sample.to(tl.int64) * voxels * channels
    rows = first + tl.arange(0, ROWS)
    mask = (rows < last)[:, None] & inside[None, :]
    tile = tl.load(base + rows.to(tl.int64)[:, None] * channels + columns[None, :], mask=mask, other=0).to(ACC)
    # Around the mean of the first tile: the sum of squares loses no digits where a channel's mean is large.
    shift = tl.sum(tile, 0) / tl.minimum(last - first, ROWS).to(ACC)
    total = tl.zeros((ROWS, COLUMNS), dtype=ACC)
    square = tl.zeros((ROWS, COLUMNS), dtype=ACC)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < last)[:, None] & inside[None, :]
        tile = tl.load(base + rows.to(tl.int64)[:, None] * channels + columns[None, :], mask=mask, other=0).to(ACC)
        off = tl.where(mask, tile - shift[None, :], 0.0)
        total += off
        square += off * off
    off = tl.sum(total, 0)
    count = (last - first).to(ACC)
    place = (sample * tl.num_programs(0) + chunk) * channels + columns
    tl.store(means + place, shift + off / count, mask=inside)
    tl.store(squares + place, tl.sum(square, 0) - off * off / count, mask=inside)


@triton.jit
def _joined_moments(
    means,
    squares,
    mean,
    scale,
    voxels,
    channels,
    per_chunk,
    chunks,
    eps,
    ACC: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean and 1 / standard deviation of each channel of a sample, of those of its chunks (Chan's rule)."""
    sample = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    total = tl.zeros((CHUNKS, COLUMNS), dtype=ACC)
    for start in range(0, chunks, CHUNKS):
        index = start + tl.arange(0, CHUNKS)
        mask = (index < chunks)[:, None] & inside[None, :]
        place = (sample * chunks + index)[:, None] * channels + columns[None, :]
        count = tl.minimum(voxels - index * per_chunk, per_chunk).to(ACC)[:, None]
        total += tl.load(means + place, mask=mask, other=0) * count
    middle = tl.sum(total, 0) / voxels
    square = tl.zeros((CHUNKS, COLUMNS), dtype=ACC)
    for start in range(0, chunks, CHUNKS):
        index = start + tl.arange(0, CHUNKS)
        mask = (index < chunks)[:, None] & inside[None, :]
        place = (sample * chunks + index)[:, None] * channels + columns[None, :]
        count = tl.minimum(voxels - index * per_chunk, per_chunk).to(ACC)[:, None]
        off = tl.load(means + place, mask=mask, other=0) - middle[None, :]
        square += tl.where(mask, tl.load(squares + place, mask=mask, other=0) + count * off * off, 0.0)
    variance = tl.maximum(tl.sum(square, 0) / voxels, 0.0)
    tl.store(mean + sample * channels + columns, middle, mask=inside)
    tl.store(scale + sample * channels + columns, 1.0 / tl.sqrt(variance + eps), mask=inside)


@triton.jit
def _of_channels(pointer, columns, inside, sample, channels, PRESENT: tl.constexpr, default, ACC: tl.constexpr):
    """A row (1, COLUMNS) with a number for each channel; of a sample, or the same for all (sample 0)."""
    if PRESENT:
        found = tl.load(pointer + sample * channels + columns, mask=inside, other=0).to(ACC)[None, :]
    else:
        found = (columns * 0).to(ACC)[None, :] + default
    return found


@triton.jit
def _normalised(
    x,
    mean,
    scale,
    weight,
    bias,
    residual,
    y,
    voxels,
    channels,
    slope,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (rows < voxels)[:, None] & inside[None, :]
    place = sample.to(tl.int64) * voxels * channels + rows.to(tl.int64)[:, None] * channels + columns[None, :]
    middle = _of_channels(mean, columns, inside, sample, channels, True, 0.0, ACC)
    spread = _of_channels(scale, columns, inside, sample, channels, True, 1.0, ACC)
    w = _of_channels(weight, columns, inside, 0, channels, AFFINE, 1.0, ACC)
    b = _of_channels(bias, columns, inside, 0, channels, AFFINE, 0.0, ACC)
    value = (tl.load(x + place, mask=mask, other=0).to(ACC) - middle) * (spread * w) + b
    if RESIDUAL:
        value += tl.load(residual + place, mask=mask, other=0).to(ACC)
    value = tl.where(value > 0, value, value * slope)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _before_activation(
    gradient,
    x,
    y,
    place,
    mask,
    middle,
    spread,
    w,
    b,
    slope,
    RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient before the activation, and the normalised input."""
    level = (tl.load(x + place, mask=mask, other=0).to(ACC) - middle) * spread
    if RESIDUAL:  # what was added is not here, but the result has the sign that decides
        positive = tl.load(y + place, mask=mask, other=0).to(ACC) > 0
    else:
        positive = level * w + b > 0
    found = tl.load(gradient + place, mask=mask, other=0).to(ACC)
    return tl.where(positive, found, found * slope), level


@triton.jit
def _chunk_gradients(
    gradient,
    x,
    y,
    mean,
    scale,
    weight,
    bias,
    plain,
    levelled,
    voxels,
    channels,
    per_chunk,
    slope,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over a chunk of voxels of the gradient before the activation, and of that times the normalised input."""
    chunk, sample = tl.program_id(0), tl.program_id(2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, voxels)
    middle = _of_channels(mean, columns, inside, sample, channels, True, 0.0, ACC)
    spread = _of_channels(scale, columns, inside, sample, channels, True, 1.0, ACC)
    w = _of_channels(weight, columns, inside, 0, channels, AFFINE, 1.0, ACC)
    b = _of_channels(bias, columns, inside, 0, channels, AFFINE, 0.0, ACC)
    total = tl.zeros((ROWS, COLUMNS), dtype=ACC)
    product = tl.zeros((ROWS, COLUMNS), dtype=ACC)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < last)[:, None] & inside[None, :]
        place = sample.to(tl.int64) * voxels * channels + rows.to(tl.int64)[:, None] * channels + columns[None, :]
        found, level = _before_activation(gradient, x, y, place, mask, middle, spread, w, b, slope, RESIDUAL, ACC)
        total += found  # 0 outside the mask, since the gradient is
        product += found * level
    place = (sample * tl.num_programs(0) + chunk) * channels + columns
    tl.store(plain + place, tl.sum(total, 0), mask=inside)
    tl.store(levelled + place, tl.sum(product, 0), mask=inside)


@triton.jit
def _joined_gradients(
    plain,
    levelled,
    total,
    product,
    of_weight,
    of_bias,
    samples,
    channels,
    chunks,
    AFFINE: tl.constexpr,
    ACC: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Those sums over all chunks of each sample; over all samples they are the gradients of bias and weight."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    all_plain = tl.zeros((COLUMNS,), dtype=ACC)
    all_levelled = tl.zeros((COLUMNS,), dtype=ACC)
    for sample in range(0, samples):
        one = tl.zeros((CHUNKS, COLUMNS), dtype=ACC)
        two = tl.zeros((CHUNKS, COLUMNS), dtype=ACC)
        for start in range(0, chunks, CHUNKS):
            index = start + tl.arange(0, CHUNKS)
            mask = (index < chunks)[:, None] & inside[None, :]
            place = (sample * chunks + index)[:, None] * channels + columns[None, :]
            one += tl.load(plain + place, mask=mask, other=0)
            two += tl.load(levelled + place, mask=mask, other=0)
        tl.store(total + sample * channels + columns, tl.sum(one, 0), mask=inside)
        tl.store(product + sample * channels + columns, tl.sum(two, 0), mask=inside)
        all_plain += tl.sum(one, 0)
        all_levelled += tl.sum(two, 0)
    if AFFINE:
        tl.store(of_weight + columns, all_levelled.to(of_weight.dtype.element_ty), mask=inside)
        tl.store(of_bias + columns, all_plain.to(of_bias.dtype.element_ty), mask=inside)


@triton.jit
def _input_gradient(
    gradient,
    x,
    y,
    mean,
    scale,
    weight,
    bias,
    total,
    product,
    of_x,
    of_residual,
    voxels,
    channels,
    slope,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (rows < voxels)[:, None] & inside[None, :]
    place = sample.to(tl.int64) * voxels * channels + rows.to(tl.int64)[:, None] * channels + columns[None, :]
    middle = _of_channels(mean, columns, inside, sample, channels, True, 0.0, ACC)
    spread = _of_channels(scale, columns, inside, sample, channels, True, 1.0, ACC)
    w = _of_channels(weight, columns, inside, 0, channels, AFFINE, 1.0, ACC)
    b = _of_channels(bias, columns, inside, 0, channels, AFFINE, 0.0, ACC)
    found, level = _before_activation(gradient, x, y, place, mask, middle, spread, w, b, slope, RESIDUAL, ACC)
    all_plain = _of_channels(total, columns, inside, sample, channels, True, 0.0, ACC) / voxels
    all_levelled = _of_channels(product, columns, inside, sample, channels, True, 0.0, ACC) / voxels
    value = (found - all_plain - level * all_levelled) * (spread * w)
    tl.store(of_x + place, value.to(of_x.dtype.element_ty), mask=mask)
    if RESIDUAL:
        tl.store(of_residual + place, found.to(of_residual.dtype.element_ty), mask=mask)


# -- starting them -----------------------------------------------------------------------------------------------------


class _Grid:
    """How rows (B, V, C) are divided among programs."""

    def __init__(self, rows: Tensor) -> None:
        self.samples, self.voxels, self.channels = rows.shape
        self.columns = min(_WIDEST, triton.next_power_of_2(self.channels))
        self.rows = min(_TILE // self.columns, triton.next_power_of_2(self.voxels))
        self.groups = triton.cdiv(self.channels, self.columns)
        tiles = triton.cdiv(self.voxels, self.rows)
        wanted = max(1, min(_MOST_CHUNKS, triton.cdiv(tiles, _TILES_OF_A_CHUNK)))
        self.per_chunk = triton.cdiv(tiles, wanted) * self.rows
        self.chunks = triton.cdiv(self.voxels, self.per_chunk)  # none of them is empty
        self.of_chunks = self.chunks, self.groups, self.samples
        self.of_tiles = tiles, self.groups, self.samples
        self.at_once = min(_CHUNKS_AT_ONCE, triton.next_power_of_2(self.chunks))
        self.tile = {"ROWS": self.rows, "COLUMNS": self.columns}
        self.few = min(16, self.columns)


def on_its_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton starts kernels on the current device, wherever their tensors lie."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _exact(tensor: Tensor) -> tuple[torch.dtype, object]:
    """What sums are made in, as torch and Triton call it."""
    return (torch.float64, tl.float64) if tensor.dtype == torch.float64 else (torch.float32, tl.float32)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, slope: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, V, C) → the result of the same shape and type; mean and 1 / standard deviation (B, C) in float32 or float64."""
    grid, (kind, acc) = _Grid(x), _exact(x)
    means, squares = (x.new_empty((grid.samples, grid.chunks, grid.channels), dtype=kind) for _ in range(2))
    mean, scale = (x.new_empty((grid.samples, grid.channels), dtype=kind) for _ in range(2))
    y = torch.empty_like(x)
    sizes = grid.voxels, grid.channels
    with on_its_device(x):
        _chunk_moments[grid.of_chunks](x, means, squares, *sizes, grid.per_chunk, ACC=acc, **grid.tile)
        few = triton.cdiv(grid.channels, grid.few), grid.samples
        _joined_moments[few](
            *(means, squares, mean, scale, *sizes, grid.per_chunk, grid.chunks, eps),
            ACC=acc,
            CHUNKS=grid.at_once,
            COLUMNS=grid.few,
        )
        flags = {"AFFINE": weight is not None, "RESIDUAL": residual is not None, "ACC": acc}
        _normalised[grid.of_tiles](
            *(x, mean, scale, _or(weight, x), _or(bias, x), _or(residual, x), y, *sizes, slope), **flags, **grid.tile
        )
    return y, mean, scale


def backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and what was added; ``y`` is the result where something was added, else None."""
    grid, (kind, acc) = _Grid(x), _exact(x)
    plain, levelled = (x.new_empty((grid.samples, grid.chunks, grid.channels), dtype=kind) for _ in range(2))
    total, product = (x.new_empty((grid.samples, grid.channels), dtype=kind) for _ in range(2))
    of_x = torch.empty_like(x)
    of_weight = None if weight is None else torch.empty_like(weight)
    of_bias = None if bias is None else torch.empty_like(bias)
    of_residual = None if y is None else torch.empty_like(y)
    known = gradient, x, _or(y, x), mean, scale, _or(weight, x), _or(bias, x)
    sizes = grid.voxels, grid.channels
    flags = {"AFFINE": weight is not None, "RESIDUAL": y is not None, "ACC": acc}
    with on_its_device(x):
        _chunk_gradients[grid.of_chunks](*known, plain, levelled, *sizes, grid.per_chunk, slope, **flags, **grid.tile)
        _joined_gradients[(triton.cdiv(grid.channels, grid.few),)](
            *(plain, levelled, total, product, _or(of_weight, x), _or(of_bias, x)),
            *(grid.samples, grid.channels, grid.chunks),
            AFFINE=weight is not None,
            ACC=acc,
            CHUNKS=grid.at_once,
            COLUMNS=grid.few,
        )
        _input_gradient[grid.of_tiles](
            *(*known, total, product, of_x, _or(of_residual, x), *sizes, slope), **flags, **grid.tile
        )
    return of_x, of_weight, of_bias, of_residual


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's argument that it doesn't look at must still be a tensor."""
    return other if tensor is None else tensor
