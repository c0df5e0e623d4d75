"""Raw networks of dynamic_network_architectures, tiny, and the plans that describe them; none of our code is used."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from einops import rearrange
from support.tiny_cnn import CNN
from torch import Tensor, nn

RES, PLAIN = "ResidualEncoderUNet", "PlainConvUNet"
CNN_PATCH = (4, 16, 8)
PRIMUS_PATCH = (6, 12, 8)
"""A grid of (3, 3, 2) tokens: nnssl's (h w d) order distorts rotary positions unless the first two axes are equal."""

BLOCKS = {
    "ResidualEncoderUNet": {"n_blocks_per_stage": [1, 2, 1]},
    "PlainConvUNet": {"n_conv_per_stage": [2, 2, 2]},
}
PRIMUS: dict[str, Any] = {
    "embed_dim": 24,
    "patch_embed_size": (2, 4, 4),
    "encoder_eva_depth": 2,
    "encoder_eva_numheads": 2,
    "drop_path_rate": 0.2,
    "attn_drop_rate": 0,
    "init_values": 0.1,
    "scale_attn_inner": True,
}
_CLASSES = {
    "conv_op": nn.Conv3d,
    "norm_op": nn.InstanceNorm3d,
    "nonlin": nn.LeakyReLU,
}


def randomised(network: nn.Module, seed: int) -> nn.Module:
    """The network with every number drawn anew, norms and biases too, so that a swap of any two shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def raw_cnn(class_name: str, channels: int, outputs: int = 1, **changes: Any) -> nn.Module:
    """A U-Net of dynamic_network_architectures itself."""
    kwargs = {**CNN, **BLOCKS[class_name], **_CLASSES, **changes}
    cls = {"ResidualEncoderUNet": ResidualEncoderUNet, "PlainConvUNet": PlainConvUNet}[class_name]
    return cls(input_channels=channels, num_classes=outputs, deep_supervision=False, **kwargs)


def raw_primus(channels: int, outputs: int = 1, patch: tuple[int, ...] = PRIMUS_PATCH, **changes: Any) -> nn.Module:
    """A Primus of dynamic_network_architectures itself."""
    settings = {**PRIMUS, **changes}
    settings["eva_depth"] = settings.pop("encoder_eva_depth")
    settings["eva_numheads"] = settings.pop("encoder_eva_numheads")
    if isinstance(settings["init_values"], list):
        settings["init_values"] = settings["init_values"][0]
    return Primus(input_channels=channels, num_classes=outputs, input_shape=patch, **settings)


# -- what a transformer computes --------------------------------------------------------------------------------------


def primus_features(network: nn.Module, image: Tensor, order: str) -> dict[str, Tensor]:
    """Patch embedding and each block's output, in their places (1, C, *grid), tokens flattened in ``order``."""
    volume = network.down_projection(image)
    grid = volume.shape[2:]
    found = {"patch embedding": volume}
    tokens = flattened(volume, order) + network.eva.pos_embed
    rope = network.eva.rope.get_embed()
    for index, block in enumerate(network.eva.blocks):
        tokens = block(tokens, rope=rope)
        found[f"block {index}"] = in_places(tokens, grid, order)
    found["last norm"] = in_places(network.eva.norm(tokens), grid, order)
    return found


def flattened(volume: Tensor, order: str) -> Tensor:
    """(1, C, w, h, d) → (1, N, C) in the order of its name."""
    pattern = {"hwd": "b c w h d -> b (h w d) c", "whd": "b c w h d -> b (w h d) c"}[order]
    return rearrange(volume, pattern)


def in_places(tokens: Tensor, grid: Sequence[int], order: str) -> Tensor:
    """(1, N, C) in the order of its name → (1, C, w, h, d)."""
    pattern = {"hwd": "b (h w d) c -> b c w h d", "whd": "b (w h d) c -> b c w h d"}[order]
    return rearrange(tokens, pattern, w=grid[0], h=grid[1], d=grid[2])


# -- plans -----------------------------------------------------------------------------------------------------------


def adaptation_plan(class_name: str, kwargs: Any, keys: dict[str, Any], patch: Any, channels: int) -> dict[str, Any]:
    """A plan as nnssl pickles it: tuples among lists."""
    configuration = {
        "spacing": (2, 0.8, 0.7),
        "patch_size": tuple(patch),
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
    }
    return {
        "architecture_plans": {
            "arch_class_name": class_name,
            "arch_kwargs": copy.deepcopy(kwargs),
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "nonlin"],
        },
        "pretrain_plan": {"plans_name": "nnsslPlans", "configurations": {"onemmiso": configuration}},
        "pretrain_num_input_channels": channels,
        "recommended_downstream_patchsize": tuple(patch),
        **keys,
    }


def cnn_keys(class_name: str, prefix: str = "encoder") -> dict[str, Any]:
    residual = class_name == "ResidualEncoderUNet"
    stem = f"{prefix}.stem" if residual else f"{prefix}.stages.0"
    first = f"{stem}.convs.0" if residual else f"{stem}.0.convs.0"
    return {
        "key_to_encoder": f"{prefix}.stages",
        "key_to_stem": stem,
        "keys_to_in_proj": (f"{first}.conv", f"{first}.all_modules.0"),
        "key_to_lpe": None,
    }


def primus_keys(prefix: str = "") -> dict[str, Any]:
    return {
        "key_to_encoder": f"{prefix}eva",
        "key_to_stem": f"{prefix}down_projection",
        "keys_to_in_proj": (f"{prefix}down_projection.proj",),
        "key_to_lpe": f"{prefix}eva.pos_embed",
    }


def write(folder: Path, tensors: dict[str, Tensor], plan: Any = None, sidecar: Any = None, **extra: Any) -> Path:
    """Write a checkpoint in the published shape and return its folder."""
    folder.mkdir(parents=True)
    content: dict[str, Any] = {"network_weights": tensors, **extra}
    if plan is not None:
        content["nnssl_adaptation_plan"] = plan
        content["citations"] = [{"type": "Architecture", "name": "made up", "apa_citations": ["Nobody (2026)"]}]
    torch.save(content, folder / "checkpoint_final.pth")
    if sidecar is not None:
        (folder / "adaptation_plan.json").write_text(json.dumps(sidecar))
    return folder


def nnunet_plans(class_name: str, channels: int) -> dict[str, Any]:
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{class_name}",
        "arch_kwargs": {**CNN, **BLOCKS[class_name]},
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(CNN_PATCH),
        "median_image_size_in_voxels": [8, 16, 16],
        "spacing": [2.0, 0.8, 0.7],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "architecture": architecture,
        "batch_dice": False,
    }
    for kind in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        order = {"is_seg": kind == "seg", "order": 3 if kind == "data" else 1, "order_z": 0, "force_separate_z": None}
        configuration[f"resampling_fn_{kind}_kwargs"] = order
    return {
        "dataset_name": "Dataset744_MadeUp",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 0.8, 0.7],
        "original_median_shape_after_transp": [8, 16, 16],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }
