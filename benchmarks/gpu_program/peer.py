"""Stage 3: nnunetv2's own trainer and ours: same card, network, cases and cores; whole loops that run free.

Both make their batches by as many processes as they would by default on so many cores. Ours trains in the memory layout that
stage 2 found faster (a run finds that out at its start).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gpu_program.networks import LAYOUTS, architecture_of
from gpu_program.results import read_rows
from gpu_program.setting import FAILURES, Setting
from gpu_program.step_time import fastest_layout

CLASSES = 5
RATIOS = {16: 1.5, 4: 3.0}
"""Goal: how many times nnunetv2's steps a second ours has, by cores."""

BUSY = 0.95
"""Goal: share of the time in which kernels run."""

NNUNET, OURS, OURS_GPU = "nnunetv2", "ours", "ours, augmented on the GPU"
LONGEST = 240
"""Seconds that one training may take."""

_WARM_UP = 10  # at least: queues of batches are full, kernels chosen, networks compiled


def run(setting: Setting) -> None:
    import train_step

    patch, shapes = setting.choose((160, train_step.SHAPES), (32, ((40, 48, 36), (44, 40, 42))))
    available = cores()
    counts = [count for count in (16, 4) if count <= available] if not setting.rehearse else [min(2, available)]
    if setting.on_gpu and 16 not in counts:
        counts.insert(0, available)
    with tempfile.TemporaryDirectory() as name:
        train_step.write_store(Path(name), patch, CLASSES, shapes)
        for count in counts:
            beside(setting, name, patch, count)


def beside(setting: Setting, folder: str, patch: int, count: int) -> None:
    """The trainings one after the other on so many cores; their steps a second and the ratio."""
    import train_step

    layout = fastest_layout(read_rows(setting.folder)) or "NCDHW"
    kinds = [NNUNET, OURS, OURS_GPU] if train_step.has_peer() else [OURS, OURS_GPU]
    if NNUNET not in kinds:
        setting.write(f"{NNUNET}, {count} cores", "not installed")
    rates = {}
    for kind in kinds:
        name = f"{kind}, {count} cores"
        with setting.surviving(name):
            found = in_process_of_its_own(setting, kind, folder, patch, count, layout)
            rates[kind] = found["rate"]
            workers = f"{found['workers']} processes make batches"
            more = f", {layout}" if kind != NNUNET else ""
            setting.write(name, found["rate"], "steps/s", how=workers + more, peak_gib=found["peak_gib"])
            tell_busy(setting, name, kind, found["busy"], found["idle_ms"])
            if kind != NNUNET and NNUNET in rates:
                tell_ratio(setting, kind, count, rates[kind] / rates[NNUNET])


def tell_ratio(setting: Setting, kind: str, count: int, ratio: float) -> None:
    name = f"{kind} by nnunetv2's, {count} cores"
    if kind == OURS and count in RATIOS:
        setting.judge(name, ratio, "times its steps/s", at_least=RATIOS[count])
    else:
        setting.write(name, ratio, "times its steps/s")


def tell_busy(setting: Setting, name: str, kind: str, busy: float, idle_ms: float) -> None:
    if math.isnan(busy):
        setting.write(f"{name}, kernels", "not measured", "there is no GPU" if not setting.on_gpu else "no profile")
    elif kind == OURS:
        setting.judge(f"{name}, kernels", busy, "of the time busy", at_least=BUSY, idle_ms_a_step=idle_ms)
    else:
        setting.write(f"{name}, kernels", busy, "of the time busy", idle_ms_a_step=idle_ms)


# -- one training ----------------------------------------------------------------------------------------------------------


def in_process_of_its_own(
    setting: Setting, kind: str, folder: str, patch: int, count: int, layout: str
) -> dict[str, Any]:
    """Raises RuntimeError when it failed or took too long."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(setting, kind, folder, patch, count, layout, theirs))
    process.start()
    theirs.close()
    try:
        if not mine.poll(LONGEST):
            raise RuntimeError(f"took more than {LONGEST} s")
        try:
            answer: dict[str, Any] = mine.recv()
        except EOFError:
            process.join(10)
            raise RuntimeError(f"its process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def _measure(setting: Setting, kind: str, folder: str, patch: int, count: int, layout: str, link: Connection) -> None:
    try:
        link.send(_measured(setting, kind, folder, patch, count, layout))
    except FAILURES as error:
        link.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
    link.close()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)  # threads that pin memory don't end by themselves


def _measured(setting: Setting, kind: str, folder: str, patch: int, count: int, layout: str) -> dict[str, Any]:
    import train_step

    from nnssl_adapt.machine.resources import default_data_workers
    from nnssl_adapt.training.recipe.recipe import Recipe

    stay_on(count)
    torch.manual_seed(0)
    network, device = architecture_of(setting, "ResEncL"), setting.device.type
    if kind == NNUNET:
        workers = min(12, count)  # its default: twelve, or the cores
        train_step.tell_peer(folder, setting.choose(workers, 1))
        step = train_step.their_training(patch, CLASSES, device, network)
        return {**free_running(setting, step), "workers": workers}
    last, fused = LAYOUTS[layout]
    recipe = Recipe.load("default").override(deep_supervision=True, channels_last=last, fused_norm=fused)
    workers = setting.choose(default_data_workers(device, 1, 2 * patch**3 * 6), 0)
    store = Path(folder) / train_step.DATASET / "nnUNetPlans_3d_fullres"
    augmentation = "gpu" if kind == OURS_GPU else "default"
    with train_step.our_training(store, patch, CLASSES, device, workers, augmentation, network, recipe) as step:
        return {**free_running(setting, step), "workers": workers}


def free_running(setting: Setting, step: Callable[[], Any]) -> dict[str, Any]:
    """Steps a second of a loop that nothing stops; then how much of 50 steps kernels run; and its memory."""
    from nnssl_adapt.training.progress.kernels import KernelFigures

    for _ in range(setting.choose(_WARM_UP, 1)):
        step()
    peak = setting.count_peak()
    steps = setting.choose(60, 1)
    setting.wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    setting.wait()
    rate = steps / (time.perf_counter() - started)
    _, reserved = peak()
    figures = profiled(step, steps=50) if setting.on_gpu else KernelFigures()
    return {"rate": rate, "busy": figures.busy, "idle_ms": figures.idle_ms, "peak_gib": reserved and reserved / 2**30}


def profiled(step: Callable[[], Any], steps: int) -> Any:
    """What kernels do in so many steps, by torch's profiler."""
    from nnssl_adapt.training.progress.kernels import kernel_figures

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return kernel_figures(profile.events(), steps)


# -- cores -----------------------------------------------------------------------------------------------------------------


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stay_on(count: int) -> None:
    """This process and those that it starts use so many cores, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    torch.set_num_threads(max(1, min(count, torch.get_num_threads())))
