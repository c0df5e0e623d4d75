"""STU-Net as its authors' code builds and saves it, written again with its names (uni-medical/STU-Net has no package)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from support import nnunet_v1
from support.nnssl_networks import nnunet_plans
from torch import nn

POOLS = [[1, 2, 2], [2, 2, 2], [1, 1, 2]]
KERNELS = [[3, 3, 3]] * 4
DIMS = [4, 6, 8, 8]
PATCH = (8, 16, 16)


class _Block(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, projected=False):
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, kernel, stride, padding=1)
        self.norm1 = nn.InstanceNorm3d(outputs, affine=True)
        self.conv2 = nn.Conv3d(outputs, outputs, kernel, padding=1)
        self.norm2 = nn.InstanceNorm3d(outputs, affine=True)
        self.conv3 = nn.Conv3d(inputs, outputs, 1, stride) if projected else None
        self.act1, self.act2 = nn.LeakyReLU(), nn.LeakyReLU()

    def forward(self, image):
        inner = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(image)))))
        return self.act2(inner + (image if self.conv3 is None else self.conv3(image)))


class _Up(nn.Module):
    def __init__(self, inputs, outputs, step):
        super().__init__()
        self.conv, self.step = nn.Conv3d(inputs, outputs, 1), step

    def forward(self, image):
        return self.conv(nn.functional.interpolate(image, scale_factor=[float(s) for s in self.step], mode="nearest"))


class PublishedSTUNet(nn.Module):
    def __init__(self, channels, classes, depth, dims=DIMS, pools=POOLS, kernels=KERNELS):
        super().__init__()

        def stage(inputs, outputs, number, stride):
            blocks = [_Block(inputs, outputs, kernels[number], stride, True)]
            return nn.Sequential(
                *blocks, *(_Block(outputs, outputs, kernels[number]) for _ in range(depth[number] - 1))
            )

        widths = [channels, *dims]
        n = len(pools)
        self.conv_blocks_context = nn.ModuleList(
            stage(widths[s], dims[s], s, 1 if s == 0 else pools[s - 1]) for s in range(n + 1)
        )
        self.upsample_layers = nn.ModuleList(_Up(dims[n - u], dims[n - 1 - u], pools[n - 1 - u]) for u in range(n))
        self.conv_blocks_localization = nn.ModuleList(
            stage(2 * dims[n - 1 - u], dims[n - 1 - u], n - 1 - u, 1) for u in range(n)
        )
        self.seg_outputs = nn.ModuleList(nn.Conv3d(dims[n - 1 - u], classes, 1) for u in range(n))

    def skips(self, image):
        found = []
        for stage in self.conv_blocks_context:
            image = stage(image)
            found.append(image)
        return found

    def outputs(self, image):
        """Logits of every resolution, the finest first."""
        skips = self.skips(image)
        image, logits = skips[-1], []
        for up, stage in enumerate(self.conv_blocks_localization):
            image = stage(torch.cat((self.upsample_layers[up](image), skips[-(up + 2)]), dim=1))
            logits.append(self.seg_outputs[up](image))
        return logits[::-1]

    def forward(self, image):
        return self.outputs(image)[0]


def stu_net_folder(folder: Path, dims: list[int], trainer: str = "STUNetTrainer_small") -> tuple[Path, PublishedSTUNet]:
    """A model folder of its trainer for nnU-Net 2.2, and the network: the strides are the plans', made five.

    Plans of that version describe the network as before 2.3.
    """
    model = folder / f"{trainer}__nnUNetPlans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    plans = nnunet_plans("PlainConvUNet", 1)
    settings = plans["configurations"]["3d_fullres"]
    settings["patch_size"] = list(PATCH)
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    del settings["architecture"]
    settings |= {"UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 32, "unet_max_num_features": 320}
    settings |= {
        "n_conv_per_stage_encoder": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        "num_pool_per_axis": [1, 2, 2],
    }
    settings |= {"pool_op_kernel_sizes": strides, "conv_kernel_sizes": [[3, 3, 3]] * 3}
    pools = [*strides[1:], *([[1, 1, 1]] * 3)]
    labels = {"background": 0, "core": 1, "rim": 2}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 1}
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(dataset))
    network = nnunet_v1.random_numbers(PublishedSTUNet(1, 3, [1] * 6, dims, pools, [[3, 3, 3]] * 6))
    content = {
        "network_weights": network.state_dict(),
        "trainer_name": trainer,
        "init_args": {"configuration": "3d_fullres"},
    }
    torch.save(content, model / "fold_0" / "checkpoint_final.pth")
    return model, network
