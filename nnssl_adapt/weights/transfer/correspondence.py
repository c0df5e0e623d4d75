"""Which tensor of a checkpoint belongs to which of a network, where the two have other stages, blocks or depth.

Stages and blocks are matched by their numbers, a U-Net's decoder by resolution. What one side has more of is known here by
counting; a gap inside a block that both have is damage, and no rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nnssl_adapt.weights.network.architectures import Architecture

_CNN_BLOCK = re.compile(r"(?P<stage>\d+)\.(?:\d+\.)?(?P<word>blocks|convs)\.(?P<block>\d+)\.(?P<rest>.+)")
_EVA_BLOCK = re.compile(r"blocks\.(?P<block>\d+)\.(?P<rest>.+)")
_SKIP = re.compile(r"skip\.(\d)\.")
_NORM = re.compile(r"(norm|all_modules\.1)\.(weight|bias)$")
_CONV_BIAS = re.compile(r"(conv|all_modules\.0)\.bias$")
_GAMMA = re.compile(r"gamma_[12]$")


@dataclass(frozen=True)
class BlockPlace:
    """Where in an encoder a tensor lies: ``stage`` is None in a transformer, ``rest`` the name within the block."""

    stage: int | None
    block: int
    rest: str
    blocks_word: str = "block"

    def __str__(self) -> str:
        where = "" if self.stage is None else f" of stage {self.stage}"
        return f"{self.blocks_word} {self.block}{where}"


def block_place(relative: str) -> BlockPlace | None:
    """Of a name below the encoder (``2.blocks.0.conv1.conv.weight``, ``blocks.7.norm1.bias``); None outside of blocks."""
    match = _CNN_BLOCK.fullmatch(relative)
    if match:
        word = "block" if match["word"] == "blocks" else "convolution"
        return BlockPlace(int(match["stage"]), int(match["block"]), match["rest"], word)
    match = _EVA_BLOCK.fullmatch(relative)
    return BlockPlace(None, int(match["block"]), match["rest"]) if match else None


@dataclass(frozen=True)
class Encoder:
    """The stages and blocks of an encoder, and which kinds of tensors its blocks have at all.

    Attributes:
        blocks: stage → number of blocks; a transformer has the one stage None.
        names: the names within blocks.
    """

    blocks: Mapping[int | None, int]
    names: frozenset[str]

    @classmethod
    def of(cls, relative_names: Iterable[str], architecture: Architecture | None = None) -> Encoder:
        """Counted from names below the encoder; with ``architecture``, at least what that says there has to be."""
        places = [place for place in map(block_place, relative_names) if place is not None]
        blocks: dict[int | None, int] = dict(_promised(architecture)) if architecture is not None else {}
        for place in places:
            blocks[place.stage] = max(blocks.get(place.stage, 0), place.block + 1)
        return cls(blocks, frozenset(place.rest for place in places))

    @property
    def stages(self) -> int:
        return max((stage + 1 for stage in self.blocks if stage is not None), default=0)

    def lacks(self, place: BlockPlace) -> str | None:
        """Why a block that another encoder has is not in this one, in words that follow "…"; None when it is."""
        if self.lacks_stage(place):
            return _counted(self.stages, "stage")
        count = self.blocks.get(place.stage, 0)
        return _counted(count, place.blocks_word) if place.block >= count else None

    def lacks_stage(self, place: BlockPlace) -> bool:
        return place.stage is not None and place.stage >= self.stages

    def has(self, pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(name) for name in self.names)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _promised(architecture: Architecture) -> Mapping[int | None, int]:
    return architecture.kind.blocks(architecture.kwargs)


def other_names(relative: str) -> list[str]:
    """Under which names the same tensor lies in a block with other strides: a projection follows the pooling, if any."""
    match = _SKIP.search(relative)
    if match is None:
        return [relative]
    other = f"skip.{1 - int(match[1])}." if match[1] in "01" else match[0]
    return list(dict.fromkeys([relative, relative.replace(match[0], other)]))


# -- reasons ---------------------------------------------------------------------------------------------------------


def why_fresh(relative: str, checkpoint: Encoder) -> str | None:
    """Why a tensor of the network may have no counterpart in the checkpoint's encoder; None: it should have one."""
    place = block_place(relative)
    if place is None:
        return None
    lacking = checkpoint.lacks(place)
    if lacking is not None:
        missing = f"stage {place.stage}" if checkpoint.lacks_stage(place) else str(place)
        return f"{missing} is not in the checkpoint ({lacking})"
    if _SKIP.match(place.rest):
        return "projection of a skip connection, the checkpoint's passes on its input as it is"
    if _CONV_BIAS.search(place.rest) and not checkpoint.has(_CONV_BIAS):
        return "the checkpoint's convolutions have no bias"
    if _NORM.search(place.rest) and place.stage is not None and not checkpoint.has(_NORM):
        return "the checkpoint's normalisation has no weight and bias; new ones are 1 and 0 and do the same"
    return None


def does_nothing_as_one(relative: str, checkpoint: Encoder) -> bool:
    """Whether it scales a branch of a transformer's block, which the checkpoint's does not: 1 keeps the function."""
    return bool(_GAMMA.search(relative)) and not checkpoint.has(_GAMMA)


def why_dropped(relative: str, network: Encoder) -> str | None:
    """Why a tensor of the checkpoint's encoder may have no place in the network; None: it should have one."""
    place = block_place(relative)
    if place is None:
        return None
    lacking = network.lacks(place)
    if lacking is not None:
        whole = network.lacks_stage(place) or place.stage is None
        where = "the network" if whole else f"the network's stage {place.stage}"
        return f"{where} has {lacking}"
    if _SKIP.match(place.rest):
        return "projection of a skip connection, the network's passes on its input as it is"
    if _CONV_BIAS.search(place.rest) and not network.has(_CONV_BIAS) and network.has(_NORM):
        return "the network's convolutions have no bias (normalisation takes it away)"
    return None


def different_blocks(relative: str, other: Encoder) -> str | None:
    """A word on blocks built another way, for the message about a tensor that has no counterpart."""
    place = block_place(relative)
    if place is None or place.rest in other.names:
        return None
    if place.rest.startswith("conv3."):
        return "bottleneck blocks on one side, basic blocks on the other"
    if _NORM.search(place.rest) and not other.has(_NORM):
        return "normalisation with weights on one side, without on the other"
    if place.rest.startswith("attn.norm."):
        return "attention is normalised (scale_attn_inner) on one side only"
    if _GAMMA.search(place.rest):
        return "blocks are scaled (init_values) on one side only"
    return None


# -- a U-Net's decoder -----------------------------------------------------------------------------------------------

_DECODER_STAGE = re.compile(r"(?P<part>stages|transpconvs|seg_layers)\.(?P<stage>\d+)\.(?P<rest>.+)")


def decoder_stages(relative_names: Iterable[str]) -> int:
    """Number of stages, from names below the decoder."""
    matches = (_DECODER_STAGE.fullmatch(name) for name in relative_names)
    return max((int(match["stage"]) + 1 for match in matches if match), default=0)


def same_resolution(relative: str, stages: int, others: int) -> str | None:
    """The name, in a decoder with ``others`` stages, of what has the same resolution; None when that is not there.

    Decoders count from the coarsest stage, so that it is the last ones that agree.
    """
    match = _DECODER_STAGE.fullmatch(relative)
    if match is None:
        return relative
    stage = int(match["stage"]) - stages + others
    return f"{match['part']}.{stage}.{match['rest']}" if stage >= 0 else None
