"""Stage 2: a training step by memory layout, compiler and loss; its memory beside the estimate; what it waits for."""

from __future__ import annotations

import contextlib
import statistics
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_program.networks import AS_TRAINED, LAYOUTS, Step, architecture_of, losses_of, patch_of
from gpu_program.results import Row
from gpu_program.setting import GIB, Setting

EXTRA_MEMORY = 1.2
"""Goal: memory that the loss may take at its peak beyond the logits, as a part of them, at 30 classes."""

_PACKAGE = Path(__file__).resolve().parents[2] / "nnssl_adapt"


def run(setting: Setting) -> None:
    """The most important first: a stage that runs out of time loses what comes last."""
    with setting.compiler():
        for classes in setting.choose((30, 5, 118), (30,)):
            loss_alone(setting, classes)
        resenc, primus = architecture_of(setting, "ResEncL"), architecture_of(setting, "PrimusM")
        with setting.surviving("waits of a step"):
            waits_of_step(setting, resenc)
        for compile in ("off", "on"):
            for layout in LAYOUTS:
                steps(setting, "ResEnc-L", resenc, 5, layout, compile)
        for compile in ("off", "on"):
            steps(setting, "Primus-M", primus, 5, "NCDHW", compile, only=AS_TRAINED)
        for compile in setting.choose(("off", "on"), ("off",)):
            for layout in reversed(LAYOUTS):
                steps(setting, "ResEnc-L", resenc, 30, layout, compile)
        for layout in ("NDHWC", "NCDHW"):
            steps(setting, "ResEnc-L", resenc, 5, layout, "max-autotune", only=AS_TRAINED)


def step_name(network: str, classes: int, layout: str, compile: str, loss: str) -> str:
    compiled = {"off": "eager", "on": "compiled", "max-autotune": "max-autotune"}[compile]
    return f"{network}, {classes} classes, {layout}, {compiled}, loss {loss}"


def fastest_layout(rows: list[Row]) -> str | None:
    """The layout with the shortest step, compiled, with the loss that trains; None: not measured in any."""
    names = {step_name("ResEnc-L", 5, layout, "on", AS_TRAINED): layout for layout in LAYOUTS}
    found = {names[row["name"]]: row["value"] for row in rows if row["name"] in names and row["value"] != "failed"}
    return min(found, key=lambda layout: found[layout]) if found else None


def steps(
    setting: Setting, network: str, architecture: Any, classes: int, layout: str, compile: str, only: str | None = None
) -> None:
    """Steps of one network in one layout, compiled once, with each loss."""
    with setting.surviving(step_name(network, classes, layout, compile, "any")):
        step = Step.of(setting, architecture, classes, layout, compile)
        for loss_name, loss in losses_of(classes, step.recipe).items():
            if only in (None, loss_name):
                name = step_name(network, classes, layout, compile, loss_name)
                with setting.surviving_part(name):
                    time_step(setting, name, architecture, step, loss, loss_name)


def time_step(setting: Setting, name: str, architecture: Any, step: Step, loss: Any, loss_name: str) -> None:
    from nnssl_adapt.planning.memory import CONTEXT, StepSettings, estimate_memory

    take = step.take(loss)
    peak = setting.count_peak()
    seconds = setting.seconds(take)
    _, reserved = peak()
    figures: dict[str, Any] = {"least_ms": 1000 * min(seconds), "most_ms": 1000 * max(seconds)}
    if loss_name == AS_TRAINED:
        settings = StepSettings.of(step.recipe)
        estimate = estimate_memory(architecture, 1, step.classes, patch_of(setting), 2, settings).total
        figures["estimate_gib"] = estimate / GIB
        if reserved is not None:  # the estimate counts the driver's share too, which torch does not see
            figures |= {"peak_gib": (reserved + CONTEXT) / GIB, "estimate_error": estimate / (reserved + CONTEXT) - 1}
    elif reserved is not None:
        figures["peak_gib"] = (reserved + CONTEXT) / GIB
    setting.write(name, 1000 * statistics.median(seconds), "ms a step", **figures)


# -- the loss --------------------------------------------------------------------------------------------------------------


def loss_alone(setting: Setting, classes: int) -> None:
    """Loss and gradient of bf16 logits, without a network: time, and the memory beyond the logits."""
    voxels = patch_of(setting)
    for name, loss in losses_of(classes).items():
        with setting.surviving(f"loss {name}, {classes} classes"):
            one_loss(setting, f"loss {name}, {classes} classes", loss, (2, classes, *voxels), name == AS_TRAINED)


def one_loss(setting: Setting, name: str, loss: Callable[..., Any], shape: tuple[int, ...], judged: bool) -> None:
    logits = torch.randn(shape, device=setting.device, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), device=setting.device).to(torch.int16)

    def work() -> None:
        logits.grad = None
        loss(logits, target).backward()

    seconds = setting.median(work)
    logits.grad = None
    peak = setting.count_peak()
    work()
    extra, _ = peak()
    setting.write(name, 1000 * seconds, "ms, loss and its gradient")
    if extra is None:
        return
    share = extra / logits.nbytes
    if judged and shape[1] == 30:
        setting.judge(f"{name}, memory", share, "of the logits, at the peak", at_most=EXTRA_MEMORY)
    else:
        setting.write(f"{name}, memory", share, "of the logits, at the peak")


# -- waits -----------------------------------------------------------------------------------------------------------------


def waits_of_step(setting: Setting, architecture: Any) -> None:
    """Every place where a step makes the host wait for the device; none are wanted."""
    take = Step.of(setting, architecture, 5, "NCDHW", "off").take(losses_of(5)[AS_TRAINED])
    for _ in range(3):
        take()
    with listed_waits(setting) as places:
        take()
    setting.write("waits of a step", len(places), "; ".join(places) or "none", passed=not places)


@contextlib.contextmanager
def listed_waits(setting: Setting) -> Iterator[list[str]]:
    """Fills the list with the places (file:line, the innermost of the package) where torch says that the host waits."""
    places: list[str] = []

    def hear(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        ours = [each for each in traceback.extract_stack() if Path(each.filename).is_relative_to(_PACKAGE)]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else f"{Path(filename).name}:{lineno}"
        if place not in places:
            places.append(place)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hear
        if setting.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if setting.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
