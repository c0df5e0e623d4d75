"""U-Nets with max pooling as published, written again with their names: UNet3D (Models Genesis, SuPreM) and FOMO25's baseline."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

PATCH = (16, 48, 32)


def randomised(network, seed=7):
    """Every weight and statistic another than it starts as."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.ndim < 5 else 0.2)
                tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return network.eval()


class _OwnStatistics(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, image):
        assert image.ndim == 5

    def forward(self, image):
        stored = self.running_mean.clone(), self.running_var.clone()
        return functional.batch_norm(image, *stored, self.weight, self.bias, True, self.momentum, self.eps)


class _Layer(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, padding=1)
        self.bn1 = _OwnStatistics(outputs)

    def forward(self, image):
        return self.bn1(self.conv1(image)).relu()


class _Transition(nn.Module):
    def __init__(self, inputs, between, outputs, up=0):
        super().__init__()
        self.ops = nn.Sequential(_Layer(inputs, between), _Layer(between, outputs))
        if up:
            self.up_conv = nn.ConvTranspose3d(up, up, 2, stride=2)

    def forward(self, image, skip=None):
        return self.ops(image if skip is None else torch.cat((self.up_conv(image), skip), 1))


class PublishedUNet3D(nn.Module):
    """``base`` is 32 in the published one; on (x, y, z) arrays."""

    def __init__(self, channels=1, classes=1, base=2):
        super().__init__()
        b = base
        self.down_tr64 = _Transition(channels, b, 2 * b)
        self.down_tr128 = _Transition(2 * b, 2 * b, 4 * b)
        self.down_tr256 = _Transition(4 * b, 4 * b, 8 * b)
        self.down_tr512 = _Transition(8 * b, 8 * b, 16 * b)
        self.up_tr256 = _Transition(24 * b, 8 * b, 8 * b, 16 * b)
        self.up_tr128 = _Transition(12 * b, 4 * b, 4 * b, 8 * b)
        self.up_tr64 = _Transition(6 * b, 2 * b, 2 * b, 4 * b)
        if classes:
            self.out_tr = nn.Module()
            self.out_tr.final_conv = nn.Conv3d(2 * b, classes, 1)

    def skips(self, image):
        found = [self.down_tr64(image)]
        for stage in (self.down_tr128, self.down_tr256, self.down_tr512):
            found.append(stage(functional.max_pool3d(found[-1], 2)))
        return found

    def forward(self, image):
        *skips, image = self.skips(image)
        for stage in (self.up_tr256, self.up_tr128, self.up_tr64):
            image = stage(image, skips.pop())
        return self.out_tr.final_conv(image)


def genesis(network):
    """In the layout of ``Genesis_Chest_CT.pt``."""
    return {"epoch": 5, "state_dict": {f"module.{name}": tensor for name, tensor in network.state_dict().items()}}


def suprem(network):
    """In the layout of ``supervised_suprem_unet_2100.pth``."""
    tensors = {f"module.backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    beside = {"module.organ_embedding": torch.zeros(32, 512), "module.GAP.0.weight": torch.ones(4)}
    return {"net": {**tensors, **beside}, "epoch": 3}


class _Double(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        for name, wide in (("conv1", inputs), ("conv2", outputs)):
            layer = nn.Module()
            layer.conv, layer.norm = nn.Conv3d(wide, outputs, 3, padding=1), nn.InstanceNorm3d(outputs, affine=True)
            setattr(self, name, layer)

    def forward(self, image):
        for layer in (self.conv1, self.conv2):
            image = functional.leaky_relu(layer.norm(layer.conv(image)), 0.01)
        return image


class PublishedBaseline(nn.Module):
    """FOMO25's baseline, with the names of its code; ``filters`` is 32 (unet_b) or 64 (unet_xl). On (x, y, z) arrays."""

    def __init__(self, channels=1, classes=1, filters=2, skips=True):
        super().__init__()
        f = filters
        self.with_skips = skips
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.in_conv = _Double(channels, f)
        for n in range(1, 5):
            setattr(self.encoder, f"encoder_conv{n}", _Double(f * 2 ** (n - 1), f * 2**n))
            wide = f * 2 ** (4 - n)
            setattr(self.decoder, f"upsample{n}", nn.ConvTranspose3d(2 * wide, wide, 2, stride=2))
            setattr(self.decoder, f"decoder_conv{n}", _Double(2 * wide if skips else wide, wide))
        self.decoder.out_conv = nn.Conv3d(f, classes, 1)

    def skips(self, image):
        found = [self.encoder.in_conv(image)]
        for n in range(1, 5):
            found.append(getattr(self.encoder, f"encoder_conv{n}")(functional.max_pool3d(found[-1], 2)))
        return found

    def forward(self, image):
        *skips, image = self.skips(image)
        for n in range(1, 5):
            image, skip = getattr(self.decoder, f"upsample{n}")(image), skips.pop()
            image = torch.cat((image, skip), 1) if self.with_skips else image
            image = getattr(self.decoder, f"decoder_conv{n}")(image)
        return self.decoder.out_conv(image)


def fomo25(network):
    """In the layout of its Lightning files."""
    return {"state_dict": {f"model._orig_mod.{name}": t for name, t in network.state_dict().items()}, "epoch": 3}
