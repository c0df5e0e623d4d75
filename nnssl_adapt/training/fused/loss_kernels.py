"""Triton kernels of the losses in one pass: each logit is read once forward, and once backward. Import it where Triton is.

They take logits (B, K, V) of any strides: channels may come first or last in memory. Sums over voxels are made in two steps
without atomics: the same numbers give the same result every time.
"""

# No `from __future__ import annotations` here: Triton looks at the annotations themselves.
import torch
import triton
import triton.language as tl
from torch import Tensor

from nnssl_adapt.training.fused.norm_kernels import on_its_device

_TILE = 4096
"""Numbers that a program has in work at once."""

_TILES_OF_A_CHUNK = 8
_MOST_CHUNKS = 1024


@triton.jit
def _places(sample, rows, columns, by_sample, by_class, by_voxel):
    row = sample.to(tl.int64) * by_sample + rows.to(tl.int64)[:, None] * by_voxel
    return row + columns.to(tl.int64)[None, :] * by_class


@triton.jit
def _log_sum(values):
    """Log of the sum of exponentials of each row (ROWS, 1)."""
    top = tl.max(values, 1)[:, None]
    return top + tl.log(tl.sum(tl.exp(values - top), 1))[:, None]


@triton.jit
def _label_sums(
    logits,
    labels,
    entropies,
    sums,
    voxels,
    classes,
    by_sample,
    by_class,
    by_voxel,
    per_chunk,
    ignored,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of a chunk of voxels: summed cross-entropy, and of each class what is shared, predicted and true."""
    chunk, sample = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, voxels)
    entropy = tl.zeros((ROWS,), dtype=tl.float32)
    shared = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    predicted = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    true = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < last)[:, None] & (columns < classes)[None, :]
        place = _places(sample, rows, columns, by_sample, by_class, by_voxel)
        values = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)
        values = tl.where((rows < last)[:, None], values, 0.0)  # rows of -inf alone have no softmax
        label = tl.load(labels + sample.to(tl.int64) * voxels + rows, mask=rows < last, other=0).to(tl.int32)[:, None]
        counted = (rows < last)[:, None] & (label != ignored)
        log_sum = _log_sum(values)
        share = tl.where(counted & inside, tl.exp(values - log_sum), 0.0)
        is_class = (label == columns[None, :]) & counted & inside
        entropy += tl.sum(tl.where(counted, log_sum, 0.0), 1) - tl.sum(tl.where(is_class, values, 0.0), 1)
        shared += tl.where(is_class, share, 0.0)
        predicted += share
        true += tl.where(is_class, 1.0, 0.0)
    number = sample * tl.num_programs(0) + chunk
    tl.store(entropies + number, tl.sum(entropy, 0))
    known = columns < classes
    base = sums + number.to(tl.int64) * 3 * classes + columns
    tl.store(base, tl.sum(shared, 0), mask=known)
    tl.store(base + classes, tl.sum(predicted, 0), mask=known)
    tl.store(base + 2 * classes, tl.sum(true, 0), mask=known)


@triton.jit
def _label_gradient(
    logits,
    labels,
    of_entropy,
    of_sums,
    gradient,
    voxels,
    classes,
    by_sample,
    by_class,
    by_voxel,
    samples,
    ignored,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    known = columns < classes
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < voxels)[:, None] & known[None, :]
    place = _places(sample, rows, columns, by_sample, by_class, by_voxel)
    values = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)
    values = tl.where((rows < voxels)[:, None], values, 0.0)
    label = tl.load(labels + sample.to(tl.int64) * voxels + rows, mask=rows < voxels, other=0).to(tl.int32)[:, None]
    share = tl.where(inside, tl.exp(values - _log_sum(values)), 0.0)
    is_class = label == columns[None, :]
    weight = tl.load(of_entropy).to(tl.float32)
    of_shared = tl.load(of_sums + sample * classes + columns, mask=known, other=0)[None, :]
    of_predicted = tl.load(of_sums + (samples + sample) * classes + columns, mask=known, other=0)[None, :]
    of_share = tl.where(is_class, of_shared, 0.0) + of_predicted
    result = share * (of_share - tl.sum(share * of_share, 1)[:, None] + weight) - tl.where(is_class, weight, 0.0)
    result = tl.where(label != ignored, result, 0.0)
    tl.store(gradient + place, result.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _region_sums(
    logits,
    target,
    entropies,
    sums,
    voxels,
    classes,
    by_sample,
    by_class,
    by_voxel,
    per_chunk,
    IGNORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of a chunk of voxels: summed binary cross-entropy, and of each region what is shared, predicted and true."""
    chunk, sample = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, voxels)
    entropy = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    shared = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    predicted = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    true = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < last)[:, None] & (columns < classes)[None, :]
        place = _places(sample, rows, columns, by_sample, by_class, by_voxel)
        values = tl.load(logits + place, mask=inside, other=0).to(tl.float32)
        truth = target + sample.to(tl.int64) * (classes + IGNORE) * voxels + rows.to(tl.int64)[:, None]
        is_region = tl.load(truth + columns.to(tl.int64)[None, :] * voxels, mask=inside, other=0) != 0
        counted = inside
        if IGNORE:
            left_out = tl.load(truth + (classes + columns * 0)[None, :].to(tl.int64) * voxels, mask=inside, other=0)
            counted = inside & (left_out == 0)
        small = tl.exp(-tl.abs(values))
        share = tl.where(counted, tl.where(values >= 0, 1.0, small) / (1.0 + small), 0.0)
        is_region = is_region & counted
        cost = tl.maximum(values, 0.0) - tl.where(is_region, values, 0.0) + tl.log(1.0 + small)
        entropy += tl.where(counted, cost, 0.0)
        shared += tl.where(is_region, share, 0.0)
        predicted += share
        true += tl.where(is_region, 1.0, 0.0)
    number = sample * tl.num_programs(0) + chunk
    tl.store(entropies + number, tl.sum(tl.sum(entropy, 1), 0))
    known = columns < classes
    base = sums + number.to(tl.int64) * 3 * classes + columns
    tl.store(base, tl.sum(shared, 0), mask=known)
    tl.store(base + classes, tl.sum(predicted, 0), mask=known)
    tl.store(base + 2 * classes, tl.sum(true, 0), mask=known)


@triton.jit
def _region_gradient(
    logits,
    target,
    of_entropy,
    of_sums,
    gradient,
    voxels,
    classes,
    by_sample,
    by_class,
    by_voxel,
    samples,
    IGNORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    known = columns < classes
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < voxels)[:, None] & known[None, :]
    place = _places(sample, rows, columns, by_sample, by_class, by_voxel)
    values = tl.load(logits + place, mask=inside, other=0).to(tl.float32)
    truth = target + sample.to(tl.int64) * (classes + IGNORE) * voxels + rows.to(tl.int64)[:, None]
    is_region = tl.load(truth + columns.to(tl.int64)[None, :] * voxels, mask=inside, other=0) != 0
    small = tl.exp(-tl.abs(values))
    share = tl.where(values >= 0, 1.0, small) / (1.0 + small)
    weight = tl.load(of_entropy).to(tl.float32)
    of_shared = tl.load(of_sums + sample * classes + columns, mask=known, other=0)[None, :]
    of_predicted = tl.load(of_sums + (samples + sample) * classes + columns, mask=known, other=0)[None, :]
    of_share = tl.where(is_region, of_shared, 0.0) + of_predicted
    result = of_share * share * (1.0 - share) + weight * (share - tl.where(is_region, 1.0, 0.0))
    if IGNORE:
        left_out = tl.load(truth + (classes + columns * 0)[None, :].to(tl.int64) * voxels, mask=inside, other=0)
        result = tl.where(left_out == 0, result, 0.0)
    tl.store(gradient + place, result.to(gradient.dtype.element_ty), mask=inside)


# -- starting them -----------------------------------------------------------------------------------------------------


class _Grid:
    """How logits (B, K, V) are divided among programs."""

    def __init__(self, logits: Tensor) -> None:
        self.samples, self.classes, self.voxels = logits.shape
        columns = triton.next_power_of_2(self.classes)
        rows = max(1, min(_TILE // columns, triton.next_power_of_2(self.voxels)))
        self.tiles = triton.cdiv(self.voxels, rows)
        wanted = max(1, min(_MOST_CHUNKS, triton.cdiv(self.tiles, _TILES_OF_A_CHUNK)))
        self.per_chunk = triton.cdiv(self.tiles, wanted) * rows
        self.chunks = triton.cdiv(self.voxels, self.per_chunk)
        self.tile = {"ROWS": rows, "COLUMNS": columns, "num_warps": 8}
        self.sizes = self.voxels, self.classes, *logits.stride()


def _parts(logits: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    entropies = logits.new_empty((grid.samples, grid.chunks), dtype=torch.float32)
    return entropies, logits.new_empty((grid.samples, grid.chunks, 3, grid.classes), dtype=torch.float32)


def label_sums(logits: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """As :meth:`nnssl_adapt.training.fused.loss_ways.Way.label_sums`."""
    grid, labels = _Grid(logits), labels.contiguous()
    entropies, sums = _parts(logits, grid)
    with on_its_device(logits):
        _label_sums[(grid.chunks, grid.samples)](
            logits, labels, entropies, sums, *grid.sizes, grid.per_chunk, ignored, **grid.tile
        )
    return entropies.sum(), sums.sum(1).transpose(0, 1)


def label_gradient(logits: Tensor, labels: Tensor, ignored: int, of_entropy: Tensor, of_sums: Tensor) -> Tensor:
    """As :meth:`nnssl_adapt.training.fused.loss_ways.Way.label_gradient`."""
    grid, labels, gradient = _Grid(logits), labels.contiguous(), _like(logits)
    with on_its_device(logits):
        _label_gradient[(grid.tiles, grid.samples)](
            *(logits, labels, of_entropy, of_sums.contiguous(), gradient, *grid.sizes, grid.samples, ignored),
            **grid.tile,
        )
    return gradient


def region_sums(logits: Tensor, target: Tensor, ignore: bool) -> tuple[Tensor, Tensor]:
    """As :meth:`nnssl_adapt.training.fused.loss_ways.Way.region_sums`."""
    grid, target = _Grid(logits), target.contiguous().view(torch.uint8)
    entropies, sums = _parts(logits, grid)
    with on_its_device(logits):
        _region_sums[(grid.chunks, grid.samples)](
            logits, target, entropies, sums, *grid.sizes, grid.per_chunk, IGNORE=int(ignore), **grid.tile
        )
    return entropies.sum(), sums.sum(1).transpose(0, 1)


def region_gradient(logits: Tensor, target: Tensor, ignore: bool, of_entropy: Tensor, of_sums: Tensor) -> Tensor:
    """As :meth:`nnssl_adapt.training.fused.loss_ways.Way.region_gradient`."""
    grid, target, gradient = _Grid(logits), target.contiguous().view(torch.uint8), _like(logits)
    with on_its_device(logits):
        _region_gradient[(grid.tiles, grid.samples)](
            *(logits, target, of_entropy, of_sums.contiguous(), gradient, *grid.sizes, grid.samples),
            IGNORE=int(ignore),
            **grid.tile,
        )
    return gradient


def _like(logits: Tensor) -> Tensor:
    """Without content, of the same strides."""
    return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
