"""Swin UNETR as data. Its sizes follow from one number; what its tensors don't tell is in which order it merges patches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nnssl_adapt.errors import ArchitectureError
from nnssl_adapt.weights.network.arguments import check_keys, number, positive_int
from nnssl_adapt.weights.network.kinds import NetworkKind, Reading, Tensors

CLASS_NAME = "SwinUNETR"
PATCH_MERGINGS = ("old", "new")

_STEM = re.compile(r"(?:(.+)\.)?encoder\.stem\.weight")
_ATTENTION = "encoder.stages.2.swin.blocks.0.attn.qkv.weight"


def spell_out(class_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    check_keys(class_name, kwargs, ("feature_size", "version", "patch_merging"), {"drop_path_rate"})
    width = positive_int(class_name, "feature_size", kwargs["feature_size"])
    version = positive_int(class_name, "version", kwargs["version"])
    if width % 12:
        raise ArchitectureError(f"{class_name}: feature_size is {width}, expected a multiple of 12")
    if version not in (1, 2):
        raise ArchitectureError(f"{class_name}: version is {version}, expected 1 or 2")
    if kwargs["patch_merging"] not in PATCH_MERGINGS:
        raise ArchitectureError(
            f"{class_name}: patch_merging is {kwargs['patch_merging']!r}, expected {' or '.join(PATCH_MERGINGS)}"
        )
    spelled: dict[str, Any] = {"feature_size": width, "version": version, "patch_merging": kwargs["patch_merging"]}
    if kwargs.get("drop_path_rate"):
        spelled["drop_path_rate"] = number(class_name, "drop_path_rate", kwargs["drop_path_rate"])
    return spelled


def read(tensors: Tensors, hints: Mapping[str, Any]) -> Reading | None:
    """The Swin UNETR whose attention is there, with or without the convolutions beside it."""
    roots = [match[1] or "" for match in map(_STEM.fullmatch, tensors) if match]
    prefixes = [f"{root}." if root else "" for root in roots]
    prefix = next((p for p in prefixes if f"{p}{_ATTENTION}" in tensors), None)
    if prefix is None:
        return None
    stem = tensors[f"{prefix}encoder.stem.weight"]
    if stem.ndim != 5:
        raise ArchitectureError("its patches have two axes: it is a 2D network, and only 3D ones can be used")
    table = tensors.get(f"{prefix}encoder.stages.2.swin.blocks.0.attn.relative_position_bias_table")
    if table is None or table.shape != (2197, 3) or tuple(stem.shape[2:]) != (2, 2, 2):
        raise ArchitectureError(
            "its attention is not that of the published Swin UNETR (windows of 7 voxels, 3 heads, patches of 2 voxels)"
        )
    if f"{prefix}encoder.stages.2.swin.blocks.2.attn.qkv.weight" in tensors:
        raise ArchitectureError("its stages have more than two blocks: it is no published Swin UNETR")
    merging = hints.get("patch_merging")
    if merging not in PATCH_MERGINGS:
        raise ArchitectureError(
            "its tensors don't tell how it merges patches, on which its function depends: "
            "say --patch-merging old if it was trained with MONAI up to 1.4, new if with 1.5 or later"
        )
    version = 2 if any(name.startswith(f"{prefix}encoder.stages.2.conv.") for name in tensors) else 1
    kwargs = {"feature_size": int(stem.shape[0]), "version": version, "patch_merging": merging}
    head = tensors.get(f"{prefix}decoder.seg_layers.4.weight")
    return Reading(kwargs, f"{prefix}encoder.stages", int(stem.shape[1]), None if head is None else int(head.shape[0]))


SWIN_UNETR = NetworkKind(
    module="nnssl_adapt.weights.modules.swin_unetr",
    spell_out=spell_out,
    strides=lambda kwargs: [[1, 1, 1], *([[2, 2, 2]] * 5)],
    size=lambda kwargs: (
        f"version {kwargs['version']}, {kwargs['feature_size']} wide, merging patches as MONAI "
        + ("up to 1.4" if kwargs["patch_merging"] == "old" else "since 1.5")
    ),
    blocks=lambda kwargs: {},
    stages=lambda kwargs: 6,
    recipe="swin_unetr",
    optimizer="adamw",
    is_resizable=False,
    has_attention=True,
    has_deep_supervision=False,
    has_symmetric_axes=False,
    may_lack=((r"\d\.residual\..+", "the file holds the Swin transformer without the convolutions beside it"),),
    needs=("monai", "nnssl-adapt[monai]"),
    untold=("patch_merging",),
    read=read,
)
