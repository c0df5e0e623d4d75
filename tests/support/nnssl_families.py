"""One tiny checkpoint of every family that nnssl writes, beside the network it was saved from: the truth.

Files are laid out as nnssl's trainers and nnU-Net lay them out, and made from raw networks of
dynamic_network_architectures, without any code of ours. The network stays in memory, and what it computes is what a
network that took over the weights has to compute. A transformer trained on tokens in (h w d) order is run on them in that
order here, block by block, as nnssl does it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support.nnssl_networks import (
    BLOCKS,
    CNN,
    CNN_PATCH,
    PLAIN,
    PRIMUS,
    PRIMUS_PATCH,
    RES,
    adaptation_plan,
    cnn_keys,
    flattened,
    in_places,
    nnunet_plans,
    primus_features,
    primus_keys,
    randomised,
    raw_cnn,
    raw_primus,
    write,
)
from torch import Tensor, nn

STEMS = ("Dataset003_Liver", "Dataset010_Colon", "17")
"""Names of the datasets whose stems a MultiTalent checkpoint holds."""


@dataclass(frozen=True)
class Family:
    """A checkpoint on disk and the network that it was saved from.

    Attributes:
        source: file or folder to open.
        network: what was pre-trained, in evaluation mode; of a MultiTalent file with the stem of the first dataset.
        channels: of its input.
        patch: (Z, Y, X) in voxels, of pre-training.
        order: in which a transformer's tokens were flattened, None for a CNN.
        tensors: what the file holds under the network's weights, before any prefix.
    """

    name: str
    source: Path
    network: nn.Module
    channels: int
    patch: tuple[int, int, int]
    order: str | None
    tensors: dict[str, Tensor]

    def at_patch(self, patch: tuple[int, int, int]) -> Family:
        """The same for another patch: positions interpolated on the grid, the rotary table of the file's own order."""
        if self.order is None:
            return replace(self, patch=patch)
        swapped = (1, 0, 2) if self.order == "hwd" else (0, 1, 2)
        shape = [patch[axis] * (2, 4, 4)[i] // (2, 4, 4)[axis] for i, axis in enumerate(swapped)]
        kwargs = {"embed_dim": self.network.eva.embed_dim, "encoder_eva_depth": len(self.network.eva.blocks)}
        block = self.network.eva.blocks[0]
        kwargs |= {"init_values": None if block.gamma_1 is None else 0.1}
        kwargs |= {"scale_attn_inner": hasattr(block.attn.norm, "weight")}
        network = raw_primus(self.channels, self.channels, tuple(shape), **kwargs).eval()
        there = replace(self, network=network, patch=patch)
        state = self.network.state_dict()
        volume = in_places(state["eva.pos_embed"], self.grid, self.order)
        volume = nn.functional.interpolate(volume, there.grid, mode="trilinear", align_corners=False)
        state["eva.pos_embed"] = flattened(volume, self.order)
        network.load_state_dict(state)
        return there

    @property
    def grid(self) -> tuple[int, int, int]:
        z, y, x = (n // s for n, s in zip(self.patch, (2, 4, 4), strict=True))
        return z, y, x

    def features(self, image: Tensor) -> dict[str, Tensor]:
        """What the pre-trained encoder computes for an image (1, channels, Z, Y, X), stage by stage."""
        with torch.no_grad():
            if self.order is None:
                return {f"stage {i}": skip for i, skip in enumerate(self.network.encoder(image))}
            return primus_features(self.network, image, self.order)


# -- what surrounds the encoder in the file --------------------------------------------------------------------------


def _random(generator: torch.Generator, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _projector(generator: torch.Generator) -> dict[str, Tensor]:
    return _random(generator, projector__0__weight=(5, 8), projector__0__bias=(5,), projector__2__weight=(3, 5))


def _swin_heads(generator: torch.Generator) -> dict[str, Tensor]:
    return _random(
        generator,
        rotation_head__weight=(4, 8),
        contrastive_head__weight=(6, 8),
        reconstruction_head__0__weight=(8, 4, 3, 3, 3),
    )


def _counted_heads(generator: torch.Generator) -> dict[str, Tensor]:
    """Heads with batch normalisation, whose counter is a whole number without an axis."""
    heads = _random(
        generator, affine_head__0__weight=(6, 8, 3, 3, 3), affine_head__1__weight=(6,), affine_head__1__bias=(6,)
    )
    heads |= {"affine_head.1.running_mean": torch.zeros(6), "affine_head.1.running_var": torch.ones(6)}
    heads["affine_head.1.num_batches_tracked"] = torch.tensor(731)
    return heads


def _no_heads(generator: torch.Generator) -> dict[str, Tensor]:
    return {}


def _moved(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """Tensors below one dotted prefix, under another."""
    prefix = f"{old}." if old else ""
    return {f"{new}.{name[len(prefix) :]}": value for name, value in tensors.items() if name.startswith(prefix)}


# -- families: convolutions ------------------------------------------------------------------------------------------


def _cnn(class_name: str, trainer: str, *, keep: str, heads: Any = _no_heads, prefix: str = "encoder") -> Any:
    """A builder of a CNN's checkpoint: ``keep`` says what of the U-Net is in the file, ``heads`` what else is."""

    def build(name: str, folder: Path, channels: int) -> Family:
        network = randomised(raw_cnn(class_name, channels, channels), seed=11)
        state = network.state_dict()
        tensors = dict(state) if keep == "all" else _moved(state, "encoder", prefix)
        tensors |= heads(torch.Generator().manual_seed(12))
        kwargs = {**CNN, **BLOCKS[class_name]}
        plan = adaptation_plan(class_name, kwargs, cnn_keys(class_name, prefix), CNN_PATCH, channels)
        path = write(folder, tensors, plan, trainer_name=trainer)
        return Family(name, path, network, channels, CNN_PATCH, None, tensors)

    return build


def _spark(name: str, folder: Path, channels: int) -> Family:
    """Its trainer trains ``all_modules.N`` only, keeps another tensor under the layer's own name, and writes no plan."""
    class_name = "ResidualEncoderUNet"
    network = randomised(raw_cnn(class_name, channels, channels), seed=13)
    generator = torch.Generator().manual_seed(14)
    tensors = dict(network.state_dict())
    for key, value in tensors.items():
        words = key.split(".")
        if words[-2] == "conv":
            tensors[key] = torch.randn(value.shape, generator=generator)
        elif words[-2] == "norm" and "encoder" in words:
            tensors[key] = torch.ones_like(value) if words[-1] == "weight" else torch.zeros_like(value)
    kwargs = {**CNN, **BLOCKS[class_name]}
    plan = adaptation_plan(class_name, kwargs, cnn_keys(class_name), CNN_PATCH, channels)
    twice = {key: value.clone() for key, value in tensors.items()}
    path = write(folder, tensors, sidecar=plan, trainer_name="SparkMAETrainer", spark_weights=twice)
    return Family(name, path, network, channels, CNN_PATCH, None, tensors)


def _multi_talent(name: str, folder: Path, channels: int) -> Family:
    """One stem a dataset, one encoder for all."""
    class_name = "ResidualEncoderUNet"
    network = randomised(raw_cnn(class_name, channels, 1), seed=15)
    generator = torch.Generator().manual_seed(16)
    tensors: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        if not key.startswith("encoder.stem."):
            if not key.startswith("decoder.encoder."):
                tensors[key] = value
            continue
        rest = key.removeprefix("encoder.stem.")
        for stem in STEMS:
            if stem == STEMS[0]:
                tensors[f"encoder.stem.{stem}.{rest}"] = value
                continue
            twin = rest.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")
            known = tensors.get(f"encoder.stem.{stem}.{twin}")
            drawn = 0.3 * torch.randn(value.shape, generator=generator) if known is None else known
            tensors[f"encoder.stem.{stem}.{rest}"] = drawn
    kwargs = {**CNN, **BLOCKS[class_name]}
    plan = adaptation_plan(class_name, kwargs, cnn_keys(class_name), CNN_PATCH, channels)
    path = write(folder, tensors, plan, trainer_name="MultiTalentTrainer")
    return Family(name, path, network, channels, CNN_PATCH, None, tensors)


def stem_of(family: Family, stem: str) -> dict[str, Tensor]:
    """Of a MultiTalent file: one dataset's stem under the names that the network has."""
    return _moved(family.tensors, f"encoder.stem.{stem}", "encoder.stem")


def _no_skip(name: str, folder: Path, channels: int) -> Family:
    """A decoder without skips, so that its convolutions take half as many channels; the encoder is as ever.

    nnssl's own is as large as ResEnc-L and its plan has no arguments; here they make it small.
    """
    network = randomised(raw_cnn("ResidualEncoderUNet", channels, channels), seed=17)
    tensors: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        half = value.shape[1] // 2 if key.startswith("decoder.stages.") and value.ndim == 5 else None
        tensors[key] = value[:, :half].clone() if half and ".convs.0." in key else value
    kwargs = {**CNN, **BLOCKS["ResidualEncoderUNet"]}
    plan = adaptation_plan("NoSkipResEncL", kwargs, cnn_keys("ResidualEncoderUNet"), CNN_PATCH, channels)
    path = write(folder, tensors, plan, trainer_name="BaseMAETrainer")
    return Family(name, path, network, channels, CNN_PATCH, None, tensors)


# -- families: transformers ------------------------------------------------------------------------------------------


def _primus(trainer: str | None, order: str, *, layout: str, special: int = 0, **changes: Any) -> Any:
    """A builder of a Primus's checkpoint.

    ``layout``: ``mae`` (a second transformer beside the first), ``plain`` (SimMIM and what looks like it) or ``encoder``
    (the encoder a level deeper, with heads). ``special``: class and register tokens before the others.
    """

    def build(name: str, folder: Path, channels: int) -> Family:
        network = randomised(raw_primus(channels, channels, **changes), seed=21)
        tensors = dict(network.state_dict())
        generator = torch.Generator().manual_seed(22)
        width = PRIMUS["embed_dim"]
        tensors["mask_token"] = torch.randn(1, 1, width, generator=generator)
        kwargs = {**PRIMUS, "input_channels": channels, "output_channels": channels, "input_shape": PRIMUS_PATCH}
        kwargs |= {"decoder_eva_depth": 0, "decoder_eva_numheads": 0, "patch_drop_rate": 0.75, **changes}
        keys = primus_keys()
        if layout == "mae":
            second = randomised(raw_primus(channels, channels, **{**changes, "encoder_eva_depth": 1}), seed=23)
            tensors |= _moved(second.state_dict(), "eva", "decoder")
            kwargs |= {"decoder_eva_depth": 1, "decoder_eva_numheads": 2}
        elif layout == "encoder":
            inner = {k: v for k, v in tensors.items() if not k.startswith("up_projection")}
            tensors = _moved(inner, "", "encoder") | _projector(generator)
            keys = primus_keys("encoder.")
        if special:
            extra = torch.randn(1, special, width, generator=generator)
            prefix = "encoder." if layout == "encoder" else ""
            positions = tensors[f"{prefix}eva.pos_embed"]
            tensors[f"{prefix}eva.pos_embed"] = torch.cat([extra, positions], dim=1)
            tensors[f"{prefix}cls_token"] = torch.randn(1, 1, width, generator=generator)
            if special > 1:
                tensors[f"{prefix}register_tokens"] = torch.randn(1, special - 1, width, generator=generator)
        plan = adaptation_plan("PrimusX", kwargs, keys, PRIMUS_PATCH, channels)
        named = {"trainer_name": trainer} if trainer else {}
        path = write(folder, tensors, plan, **named)
        return Family(name, path, network, channels, PRIMUS_PATCH, order, tensors)

    return build


# -- other wrappings of the same -------------------------------------------------------------------------------------


def _wrapped(inner: str, prefix: str) -> Any:
    """The same file, saved from a network inside DataParallel or torch.compile."""

    def build(name: str, folder: Path, channels: int) -> Family:
        family = FAMILIES[inner](name, folder / "inner", channels)
        content = torch.load(family.source / "checkpoint_final.pth", weights_only=True)
        content["network_weights"] = {f"{prefix}{key}": value for key, value in family.tensors.items()}
        torch.save(content, folder / "checkpoint_final.pth")
        return Family(name, folder, *_rest(family))

    return build


def _rounded(inner: str, dtype: torch.dtype) -> Any:
    """The same file in half precision; the truth is the network with the rounded weights."""

    def build(name: str, folder: Path, channels: int) -> Family:
        family = FAMILIES[inner](name, folder / "inner", channels)
        content = torch.load(family.source / "checkpoint_final.pth", weights_only=True)
        content["network_weights"] = {key: value.to(dtype) for key, value in family.tensors.items()}
        torch.save(content, folder / "checkpoint_final.pth")
        with torch.no_grad():
            for parameter in family.network.parameters():
                parameter.copy_(parameter.to(dtype))
        return Family(name, folder, *_rest(family))

    return build


def _on_cuda(inner: str) -> Any:
    """The same file with tensors that were on a GPU when it was written."""

    def build(name: str, folder: Path, channels: int) -> Family:
        family = FAMILIES[inner](name, folder / "inner", channels)
        content = torch.load(family.source / "checkpoint_final.pth", weights_only=True)
        with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
            torch.save(content, folder / "checkpoint_final.pth")
        return Family(name, folder, *_rest(family))

    return build


def _replanned(inner: str, sidecar: bool = False, **changes: Any) -> Any:
    """The same file with a plan that is wrong in some entries; with ``sidecar`` the right one lies beside it."""

    def build(name: str, folder: Path, channels: int) -> Family:
        family = FAMILIES[inner](name, folder / "inner", channels)
        content = torch.load(family.source / "checkpoint_final.pth", weights_only=True)
        plan = content["nnssl_adaptation_plan"]
        if sidecar:
            (folder / "adaptation_plan.json").write_text(json.dumps(plan))
        content["nnssl_adaptation_plan"] = {**plan, **changes}
        torch.save(content, folder / "checkpoint_final.pth")
        return Family(name, folder, *_rest(family))

    return build


def _rest(family: Family) -> tuple[Any, ...]:
    return family.network, family.channels, family.patch, family.order, family.tensors


def _supervised(class_name: str) -> Any:
    """A trained model folder as nnU-Net writes it."""

    def build(name: str, folder: Path, channels: int) -> Family:
        network = randomised(raw_cnn(class_name, channels, 3), seed=31)
        tensors = dict(network.state_dict())
        modality = {str(i): f"MR{i}" for i in range(channels)}
        dataset = {"channel_names": modality, "labels": {"background": 0, "left": 1, "right": 2}}
        dataset |= {"numTraining": 3, "file_ending": ".nii.gz"}
        model = folder / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        path = write(model / "fold_0", tensors, trainer_name="nnUNetTrainer", init_args={"configuration": "3d_fullres"})
        (path.parent / "dataset.json").write_text(json.dumps(dataset))
        (path.parent / "plans.json").write_text(json.dumps(nnunet_plans(class_name, channels)))
        return Family(name, model, network, channels, CNN_PATCH, None, tensors)

    return build


FAMILIES: dict[str, Callable[[str, Path, int], Family]] = {
    "MAE": _cnn(RES, "BaseMAETrainer", keep="all"),
    "MAE PlainConv": _cnn(PLAIN, "BaseMAETrainer", keep="all"),
    "Spark": _spark,
    "MG": _cnn(RES, "ModelsGenesisTrainer", keep="all"),
    "VF": _cnn(RES, "VolumeFusionTrainer", keep="all"),
    "VoCo": _cnn(RES, "VoCoTrainer", keep="encoder", heads=_projector),
    "SimCLR": _cnn(RES, "SimCLRTrainer", keep="encoder", heads=_projector),
    "SwinUNETR": _cnn(RES, "SwinUNETRTrainer", keep="encoder", heads=_swin_heads),
    "GVSL": _cnn(RES, "GVSLTrainer", keep="encoder", heads=_counted_heads, prefix="backbone.encoder"),
    "PCRLv2": _cnn(RES, "PCRLv2Trainer", keep="encoder", heads=_counted_heads, prefix="network.encoder"),
    "VoCo PlainConv": _cnn(PLAIN, "VoCoTrainer", keep="encoder", heads=_projector),
    "NoSkip": _no_skip,
    "MultiTalent": _multi_talent,
    "EvaMAE": _primus("BaseEvaMAETrainer", "hwd", layout="mae"),
    "EvaMAE unnamed": _primus(None, "hwd", layout="mae"),
    "SimMIM": _primus("SimMIMEvaTrainer", "whd", layout="plain"),
    "Primus VoCo": _primus("VoCoEvaTrainer", "hwd", layout="encoder"),
    "Primus SimCLR": _primus("SimCLREvaTrainer", "hwd", layout="encoder"),
    "Primus SwinUNETR": _primus("SwinUNETREvaTrainer", "hwd", layout="encoder"),
    "Primus VoCo unnamed": _primus(None, "hwd", layout="encoder"),
    "Primus MG": _primus("ModelsGenesisEvaTrainer", "hwd", layout="plain"),
    "Primus VF": _primus("VolumeFusionEvaTrainer", "hwd", layout="plain"),
    "PrimusX init None": _primus("BaseEvaMAETrainer", "hwd", layout="mae", init_values=None, scale_attn_inner=False),
    "PrimusX init list": _primus("BaseEvaMAETrainer", "hwd", layout="mae", init_values=[0.1]),
    "PrimusX unscaled": _primus("SimMIMEvaTrainer", "whd", layout="plain", scale_attn_inner=False),
    "class token": _primus("BaseEvaMAETrainer", "hwd", layout="mae", special=1),
    "register tokens": _primus("SimMIMEvaTrainer", "whd", layout="plain", special=5),
    "supervised": _supervised(RES),
    "supervised PlainConv": _supervised(PLAIN),
}
FAMILIES |= {
    "MAE in DataParallel": _wrapped("MAE", "module."),
    "MAE compiled": _wrapped("MAE", "_orig_mod."),
    "MAE compiled in DataParallel": _wrapped("MAE", "module._orig_mod."),
    "EvaMAE compiled, then DataParallel": _wrapped("EvaMAE", "_orig_mod.module."),
    "MAE saved on CUDA": _on_cuda("MAE"),
    "MAE without keys": _replanned("MAE", key_to_encoder=None, key_to_stem=None, keys_to_in_proj=None),
    "GVSL with wrong keys": _replanned("GVSL", key_to_encoder="encoder.stages", keys_to_in_proj=("nowhere",)),
    "EvaMAE without keys": _replanned("EvaMAE", key_to_encoder=None, key_to_lpe=None),
    "Primus SimCLR with a wrong patch": _replanned("Primus SimCLR", sidecar=True, pretrain_patch_size=(8, 8, 8)),
    "MAE fp16": _rounded("MAE", torch.float16),
    "EvaMAE bf16": _rounded("EvaMAE", torch.bfloat16),
}
"""Every family by its name: ``FAMILIES[name](name, new folder, channels)``."""
