"""Stage 4: one large case of 30 classes: tiles, transfer and export apart, mirrored or not; the peer on the same logits."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from gpu_program.correctness import smooth_logits
from gpu_program.networks import architecture_of, patch_of
from gpu_program.setting import GIB, Setting

CLASSES = 30
ON_CARD = 0.5
"""Goal: seconds from the logits of a case of 512 × 512 × 400 voxels to its labels, on the card."""

ONE = (1.0, 1.0, 1.0)


def run(setting: Setting) -> None:
    shape = setting.choose((400, 512, 512), (20, 28, 40))
    with setting.surviving("tiles"):
        tiles(setting, shape)
    grids = {"same grid": shape, "resampled": tuple(n * 3 // 4 for n in shape)}
    for name, size in grids.items():
        with setting.surviving(f"logits to labels on the device, {name}"):
            labels(setting, name, size, shape)
    for name, size in grids.items():  # minutes of one thread: last
        with setting.surviving(f"nnunetv2, logits to labels, {name}"):
            peer(setting, name, size, shape)


def tiles(setting: Setting, shape: tuple[int, ...]) -> None:
    """The network over the whole case; the logits stay on the device if they fit."""
    from nnssl_adapt.inference.sliding_window import sliding_window_logits
    from nnssl_adapt.weights.network.architectures import build_network

    torch.manual_seed(0)
    network = build_network(architecture_of(setting, "ResEncL"), 1, CLASSES, patch_of(setting))
    image = torch.randn(1, *shape)
    options: dict[str, Any] = {"device": setting.device, "autocast_dtype": torch.bfloat16}
    small = image[:, : patch_of(setting)[0], : patch_of(setting)[1], : patch_of(setting)[2]]
    for axes, name in (((), "not mirrored"), ((0, 1, 2), "mirrored")):
        with setting.surviving_part(f"tiles, {name}"):
            sliding_window_logits(network, small, patch_of(setting), CLASSES, mirror_axes=axes, **options)  # to warm up
            peak = setting.count_peak()
            seconds, logits = setting.once(
                lambda axes=axes: sliding_window_logits(
                    network, image, patch_of(setting), CLASSES, mirror_axes=axes, keep=True, **options
                )
            )
            _, reserved = peak()
            where = f"logits in {str(logits.dtype).removeprefix('torch.')} on {logits.device.type}"
            setting.write(f"tiles, {name}", seconds, "s", where=where, peak_gib=reserved and reserved / GIB)
            del logits


def labels(setting: Setting, name: str, size: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """From float32 logits, as tiles leave them on the device, to labels; and by way of the CPU, which must agree."""
    from nnssl_adapt.geometry.logits import logits_to_labels
    from nnssl_adapt.geometry.logits_on_device import labels_on_device

    logits = smooth_logits(size, CLASSES, setting.device)
    seconds = setting.median(lambda: labels_on_device(logits, shape, ONE, ONE), 3, 1)
    setting.judge(f"logits to labels on the device, {name}", seconds, "s", at_most=ON_CARD)
    found = labels_on_device(logits, shape, ONE, ONE)
    seconds, there = setting.once(lambda: found.cpu())
    setting.write(f"labels to the CPU, {name}", seconds, "s")
    seconds, on_cpu = setting.once(lambda: logits.cpu())
    setting.write(f"logits to the CPU, {name}", seconds, "s")
    seconds, expected = setting.once(lambda: logits_to_labels(on_cpu, shape, ONE, ONE))
    setting.write(f"logits to labels on the CPU, {name}", seconds, "s")
    share = float((there.numpy() == expected).mean())
    setting.write(f"labels made on the device, {name}", share, "of the CPU's", passed=share == 1)


def peer(setting: Setting, name: str, size: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """nnunetv2's export of the same logits, in float16 on the CPU, as its predictor hands them over; with its eight threads."""
    if importlib.util.find_spec("nnunetv2") is None:
        setting.write(f"nnunetv2, logits to labels, {name}", "not installed")
        return
    import predict

    predict.CASES[name] = (size, ONE, shape, ONE, CLASSES)
    logits = smooth_logits(size, CLASSES, setting.device, torch.float16).cpu()
    seconds, found = setting.once(predict.their_export(name, logits, setting.choose(8, 1)))
    setting.write(f"nnunetv2, logits to labels, {name}", seconds, "s")
    from nnssl_adapt.geometry.logits_on_device import labels_on_device

    ours = labels_on_device(logits.to(setting.device), shape, ONE, ONE).cpu().numpy()
    setting.write(f"labels that nnunetv2 makes too, {name}", float((ours == found).mean()), "of its labels")
