"""A network over an image larger than its patch: overlapping tiles, blended with Gaussian weights.

The scheme (where tiles lie, the weights, mirroring, padding of small images) is nnU-Net's; see "nnU-Net: a
self-configuring method", Nature Methods 18 (2021). Sums are kept in float32 where nnU-Net keeps them in float16, which
rounds most where the weights are small, in the corners of the image.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from nnssl_adapt.errors import ConfigurationError, PredictionError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of tiles that are done and the number there are."""

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


def sliding_window_logits(
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
    progress: Progress | None = None,
) -> Tensor:
    """Run a network over a whole image.

    The network is moved to ``device`` and stays there; its training mode is restored.

    Args:
        network: (1, C, *patch) → logits (1, K, *patch), or a list of them, finest first (deep supervision).
        image: preprocessed, (C, Z, Y, X). Smaller than the patch: padded with zeros on both sides, and cut again.
        patch_size: (Z, Y, X) in voxels.
        num_heads: K, the network's outputs.
        step: largest distance between tiles, as a fraction of the patch.
        mirror_axes: spatial axes (0 is Z); every combination is flipped and the results are averaged. None or empty:
            no mirroring, up to 8 times faster.
        device: where the network runs. The sums are kept there too; if a GPU's memory is too small for that they are
            kept in main memory, and the log says so.
        autocast_dtype: precision of the network on CUDA (None: float32). Elsewhere the network runs in float32.
        accumulation_dtype: of the sums. float16 reproduces nnU-Net's rounding and needs half the memory.
        progress: called after each tile.

    Returns:
        Logits (K, Z, Y, X) on the CPU in ``accumulation_dtype``.

    Raises:
        PredictionError: the logits are NaN or infinite.
    """
    device = torch.device(device)
    image, original = _pad_to_patch(image, patch_size)
    tiles = _tiles(image.shape[1:], patch_size, step)
    flips = _flips(mirror_axes)
    weights = gaussian_importance(patch_size, dtype=accumulation_dtype)

    def run(tile: Tensor) -> Tensor:
        with _autocast(device, autocast_dtype):
            return _mirrored(network, tile[None].to(device), flips)[0]

    network.to(device)
    with _evaluating(network), torch.no_grad():
        try:
            logits = _blend(run, image, tiles, weights, num_heads, device, progress)
        except torch.cuda.OutOfMemoryError:
            logger.warning("GPU memory is too small for the logits %s: kept in main memory, slower", tuple(image.shape))
            torch.cuda.empty_cache()
            logits = _blend(run, image, tiles, weights, num_heads, torch.device("cpu"), progress)
    logits = logits[original].contiguous().cpu()
    if not torch.isfinite(logits.sum(dtype=torch.float64)):  # NaN and infinities survive a sum, and it takes no memory
        raise PredictionError(
            "the network's output is NaN or infinite: its weights are broken, or its numbers too large for "
            f"{'float16' if device.type == 'cuda' else accumulation_dtype}"
        )
    return logits


def _blend(
    run: Callable[[Tensor], Tensor],
    image: Tensor,
    tiles: Sequence[tuple[slice, ...]],
    weights: Tensor,
    num_heads: int,
    keep_on: torch.device,
    progress: Progress | None,
) -> Tensor:
    """Weighted mean of overlapping tiles, (K, Z, Y, X) on ``keep_on``, in the type of ``weights``."""
    weights = weights.to(keep_on)
    image = image.to(keep_on)
    total = torch.zeros((num_heads, *image.shape[1:]), dtype=weights.dtype, device=keep_on)
    total_weight = torch.zeros(image.shape[1:], dtype=weights.dtype, device=keep_on)
    for done, tile in enumerate(tiles, start=1):
        where = (slice(None), *tile)
        total[where] += run(image[where]).to(keep_on).float() * weights
        total_weight[tile] += weights
        if progress is not None:
            progress(done, len(tiles))
    return total.div_(total_weight)


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
    """Every combination of axes of a batch (B, C, Z, Y, X) to flip, first of all none."""
    axes = [axis + 2 for axis in mirror_axes or ()]
    return [flip for count in range(len(axes) + 1) for flip in itertools.combinations(axes, count)]


def _mirrored(network: nn.Module, batch: Tensor, flips: Sequence[tuple[int, ...]]) -> Tensor:
    """Mean of the network's output over all flips, float32."""
    total: Tensor | None = None
    for flip in flips:
        output = network(torch.flip(batch, flip) if flip else batch)
        output = (output[0] if isinstance(output, (list, tuple)) else output).float()
        output = torch.flip(output, flip) if flip else output
        total = output if total is None else total + output
    assert total is not None
    return total / len(flips)


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
