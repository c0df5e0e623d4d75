"""A tiny 2D network, and model folders of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.tiny_cnn import CNN

from nnssl_adapt.weights.network.architectures import Architecture, build_network

PATCH = (24, 32)

PLANAR_CNN = Architecture(
    "PlainConvUNet",
    {
        **CNN,
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "kernel_sizes": [[3, 3]] * 3,
        "strides": [[1, 1], [2, 2], [2, 2]],
        "n_conv_per_stage": [1, 1, 1],
    },
)


def planar_plans(channels: int = 3) -> dict[str, Any]:
    """Content of a plans file of nnU-Net for pictures, with the tiny network."""
    function, kwargs = "resample_data_or_seg_to_shape", {"order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "Dataset004_Others",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "NaturalImage2DIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): {} for c in range(channels)},  # nnU-Net looks for them
        "configurations": {
            "2d": {
                "data_identifier": "nnUNetPlans_2d",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 5,
                "patch_size": list(PATCH),
                "median_image_size_in_voxels": [44.0, 60.0],
                "spacing": [1.0, 1.0],
                "normalization_schemes": ["ZScoreNormalization"] * channels,
                "use_mask_for_norm": [False] * channels,
                "resampling_fn_data": function,
                "resampling_fn_seg": function,
                "resampling_fn_probabilities": function,
                "resampling_fn_data_kwargs": {**kwargs, "is_seg": False, "order": 3},
                "resampling_fn_seg_kwargs": {**kwargs, "is_seg": True, "order": 1},
                "resampling_fn_probabilities_kwargs": {**kwargs, "is_seg": False, "order": 1},
                "architecture": PLANAR_CNN.to_plans_dict((1, *PATCH)),
                "batch_dice": True,
            }
        },
    }


def write_planar_model(root: Path) -> Path:
    """A model folder of nnU-Net's ``2d`` for RGB pictures, with random weights; returns it."""
    folder = root / "Dataset004_Others" / "nnUNetTrainer__nnUNetPlans__2d"
    (folder / "fold_0").mkdir(parents=True)
    content = {
        "channel_names": {"0": "red", "1": "green", "2": "blue"},
        "labels": {"background": 0, "round": 1, "long": 2},
        "numTraining": 5,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "plans.json").write_text(json.dumps(planar_plans()))
    torch.manual_seed(3)
    checkpoint = {
        "network_weights": build_network(PLANAR_CNN, 3, 3, (1, *PATCH)).state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "2d", "fold": 0},
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder
