"""Plans for tiny networks on the made-up dataset, for tests of training."""

import copy

from support import tiny_cnn

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training.run.identity import RunIdentity
from nnssl_adapt.weights.network.architectures import Architecture

DATASET = "Dataset991_Tiny"
PATCH = (16, 16, 24)

CNN = Architecture(
    "ResidualEncoderUNet",
    {
        **tiny_cnn.CNN,
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage": [1, 1, 1],
    },
)
TRANSFORMER = Architecture(
    "Primus",
    {
        "embed_dim": 36,
        "patch_embed_size": [8, 8, 8],
        "eva_depth": 2,
        "eva_numheads": 3,
        "drop_path_rate": 0.4,
        "init_values": 0.1,
        "scale_attn_inner": True,
    },
)


def plan_content(architecture, channels=1, patch=PATCH):
    schemes = ["ZScoreNormalization"] * channels
    resampling = [
        {"force_separate_z": None, "is_seg": is_seg, "order": order, "order_z": 0}
        for is_seg, order in ((False, 3), (True, 1), (False, 1))
    ]
    function = "resample_data_or_seg_to_shape"
    return {
        "dataset_name": DATASET,
        "plans_name": "ptPlans__tiny",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "tiny",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(patch),
                "median_image_size_in_voxels": [20.0, 28.0, 24.0],
                "spacing": [2.0, 1.0, 1.3],
                "normalization_schemes": schemes,
                "use_mask_for_norm": [False] * channels,
                "resampling_fn_data": function,
                "resampling_fn_seg": function,
                "resampling_fn_data_kwargs": resampling[0],
                "resampling_fn_seg_kwargs": resampling[1],
                "resampling_fn_probabilities": function,
                "resampling_fn_probabilities_kwargs": resampling[2],
                "architecture": architecture.to_plans_dict(patch),
                "batch_dice": False,
            }
        },
    }


def changed(plan, **entries):
    """The plan with other entries in its configuration."""
    content = copy.deepcopy(plan.content)
    content["configurations"]["3d_fullres"].update(entries)
    return FinetunePlan(content, plan.configuration, plan.path)


def identity_of(architecture, recipe, patch=PATCH, labels=None, channels=("T1",), cases=(("a", "b"), ("c",)), **more):
    """What a run of fold 0 is made of; ``cases`` for training and for validation."""
    dataset = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": labels or {"background": 0, "liver": 1, "lesion": 2},
        "file_ending": ".nii.gz",
    }
    plan = FinetunePlan(plan_content(architecture, len(channels), patch))
    return RunIdentity(plan, DatasetJson.from_content(dataset), 0, *cases, recipe, "0", **more)
