"""A network's tensors and its parts: encoder, stem, input projection, positions.

Networks of dynamic_network_architectures name their own parts: ``key_to_encoder``, ``key_to_stem``, ``keys_to_in_proj``,
``key_to_lpe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from nnssl_adapt.errors import TransferError

Tensors = Mapping[str, Tensor]

COPIES = ("teacher", "ema", "momentum", "target", "decoder", "spark_weights")
"""Parts of names that mark a second copy of an encoder, to be taken only when there is no other."""


@dataclass(frozen=True)
class TargetTensor:
    """One tensor of the network, under all of its names (blocks of the CNNs register their layers twice)."""

    names: tuple[str, ...]
    tensor: Tensor

    def below(self, prefix: str) -> tuple[str, ...]:
        """Its names relative to a module, the trained one of two aliases first; empty when it lies elsewhere."""
        relative = (below(name, prefix) for name in self.names)
        return tuple(
            sorted((name for name in relative if name is not None), key=lambda name: "all_modules" not in name)
        )


@dataclass(frozen=True)
class NetworkParts:
    """A network's tensors, and the dotted prefixes of its encoder, stem and positions."""

    tensors: tuple[TargetTensor, ...]
    encoder: str
    stem: str
    in_proj: tuple[str, ...]
    positions: str | None

    @classmethod
    def of(cls, network: nn.Module) -> NetworkParts:
        """Read them off a network. Raises TransferError when it doesn't say where its encoder is."""
        encoder, stem = getattr(network, "key_to_encoder", None), getattr(network, "key_to_stem", None)
        if not isinstance(encoder, str) or not isinstance(stem, str):
            raise TransferError(
                f"{type(network).__name__} does not say where its encoder is (key_to_encoder, key_to_stem): "
                "build the network with build_network()"
            )
        by_identity: dict[int, tuple[Tensor, list[str]]] = {}
        for name, tensor in network.state_dict(keep_vars=True).items():
            by_identity.setdefault(id(tensor), (tensor, []))[1].append(name)
        tensors = tuple(TargetTensor(tuple(names), tensor) for tensor, names in by_identity.values())
        in_proj = tuple(getattr(network, "keys_to_in_proj", ()))
        return cls(tensors, encoder, stem, in_proj, getattr(network, "key_to_lpe", None))

    def is_in_proj(self, tensor: TargetTensor) -> bool:
        """Whether it is the convolution weight that sees the image's channels."""
        return any(name == f"{module}.weight" for module in self.in_proj for name in tensor.names)

    def is_positions(self, tensor: TargetTensor) -> bool:
        return self.positions is not None and self.positions in tensor.names

    def part_of(self, tensor: TargetTensor) -> str | None:
        """``encoder`` or ``stem`` (also where the stem lies inside the encoder), or None outside of both."""
        if tensor.below(self.stem):
            return "stem"
        return "encoder" if tensor.below(self.encoder) else None

    def members(self, prefix: str) -> list[TargetTensor]:
        return [tensor for tensor in self.tensors if tensor.below(prefix)]


def below(name: str, prefix: str) -> str | None:
    """The rest of a dotted name below a prefix, or None; the empty prefix is above everything."""
    if not prefix:
        return name
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else None


def join_name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def is_special_token(name: str) -> bool:
    """Class and register tokens: learned tokens without a place, which a segmentation network does not have."""
    return name.rpartition(".")[2] in ("cls_token", "register_tokens", "reg_token")
