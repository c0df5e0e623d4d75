"""U-Nets with max pooling as data, read off their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nnssl_adapt.errors import ArchitectureError
from nnssl_adapt.weights.network.arguments import check_keys, flag, number, positive_int
from nnssl_adapt.weights.network.kinds import NetworkKind, Reading, Tensors
from nnssl_adapt.weights.network.network_parts import below, join_name

CLASS_NAME = "MaxPoolUNet"
NORMS = ("instance", "own_statistics")

_FIRST = re.compile(r"(?:(.+)\.)?encoder\.stages\.0\.convs\.0\.conv\.weight")
_KERNEL = re.compile(r"stages\.(\d{1,2})\.convs\.([01])\.conv\.weight")
_HEAD = re.compile(r"seg_layers\.\d{1,2}\.weight")


def spell_out(class_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    needed = ("features_per_stage", "first_features_per_stage", "narrows", "norm", "slope")
    check_keys(class_name, kwargs, needed, set())
    spelled: dict[str, Any] = {}
    for key in needed[:2]:
        if not isinstance(kwargs[key], (list, tuple)) or not 2 <= len(kwargs[key]) <= 12:
            raise ArchitectureError(f"{class_name}: {key} is {kwargs[key]!r}, expected a width for each stage")
        spelled[key] = [positive_int(class_name, key, width) for width in kwargs[key]]
    if len(spelled[needed[0]]) != len(spelled[needed[1]]):
        raise ArchitectureError(f"{class_name}: {needed[0]} and {needed[1]} need an entry for each stage")
    if kwargs["norm"] not in NORMS:
        raise ArchitectureError(f"{class_name}: norm is {kwargs['norm']!r}, expected one of {', '.join(NORMS)}")
    slope = number(class_name, "slope", kwargs["slope"])
    return {
        **spelled,
        "narrows": flag(class_name, "narrows", kwargs["narrows"]),
        "norm": kwargs["norm"],
        "slope": slope,
    }


def read(tensors: Tensors, hints: Mapping[str, Any]) -> Reading | None:
    """The U-Net that has these convolutions; normalisation and activation are hints, else those of nnU-Net's networks."""
    roots = [match[1] or "" for match in map(_FIRST.fullmatch, tensors) if match]
    if not roots:
        return None
    root = min(roots, key=len)
    inside, decoder = (_below(tensors, join_name(root, part)) for part in ("encoder", "decoder"))
    kernels = {(int(m[1]), int(m[2])): t for name, t in inside.items() if (m := _KERNEL.fullmatch(name))}
    stages = len(kernels) // 2
    if any(kernel.ndim != 5 for kernel in kernels.values()):
        raise ArchitectureError("its convolutions have two axes: it is a 2D network, and only 3D ones can be used")
    if set(kernels) != {(stage, conv) for stage in range(stages) for conv in (0, 1)}:
        raise ArchitectureError(f"its convolutions are numbered {sorted(kernels)[:8]}, expected two for each stage")
    if any(tuple(t.shape[2:]) != (3, 3, 3) for t in kernels.values()):
        raise ArchitectureError("its convolutions have other kernels than 3×3×3, which is not known here")
    up = decoder.get("transpconvs.0.weight")
    kwargs = {
        "features_per_stage": [int(kernels[stage, 1].shape[0]) for stage in range(stages)],
        "first_features_per_stage": [int(kernels[stage, 0].shape[0]) for stage in range(stages)],
        "narrows": hints.get("narrows", True) if up is None else up.shape[0] != up.shape[1],
        "norm": hints.get("norm") or "instance",
        "slope": hints.get("slope", 0.01),
    }
    heads = [int(t.shape[0]) for name, t in decoder.items() if _HEAD.fullmatch(name)]
    guessed = tuple(name for name in ("norm", "slope") if name not in hints)
    channels = int(kernels[0, 0].shape[1])
    return Reading(kwargs, join_name(root, "encoder.stages"), channels, heads[-1] if heads else None, guessed)


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {rest: tensor for name, tensor in tensors.items() if (rest := below(name, prefix)) is not None}


def _size(kwargs: Mapping[str, Any]) -> str:
    return f"features {'-'.join(map(str, kwargs['features_per_stage']))}, {kwargs['norm']} normalisation"


MAX_POOL_UNET = NetworkKind(
    module="nnssl_adapt.weights.modules.max_pool_unet",
    spell_out=spell_out,
    strides=lambda kwargs: [[1, 1, 1], *([[2, 2, 2]] * (len(kwargs["features_per_stage"]) - 1))],
    size=_size,
    blocks=lambda kwargs: dict.fromkeys(range(len(kwargs["features_per_stage"])), 2),
    stages=lambda kwargs: len(kwargs["features_per_stage"]),
    is_resizable=False,
    untold=("norm", "slope"),
    read=read,
)
