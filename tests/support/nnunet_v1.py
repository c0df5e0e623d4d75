"""Models of nnU-Net version 1 as its trainer saves them: a network with its names, weights, and the pickle beside them."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

POOLS = [[1, 2, 2], [2, 2, 2]]
KERNELS = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
PATCH = (8, 12, 16)


class _Block(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=(1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, [size // 2 for size in kernel])
        self.instnorm = nn.InstanceNorm3d(outputs, eps=1e-5, affine=True)

    def forward(self, image):
        return nn.functional.leaky_relu(self.instnorm(self.conv(image)), 0.01)


class _Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, image):
        return self.blocks(image)


class GenericUNet(nn.Module):
    """The network with the structure and the names of nnunet 1.7.1's, written again: two convolutions a stage."""

    def __init__(self, channels, classes, base=4, most=320, pools=POOLS, kernels=KERNELS):
        super().__init__()
        n = len(pools)
        widths = [min(base * 2**stage, most) for stage in range(n + 1)]
        strides = [(1, 1, 1), *pools]
        context = []
        for stage in range(n + 1):
            inputs = channels if stage == 0 else widths[stage - 1]
            first = _Block(inputs, widths[stage], kernels[stage], strides[stage])
            second = _Block(widths[stage], widths[stage], kernels[stage])
            context.append(_Stack(first, second) if stage < n else nn.Sequential(_Stack(first), _Stack(second)))
        self.conv_blocks_context = nn.ModuleList(context)
        self.conv_blocks_localization, self.tu, self.seg_outputs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for up in range(n):
            width, kernel = widths[n - 1 - up], kernels[-(up + 1)]
            self.tu.append(nn.ConvTranspose3d(widths[n - up], width, pools[-(up + 1)], pools[-(up + 1)], bias=False))
            stacks = _Stack(_Block(2 * width, width, kernel)), _Stack(_Block(width, width, kernel))
            self.conv_blocks_localization.append(nn.Sequential(*stacks))
            self.seg_outputs.append(nn.Conv3d(width, classes, 1, bias=False))

    def forward(self, image):
        skips = []
        for stage in self.conv_blocks_context:
            image = stage(image)
            skips.append(image)
        for up, stack in enumerate(self.conv_blocks_localization):
            image = stack(torch.cat((self.tu[up](image), skips[-(up + 2)]), dim=1))
        return self.seg_outputs[-1](image)

    def skips(self, image):
        found = []
        for stage in self.conv_blocks_context:
            image = stage(image)
            found.append(image)
        return found


def original(channels, classes, base=4, pools=POOLS, kernels=KERNELS):
    """nnunet's own class, as its trainer makes it. Raises ImportError where the package is not installed."""
    from nnunet.network_architecture.generic_UNet import Generic_UNet

    norm, dropout = {"eps": 1e-5, "affine": True}, {"p": 0, "inplace": True}
    nonlin = {"negative_slope": 1e-2, "inplace": True}
    switches = False, False, lambda x: x, None, pools, kernels, False, True, True
    what = nn.Conv3d, nn.InstanceNorm3d, norm, nn.Dropout3d, dropout, nn.LeakyReLU, nonlin
    return Generic_UNet(channels, base, classes, len(pools), 2, 2, *what, *switches)


def random_numbers(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def plans(modalities=("CT", "T1"), patch=PATCH, spacing=(3.0, 0.7, 0.8), transpose=(0, 1, 2), **more):
    """``plans.pkl``, with the types that version 1 puts into it."""
    channels = len(modalities)
    numbered = OrderedDict(enumerate(modalities))
    stage = {
        "batch_size": 2,
        "num_pool_per_axis": [1, 2, 2],
        "patch_size": np.array(patch),
        "current_spacing": np.array(spacing),
        "original_spacing": np.array(spacing),
        "do_dummy_2D_data_aug": False,
        "pool_op_kernel_sizes": POOLS,
        "conv_kernel_sizes": KERNELS,
    }
    statistics = {"mean": np.float64(40.5), "sd": np.float32(90), "mn": -1000.0, "mx": 1200.0, "median": 44.0}
    statistics |= {"percentile_00_5": np.float64(-160), "percentile_99_5": np.float64(240), "v": []}
    return {
        "plans_per_stage": {0: stage, **more.pop("stages", {})},
        "modalities": numbered,
        "num_modalities": channels,
        "normalization_schemes": OrderedDict((i, "CT" if m == "CT" else "nonCT") for i, m in numbered.items()),
        "use_mask_for_norm": OrderedDict((i, m != "CT") for i, m in numbered.items()),
        "dataset_properties": {
            "modalities": numbered,
            "intensityproperties": dict.fromkeys(range(channels), statistics),
        },
        "transpose_forward": list(transpose),
        "base_num_features": 4,
        "num_classes": 2,
        "all_classes": [1, 2],
        **more,
    }


def save(folder, network, name="nnUNetTrainerV2", stage=0, content=None, filename="model_final_checkpoint.model"):
    """Write what the trainer's ``save_checkpoint`` writes; returns the path of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = OrderedDict((key, tensor.cpu()) for key, tensor in network.state_dict().items())
    weights = {"epoch": 1000, "state_dict": state, "optimizer_state_dict": None, "lr_scheduler_state_dict": None}
    torch.save(
        {**weights, "plot_stuff": ([0.5], [np.float64(0.4)], [], []), "best_stuff": (0.1, None, None)},
        folder / filename,
    )
    init = ("/x/plans.pkl", 0, "/x", "/y", True, stage, True, False, True)
    info = OrderedDict(init=init, name=name, plans=plans() if content is None else content)
    info["class"] = f"<class 'nnunet.training.network_training.{name}.{name}'>"
    (folder / f"{filename}.pkl").write_bytes(pickle.dumps(info))
    return folder / filename
