"""Model folders in nnU-Net's layout, with a small network whose weights are random but fixed."""

import json

import torch
from support.tiny_cnn import CNN

from nnssl_adapt.weights.network.architectures import Architecture, build_network

PATCH = (16, 24, 32)
SPACING = (2.0, 1.0, 1.5)  # transposed axes, mm

ARCHITECTURE = Architecture("PlainConvUNet", {**CNN, "kernel_sizes": [[3, 3, 3]] * 3, "n_conv_per_stage": [1, 1, 1]})

HOME = "/home/jane doe/scanner"
CASES = ("sub-amu01_T2w", "sub-beijing02_T2w")
"""What must not be published, where a test wants to see that."""

LABELS = {"background": 0, "cord": 1, "lesion": 2}


def plans_content(channels=1, spacing=SPACING, transpose=(1, 0, 2), keep_grid=False):
    """Content of a plans file; ``spacing`` in transposed axes."""
    function = "no_resampling_hack" if keep_grid else "resample_data_or_seg_to_shape"

    def kwargs(order):
        return {} if keep_grid else {"is_seg": order == 1, "order": order, "order_z": 0, "force_separate_z": None}

    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(PATCH),
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": function,
        "resampling_fn_seg": function,
        "resampling_fn_probabilities": function,
        "resampling_fn_data_kwargs": kwargs(3),
        "resampling_fn_seg_kwargs": kwargs(1),
        "resampling_fn_probabilities_kwargs": kwargs(1) | ({} if keep_grid else {"is_seg": False}),
        "architecture": ARCHITECTURE.to_plans_dict(PATCH),
        "batch_dice": False,
    }
    return {
        "dataset_name": "Dataset991_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose),
        "transpose_backward": [list(transpose).index(axis) for axis in range(3)],
        "configurations": {"3d_fullres": configuration},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }


def fold_checkpoint(seed, channels=1, heads=3, mirror_axes=(0, 1, 2)):
    """What nnU-Net's prediction reads of a checkpoint. Weights are random."""
    torch.manual_seed(seed)
    network = build_network(ARCHITECTURE, channels, heads, PATCH)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(torch.randn(tensor.shape) * (0.3 if name.endswith("weight") else 0.05))
        # Make the outputs of equal rank, so that every label occurs in what the network predicts.
        outputs = network.eval()(torch.randn(1, channels, *PATCH)).flatten(2)[0]
        head = network.decoder.seg_layers[-1]
        head.weight /= outputs.std(1)[:, None, None, None, None]
        head.bias.copy_((head.bias - outputs.mean(1)) / outputs.std(1))
    return {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres", "fold": seed},
        "inference_allowed_mirroring_axes": mirror_axes,
    }


def write_model_folder(
    root,
    folds=(0,),
    channels=1,
    labels=None,
    name="nnUNetTrainer__nnUNetPlans__3d_fullres",
    heads=3,
    mirror_axes=(0, 1, 2),
    **plans,
):
    """Write ``root/Dataset991_Tiny/name`` with the given folds and return its path; ``plans`` go to plans_content."""
    folder = root / "Dataset991_Tiny" / name
    folder.mkdir(parents=True)
    content = {
        "channel_names": {str(c): f"MR{c}" for c in range(channels)},
        "labels": LABELS,
        "numTraining": 5,
        "file_ending": ".nii.gz",
        **(labels or {}),
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "plans.json").write_text(json.dumps(plans_content(channels, **plans)))
    for fold in folds:
        (folder / f"fold_{fold}").mkdir()
        seed = fold if isinstance(fold, int) else 99
        checkpoint = fold_checkpoint(seed, channels, heads, mirror_axes)
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def write_cascade(root, folds=(0,)):
    """Model folders of ``3d_lowres`` and, beside it, ``3d_cascade_fullres`` with random weights; returns the second."""
    low = write_model_folder(root, folds=folds, name="nnUNetTrainer__nnUNetPlans__3d_lowres")
    plans = json.loads((low / "plans.json").read_text())
    full = plans["configurations"]["3d_fullres"]
    plans["foreground_intensity_properties_per_channel"] = {"0": {}}  # nnU-Net looks for it even where it isn't needed
    plans["configurations"] |= {
        "3d_lowres": {
            **full,
            "data_identifier": "nnUNetPlans_3d_lowres",
            "spacing": [2 * mm for mm in SPACING],
            "next_stage": "3d_cascade_fullres",
        },
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    cascade = write_model_folder(root, folds=(), name="nnUNetTrainer__nnUNetPlans__3d_cascade_fullres")
    for folder, channels in ((low, 1), (cascade, 3)):
        (folder / "plans.json").write_text(json.dumps(plans))
        for fold in folds:
            content = fold_checkpoint(10 * channels + fold, channels)
            content["init_args"]["configuration"] = folder.name.rpartition("__")[2]
            (folder / f"fold_{fold}").mkdir(exist_ok=True)
            torch.save(content, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return cascade
