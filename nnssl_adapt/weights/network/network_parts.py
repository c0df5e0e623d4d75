"""Where in a checkpoint's tensors the encoder lies: found by name and shape, whatever the plan says.

Networks of dynamic_network_architectures name their own parts (``key_to_encoder``, ``key_to_stem``,
``keys_to_in_proj``, ``key_to_lpe``); the plan names the same parts in the checkpoint. Where the plan is wrong or silent,
the checkpoint is searched for the prefix under which the network's own names and shapes turn up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.network.adaptation_plan import AdaptationPlan, token_grid
from nnssl_adapt.weights.network.tensor_ops import Grid, find_token_grid

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


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def find_source(tensor: TargetTensor, target_prefix: str, source_prefix: str, source: Tensors) -> list[str]:
    """Names in the checkpoint of one tensor of the network, the trained alias first; empty when it is not there."""
    names = (join(source_prefix, name) for name in tensor.below(target_prefix))
    return [name for name in names if name in source]


def find_prefix(parts: NetworkParts, target_prefix: str, source: Tensors, named: str | None) -> tuple[str | None, bool]:
    """The checkpoint's prefix for a part of the network, and whether it is the one the plan named.

    The named one is taken if everything is there in the right shape, or if no other prefix has more. None: nothing in the
    checkpoint fits.
    """
    members = parts.members(target_prefix)

    def fitting(prefix: str) -> int:
        return sum(
            fits(parts, tensor, find_source(tensor, target_prefix, prefix, source), source) for tensor in members
        )

    named_count = fitting(named) if named is not None else 0
    if named is not None and named_count == len(members) > 0:
        return named, True
    prefixes = _candidate_prefixes(members, target_prefix, source)
    best = max(prefixes, key=lambda prefix: (fitting(prefix), *_preference(prefix)), default=None)
    if best is not None and fitting(best) > named_count:
        return best, False
    return (named, True) if named_count else (None, False)


def _preference(prefix: str) -> tuple[int, int, list[int]]:
    """Among equals: no second copy, then the shortest name, then the first in the alphabet."""
    words = prefix.split(".")
    return -sum(word in words for word in COPIES), -len(prefix), [-ord(letter) for letter in prefix]


def _candidate_prefixes(members: Iterable[TargetTensor], target_prefix: str, source: Tensors) -> set[str]:
    relative = {name for tensor in members for name in tensor.below(target_prefix)}
    found: set[str] = set()
    for name in source:
        words = name.split(".")
        found.update(".".join(words[:cut]) for cut in range(len(words)) if ".".join(words[cut:]) in relative)
    return found


def fits(parts: NetworkParts, target: TargetTensor, names: Sequence[str], source: Tensors) -> bool:
    """Whether the checkpoint's tensor of these names fits: same shape, up to the stem's channels and the positions."""
    if not names:
        return False
    here, there = list(target.tensor.shape), list(source[names[0]].shape)
    if len(here) == len(there) and parts.is_in_proj(target):
        here[1] = there[1]
    if len(here) == len(there) and parts.is_positions(target):
        here[1] = there[1]
    return here == there


# -- positions of a transformer --------------------------------------------------------------------------------------


def positions_name(parts: NetworkParts, source: Tensors, plan: AdaptationPlan) -> str | None:
    """The checkpoint's name of the learned positions: those of the plan's encoder, else what the plan names.

    The encoder's go first, since the second transformer of a masked autoencoder has positions too.
    """
    if parts.positions is None:
        return None
    relative = below(parts.positions, parts.encoder)
    name = join(plan.key_to_encoder or "", relative) if relative is not None else None
    return next((candidate for candidate in (name, plan.key_to_lpe) if candidate in source), None)


def positions_grid(positions: Tensor, source: Tensors, plan: AdaptationPlan) -> tuple[int, Grid | None]:
    """(leading class and register tokens, grid (Z, Y, X)) of learned positions (1, N, C) in a checkpoint.

    The grid comes from the number of tokens; the plan's patch, then its recommended patch, say how it is cut, and without
    either it is a cube. None: no grid fits.
    """
    if positions.ndim != 3:
        return 0, None
    recommended = plan.recommended_patch_size
    candidates = [plan.token_grid, token_grid(plan.architecture, recommended) if recommended else None]
    special = sum(tensor.shape[1] for name, tensor in source.items() if is_special_token(name) and tensor.ndim == 3)
    for leading in dict.fromkeys((special, 0)):
        grid = find_token_grid(positions.shape[1] - leading, candidates)
        if grid is not None:
            return leading, grid
    return 0, None


def is_special_token(name: str) -> bool:
    """Class and register tokens: learned tokens without a place, which a segmentation network does not have."""
    return name.rpartition(".")[2] in ("cls_token", "register_tokens", "reg_token")
