"""Stage 0: the machine, by torch alone."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path

import torch

from gpu_program.setting import GIB, Setting

PACKAGES = ("triton", "numpy", "SimpleITK", "blosc2", "isal", "pydantic", "dynamic-network-architectures", "nnunetv2")


def run(setting: Setting) -> None:
    """Versions, card, bandwidths, rate of matrix products, whether the compiler works, /dev/shm."""
    setting.write("python", platform.python_version())
    setting.write("torch", torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    found = {name: version_of(name) for name in PACKAGES}
    setting.write("packages", ", ".join(f"{name} {version or 'missing'}" for name, version in found.items()))
    setting.write("cores", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    shared = Path("/dev/shm")
    setting.write("/dev/shm free", shutil.disk_usage(shared).free / GIB if shared.is_dir() else None, "GiB")
    if setting.on_gpu:
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        setting.write("cards", torch.cuda.device_count())
        setting.write("compute capability", f"{card.major}.{card.minor}", multiprocessors=card.multi_processor_count)
        setting.write("memory of the card", total / GIB, "GiB")
        setting.write("of it free", free / GIB, "GiB")
    with setting.surviving("bandwidths"):
        bandwidths(setting)
    for name, kind in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        with setting.surviving(f"{name} products"):
            products(setting, name, kind)
    with setting.surviving("torch.compile"), setting.compiler():
        compiler(setting)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def bandwidths(setting: Setting) -> None:
    size = setting.choose(1 << 28, 1 << 16)  # numbers of 4 bytes
    source = torch.rand(size, device=setting.device)
    copy = torch.empty_like(source)
    setting.write("memory", 2 * source.nbytes / setting.median(lambda: copy.copy_(source)) / 1e9, "GB/s")
    for pinned in (True, False):
        host = torch.empty(size, pin_memory=pinned and setting.on_gpu)
        kind = "pinned" if pinned else "pageable"
        up = setting.median(lambda host=host: copy.copy_(host, non_blocking=True), 5)
        down = setting.median(lambda host=host: host.copy_(copy, non_blocking=True), 5)
        setting.write(f"host to device, {kind}", host.nbytes / up / 1e9, "GB/s")
        setting.write(f"device to host, {kind}", host.nbytes / down / 1e9, "GB/s")


def products(setting: Setting, name: str, kind: torch.dtype) -> None:
    n = setting.choose(8192, 64)
    a, b = (torch.randn(n, n, device=setting.device, dtype=kind) for _ in range(2))
    setting.write(f"{name} products", 2 * n**3 / setting.median(lambda: a @ b) / 1e12, "TFLOP/s")


def compiler(setting: Setting) -> None:
    """A small function, compiled: the same numbers, and how long it took."""

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.leaky_relu((x - x.mean(1, keepdim=True)) * x.var(1, keepdim=True).rsqrt(), 0.01)

    x = torch.randn(64, 1024, device=setting.device)
    started = time.perf_counter()
    found = torch.compile(normalised)(x)
    setting.wait()
    seconds = time.perf_counter() - started
    right = torch.allclose(found, normalised(x), atol=1e-4)
    setting.write("torch.compile", seconds, "s for a small function", passed=right)
