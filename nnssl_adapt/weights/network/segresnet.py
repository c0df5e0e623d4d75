"""SegResNet as data, read off its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nnssl_adapt.errors import ArchitectureError
from nnssl_adapt.weights.network.arguments import check_keys, flag, positive_int
from nnssl_adapt.weights.network.kinds import NetworkKind, Reading, Tensors
from nnssl_adapt.weights.network.network_parts import below

CLASS_NAME = "SegResNet"
NORMS = ("batch", "group", "instance", "instance_plain")
UPSAMPLING = ("deconv", "linear")

_FIRST = re.compile(r"(?:(.+)\.)?encoder\.stages\.0\.blocks\.0\.conv1\.weight")
_BLOCK = re.compile(r"stages\.(\d{1,2})\.blocks\.(\d{1,3})\.conv1\.weight")
_DECODER_BLOCK = re.compile(r"stages\.(\d{1,2})\.(\d{1,3})\.conv1\.weight")
_HEAD = re.compile(r"seg_layers\.\d{1,2}\.weight")


def spell_out(class_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    needed = ("init_filters", "blocks_down", "blocks_up", "norm", "decoder_norm", "upsampling", "final_norm")
    check_keys(class_name, kwargs, needed, set())
    spelled: dict[str, Any] = {"init_filters": positive_int(class_name, "init_filters", kwargs["init_filters"])}
    for key in ("blocks_down", "blocks_up"):
        if not isinstance(kwargs[key], (list, tuple)) or not 1 <= len(kwargs[key]) <= 12:
            raise ArchitectureError(f"{class_name}: {key} is {kwargs[key]!r}, expected a number for each stage")
        spelled[key] = [positive_int(class_name, "n_blocks_per_stage", blocks) for blocks in kwargs[key]]
    if len(spelled["blocks_up"]) != len(spelled["blocks_down"]) - 1:
        raise ArchitectureError(f"{class_name}: blocks_up needs one entry fewer than blocks_down")
    for key, choices in (("norm", NORMS), ("decoder_norm", NORMS), ("upsampling", UPSAMPLING)):
        if kwargs[key] not in choices:
            raise ArchitectureError(f"{class_name}: {key} is {kwargs[key]!r}, expected one of {', '.join(choices)}")
        spelled[key] = kwargs[key]
    spelled["final_norm"] = flag(class_name, "final_norm", kwargs["final_norm"])
    return spelled


def read(tensors: Tensors, hints: Mapping[str, Any]) -> Reading | None:
    """The SegResNet that has these blocks; hints say which normalisation has weights and no statistics."""
    roots = [match[1] or "" for match in map(_FIRST.fullmatch, tensors) if match]
    if not roots:
        return None
    root = min(roots, key=len)
    inside = {name: t for full, t in tensors.items() if (name := below(full, f"{root}.encoder" if root else "encoder"))}
    stem = inside.get("stem.weight")
    if stem is None or stem.ndim != 5:
        raise ArchitectureError(
            "its convolutions have two axes: it is a 2D network, and only 3D ones can be used"
            if stem is not None
            else "it has blocks of a SegResNet and no first convolution (encoder.stem)"
        )
    if tuple(inside["stages.0.blocks.0.conv1.weight"].shape[2:]) != (3, 3, 3):
        raise ArchitectureError("it is a SegResNet with kernels for one spacing (resolution), which is not known here")
    blocks = _counted(_BLOCK, inside)
    decoder = {
        name: t for full, t in tensors.items() if (name := below(full, f"{root}.decoder" if root else "decoder"))
    }
    up = _counted(_DECODER_BLOCK, decoder)
    guessed = []
    if len(up) != len(blocks) - 1:
        up = [1] * (len(blocks) - 1)
    ups = decoder.get("transpconvs.0.weight")
    upsampling = hints.get("upsampling") or "deconv"
    if ups is not None:
        upsampling = "linear" if tuple(ups.shape[2:]) == (1, 1, 1) else "deconv"
    norm, told = _norm({name: t for name, t in inside.items() if name.startswith("stages.0.blocks.0.")}, hints)
    guessed += [] if told else ["norm"]
    kwargs = {
        "init_filters": int(stem.shape[0]),
        "blocks_down": blocks,
        "blocks_up": up,
        "norm": norm,
        # Statistics are worth keeping with the weights that they belong to; a fresh decoder has none.
        "decoder_norm": hints.get("decoder_norm") or ("instance" if norm == "batch" else norm),
        "upsampling": upsampling,
        "final_norm": "final_norm.weight" in decoder,
    }
    heads = [int(t.shape[0]) for name, t in decoder.items() if _HEAD.fullmatch(name)]
    encoder = f"{root}.encoder.stages" if root else "encoder.stages"
    return Reading(kwargs, encoder, int(stem.shape[1]), heads[-1] if heads else None, tuple(guessed))


def _norm(block: Tensors, hints: Mapping[str, Any]) -> tuple[str, bool]:
    """Normalisation of an encoder's first block, and whether its tensors or a hint tell it."""
    if any(name.endswith("running_mean") for name in block):
        return "batch", True
    if not any(name.endswith("norm1.weight") for name in block):
        return "instance_plain", True
    hinted = hints.get("norm")
    return (hinted, True) if hinted in ("group", "instance") else ("instance", False)


def _counted(pattern: re.Pattern[str], names: Tensors) -> list[int]:
    """Blocks of each stage; ArchitectureError where their numbers have gaps."""
    found: dict[int, set[int]] = {}
    for match in filter(None, map(pattern.fullmatch, names)):
        found.setdefault(int(match[1]), set()).add(int(match[2]))
    for numbers in (set(found), *found.values()):
        if numbers != set(range(len(numbers))):
            raise ArchitectureError(f"its stages or blocks are numbered {sorted(numbers)[:8]}, expected 0, 1, 2, …")
    return [len(found[stage]) for stage in sorted(found)]


SEG_RES_NET = NetworkKind(
    module="nnssl_adapt.weights.modules.segresnet",
    spell_out=spell_out,
    strides=lambda kwargs: [[1, 1, 1], *([[2, 2, 2]] * (len(kwargs["blocks_down"]) - 1))],
    size=lambda kwargs: (
        f"{kwargs['init_filters']} wide, blocks {'-'.join(map(str, kwargs['blocks_down']))}, {kwargs['norm']} normalisation"
    ),
    blocks=lambda kwargs: dict(enumerate(kwargs["blocks_down"])),
    stages=lambda kwargs: len(kwargs["blocks_down"]),
    is_resizable=False,
    needs_pretraining=lambda kwargs: (
        "its batch normalisation keeps the statistics of pre-training" if kwargs["norm"] == "batch" else ""
    ),
    untold=("norm",),
    read=read,
)
