"""Which device the work is done on."""

from __future__ import annotations

import torch

from nnssl_adapt.errors import DeviceUnavailable


def check_device(device: str | torch.device) -> torch.device:
    """Return the device (``cuda``, ``cuda:1``, ``mps``, ``cpu``) if this machine has it.

    A numbered CUDA device becomes the current one of this thread: what asks for "the" GPU (kernels that are compiled here,
    events, graphs) would otherwise use the first.

    Raises DeviceUnavailable, saying what there is instead.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise DeviceUnavailable(f"device {device!r} is unknown: use cuda, cpu or mps") from None
    if wanted.type == "cpu":
        return wanted
    if wanted.type == "cuda" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if (wanted.index or 0) < count:
            if wanted.index is not None:
                torch.cuda.set_device(wanted)
            return wanted
        raise DeviceUnavailable(f"device {device} does not exist: this machine has cuda:0 to cuda:{count - 1}")
    if wanted.type == "mps" and torch.backends.mps.is_available():
        return wanted
    others = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    raise DeviceUnavailable(
        f"no {wanted.type} device on this machine (or PyTorch was installed without support for it): "
        + (f"use {others}, or " if others else "")
        + "run on the CPU with -device cpu, which is slow"
    )


def half_precision(device: torch.device) -> torch.dtype:
    """The 16-bit type that a CUDA device computes fastest and safest in: bf16 where it has it in hardware, else fp16."""
    native = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if native else torch.float16
