"""Checkpoints as nnssl writes them, small and made up, for tests that need a special one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from support.tiny_cnn import CNN

from nnssl_adapt.weights.network.architectures import Architecture, build_network

RESENC = {**CNN, "n_blocks_per_stage": [1, 2, 1]}

PLAINCONV = {**CNN, "n_conv_per_stage": [2, 2, 2]}

PRIMUS = {
    "embed_dim": 24,
    "patch_embed_size": [2, 4, 4],
    "eva_depth": 2,
    "eva_numheads": 2,
    "drop_path_rate": 0.2,
    "init_values": 0.1,
    "scale_attn_inner": True,
}
"""A Primus whose patch (4, 12, 16) is a grid of (2, 3, 4) tokens."""

KEYS = {
    "ResidualEncoderUNet": {
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
        "key_to_lpe": None,
    },
    "PlainConvUNet": {
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stages.0",
        "keys_to_in_proj": ("encoder.stages.0.0.convs.0.all_modules.0", "encoder.stages.0.0.convs.0.conv"),
        "key_to_lpe": None,
    },
    "Primus": {
        "key_to_encoder": "eva",
        "key_to_stem": "down_projection",
        "keys_to_in_proj": ("down_projection.proj",),
        "key_to_lpe": "eva.pos_embed",
    },
}


def architecture(class_name: str = "ResidualEncoderUNet") -> Architecture:
    kwargs = {"ResidualEncoderUNet": RESENC, "PlainConvUNet": PLAINCONV, "Primus": PRIMUS}[class_name]
    return Architecture(class_name, copy.deepcopy(kwargs))


def plan(
    class_name: str = "ResidualEncoderUNet", patch=(8, 12, 16), spacing=(2, 0.8, 0.7), channels=1, **changes
) -> dict:
    """An adaptation plan as nnssl pickles it (tuples and ints among floats)."""
    content = {
        "architecture_plans": {
            "arch_class_name": class_name,
            "arch_kwargs": copy.deepcopy(dict(architecture(class_name).kwargs)),
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "nonlin"],
        },
        "pretrain_plan": {
            "dataset_name": "Dataset745_MadeUp",
            "plans_name": "nnsslPlans",
            "configurations": {
                "onemmiso": {
                    "spacing": spacing,
                    "patch_size": tuple(patch),
                    "normalization_schemes": ["ZScoreNormalization"],
                    "use_mask_for_norm": [False],
                }
            },
        },
        "pretrain_num_input_channels": channels,
        "recommended_downstream_patchsize": (16, 24, 32),
        **copy.deepcopy(KEYS[class_name]),
    }
    return {**content, **changes}


def state_dict(
    class_name: str = "ResidualEncoderUNet", patch=(8, 12, 16), channels=1, seed=0
) -> dict[str, torch.Tensor]:
    """Random weights (norms included) under the names that nnssl gives them."""
    network = build_network(architecture(class_name), channels, 1, patch)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.state_dict()


def write_checkpoint(
    folder: Path, tensors: dict, embedded=None, sidecar=None, name="checkpoint_final.pth", **extra
) -> Path:
    """Write a checkpoint in the published shape, with a plan in it, beside it, both or neither; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"network_weights": tensors, **extra}
    if embedded is not None:
        content["nnssl_adaptation_plan"] = embedded
    torch.save(content, folder / name)
    if sidecar is not None:
        (folder / "adaptation_plan.json").write_text(json.dumps(sidecar))
    return folder / name
