"""The encoder as it was pre-trained, run without any of the rules by which a transfer adapts weights.

The checkpoint's own network is built again and gets the file's tensors by name, one by one and untouched. A transformer's
tokens are put into the order that they were trained in, around its unchanged weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.checkpoint.plan_check import positions_grid
from nnssl_adapt.weights.checkpoint.stems import is_other_stem
from nnssl_adapt.weights.network.architectures import Shape, build_network
from nnssl_adapt.weights.network.network_parts import NetworkParts, below, is_special_token, join_name

Features = dict[str, Tensor]
"""Name of a stage → what it computes, (1, C, Z, Y, X)."""


@torch.no_grad()
def pretrained_network(
    checkpoint: Checkpoint,
    patch: Shape,
    positions: Tensor | None = None,
    decoder: bool = False,
    beside: nn.Module | None = None,
) -> nn.Module:
    """The network that the checkpoint describes, with the file's own tensors in its encoder and stem.

    Where a layer has two names, the one under ``all_modules`` is what was trained. ``positions`` replace the file's. With
    ``decoder`` that of a U-Net is filled too, up to its segmentation heads. What a file of this kind may lack as a whole (the
    convolutions beside a Swin transformer) is taken from ``beside``, the network that was fitted.

    Raises TransferError naming what would stay without a value, or what has no place.
    """
    network = build_network(checkpoint.architecture, checkpoint.plan.num_input_channels, 1, patch).eval()
    parts = NetworkParts.of(network)
    by_name = {name: target.tensor for target in parts.tensors for name in target.names}
    prefixes = _prefixes(checkpoint, parts, decoder)
    filled = _filled_beside(checkpoint, parts, beside)
    leftover: list[str] = []
    for name in sorted(checkpoint.tensors, key=lambda name: ".all_modules." in name):
        for source, target in prefixes:
            rest = below(name, source)
            if rest is None:
                continue
            destination = by_name.get(join_name(target, rest))
            value = checkpoint.tensors[name]
            if name == checkpoint.plan.key_to_lpe and positions is not None:
                value = positions
            if destination is not None and destination.shape == value.shape:
                destination.copy_(value)
                filled.add(id(destination))
            elif not (is_special_token(name) or is_other_stem(name) or "rope" in name.split(".")):
                leftover.append(name)
            break
    wanted = [tensor for tensor in parts.tensors if any(tensor.below(target) for _, target in prefixes)]
    missing = [tensor.names[0] for tensor in wanted if id(tensor.tensor) not in filled]
    if missing or leftover:
        raise TransferError(
            f"{checkpoint.origin}: its tensors don't fill the encoder that its plan describes ({checkpoint.architecture}): "
            f"without a value {', '.join(missing[:3]) or 'none'}, without a place {', '.join(leftover[:3]) or 'none'}"
        )
    return network


def lacking_names(checkpoint: Checkpoint, parts: NetworkParts) -> set[str]:
    """Names in the network of what the file lacks as a whole, as files of its kind may."""
    patterns = [re.compile(pattern) for pattern, _ in checkpoint.architecture.kind.may_lack]
    there = [below(name, checkpoint.plan.key_to_encoder or "") or "" for name in checkpoint.tensors]
    lacking = [pattern for pattern in patterns if not any(map(pattern.fullmatch, there))]
    names = {
        name: relative for target in parts.tensors for name in target.names for relative in target.below(parts.encoder)
    }
    return {name for name, relative in names.items() if any(pattern.fullmatch(relative) for pattern in lacking)}


def _filled_beside(checkpoint: Checkpoint, parts: NetworkParts, beside: nn.Module | None) -> set[int]:
    """Fill what the file lacks as a whole with another network's, where it has the same size; return which (``id``) that is."""
    lacking = lacking_names(checkpoint, parts)
    own = {} if beside is None else beside.state_dict()
    found = [target for target in parts.tensors if lacking & {*target.names}]
    for target in found:
        value = own.get(target.names[0])
        if value is not None and value.shape == target.tensor.shape:
            target.tensor.copy_(value)
    return {id(target.tensor) for target in found} if own else set()


def _prefixes(checkpoint: Checkpoint, parts: NetworkParts, decoder: bool) -> list[tuple[str, str]]:
    """Where parts of the network lie in the file and in the network."""
    plan = checkpoint.plan
    prefixes = [(plan.key_to_encoder or "", parts.encoder), (plan.key_to_stem or "", parts.stem)]
    if decoder:
        root = (plan.key_to_encoder or "").removesuffix(parts.encoder)
        prefixes += [(f"{root}{part}", part) for part in DECODER]
    return prefixes


DECODER = ("decoder.stages", "decoder.transpconvs")
"""What of a U-Net's decoder does not depend on the labels."""


def pretrained_token_features(
    checkpoint: Checkpoint, image: Tensor, grid: Shape, order: str, notes: list[str]
) -> Features:
    """What the pre-trained transformer computes, its own weights on tokens in its own order."""
    kernel = checkpoint.architecture.total_stride
    # In (h w d) order the table of rotary positions is that of the grid with its first two axes exchanged.
    axes = (1, 0, 2) if order == "hwd" else (0, 1, 2)
    patch = tuple(grid[axis] * kernel[i] for i, axis in enumerate(axes))
    positions, pretraining_grid = _positions_on(grid, checkpoint, order, notes)
    network: Any = pretrained_network(checkpoint, (patch[0], patch[1], patch[2]), positions)
    volume = network.down_projection(image)
    features: Features = {"patch embedding": volume}
    tokens = _flat(volume, order)
    if positions is not None:
        tokens = tokens + positions
    features["with positions"] = _placed(tokens, grid, order)
    rope = network.eva.rope.get_embed() if network.eva.rope is not None else None
    if rope is not None and order == "hwd" and pretraining_grid[0] != pretraining_grid[1]:
        notes.append(
            f"blocks can't be compared: nnssl's (h w d) order distorts rotary positions on a grid of {list(pretraining_grid)}"
        )
        return features
    places = sampled_places(grid)
    if places is not None:
        chosen = _tokens_at(places, grid, order)
        tokens, rope = tokens[:, chosen], None if rope is None else rope[chosen]
        notes.append(f"blocks are run on {len(places)} of the {math.prod(grid)} tokens, the same ones in both")

    def shown(tokens: Tensor) -> Tensor:
        return _placed(tokens, grid, order) if places is None else tokens.transpose(1, 2)

    for index, block in enumerate(network.eva.blocks):
        tokens = block(tokens, rope=rope)
        features[f"block {index}"] = shown(tokens)
    features["last norm"] = shown(network.eva.norm(tokens))
    return features


def _positions_on(grid: Shape, checkpoint: Checkpoint, order: str, notes: list[str]) -> tuple[Tensor | None, Shape]:
    """The file's learned positions (1, N, C) on a grid, flattened as the file has them, and the grid of pre-training."""
    plan = checkpoint.plan
    if plan.key_to_lpe is None:
        return None, grid
    raw = checkpoint.tensors[plan.key_to_lpe]
    leading, found = positions_grid(raw, checkpoint.tensors, plan)
    trained = found or grid
    positions = raw[:, leading:].float()
    if leading:
        notes.append(f"without the {leading} class or register token(s), which a segmentation network does not have")
    if trained != grid:
        volume = interpolate(_placed(positions, trained, order), size=grid, mode="trilinear", align_corners=False)
        positions = _flat(volume, order)
        notes.append(
            f"on a grid of {list(grid)} tokens, pre-training had {list(trained)}: the pre-trained encoder gets its learned "
            "positions interpolated, the rest is its own"
        )
    return positions, trained


MANY_TOKENS = 10_000
SAMPLE = 2_048


def sampled_places(grid: Shape) -> Tensor | None:
    """Places (numbered w h d) of the tokens that blocks are run on; None for all.

    Attention over a part of the tokens is what blocks were trained on, as masked autoencoders drop the others; over the
    13,824 tokens of nnFoundationViT it would take an hour on a CPU.
    """
    count = math.prod(grid)
    if count <= MANY_TOKENS:
        return None
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SAMPLE].sort().values


def _tokens_at(places: Tensor, grid: Shape, order: str) -> Tensor:
    """Numbers of the tokens, flattened in ``order``, that lie at places numbered (w h d)."""
    numbers = torch.arange(math.prod(grid)).reshape(1, 1, *grid)
    at_token = _flat(numbers, order).flatten()
    return at_token.argsort()[places]


class _Seen(Exception):
    """Ends the forward pass after the encoder."""


def watch_transformer(network: Any, image: Tensor, grid: Shape, order: str) -> Features:
    """What a Primus computes for an image, watched from outside while it runs as always.

    On a very large grid its blocks get only the tokens of :func:`sampled_places`.
    """
    found: Features = {}
    places = sampled_places(grid)
    chosen = None if places is None else _tokens_at(places, grid, order)

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found[name] = _placed(output, grid, order) if chosen is None else output.transpose(1, 2)

        return hook

    def keep_embedding(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        found["patch embedding"] = output

    def before_block(block: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> Any:
        tokens, rope = inputs[0], named.get("rope")
        if block is network.eva.blocks[0]:
            found["with positions"] = _placed(tokens, grid, order)
            tokens = tokens if chosen is None else tokens[:, chosen]
        return (tokens,), {**named, "rope": rope if rope is None or chosen is None else rope[chosen]}

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found["last norm"] = inputs[0]  # the network itself has put them in their places
        raise _Seen

    def stop_early(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if chosen is not None:  # what follows needs all tokens
            found["last norm"] = output.transpose(1, 2)
            raise _Seen

    hooks = [
        network.down_projection.register_forward_hook(keep_embedding),
        network.eva.norm.register_forward_hook(stop_early),
        network.up_projection.register_forward_pre_hook(stop),
    ]
    for index, block in enumerate(network.eva.blocks):
        hooks.append(block.register_forward_pre_hook(before_block, with_kwargs=True))
        hooks.append(block.register_forward_hook(keep(f"block {index}")))
    try:
        network(image)
    except _Seen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _flat(volume: Tensor, order: str) -> Tensor:
    """(1, C, w, h, d) → (1, N, C)."""
    places = volume.permute(0, 3, 2, 4, 1) if order == "hwd" else volume.permute(0, 2, 3, 4, 1)
    return places.reshape(1, -1, volume.shape[1])


def _placed(tokens: Tensor, grid: Iterable[int], order: str) -> Tensor:
    """(1, N, C) → (1, C, w, h, d)."""
    w, h, d = grid
    if order == "hwd":
        return tokens.reshape(1, h, w, d, -1).permute(0, 4, 2, 1, 3)
    return tokens.reshape(1, w, h, d, -1).permute(0, 4, 1, 2, 3)
