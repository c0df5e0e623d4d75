"""A network over an image larger than its patch: overlapping tiles, blended with Gaussian weights.

The scheme (where tiles lie, the weights, mirroring, padding of small images) is nnU-Net's; see "nnU-Net: a
self-configuring method", Nature Methods 18 (2021). Sums are kept in float32 where nnU-Net keeps them in float16, which
rounds most where the weights are small, in the corners of the image.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from nnssl_adapt.errors import ConfigurationError, PredictionError
from nnssl_adapt.inference.convolutions import cudnn_benchmark, exact_float32, onednn_convolutions
from nnssl_adapt.inference.sums import SumsPlace, Tiles, sums_places
from nnssl_adapt.inference.tile_batches import TileBatch, tile_batch

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of tiles that are done and the number there are."""

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Gives a tensor of zeros on the CPU, of this shape and type."""

SIGMA_SCALE = 1 / 8
"""Standard deviation of the weights, as a fraction of the patch."""

WEIGHT_AT_CENTRE = 10.0
"""nnU-Net's scale. It matters only to float16 sums, whose smallest weights would otherwise vanish."""


def tile_positions(shape: Sequence[int], patch_size: Sequence[int], step: float = 0.5) -> list[list[int]]:
    """Where tiles start along each axis (voxels): evenly, at most ``step`` × patch apart, first and last at the borders.

    ``shape`` and ``patch_size`` have the same axes; no axis of the image is smaller than the patch.
    Raises ConfigurationError unless 0 < step ≤ 1.
    """
    if not 0 < step <= 1:
        raise ConfigurationError(f"the tile step is a fraction of the patch, 0 < step <= 1, got {step}")
    positions = []
    for size, patch in zip(shape, patch_size, strict=True):
        if size < patch:
            raise ValueError(f"the image {tuple(shape)} is smaller than the patch {tuple(patch_size)}: pad it first")
        if patch == 1:  # slices, of a 2D network: each once
            positions.append(list(range(size)))
            continue
        intervals = math.ceil((size - patch) / (patch * step))
        distance = (size - patch) / max(1, intervals)
        positions.append([round(distance * i) for i in range(intervals + 1)])
    return positions


def gaussian_importance(
    patch_size: Sequence[int], scale: float = WEIGHT_AT_CENTRE, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights of a tile's voxels, shaped as the patch: a Gaussian of 1/8 patch, ``scale`` at the centre, nowhere zero.

    The outer product of one line for each axis; equal bit for bit to filtering a single voxel in the volume.
    """
    product = np.ones(())
    for size in patch_size:
        impulse = np.zeros(size)
        impulse[size // 2] = 1
        product = np.multiply.outer(product, gaussian_filter1d(impulse, size * SIGMA_SCALE, mode="constant"))
    weights = torch.from_numpy(product / (product.max() / scale)).to(dtype)
    zero = weights == 0  # underflow in float16; dividing by a sum of zeros would give NaN
    weights[zero] = weights[~zero].min()
    return weights


def logits_by_tiles(
    network: nn.Module,
    image: Tensor,
    patch_size: Sequence[int],
    num_heads: int,
    *,
    step: float = 0.5,
    mirror_axes: Sequence[int] | None = (0, 1, 2),
    device: str | torch.device = "cpu",
    autocast_dtype: torch.dtype | None = torch.float16,
    accumulation_dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    allocate: Allocate | None = None,
    keep: bool = False,
    copies: int = 1,
) -> Tiles:
    """Run a network over a whole image, and stop after each tile.

    The network is moved to ``device`` and stays there; its training mode is restored.

    Args:
        network: (B, C, *patch) → logits (B, K, *patch), or a list of them, finest first (deep supervision).
        image: preprocessed, (C, Z, Y, X). Smaller than the patch: padded with zeros on both sides, and cut again.
        patch_size: (Z, Y, X) in voxels.
        num_heads: K, the network's outputs.
        step: largest distance between tiles, as a fraction of the patch.
        mirror_axes: spatial axes (0 is Z); every combination is flipped and the results are averaged. None or empty:
            no mirroring, up to 8 times faster.
        device: where the network runs. The sums are kept there too. If a GPU's memory is too small for that, they are in
            float16, and if that is too much as well, in main memory; the log says so.
        autocast_dtype: precision of the network on CUDA (None: float32). Elsewhere the network runs in float32.
        accumulation_dtype: of the sums. float16 reproduces nnU-Net's rounding and needs half the memory.
        batch_size: tiles that go through the network together; a tile's mirrored copies count as one each. None: up to 8
            on CUDA (see :func:`~nnssl_adapt.inference.tile_batches.tiles_at_once`; half as many as often as its memory is
            too small), 1 elsewhere, where more gains nothing.
        allocate: makes the tensor that is returned; None: torch does.
        keep: leave the logits where the sums were, on the device if they fitted.
        copies: how many such logits will be on the device at a time, of several networks whose mean is wanted.

    Yields:
        The number of tiles that are done, and the number there are.

    Returns:
        Logits (K, Z, Y, X) on the CPU (but see ``keep``) in the type of the sums.

    Raises:
        PredictionError: the logits are NaN or infinite.
    """
    device = torch.device(device)
    whole, original = _pad_to_patch(image, patch_size)
    network.to(device)
    window = _Window(
        tiles=_tiles(whole.shape[1:], patch_size, step),
        flips=_flips(mirror_axes),
        patch_size=tuple(patch_size),
        num_heads=num_heads,
        batch=TileBatch(batch_size) if batch_size else tile_batch(network, num_heads, patch_size, device),
        # A padded image's sums are larger than what is returned.
        allocate=allocate if allocate is not None and whole is image else _zeros,
    )

    def run(batch: Tensor) -> Tensor:
        with torch.no_grad(), _autocast(device, autocast_dtype):
            output = network(batch)
        found: Tensor = (output[0] if isinstance(output, (list, tuple)) else output).float()
        return found

    # Sums in float16 are asked for to get nnU-Net's very numbers, which are those of PyTorch's own choice of algorithm.
    fast = onednn_convolutions(network, device) if accumulation_dtype == torch.float32 else nullcontext()
    with _evaluating(network), cudnn_benchmark(device), exact_float32(device), fast:
        places = sums_places(device, accumulation_dtype, num_heads, whole, copies)
        fitting = None
        for number, place in enumerate(places):
            if number:  # not in a handler, whose traceback would keep the sums before in memory
                _say_too_small(whole, place)
                _empty_cache(device)
            fitting = yield from _blend_if_it_fits(run, whole, window, device, place, place is places[-1])
            if fitting is not None:
                break
        assert fitting is not None  # the last place raises
        logits: Tensor = fitting
        del fitting
    _refuse_non_finite(logits, autocast_dtype if device.type == "cuda" else accumulation_dtype)
    return logits[original] if keep else _returned(logits[original], allocate or _zeros)


def with_float32_as_fallback(
    run: Callable[[torch.dtype | None], Tiles], precision: torch.dtype | None, device: torch.device
) -> Tiles:
    """``run(precision)``; once more in float32 where numbers were too large for half precision on a GPU.

    Raises PredictionError where the logits are NaN or infinite in float32 too.
    """
    try:
        return (yield from run(precision))
    except PredictionError as error:
        if device.type != "cuda" or precision is None:
            raise
        # As text: a record of the error would keep its traceback, and with it the tensors.
        logger.warning("%s: this image is done again in float32", str(error))
    return (yield from run(None))  # not in the handler, whose traceback keeps the first run's tensors in memory


def sliding_window_logits(
    network: nn.Module,
    image: Tensor,
    patch_size: Sequence[int],
    num_heads: int,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Tensor:
    """As :func:`logits_by_tiles`, without a stop; ``progress`` is called after each tile."""
    return finish(logits_by_tiles(network, image, patch_size, num_heads, **settings), progress)


def finish(tiles: Tiles, progress: Progress | None = None) -> Tensor:
    """Do all the work and return its logits; ``progress`` is called after each tile."""
    with closing(tiles):
        while True:
            try:
                done, total = next(tiles)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits
            if progress is not None:
                progress(done, total)


def _blend_if_it_fits(
    run: Callable[[Tensor], Tensor], image: Tensor, window: _Window, device: torch.device, place: SumsPlace, last: bool
) -> Generator[tuple[int, int], None, Tensor | None]:
    """:func:`_blend`; None where a GPU is too small for the sums. Raises OutOfMemoryError in the last place there is."""
    try:
        return (yield from _blend(run, image, window, device, place))
    except torch.OutOfMemoryError:
        if last:
            raise
    return None


def _returned(logits: Tensor, allocate: Allocate) -> Tensor:
    """The logits on the CPU without gaps, in memory of ``allocate`` unless they are there already."""
    if logits.device.type == "cpu" and logits.is_contiguous():
        return logits
    return allocate(tuple(logits.shape), logits.dtype).copy_(logits)


def _refuse_non_finite(logits: Tensor, dtype: torch.dtype | None) -> None:
    # NaN and infinities survive a sum, and it takes no memory. Apple's GPUs have no float64.
    total = (logits.cpu() if logits.device.type == "mps" else logits).sum(dtype=torch.float64)
    if not torch.isfinite(total):
        raise PredictionError(
            "the network's output is NaN or infinite: its weights are broken, or its numbers too large for "
            f"{str(dtype or torch.float32).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class _Window:
    """How an image is gone through.

    Attributes:
        tiles: where they lie, (Z, Y, X).
        flips: axes of an image (C, Z, Y, X) to mirror, one entry for each look at a tile.
        patch_size: of a tile (Z, Y, X).
        num_heads: outputs of the network.
        batch: looks that go through the network together.
        allocate: memory of the sums on the CPU.
    """

    tiles: Sequence[tuple[slice, ...]]
    flips: Sequence[tuple[int, ...]]
    patch_size: tuple[int, ...]
    num_heads: int
    batch: TileBatch
    allocate: Allocate


def _blend(
    run: Callable[[Tensor], Tensor], image: Tensor, window: _Window, device: torch.device, place: SumsPlace
) -> Tiles:
    """Weighted mean of overlapping tiles, (K, Z, Y, X), in this place."""
    keep_on = place.device
    weights = gaussian_importance(window.patch_size, dtype=place.dtype).to(keep_on)
    image = image.to(keep_on)
    shape = (window.num_heads, *image.shape[1:])
    if keep_on.type == "cpu":
        total = window.allocate(shape, weights.dtype)
    else:
        total = torch.zeros(shape, dtype=weights.dtype, device=keep_on)
    total_weight = torch.zeros(image.shape[1:], dtype=weights.dtype, device=keep_on)
    batch, done = window.batch, 0
    while done < len(window.tiles):
        try:
            for logits in _means(run, image, window.tiles[done:], window.flips, batch.size, device):
                tile = window.tiles[done]
                where = (slice(None), *tile)
                _add(total[where], logits.to(keep_on), weights)
                total_weight[tile] += weights
                done += 1
                yield done, len(window.tiles)
        except torch.OutOfMemoryError:
            if batch.size == 1:
                raise
            batch.size //= 2
            logger.debug("GPU memory is too small for %d tiles at a time: %d from here on", 2 * batch.size, batch.size)
            _empty_cache(device)
    return total.div_(total_weight)


def _add(total: Tensor, logits: Tensor, weights: Tensor) -> None:
    if total.dtype == torch.float32:
        total.addcmul_(logits, weights)
    else:
        total += logits * weights  # multiplied in float32 and rounded once, as nnU-Net does


def _means(
    run: Callable[[Tensor], Tensor],
    image: Tensor,
    tiles: Sequence[tuple[slice, ...]],
    flips: Sequence[tuple[int, ...]],
    batch_size: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """For one tile after the other the mean over its flips, float32 (K, *patch) on ``device``."""
    looks = _looks(image, tiles, flips, device)
    total: Tensor | None = None
    seen = 0
    while batch := list(itertools.islice(looks, batch_size)):
        outputs = run(torch.stack([look for look, _ in batch]))
        for output, (_, flip) in zip(outputs, batch, strict=True):
            output = torch.flip(output, flip) if flip else output
            total = output if total is None else total.add_(output)
            seen += 1
            if seen == len(flips):
                yield total.div_(seen) if seen > 1 else total
                total, seen = None, 0


def _looks(
    image: Tensor, tiles: Sequence[tuple[slice, ...]], flips: Sequence[tuple[int, ...]], device: torch.device
) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Every tile (C, *patch) in every mirroring, and the axes that were mirrored."""
    for tile in tiles:
        where = (slice(None), *tile)
        piece = image[where].to(device)
        for flip in flips:
            yield (torch.flip(piece, flip) if flip else piece), flip


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# -- the GPU's memory --------------------------------------------------------------------------------------------------


def _say_too_small(image: Tensor, place: SumsPlace) -> None:
    where = "kept in main memory, slower" if place.device.type == "cpu" else "added up in float16, as nnU-Net does"
    logger.warning("GPU memory is too small for the logits of an image of %s: %s", tuple(image.shape[1:]), where)


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _pad_to_patch(image: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """The image with zeros around it where it is smaller than the patch, and where it lies in there (all axes).

    An odd voxel goes behind the image, as in nnU-Net.
    """
    if image.ndim != 4:
        raise ValueError(f"expected an image (C, Z, Y, X), got {image.ndim} axes")
    missing = [max(0, patch - size) for size, patch in zip(image.shape[1:], patch_size, strict=True)]
    inside = (slice(None), *(slice(m // 2, m // 2 + n) for m, n in zip(missing, image.shape[1:], strict=True)))
    if not any(missing):
        return image, inside
    last_axis_first = [n for m in reversed(missing) for n in (m // 2, m - m // 2)]
    return nn.functional.pad(image, last_axis_first), inside


def _tiles(shape: Sequence[int], patch_size: Sequence[int], step: float) -> list[tuple[slice, ...]]:
    starts = tile_positions(shape, patch_size, step)
    return [
        tuple(slice(start, start + size) for start, size in zip(corner, patch_size, strict=True))
        for corner in itertools.product(*starts)
    ]


def _flips(mirror_axes: Sequence[int] | None) -> list[tuple[int, ...]]:
    """Every combination of axes of an image (C, Z, Y, X) to flip, first of all none."""
    axes = [axis + 1 for axis in mirror_axes or ()]
    return [flip for count in range(len(axes) + 1) for flip in itertools.combinations(axes, count)]


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    # On CPUs autocast is slower than float32 on many models, and MPS does not have it everywhere.
    return torch.autocast("cuda", dtype=dtype) if device.type == "cuda" and dtype is not None else nullcontext()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
