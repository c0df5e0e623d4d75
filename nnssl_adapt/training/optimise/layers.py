"""A network's parameters by layer: which belong to the encoder, the decoder and the head, and how deep they lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from nnssl_adapt.errors import ConfigurationError

Part = Literal["encoder", "decoder", "head"]

ADAPTER_MARK = ".lora_"
"""Part of every name of an adapter's parameters (peft's)."""

_NUMBERED = re.compile(r"(?:^|\.)(?:stages|blocks)\.(\d+)\.")
_HEADS = re.compile(r"^(decoder\.seg_layers|up_projection\.decode)\.(\d+)\.")


@dataclass(frozen=True)
class Layer:
    """Parameters that are treated alike.

    Attributes:
        name: ``encoder.0`` (the stem), ``encoder.1``, …, ``decoder``, ``head``; adapters of a layer are
            ``encoder.1.adapters``, and the heads of a U-Net's coarser resolutions ``head.deep``.
        part: ``encoder``, ``decoder`` or ``head``.
        depth: of an encoder's layer, 0 for the stem and what lies beside it (learned positions), then 1 for the first stage
            or block, and so on; None outside of the encoder.
        steps_from_top: of an encoder's layer, 1 for the last one, up to the number of layers for the stem; 0 elsewhere.
        parameters: each of them once, whatever its names.
        adapters: whether they are low-rank adapters.
        unused: whether no output depends on them, as the heads of deep supervision when it is off.
    """

    name: str
    part: Part
    depth: int | None
    steps_from_top: int
    parameters: tuple[nn.Parameter, ...]
    adapters: bool = False
    unused: bool = False


def says_where_its_encoder_is(network: nn.Module) -> bool:
    """Whether a network names its parts, as those of dynamic_network_architectures do."""
    return all(isinstance(getattr(network, key, None), str) for key in ("key_to_encoder", "key_to_stem"))


def layers_of(network: nn.Module, deep_supervision: bool = False) -> list[Layer]:
    """All parameters of a network, each in exactly one layer: the encoder's from the image on, the decoder, the head.

    CNNs have one layer a stage after the stem (a PlainConvUNet's stem is its first stage); a Primus has one a block, and
    its learned positions go with the patch embedding, its last norm with the last block.

    The layers are the same with and without ``deep_supervision``, so that an optimiser's state fits both.

    Raises ConfigurationError when the network doesn't say where its encoder is.
    """
    if not says_where_its_encoder_is(network):
        raise ConfigurationError(
            f"{type(network).__name__} does not say where its encoder is (key_to_encoder, key_to_stem): "
            "build the network with build_network()"
        )
    encoder, stem = str(network.key_to_encoder), str(network.key_to_stem)
    heads = _heads(network)
    groups: dict[tuple[Part, int, bool, bool], list[nn.Parameter]] = {}
    top = _top(network, encoder, stem)
    for name, parameter in network.named_parameters():  # each once, by its name in the encoder if it has one there
        part = _part(name, encoder, stem, heads)
        depth = _depth(name, stem, top) if part == "encoder" else top + 1
        deep = part == "head" and not _is_below(name, heads[-1:])
        groups.setdefault((part, depth, ADAPTER_MARK in name, deep), []).append(parameter)
    order = {"encoder": 0, "decoder": 1, "head": 2}
    keys = sorted(groups, key=lambda key: (order[key[0]], key[1:]))
    return [
        Layer(
            name=_name(part, depth, adapters, deep),
            part=part,
            depth=depth if part == "encoder" else None,
            steps_from_top=top + 1 - depth,
            parameters=tuple(groups[part, depth, adapters, deep]),
            adapters=adapters,
            unused=deep and not deep_supervision,
        )
        for part, depth, adapters, deep in keys
    ]


def frozen_layers(network: nn.Module, stages: int) -> set[str]:
    """Names of the encoder's layers that belong to the stem and to its first ``stages`` stages or blocks."""
    stem_is_first = _is_stage(str(network.key_to_stem))
    last = max(stages - 1, 0) if stem_is_first else stages
    return {layer.name for layer in layers_of(network) if layer.depth is not None and layer.depth <= last}


def _name(part: Part, depth: int, adapters: bool, deep: bool) -> str:
    name = f"encoder.{depth}" if part == "encoder" else part
    return name + (".adapters" if adapters else "") + (".deep" if deep else "")


def _part(name: str, encoder: str, stem: str, heads: Sequence[str]) -> Part:
    if _is_below(name, heads):
        return "head"
    beside = name in ("register_tokens", "cls_token")  # learned tokens, which a transformer's encoder starts from
    return "encoder" if beside or _is_below(name, (encoder, stem)) else "decoder"


def _depth(name: str, stem: str, top: int) -> int:
    if _is_below(name, (stem,)):
        return 0
    if match := _NUMBERED.search(name):
        return int(match[1]) + (0 if _is_stage(stem) else 1)
    return 0 if name.endswith(("pos_embed", "tokens", "token")) else top


def _top(network: nn.Module, encoder: str, stem: str) -> int:
    """Depth of the last encoder layer."""
    names = (name for name, _ in network.named_parameters() if _is_below(name, (encoder,)))
    numbers = [int(match[1]) for name in names if (match := _NUMBERED.search(name))]
    return max(numbers, default=-1) + (0 if _is_stage(stem) else 1)


def _is_stage(stem: str) -> bool:
    """Whether the stem is the encoder's first stage, as in a PlainConvUNet."""
    return _NUMBERED.search(f"{stem}.") is not None


def _heads(network: nn.Module) -> list[str]:
    """Modules that make logits, finest last: a U-Net's ``decoder.seg_layers.N``, the last layer of a Primus's decoder."""
    found = {match[0].rstrip(".") for name, _ in network.named_parameters() if (match := _HEADS.match(name))}
    ordered = sorted(found, key=lambda name: int(name.rpartition(".")[2]))
    return ordered if all(name.startswith("decoder.seg_layers.") for name in ordered) else ordered[-1:]


def _is_below(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
