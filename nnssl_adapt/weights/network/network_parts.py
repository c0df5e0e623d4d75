"""A network's parts (encoder, stem, input projection, positions), and where they lie in a checkpoint's tensors.

They are found by name and shape, whatever a plan says. Networks of dynamic_network_architectures name their own parts:
``key_to_encoder``, ``key_to_stem``, ``keys_to_in_proj``, ``key_to_lpe``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        # The tokenizer of PrimusV2 and V3 has a second way for the image, which the network does not name.
        beside = [f"{stem}.stem.blocks.0.skip.0.{layer}" for layer in ("conv", "all_modules.0")]
        in_proj += tuple(module for module in beside if any(f"{module}.weight" in t.names for t in tensors))
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


# -- in a checkpoint -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Location:
    """Where the parts of a network lie in a checkpoint.

    Attributes:
        encoder, stem: dotted prefixes of their tensors in the checkpoint.
        encoder_as_named, stem_as_named: whether these are the prefixes that were named.
        in_proj: names in the checkpoint of the convolution weight that sees the image, the trained alias first.
        positions: name in the checkpoint of a transformer's learned positions, None where it has none.
        is_complete: every tensor of the encoder is there in the network's shape, and no further one lies beside them.
    """

    encoder: str
    stem: str
    encoder_as_named: bool
    stem_as_named: bool
    in_proj: tuple[str, ...]
    positions: str | None
    is_complete: bool


def locate(
    parts: NetworkParts,
    tensors: Tensors,
    encoder: str | None,
    stem: str | None,
    positions: str | None = None,
    with_decoder: bool = False,
) -> Location | None:
    """Find the encoder and the stem of a network among a checkpoint's tensors; None when one of them is nowhere.

    Args:
        parts: of the network.
        tensors: of the checkpoint, each of which belongs to this network or to no part of it.
        encoder, stem: the prefixes that a plan names, None where it names none.
        positions: the name that a plan gives the learned positions.
        with_decoder: whether a decoder (without its heads, whose number is the dataset's) counts for completeness.
    """
    prefix, encoder_as_named = find_prefix(parts, parts.encoder, tensors, encoder)
    found = None if prefix is None else _find_stem(parts, tensors, prefix, stem)
    if prefix is None or found is None:
        return None
    projection = next((tensor for tensor in parts.tensors if parts.is_in_proj(tensor)), None)
    in_proj = [] if projection is None else find_source(projection, parts.stem, found[0], tensors)
    places = [(parts.encoder, prefix), (parts.stem, found[0])]
    if with_decoder and any(name.startswith("decoder.") for name in tensors):
        places.append(("decoder", "decoder"))
    complete = _is_complete(parts, places, tensors)
    learned = _find_positions(parts, tensors, prefix, positions)
    return Location(prefix, found[0], encoder_as_named, found[1], tuple(in_proj), learned, complete)


def _find_stem(parts: NetworkParts, tensors: Tensors, encoder: str, named: str | None) -> tuple[str, bool] | None:
    """Where the stem lies: as named, or where the network has it beside its encoder.

    Nowhere else: it is one layer, and a decoder's last stage may have the same names and shapes.
    """
    rest = below(parts.stem, parts.encoder.rpartition(".")[0])
    beside = join_name(encoder.rpartition(".")[0], rest if rest is not None else parts.stem)
    members = parts.members(parts.stem)

    def fitting(prefix: str) -> int:
        return sum(fits(parts, t, find_source(t, parts.stem, prefix, tensors), tensors) for t in members)

    candidates = [prefix for prefix in (named, beside) if prefix is not None]
    best = max(candidates, key=fitting)  # the named one of equals
    return (best, best == named) if fitting(best) else None


def _find_positions(parts: NetworkParts, tensors: Tensors, encoder: str, named: str | None) -> str | None:
    """The name of the learned positions: those of the encoder, else as named.

    The encoder's go first, since the second transformer of a masked autoencoder has positions too.
    """
    if parts.positions is None:
        return None
    relative = below(parts.positions, parts.encoder)
    name = join_name(encoder, relative) if relative is not None else None
    return next((candidate for candidate in (name, named) if candidate in tensors), None)


def _is_complete(parts: NetworkParts, places: Sequence[tuple[str, str]], tensors: Tensors) -> bool:
    """Whether the places (prefix in the network, prefix in the checkpoint) hold exactly the network's tensors."""
    known: set[str] = set()
    for target, source in places:
        for tensor in parts.members(target):
            if source == "decoder" and parts.part_of(tensor):
                continue  # the encoder again, under the decoder; safetensors keep one of two names
            names = find_source(tensor, target, source, tensors)
            if not fits(parts, tensor, names, tensors) and "seg_layers" not in tensor.names[0].split("."):
                return False
            known.update(names)
    return not any(_is_left_over(name, source) for _, source in places for name in tensors.keys() - known)


def _is_left_over(name: str, prefix: str) -> bool:
    rest = below(name, prefix)
    return (
        rest is not None and not is_special_token(name) and not {"rope", "seg_layers", "encoder"} & {*rest.split(".")}
    )


def find_source(tensor: TargetTensor, target_prefix: str, source_prefix: str, source: Tensors) -> list[str]:
    """Names in the checkpoint of one tensor of the network, the trained alias first; empty when it is not there."""
    names = (join_name(source_prefix, name) for name in tensor.below(target_prefix))
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
