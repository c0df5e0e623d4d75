"""A network's architecture read off its tensors' names and shapes, for files whose plan is missing or wrong.

What leaves no trace in the tensors (activation, dropout, strides where there is no decoder, attention heads) is taken from
hints, else from what nnU-Net and nnssl always use, and named as guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnssl_adapt.errors import ArchitectureError
from nnssl_adapt.weights.network.architectures import KINDS, Architecture, Shape
from nnssl_adapt.weights.network.arguments import BLOCKS_PER_STAGE
from nnssl_adapt.weights.network.network_parts import COPIES, Tensors, below, join_name
from nnssl_adapt.weights.network.presets import PRESETS

_LAYER = r"(?:conv|all_modules\.0)\.weight"
_N = r"(\d{1,4})"  # no network has more layers, and numbers in a damaged file may have thousands of digits
_PLAIN = re.compile(rf"stages\.{_N}\.\d\.convs\.{_N}\.{_LAYER}")
_RESIDUAL = re.compile(rf"stages\.{_N}\.blocks\.{_N}\.conv(\d)\.{_LAYER}")
_DECODER = re.compile(rf"stages\.{_N}\.convs\.{_N}\.{_LAYER}")
_TRANSPOSED = re.compile(rf"transpconvs\.{_N}\.weight")
_HEAD = re.compile(rf"seg_layers\.{_N}\.weight")
_BLOCK = re.compile(rf"blocks\.{_N}\..+")
_FIRST = re.compile(rf"(?:(.+)\.)?stages\.0\.(?:\d\.convs\.0|blocks\.0\.conv1)\.{_LAYER}")

_AS_ALWAYS: dict[str, Any] = {
    "conv_op": "Conv3d",
    "norm_op": "InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
"""What nnU-Net's planners and nnssl give every U-Net."""

_CONVOLUTIONS = (4, 5)
"""Axes of a convolution's weights: two more than the image has."""

_HEADS_OF_WIDTH = {
    kwargs["embed_dim"]: kwargs["eva_numheads"] for _, kwargs in PRESETS.values() if "embed_dim" in kwargs
}


@dataclass(frozen=True)
class Topology:
    """What the tensors say about their network.

    Attributes:
        architecture: of the network.
        encoder: dotted prefix of the part that has the stages (``encoder``), or of the transformer (``eva``).
        channels: image channels that the stem takes.
        heads: outputs of the last segmentation layer, None where there is none.
        guessed: arguments that the tensors don't tell.
        patch_size: the patch (Z, Y, X) in voxels of a transformer whose learned positions fill a cube, else None.
    """

    architecture: Architecture
    encoder: str
    channels: int
    heads: int | None = None
    guessed: tuple[str, ...] = ()
    patch_size: Shape | None = None


def read_topology(tensors: Tensors, hints: Mapping[str, Any] | None = None) -> Topology:
    """Read the architecture off names and shapes; ``hints`` are arguments to use for what they don't tell.

    Raises ArchitectureError saying what is missing, when the tensors are those of no network that is known.
    """
    for class_name, kind in KINDS.items():
        if (reading := kind.read(tensors, hints or {})) is not None:
            architecture = Architecture(class_name, reading.kwargs)
            return Topology(architecture, reading.encoder, reading.channels, reading.heads, reading.guessed)
    projections = [name for name in tensors if re.fullmatch(r"(?:.+\.)?down_projection\.(?:final_)?proj\.weight", name)]
    if projections:
        name = min(projections, key=_is_copy)
        return _read_primus(tensors, name.rpartition("down_projection.")[0].rstrip("."), hints or {})
    found = {match[1] or "" for match in map(_FIRST.fullmatch, tensors) if match}
    if found:
        return read_unet(tensors, min(found, key=_is_copy), hints or {})
    raise ArchitectureError(
        "its tensors are neither a U-Net's (encoder.stages…) nor a Primus's (down_projection, eva…)"
    )


def _is_copy(name: str) -> tuple[int, int, str]:
    words = name.split(".")
    return sum(word in words for word in COPIES), len(name), name


# -- U-Nets ----------------------------------------------------------------------------------------------------------


def read_unet(tensors: Tensors, encoder: str, hints: Mapping[str, Any]) -> Topology:
    """The U-Net whose encoder's stages lie under ``encoder``; its decoder is looked for beside it."""
    inside = {rest: tuple(t.shape) for name, t in tensors.items() if (rest := below(name, encoder)) is not None}
    # The same network of two axes has the same names, and kernels of two axes.
    axes = 2 if any(len(shape) == 4 for name, shape in inside.items() if name.endswith(".weight")) else 3
    always = {k: v.replace("3d", f"{axes}d") if isinstance(v, str) else v for k, v in _AS_ALWAYS.items()}
    residual = any(_RESIDUAL.fullmatch(name) for name in inside)
    class_name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    kwargs = {**always, **{key: hints[key] for key in always if key in hints}}
    kwargs |= _residual_stages(inside) if residual else _plain_stages(inside)
    kwargs |= _layer_options(inside, kwargs)
    first = _shape_of(inside, "stem.convs.0" if residual else "stages.0.0.convs.0")
    above = encoder.rpartition(".")[0]
    decoder, heads, guessed = _decoder(tensors, join_name(above, "decoder"), class_name, kwargs, hints)
    return Topology(Architecture(class_name, {**kwargs, **decoder}), encoder, first[1], heads, tuple(guessed))


def _plain_stages(inside: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    stages = _by_stage(inside, _PLAIN)
    last = [convs[max(convs)] for convs in stages]
    return {
        "n_stages": len(stages),
        "features_per_stage": [shape[0] for shape in last],
        "kernel_sizes": [list(shape[2:]) for shape in last],
        BLOCKS_PER_STAGE["PlainConvUNet"]: [len(convs) for convs in stages],
    }


def _residual_stages(inside: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Basic blocks have two convolutions with the stage's kernel, bottleneck blocks one between two of size 1."""
    convs = {number: _by_stage(inside, _RESIDUAL, number) for number in ("2", "3")}
    stages = convs["2"]
    widest = convs["3"] or stages
    kwargs: dict[str, Any] = {
        "n_stages": len(stages),
        "features_per_stage": [blocks[0][0] for blocks in widest],
        "kernel_sizes": [list(blocks[0][2:]) for blocks in stages],
        BLOCKS_PER_STAGE["ResidualEncoderUNet"]: [len(blocks) for blocks in stages],
    }
    if convs["3"]:
        kwargs |= {"block": "BottleneckD", "bottleneck_channels": [blocks[0][0] for blocks in stages]}
    stem = _shape_of(inside, "stem.convs.0")[0]
    if stem != kwargs["features_per_stage"][0]:
        kwargs["stem_channels"] = stem
    return kwargs


def _by_stage(
    inside: Mapping[str, tuple[int, ...]], pattern: re.Pattern[str], third: str | None = None
) -> list[dict[int, tuple[int, ...]]]:
    """For each stage: number of the convolution (or block) → shape of its weight."""
    stages: dict[int, dict[int, tuple[int, ...]]] = {}
    for name, shape in inside.items():
        match = pattern.fullmatch(name)
        if match and (third is None or match[3] == third):
            if len(shape) not in _CONVOLUTIONS:
                raise ArchitectureError(f"{name} has {len(shape)} axes, expected 5 (a 3D convolution; 4 of a 2D one)")
            stages.setdefault(int(match[1]), {})[int(match[2])] = shape
    _check_counted("stages", stages)
    for stage, members in stages.items():
        _check_counted(f"stage {stage}'s convolutions", members)
    return [stages[stage] for stage in sorted(stages)]


def _check_counted(what: str, found: Iterable[int]) -> None:
    numbers = sorted(found)
    if numbers != list(range(len(numbers))):
        raise ArchitectureError(f"{what} are numbered {numbers[:8]}, expected 0, 1, 2, … without gaps")


def _shape_of(inside: Mapping[str, tuple[int, ...]], layer: str) -> tuple[int, ...]:
    for name in (f"{layer}.all_modules.0.weight", f"{layer}.conv.weight"):
        if name in inside:
            if len(inside[name]) not in _CONVOLUTIONS:
                raise ArchitectureError(
                    f"{name} has {len(inside[name])} axes, expected 5 (a 3D convolution; 4 of a 2D one)"
                )
            return inside[name]
    raise ArchitectureError(f"there is no {layer}.conv.weight")


def _layer_options(inside: Mapping[str, tuple[int, ...]], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Biases, and what normalises: told by the tensors that a layer has beside its kernel."""
    options: dict[str, Any] = {"conv_bias": any(re.search(r"(conv|all_modules\.0)\.bias$", name) for name in inside)}
    statistics = any(name.endswith(".running_mean") for name in inside)
    affine = any(re.search(r"(norm|all_modules\.1)\.weight$", name) for name in inside)
    if statistics:
        options["norm_op"] = f"BatchNorm{str(kwargs['norm_op'])[-2:]}"
    elif "BatchNorm" in str(kwargs["norm_op"]):
        options["norm_op"] = f"InstanceNorm{str(kwargs['norm_op'])[-2:]}"
    options["norm_op_kwargs"] = {**(kwargs["norm_op_kwargs"] or {}), "affine": affine}
    return options


def _decoder(
    tensors: Tensors, prefix: str, class_name: str, kwargs: Mapping[str, Any], hints: Mapping[str, Any]
) -> tuple[dict[str, Any], int | None, list[str]]:
    """Strides, convolutions a stage and heads from a U-Net's own decoder, or guesses where there is none."""
    inside = {rest: tuple(t.shape) for name, t in tensors.items() if (rest := below(name, prefix)) is not None}
    stages, ups = kwargs["n_stages"], {}
    axes = len(kwargs["kernel_sizes"][0])
    for name, shape in inside.items():
        if (match := _TRANSPOSED.fullmatch(name)) and len(shape) in _CONVOLUTIONS:
            ups[int(match[1])] = list(shape[2:])
    guessed = []
    if sorted(ups) == list(range(stages - 1)):
        # Each transposed convolution undoes one stage's step with a kernel of the same size, the deepest first.
        strides = [[1] * axes, *(ups[index] for index in reversed(range(stages - 1)))]
    else:
        strides = list(hints.get("strides") or ())
        if len(strides) != stages:
            strides = [[1] * axes, *([[2] * axes] * (stages - 1))]
            guessed.append("strides")
    convs = _by_stage({k: v for k, v in inside.items() if len(v) in _CONVOLUTIONS}, _DECODER)
    per_stage = [len(members) for members in convs]
    if len(per_stage) != stages - 1:
        per_stage = list(hints.get("n_conv_per_stage_decoder") or ())
    if len(per_stage) != stages - 1:
        per_stage = [1 if class_name == "ResidualEncoderUNet" else 2] * (stages - 1)
        guessed.append("n_conv_per_stage_decoder")
    layers = {int(match[1]): shape for name, shape in inside.items() if (match := _HEAD.fullmatch(name)) and shape}
    heads = layers[max(layers)][0] if layers else None
    return {"strides": strides, "n_conv_per_stage_decoder": per_stage}, heads, guessed


# -- transformers ----------------------------------------------------------------------------------------------------


def _read_primus(tensors: Tensors, root: str, hints: Mapping[str, Any]) -> Topology:
    """A Primus under ``root`` (a level deeper than the file in some families)."""
    class_name, width, channels, patch = _tokenizer(tensors, join_name(root, "down_projection"))
    encoder = join_name(root, "eva")
    inside = {rest: tuple(t.shape) for name, t in tensors.items() if (rest := below(name, encoder)) is not None}
    blocks = {int(match[1]) for match in map(_BLOCK.fullmatch, inside) if match}
    _check_counted("the transformer's blocks", blocks)
    if not blocks:
        raise ArchitectureError(f"there are no {encoder}.blocks")
    heads, guessed = _attention_heads(width, hints)
    kwargs = {key: hints[key] for key in ("drop_path_rate", "attn_drop_rate", "proj_drop_rate") if key in hints}
    kwargs |= {
        "embed_dim": width,
        "patch_embed_size": patch,
        "eva_depth": len(blocks),
        "eva_numheads": heads,
        "init_values": (hints.get("init_values") or 0.1) if "blocks.0.gamma_1" in inside else None,
        "scale_attn_inner": "blocks.0.attn.norm.weight" in inside,
    }
    hidden = (*inside.get("blocks.0.mlp.fc1_g.weight", ()), 0)[0]
    if hidden and hidden != int(width * 4 * 2 / 3):
        kwargs["mlp_ratio"] = hidden / width
    if "pos_embed" not in inside:
        kwargs["use_abs_pos_embed"] = False
    kwargs |= {key: hints[key] for key in ("use_rot_pos_emb", "rope_kwargs") if key in hints}
    cube = _cube_of_positions(inside.get("pos_embed", ()), patch)
    return Topology(Architecture(class_name, kwargs), encoder, channels, None, guessed, cube)


def _cube_of_positions(shape: tuple[int, ...], token: Sequence[int]) -> Shape | None:
    """The patch of learned positions (1, N, C) that fill a cube of tokens; None where they don't, or there are none."""
    count = shape[1] if len(shape) == 3 else 0
    side = round(count ** (1 / 3))
    if count == 0 or side**3 != count:
        return None
    z, y, x = (side * step for step in token)
    return z, y, x


def _tokenizer(tensors: Tensors, prefix: str) -> tuple[str, int, int, list[int]]:
    """(class, width, image channels, patch of a token) of a Primus by what makes its tokens: one convolution, or several."""
    final = next((n for n in ("proj", "final_proj") if join_name(prefix, f"{n}.weight") in tensors), "proj")
    first = "proj.weight" if final == "proj" else "stem.blocks.0.conv1.conv.weight"
    shapes = [
        tuple(tensors[name].shape) for n in (f"{final}.weight", first) if (name := join_name(prefix, n)) in tensors
    ]
    if len(shapes) < 2 or any(len(shape) != 5 for shape in shapes):
        raise ArchitectureError(f"{prefix}.{first} is missing or has other than 5 axes (out, in, Z, Y, X)")
    (width, *_), (_, channels, *kernel) = shapes
    if final == "proj":
        return "Primus", max(width, 1), channels, kernel
    version = "PrimusV3" if join_name(prefix, "proj_to_tokens.0.weight") in tensors else "PrimusV2"
    return version, max(width, 1), channels, [8, 8, 8]


def _attention_heads(width: int, hints: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Heads leave no trace in the tensors: as hinted, else as in the published network of this width."""
    hinted = hints.get("eva_numheads")
    for heads in (hinted, _HEADS_OF_WIDTH.get(width)):
        if heads and width % heads == 0 and (width // heads) % 6 == 0:
            return int(heads), () if heads == hinted else ("eva_numheads",)
    raise ArchitectureError(f"a transformer {width} wide doesn't say how many attention heads it has")
