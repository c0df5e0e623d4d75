"""STU-Net as data, read off its tensors. They don't tell its strides, since its decoder repeats voxels: those are hinted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nnssl_adapt.errors import ArchitectureError
from nnssl_adapt.weights.network.arguments import check_keys, positive_int, triple
from nnssl_adapt.weights.network.kinds import NetworkKind, Reading, Tensors
from nnssl_adapt.weights.network.network_parts import below, join_name

CLASS_NAME = "STUNet"
STRIDES = [[1, 1, 1], *([[2, 2, 2]] * 4), [1, 1, 2]]
"""Of the published networks."""

_FIRST = re.compile(r"(?:(.+)\.)?encoder\.stages\.0\.blocks\.0\.conv3\.weight")
_BLOCK = re.compile(r"stages\.(\d{1,2})\.blocks\.(\d{1,3})\.conv2\.weight")
_HEAD = re.compile(r"seg_layers\.\d{1,2}\.weight")


SIZES = {"S": (16, 1), "B": (32, 1), "L": (64, 2), "H": (96, 3)}
"""Width of the first stage and blocks a stage of the published networks."""


def published(letter: str) -> dict[str, Any]:
    """Arguments of the published network of this size."""
    width, blocks = SIZES[letter]
    return {
        "features_per_stage": [width * more for more in (1, 2, 4, 8, 16, 16)],
        "n_blocks_per_stage": [blocks] * 6,
        "kernel_sizes": [[3, 3, 3]] * 6,
        "strides": STRIDES,
    }


def steps_of_plans(strides: Sequence[Sequence[int]]) -> list[list[int]]:
    """Its strides on plans of nnU-Net: its trainers make five steps of whatever was planned."""
    steps = [list(step) for step in strides[1:6]]
    return [[1, 1, 1], *steps, *([[1, 1, 1]] * (5 - len(steps)))]


def spell_out(class_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    needed = ("features_per_stage", "n_blocks_per_stage", "kernel_sizes", "strides")
    check_keys(class_name, kwargs, needed, set())
    for key in needed:
        if not isinstance(kwargs[key], (list, tuple)) or not 2 <= len(kwargs[key]) <= 12:
            raise ArchitectureError(f"{class_name}: {key} is {kwargs[key]!r}, expected an entry for each stage")
        if len(kwargs[key]) != len(kwargs["strides"]):
            raise ArchitectureError(
                f"{class_name}: {key} has {len(kwargs[key])} entries, expected {len(kwargs['strides'])} (its strides)"
            )
    spelled: dict[str, Any] = {
        key: [positive_int(class_name, key, entry) for entry in kwargs[key]]
        for key in ("features_per_stage", "n_blocks_per_stage")
    }
    return spelled | {
        key: [triple(class_name, key, entry) for entry in kwargs[key]] for key in ("kernel_sizes", "strides")
    }


def read(tensors: Tensors, hints: Mapping[str, Any]) -> Reading | None:
    """The STU-Net that has these blocks; ``strides`` are a hint, else the published ones."""
    roots = [match[1] or "" for match in map(_FIRST.fullmatch, tensors) if match]
    if not roots:
        return None
    root = min(roots, key=len)
    inside = {name: t for full, t in tensors.items() if (name := below(full, join_name(root, "encoder")))}
    found: dict[int, list[Any]] = {}
    for name, tensor in inside.items():
        if match := _BLOCK.fullmatch(name):
            found.setdefault(int(match[1]), []).append(tensor)
    if set(found) != set(range(len(found))) or any(t.ndim != 5 for ts in found.values() for t in ts):
        raise ArchitectureError(f"its stages are numbered {sorted(found)[:8]} or have other than three axes")
    stages = [found[stage] for stage in range(len(found))]
    hinted = hints.get("strides") or STRIDES
    guessed: tuple[str, ...] = ()
    if not hints.get("strides"):
        guessed = ("strides",)
    # Its trainers make as many steps as it has stages of whatever nnU-Net planned.
    hinted = [*hinted[: len(stages)], *([[1, 1, 1]] * (len(stages) - len(hinted)))]
    kwargs = {
        "features_per_stage": [int(blocks[0].shape[0]) for blocks in stages],
        "n_blocks_per_stage": [len(blocks) for blocks in stages],
        "kernel_sizes": [list(blocks[0].shape[2:]) for blocks in stages],
        "strides": [list(step) for step in hinted],
    }
    decoder = {name: t for full, t in tensors.items() if (name := below(full, join_name(root, "decoder")))}
    heads = [int(t.shape[0]) for name, t in decoder.items() if _HEAD.fullmatch(name)]
    channels = int(inside["stages.0.blocks.0.conv3.weight"].shape[1])
    encoder = join_name(root, "encoder.stages")
    return Reading(kwargs, encoder, channels, heads[-1] if heads else None, guessed)


def _size(kwargs: Mapping[str, Any]) -> str:
    features, blocks = ("-".join(map(str, kwargs[key])) for key in ("features_per_stage", "n_blocks_per_stage"))
    return f"features {features}, blocks {blocks}"


STU_NET = NetworkKind(
    module="nnssl_adapt.weights.modules.stu_net",
    spell_out=spell_out,
    strides=lambda kwargs: kwargs["strides"],
    size=_size,
    blocks=lambda kwargs: dict(enumerate(kwargs["n_blocks_per_stage"])),
    stages=lambda kwargs: len(kwargs["strides"]),
    is_resizable=False,
    named_sizes=("features_per_stage", "n_blocks_per_stage"),
    read=read,
)
