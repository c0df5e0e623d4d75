"""Measuring the token order of a masked autoencoder: it is the one in which it reconstructs what it does not see.

Where a file has the whole masked autoencoder (nnssl's EvaMAE: encoder, mask token, second transformer and patch decoder), a
structured volume with most of its patches hidden is reconstructed twice, as if tokens were flattened (h w d) and (w h d).
A wrong order exchanges the first two axes of all positions alike, so that neighbours stay neighbours: what a patch's
average is, both get about as well. But inside of a patch the axes are as they were, and only in the right order does a
slope that runs from patch to patch run on inside of the hidden one. So that is what is compared: the hidden patches' content
without their averages.

Other networks have learned positions. Those of neighbours are alike: read in the wrong order, a grid that is not square in its
first two axes puts tokens side by side that are none. On a square one both readings have the same neighbours, and tell nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nnssl_adapt.errors import ArchitectureError
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, Shape, build_network, without_memory
from nnssl_adapt.weights.network.network_parts import below, is_special_token, join_name

logger = logging.getLogger(__name__)

VOLUMES = 8
_HOPELESS = 3
"""After so many volumes it stops if every error was above that of flat patches: the network has learned too little."""

VISIBLE = 0.5
"""Fraction of the patches that is seen: more than in pre-training, so that there are neighbours in a small region."""

MOST_TOKENS = 216
"""Patches that are looked at, a block in the middle of the grid: some seconds on one CPU core for PrimusM, where the whole grid
of pre-training (8000 tokens) would take minutes. Positions stay those of the whole grid."""

LEARNED, DIFFERENCE, ERRORS = 0.9, 0.1, 2.5
"""What counts as clear. The better order's error has to be below 0.9 of what flat patches would give (a network that
reconstructs nothing has no say: random weights give 1 and more); the other's at least 10% above it; and the difference at
least 2.5 of its standard errors over the volumes, which happens by chance once in twenty times."""


@dataclass(frozen=True)
class Measurement:
    """Errors of both orders, relative to those of flat patches, averaged over volumes.

    Attributes:
        order: the one that is clearly better, None if neither is.
    """

    hwd: float
    whd: float
    order: str | None

    def __str__(self) -> str:
        errors = f"reconstruction error {self.hwd:.3f} as hwd, {self.whd:.3f} as whd (1: flat patches)"
        return f"measured: {errors}" if self.order else f"not told by measuring: {errors}"


@dataclass(frozen=True)
class Smoothness:
    """How much positions of neighbours along the first two axes differ, relative to any two positions, in both orders.

    Attributes:
        order: the one that is clearly smoother, None if neither is.
    """

    hwd: float
    whd: float
    order: str | None

    def __str__(self) -> str:
        found = f"neighbours' positions differ by {self.hwd:.2f} as hwd, {self.whd:.2f} as whd (1: as any two)"
        return f"measured: {found}" if self.order else f"not told by measuring: {found}"


def measure_smoothness(positions: Tensor | None, grid: Shape | None) -> Smoothness | None:
    """In which order learned positions (1, tokens, width) on a grid (Z, Y, X) are smoother.

    None where it can't show: no positions, other tokens beside them, or a grid that is square in its first two axes.
    """
    if positions is None or grid is None or grid[0] == grid[1] or min(grid[:2]) < 2:
        return None
    if positions.ndim != 3 or positions.shape[1] != math.prod(grid):
        return None
    values = positions[0].float()
    values = values - values.mean(dim=0)
    w, h, d = grid
    found = {order: _roughness(values.reshape(*shape, -1)) for order, shape in (("hwd", (h, w, d)), ("whd", (w, h, d)))}
    if not all(math.isfinite(value) for value in found.values()):
        return None
    better, worse = sorted(found, key=lambda order: found[order])
    is_clear = found[better] < LEARNED and found[worse] > found[better] * (1 + DIFFERENCE)
    return Smoothness(found["hwd"], found["whd"], better if is_clear else None)


def _roughness(places: Tensor) -> float:
    """Mean squared difference of neighbours along the first two of (A, B, C, width), relative to that of any two places."""
    differences = [places.diff(dim=axis).square().sum(dim=-1).flatten() for axis in (0, 1)]
    return float(torch.cat(differences).mean() / (2 * places.square().sum(dim=-1).mean()))


def measure_order(checkpoint: Checkpoint) -> Measurement | None:
    """Measure in which token order a masked autoencoder reconstructs better; None when the file does not hold one.

    Deterministic; reads the weights and changes nothing.
    """
    ratios: dict[str, list[float]] = {"hwd": [], "whd": []}
    try:
        with torch.random.fork_rng(devices=[]):  # networks are built, which draws their weights
            parts = _Autoencoder.of(checkpoint)
        if parts is None:
            return None
        with torch.no_grad():
            for seed in range(VOLUMES):
                volume, hidden = _scene(parts, seed)
                for order, errors in ratios.items():
                    errors.append(parts.error(volume, hidden, order))
                if seed + 1 == _HOPELESS and all(error > 1 for errors in ratios.values() for error in errors):
                    break
    except (
        KeyError,
        IndexError,
        RuntimeError,
        ArchitectureError,
    ) as error:  # RuntimeError is torch's for names and shapes
        logger.debug("%s: token order not measured: %r", checkpoint.origin, error)
        return None
    means = {order: sum(errors) / len(errors) for order, errors in ratios.items()}
    if not all(math.isfinite(mean) for mean in means.values()):
        return None
    better, worse = sorted(means, key=lambda order: means[order])
    differences = torch.tensor(ratios[worse]) - torch.tensor(ratios[better])
    standard_error = float(differences.std()) / math.sqrt(len(differences))
    is_clear = (
        means[better] < LEARNED
        and means[worse] > means[better] * (1 + DIFFERENCE)
        and float(differences.mean()) > ERRORS * standard_error
    )
    return Measurement(means["hwd"], means["whd"], better if is_clear else None)


@dataclass(frozen=True)
class _Autoencoder:
    """The tensors of nnssl's EvaMAE, and empty modules that say what to do with them."""

    tensors: Mapping[str, Tensor]
    block: nn.Module
    second_block: nn.Module
    up_projection: nn.Module
    rope: Tensor | None
    grid: Shape
    kernel: Shape
    depths: tuple[int, int]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Autoencoder | None:
        plan, architecture = checkpoint.plan, checkpoint.architecture
        grid = plan.token_grid
        prefix = (plan.key_to_encoder or "").removesuffix("eva").removesuffix(".")
        if grid is None or not (plan.key_to_encoder or "").endswith("eva") or plan.key_to_lpe is None:
            return None
        inside = {below(name, prefix): tensor for name, tensor in checkpoint.tensors.items()}
        tensors = {name: tensor for name, tensor in inside.items() if name is not None}
        needed = (
            "mask_token",
            "eva.pos_embed",
            "decoder.pos_embed",
            "decoder.norm.weight",
            "decoder.blocks.0.norm1.weight",
        )
        if any(name not in tensors for name in needed) or any(is_special_token(name) for name in tensors):
            return None
        if tensors["eva.pos_embed"].shape[1] != math.prod(grid) or tensors["decoder.pos_embed"].shape[1] != math.prod(
            grid
        ):
            return None
        kernel = architecture.total_stride
        outputs = [t.shape[1] for name, t in tensors.items() if name.startswith("up_projection.") and t.ndim == 5][-1]
        first, second = _one_block(architecture, outputs), _one_block(_second(checkpoint), outputs)
        return cls(
            tensors={name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()},
            block=first.eva.blocks[0],
            second_block=second.eva.blocks[0],
            up_projection=first.up_projection,
            rope=_rotary_table(architecture, grid),
            grid=grid,
            kernel=kernel,
            depths=(_depth(tensors, "eva"), _depth(tensors, "decoder")),
        )

    def error(self, volume: Tensor, hidden: Tensor, order: str) -> float:
        """Error in the hidden patches' content without their averages, relative to the content itself.

        ``volume`` (1, channels, Z, Y, X) covers a block of the grid, ``hidden`` (patches,) is true where it is not seen,
        both with places in (w h d) order.
        """
        shape = _block_shape(self.grid)
        index = _token_numbers(self.grid, shape, order)
        weight, bias = self.tensors["down_projection.proj.weight"], self.tensors["down_projection.proj.bias"]
        embedded = nn.functional.conv3d(volume, weight, bias, stride=self.kernel).flatten(2).transpose(1, 2)
        seen = index[~hidden]
        tokens = embedded[:, ~hidden] + self.tensors["eva.pos_embed"][:, seen]
        tokens = self._transform(tokens, seen, "eva", self.block, self.depths[0])
        restored = self.tensors["mask_token"].expand(1, len(index), -1).clone()
        restored[:, ~hidden] = tokens
        restored = restored + self.tensors["decoder.pos_embed"][:, index]
        decoded = self._transform(restored, index, "decoder", self.second_block, self.depths[1])
        places = decoded.transpose(1, 2).reshape(1, -1, *shape)
        image = functional_call(self.up_projection, _inside(self.tensors, "up_projection"), (places,), strict=True)
        found, truth = (_without_average(_patches(each, self.kernel))[:, hidden] for each in (image, volume))
        return float((found - truth).square().sum() / truth.square().sum())

    def _transform(self, tokens: Tensor, index: Tensor, name: str, block: nn.Module, depth: int) -> Tensor:
        rope = None if self.rope is None else self.rope[index]
        for number in range(depth):
            values = _inside(self.tensors, f"{name}.blocks.{number}")
            tokens = functional_call(block, values, (tokens,), {"rope": rope}, strict=True)
        width = (tokens.shape[-1],)
        return nn.functional.layer_norm(
            tokens, width, self.tensors[f"{name}.norm.weight"], self.tensors[f"{name}.norm.bias"]
        )


def _one_block(architecture: Architecture, outputs: int) -> Any:
    """A Primus of one block without memory behind it, in evaluation mode."""
    small = replace(architecture, kwargs={**architecture.kwargs, "eva_depth": 1}, preset=None)
    with without_memory(small):
        return build_network(small, 1, outputs, small.total_stride).eval()


def _second(checkpoint: Checkpoint) -> Architecture:
    """The second transformer, which has its own number of heads; the plan's arguments as found say it."""
    arguments = checkpoint.plan.raw.get("architecture_plans", {}).get("arch_kwargs") or {}
    heads = arguments.get("decoder_eva_numheads") or checkpoint.architecture.kwargs["eva_numheads"]
    return replace(
        checkpoint.architecture, kwargs={**checkpoint.architecture.kwargs, "eva_numheads": int(heads)}, preset=None
    )


def _rotary_table(architecture: Architecture, grid: Shape) -> Tensor | None:
    """Rotary positions (tokens, …) of the whole grid. They depend on the width of one head only."""
    kwargs = architecture.kwargs
    head = kwargs["embed_dim"] // kwargs["eva_numheads"]
    tiny = {**kwargs, "embed_dim": head, "eva_numheads": 1, "eva_depth": 1}
    patch = tuple(n * k for n, k in zip(grid, architecture.total_stride, strict=True))
    rope: Any = build_network(replace(architecture, kwargs=tiny, preset=None), 1, 1, patch).get_submodule("eva")
    return None if rope.rope is None else rope.rope.get_embed()


def _depth(tensors: Iterable[str], name: str) -> int:
    words = (below(tensor, f"{name}.blocks") for tensor in tensors)
    return max(int(word.split(".")[0]) for word in words if word is not None) + 1


def _inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(join_name(prefix, ""))
    }


# -- scenes ----------------------------------------------------------------------------------------------------------


def _block_shape(grid: Shape) -> Shape:
    """Patches along each axis that are looked at: the whole grid, or a block of at most MOST_TOKENS."""
    if math.prod(grid) <= MOST_TOKENS:
        return grid
    side = round(MOST_TOKENS ** (1 / 3))
    z, y, x = (min(side, n) for n in grid)
    return z, y, x


def _token_numbers(grid: Shape, shape: Shape, order: str) -> Tensor:
    """Number of the token at each place of the block in the middle of the grid, places in (w h d) order."""
    w, h, d = (torch.arange(size) + (whole - size) // 2 for whole, size in zip(grid, shape, strict=True))
    w, h, d = w[:, None, None], h[None, :, None], d[None, None, :]
    numbers = (h * grid[0] + w) * grid[2] + d if order == "hwd" else (w * grid[1] + h) * grid[2] + d
    return numbers.flatten()


def _scene(parts: _Autoencoder, seed: int) -> tuple[Tensor, Tensor]:
    """A slow wave, mostly along the first axis or mostly along the second in turns, and which patches are hidden."""
    generator = torch.Generator().manual_seed(seed)
    shape = _block_shape(parts.grid)
    axes = [(torch.arange(n * k) + 0.5) / k for n, k in zip(shape, parts.kernel, strict=True)]
    z, y, x = torch.meshgrid(*axes, indexing="ij")  # in patches
    slopes = torch.tensor([1.0, 0.1, 0.2] if seed % 2 else [0.1, 1.0, 0.2])
    length = 5 + 3 * torch.rand(1, generator=generator)  # of the wave, in patches
    phase = 2 * torch.pi * torch.rand(1, generator=generator)
    volume = torch.sin(2 * torch.pi * (slopes[0] * z + slopes[1] * y + slopes[2] * x) / length + phase)
    volume = math.sqrt(2) * volume  # as strong as a z-scored image
    channels = parts.tensors["down_projection.proj.weight"].shape[1]
    count = math.prod(shape)
    hidden = torch.ones(count, dtype=torch.bool)
    hidden[torch.randperm(count, generator=generator)[: max(1, round(VISIBLE * count))]] = False
    return volume.expand(1, channels, *volume.shape).contiguous(), hidden


def _patches(volume: Tensor, kernel: Shape) -> Tensor:
    """(1, C, Z, Y, X) → (C, patches in (w h d) order, voxels)."""
    _, c, *size = volume.shape
    w, h, d = (n // k for n, k in zip(size, kernel, strict=True))
    cut = volume.reshape(c, w, kernel[0], h, kernel[1], d, kernel[2])
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(c, w * h * d, -1)


def _without_average(patches: Tensor) -> Tensor:
    return patches - patches.mean(dim=-1, keepdim=True)
