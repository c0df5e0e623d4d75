"""nnU-Net version 1: ``model_final_checkpoint.model``, a state dict of its Generic_UNet.

The network is today's PlainConvUNet under other names (strided convolutions, instance normalisation, leaky ReLU of slope
0.01, transposed convolutions without bias), so that it is taken over exactly. Names as nnunet 1.7.1 writes them. How it was
preprocessed stands in the ``.model.pkl`` beside it, which is read as data.

One thing differs: at every resolution the decoder of version 1 has the kernel of the stage below, today's that of its own. An
encoder's kernel that is smaller than its decoder's gets zeros around it, which changes nothing that it computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch.nn.functional import pad

from nnssl_adapt.errors import AdaptationPlanError
from nnssl_adapt.weights.families.family import CT_SCHEME, Z_SCORE, Facts, Family, KeyMap
from nnssl_adapt.weights.families.nnunet import NNUNET_CITATION
from nnssl_adapt.weights.network.network_parts import Tensors

_LAYER = r"(weight|bias)"

_SCHEMES = {"CT": CT_SCHEME, "noNorm": "NoNormalization"}
"""Normalisation of version 1 → that of version 2; z-score for all other names, as there."""


def trained_as(content: Any, where: str, folder: str = "") -> dict[str, Any]:
    """What the ``.model.pkl`` of version 1 says, under the names that :class:`AdaptationPlan` has.

    Args:
        content: ``{init, name, class, plans}``, as plain values.
        where: the file, for messages.
        folder: the path of the weights, whose folders name the configuration (``3d_lowres``) where ``init`` does not.

    Spacing and patch are in the order of ``transpose_forward``, as there. Raises AdaptationPlanError for the second stage of
    a cascade, and for plans that lack an entry.
    """
    try:
        if "Cascade" in str(content["name"]) or "3d_cascade_fullres" in folder:
            raise AdaptationPlanError(
                f"{where} is the second stage of a cascade, which takes another network's labels as input: take the model's "
                "3d_fullres or 3d_lowres"
            )
        plans = content["plans"]
        stage = plans["plans_per_stage"][_stage(content, folder)]
        if len(stage["patch_size"]) != 3:
            raise AdaptationPlanError(
                f"{where} is a 2D network of version 1, and only its 3D ones can be used: take 3d_fullres"
            )
        schemes = _in_order(plans["normalization_schemes"])
        names = _in_order(plans.get("modalities") or plans["dataset_properties"]["modalities"])
        spacing = [float(step) for step in stage["current_spacing"]]
        return {
            "spacing": spacing,
            "patch_size": [int(size) for size in stage["patch_size"]],
            "recommended_patch_size": [int(size) for size in stage["patch_size"]],
            "normalization_schemes": [_SCHEMES.get(scheme, Z_SCORE) for scheme in schemes],
            "use_mask_for_norm": [bool(used) for used in _in_order(plans["use_mask_for_norm"])],
            "transpose_forward": [int(axis) for axis in plans.get("transpose_forward") or (0, 1, 2)],
            "channel_names": [str(name) for name in names],
            "intensity": _intensity(plans["dataset_properties"].get("intensityproperties"), len(schemes)),
            "trainer_name": str(content["name"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise AdaptationPlanError(
            f"{where} is not what nnU-Net version 1 writes beside its weights ({type(error).__name__}: {error}): move it away "
            "to use the weights without it"
        ) from error


def pooling(content: Any, where: str, folder: str = "") -> list[list[int]]:
    """Steps from each resolution to the next (Z, Y, X), as the plans have them; arguments as of :func:`trained_as`."""
    try:
        steps = content["plans"]["plans_per_stage"][_stage(content, folder)]["pool_op_kernel_sizes"]
        return [[int(size) for size in step] for step in steps]
    except (KeyError, TypeError, ValueError) as error:
        raise AdaptationPlanError(f"{where} does not say the network's steps (pool_op_kernel_sizes)") from error


def _stage(content: Mapping[str, Any], folder: str) -> int:
    """Number of the resolution: the trainer's argument, else as the configuration's folder says, else the only one."""
    stages = list(content["plans"]["plans_per_stage"])
    given = content["init"][5] if len(content["init"]) > 5 else None
    if isinstance(given, int) and given in stages:
        return given
    return int(min(stages) if "3d_lowres" in folder else max(stages))


def _in_order(numbered: Any) -> list[Any]:
    """Values of ``{0: …, 1: …}``, whose keys may be text."""
    if not isinstance(numbered, Mapping):
        return list(numbered)
    return [numbered[key] for key in sorted(numbered, key=int)]


def _intensity(found: Any, channels: int) -> list[dict[str, float]]:
    """Version 2's statistics of every channel; empty where there are none (images other than CT)."""
    if not found:
        return []
    names = {"mean": "mean", "median": "median", "sd": "std", "mn": "min", "mx": "max"}
    names |= {key: key for key in ("percentile_00_5", "percentile_99_5")}
    entries = {int(key): entry for key, entry in found.items() if entry}
    zeros = dict.fromkeys(names.values(), 0.0)
    return [
        {**zeros, **{names[key]: float(value) for key, value in entries.get(c, {}).items() if key in names}}
        for c in range(channels)
    ]


def with_kernels_of_decoder(tensors: Tensors) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tensors, under today's names, with zeros around an encoder's kernels that are smaller than its decoder's."""
    stages = sorted({int(m[1]) for m in map(_ENCODED.fullmatch, tensors) if m})
    decoders = sorted({int(m[1]) for m in map(_DECODED.fullmatch, tensors) if m})
    found, grown = dict(tensors), []
    if len(decoders) != len(stages) - 1:
        return found, ()
    for stage in stages[:-1]:
        wanted = next(
            (t.shape[2:] for name, t in tensors.items() if _is_kernel(name, _DECODED, decoders[-1] - stage)), None
        )
        kernels = [name for name in tensors if _is_kernel(name, _ENCODED, stage)]
        for name in kernels if wanted is not None else ():
            more = [(new - old) // 2 for new, old in zip(wanted or (), tensors[name].shape[2:], strict=True)]
            if any(step > 0 for step in more):
                found[name] = pad(tensors[name], [max(step, 0) for step in reversed(more) for _ in range(2)])
                grown.append(stage)
    numbers = ", ".join(map(str, dict.fromkeys(grown)))
    note = f"zeros around the encoder's kernels of stage {numbers}, since version 1's decoder has larger ones: computes the same"
    return found, (note,) if grown else ()


_ENCODED = re.compile(r"encoder\.stages\.(\d+)\.0\.convs\.\d\.conv\.weight")
_DECODED = re.compile(r"decoder\.stages\.(\d+)\.convs\.\d\.conv\.weight")


def _is_kernel(name: str, pattern: re.Pattern[str], stage: int) -> bool:
    match = pattern.fullmatch(name)
    return match is not None and int(match[1]) == stage


NNUNET_V1 = Family(
    name="a network of nnU-Net version 1",
    key_map=KeyMap(
        marker=r"conv_blocks_context\.0\.blocks\.0\.conv\.weight",
        rules=(
            (rf"conv_blocks_context\.(\d+)\.blocks\.(\d+)\.conv\.{_LAYER}", r"encoder.stages.\1.0.convs.\2.conv.\3"),
            (
                rf"conv_blocks_context\.(\d+)\.blocks\.(\d+)\.instnorm\.{_LAYER}",
                r"encoder.stages.\1.0.convs.\2.norm.\3",
            ),
            # The deepest stage is two stacks of one convolution each, and so are all of the decoder's.
            (rf"conv_blocks_context\.(\d+)\.(\d)\.blocks\.0\.conv\.{_LAYER}", r"encoder.stages.\1.0.convs.\2.conv.\3"),
            (
                rf"conv_blocks_context\.(\d+)\.(\d)\.blocks\.0\.instnorm\.{_LAYER}",
                r"encoder.stages.\1.0.convs.\2.norm.\3",
            ),
            (
                rf"conv_blocks_localization\.(\d+)\.(\d)\.blocks\.0\.conv\.{_LAYER}",
                r"decoder.stages.\1.convs.\2.conv.\3",
            ),
            (
                rf"conv_blocks_localization\.(\d+)\.(\d)\.blocks\.0\.instnorm\.{_LAYER}",
                r"decoder.stages.\1.convs.\2.norm.\3",
            ),
            (r"tu\.(\d+)\.weight", r"decoder.transpconvs.\1.weight"),
            (r"seg_outputs\.(\d+)\.weight", r"decoder.seg_layers.\1.weight"),
        ),
    ),
    facts=Facts(
        supervised=True,
        citations=(NNUNET_CITATION,),
        told="the spacing, patch and normalisation of a model of nnU-Net version 1 stand in the .model.pkl beside it, which is "
        "not there: copy it too, or choose -am median or fixed, and --normalization",
    ),
    beside=trained_as,
    prepare=with_kernels_of_decoder,
)
