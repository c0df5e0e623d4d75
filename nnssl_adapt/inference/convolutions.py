"""Which algorithms convolve: the fastest for patches that all have one size.

On a GPU cuDNN finds them by trying. On a CPU PyTorch leaves a convolution to oneDNN, unless the batch is one sample with few
channels and voxels: that goes to code of its own (``use_mkldnn`` in ``aten/src/ATen/native/Convolution.cpp``), which takes up
to twenty times as long. Batches of two would avoid it, but do not fit the processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LEFT_TO_SLOW_CODE = 20480
"""PyTorch's limit on channels × Z × Y of a single sample."""


@contextmanager
def onednn_convolutions(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, 3D convolutions of ``network`` that compute in float32 on a CPU are oneDNN's; no gradients."""
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv3d) and _is_plain(m)]
    if not _is_available(device):
        convolutions = []
    for convolution in convolutions:
        vars(convolution)["forward"] = functools.partial(_forward, convolution)
    try:
        yield
    finally:
        for convolution in convolutions:
            del vars(convolution)["forward"]  # the class's own is back


def _is_available(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch, "mkldnn_convolution")


def _is_plain(convolution: nn.Conv3d) -> bool:
    return (
        type(convolution) is nn.Conv3d
        and "forward" not in vars(convolution)
        and convolution.padding_mode == "zeros"
        and max(convolution.kernel_size) > 1
        and convolution.weight.dtype == torch.float32
    )


def _forward(of: nn.Conv3d, image: Tensor) -> Tensor:
    if (
        len(image) > 1
        or image.dtype != torch.float32
        or image.shape[1:4].numel() > _LEFT_TO_SLOW_CODE
        or isinstance(of.padding, str)
    ):
        return nn.Conv3d.forward(of, image)
    return torch.mkldnn_convolution(image, of.weight, of.bias, of.padding, of.stride, of.dilation, of.groups)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Within, float32 on CUDA is float32: neither convolutions nor products are rounded to TF32's ten bits.

    PyTorch's own default is a mixture: TF32 in convolutions, float32 in products. Whoever asks for float32, or is helped out
    with it where half precision overflowed, gets it in both. Half precision is not affected, nor are other devices.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@contextmanager
def cudnn_benchmark(device: torch.device) -> Iterator[None]:
    """Within, cuDNN chooses its convolutions by timing them; nothing changes on other devices than CUDA."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
