"""What only a GPU can show, in one command:  python benchmarks/gpu.py -o FOLDER

    --stage N     one stage: 0 machine, 1 correctness, 2 step time, 3 beside nnunetv2, 4 prediction
    --rehearse    every stage on the CPU with tiny sizes, by the same code: finds typing errors, measures nothing
    --publish     put FOLDER's tables into docs/benchmarks.md; refused for figures that were not measured on a GPU

Each stage runs in a process of its own with a time limit. Figures are appended to FOLDER/results.jsonl as they come, so that
a crash loses one of them; tables.md comes last. Stages 0 to 2 need neither SimpleITK nor nnunetv2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured on a GPU: begin -->", "<!-- measured on a GPU: end -->"
SECONDS = {0: 90, 1: 540, 2: 540, 3: 540, 4: 330}
TITLES = {0: "Machine", 1: "Correctness", 2: "Step time", 3: "Beside nnunetv2", 4: "Prediction"}


@dataclass(frozen=True)
class Setting:
    """Where a stage runs and how large it is.

    Attributes:
        folder: of the results.
        stage: its number.
        rehearse: on the CPU, with tiny sizes.
    """

    folder: Path
    stage: int
    rehearse: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def patch(self) -> tuple[int, int, int]:
        return (16, 16, 16) if self.rehearse else (160, 160, 160)

    @property
    def compiled(self) -> tuple[bool, ...]:
        return (False,) if self.rehearse else (False, True)

    def write(self, name: str, value: Any, unit: str = "", **more: Any) -> None:
        """Append a figure to the results, at once."""
        card = "cpu" if self.rehearse else torch.cuda.get_device_name()
        row = {"stage": self.stage, "name": name, "value": value, "unit": unit, "device": card, **more}
        row["on_gpu"] = self.device.type == "cuda"
        with (self.folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {name}: {value if not isinstance(value, float) else f'{value:.4g}'} {unit}", flush=True)

    @contextlib.contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """A failure becomes a row, and the stage goes on."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError, ImportError, OSError, LookupError, AssertionError) as error:
            self.write(name, "failed", error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 3) -> float:
    """Median seconds of one call, by events on a GPU; the first ones tune and compile, and are left out."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


# -- 0: the machine ---------------------------------------------------------------------------------------------------------


def machine(setting: Setting) -> None:
    """Versions, card, bandwidths, rate of matrix products, compiler, /dev/shm."""
    device, size = setting.device, 1 << (20 if setting.rehearse else 28)
    setting.write("python", platform.python_version())
    setting.write("torch", torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    setting.write("cores", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    shared = Path("/dev/shm")
    setting.write("/dev/shm free", shutil.disk_usage(shared).free / 2**30 if shared.is_dir() else None, "GiB")
    source = torch.zeros(size, device=device)
    copy = torch.empty_like(source)
    setting.write("memory", 2 * source.nbytes / seconds_of(lambda: copy.copy_(source), device, 10) / 1e9, "GB/s")
    with setting.surviving("pinned memory"):
        host = torch.empty(size, pin_memory=device.type == "cuda")
        setting.write("host to device", host.nbytes / seconds_of(lambda: copy.copy_(host), device, 5) / 1e9, "GB/s")
    n = 128 if setting.rehearse else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    setting.write("bf16 products", 2 * n**3 / seconds_of(lambda: a @ b, device, 10) / 1e12, "TFLOP/s")
    setting.write("compiler", importlib.util.find_spec("triton") is not None, "Triton is there")


# -- 1: correctness ----------------------------------------------------------------------------------------------------------


def network_and_batch(setting: Setting, classes: int, features: int) -> tuple[nn.Module, Tensor, Tensor, Any]:
    """A residual encoder U-Net of three stages, a batch of two, and its strides; the same each time."""
    from nnssl_adapt.weights.network.architectures import Architecture, build_network

    architecture = Architecture.named(
        "ResEncL",
        n_stages=3,
        features_per_stage=[features * 2**stage for stage in range(3)],
        kernel_sizes=[[3, 3, 3]] * 3,
        strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        n_blocks_per_stage=[1, 2, 2],
        n_conv_per_stage_decoder=[1, 1],
    )
    torch.manual_seed(0)
    patch = (16, 24, 32)
    network = build_network(architecture, 1, classes, patch)
    image = torch.randn(2, 1, *patch)
    return network, image, torch.randint(0, classes, (2, 1, *patch)).to(torch.int16), architecture.kwargs["strides"]


def correctness(setting: Setting) -> None:
    """Gradients of a step in every precision, compiled or not, in both layouts, against float64 on the CPU; the cuda tests."""
    from nnssl_adapt.data.labels import LabelScheme
    from nnssl_adapt.training.optimise.losses import build_loss
    from nnssl_adapt.training.optimise.network_options import to_device, training_forward
    from nnssl_adapt.training.optimise.one_pass import in_one_pass
    from nnssl_adapt.training.recipe.recipe import Recipe

    classes, device = 5, setting.device
    names = {"background": 0, **{f"class {n}": n for n in range(1, classes)}}
    scheme = LabelScheme.from_dataset_json({"labels": names})
    network, image, target, _ = network_and_batch(setting, classes, 8)
    exact = network.double()
    build_loss(scheme, False)(exact(image.double()), target).backward()
    expected = torch.cat([w.grad.flatten() for w in exact.parameters() if w.grad is not None])
    for precision in ("fp32", "bf16") if setting.rehearse else ("fp32", "bf16", "fp16"):
        for compiled in setting.compiled:
            for last in (False, True):
                name = f"{precision}, {'compiled' if compiled else 'eager'}, {'NDHWC' if last else 'NCDHW'}"
                with setting.surviving(name):
                    recipe = Recipe(channels_last=last, compile="on" if compiled else "off")
                    ours = to_device(network_and_batch(setting, classes, 8)[0], recipe, device)
                    half = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
                    forward, loss = training_forward(ours, recipe, device), in_one_pass(build_loss(scheme, False))
                    with torch.autocast(device.type, dtype=half, enabled=half is not None):
                        value = loss(forward(image.to(device)), target.to(device))
                    scale = 1024 if precision == "fp16" else 1
                    (value * scale).backward()
                    got = torch.cat([w.grad.flatten() for w in ours.parameters() if w.grad is not None]).double().cpu()
                    error = ((got / scale - expected).norm() / expected.norm()).item()
                    setting.write(name, error, "relative error of the gradient", passed=error < 0.1)
    windows(setting)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "cuda",
        "-n",
        "0",
        str(HERE.parent / "tests" / "unit" / ("inference" if setting.rehearse else "")),
    ]
    with setting.surviving("pytest -m cuda"):
        done = subprocess.run(
            [*command, *(["--collect-only"] if setting.rehearse else [])], capture_output=True, text=True
        )
        last_line = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
        setting.write("pytest -m cuda", last_line, passed=done.returncode == 0)


def windows(setting: Setting) -> None:
    """Labels of a sliding window on the device, beside the CPU's."""
    from nnssl_adapt.inference.sliding_window import sliding_window_logits

    network, _, _, _ = network_and_batch(setting, 5, 8)
    image, patch = torch.randn(1, 20, 30, 40), (16, 24, 32)
    options: dict[str, Any] = {"mirror_axes": (0,), "autocast_dtype": None}
    with setting.surviving("sliding window"):
        cpu = sliding_window_logits(network, image, patch, 5, device="cpu", **options)
        there = sliding_window_logits(network, image, patch, 5, device=setting.device, **options)
        setting.write("sliding window", float((cpu.argmax(0) == there.argmax(0)).double().mean()), "of labels equal")


# -- 2: step time ------------------------------------------------------------------------------------------------------------


def step_time(setting: Setting) -> None:
    """A training step of ResEnc-L: layouts, compiled or not, losses, classes; peak memory beside the estimate."""
    from nnssl_adapt.planning.memory import StepSettings, estimate_memory
    from nnssl_adapt.weights.network.architectures import Architecture

    tiny: dict[str, Any] = {"n_stages": 3, "features_per_stage": [4, 8, 8], "kernel_sizes": [[3, 3, 3]] * 3}
    tiny |= {"strides": [[1] * 3, [2] * 3, [2] * 3], "n_blocks_per_stage": [1] * 3, "n_conv_per_stage_decoder": [1] * 2}
    architecture = Architecture.named("ResEncL", **(tiny if setting.rehearse else {}))
    for classes in (5, 30):
        estimate = estimate_memory(
            architecture,
            1,
            classes,
            setting.patch,
            2,
            StepSettings(),
        )
        setting.write(f"{classes} classes, estimate", estimate.total / 2**30, "GiB")
        for last in (False, True):
            for compiled in setting.compiled:
                for one_pass in (False, True):
                    name = (
                        f"{classes} classes, {'NDHWC' if last else 'NCDHW'}, {'compiled' if compiled else 'eager'}, "
                        f"loss {'in one pass' if one_pass else 'reference'}"
                    )
                    with setting.surviving(name):
                        time_step(setting, name, architecture, classes, last, compiled, one_pass)


def time_step(
    setting: Setting, name: str, architecture: Any, classes: int, last: bool, compiled: bool, one_pass: bool
) -> None:
    from nnssl_adapt.data.labels import LabelScheme
    from nnssl_adapt.training.loop import TrainingLoop
    from nnssl_adapt.training.optimise.losses import build_loss
    from nnssl_adapt.training.optimise.network_options import to_device, training_forward
    from nnssl_adapt.training.optimise.one_pass import in_one_pass
    from nnssl_adapt.training.optimise.optimizer import build_optimizer
    from nnssl_adapt.training.recipe.recipe import Recipe
    from nnssl_adapt.training.run.checkpointing import TrainingState
    from nnssl_adapt.weights.network.architectures import build_network

    device = setting.device
    torch.backends.cudnn.benchmark = device.type == "cuda"
    recipe = Recipe(channels_last=last, compile="on" if compiled else "off")
    scheme = LabelScheme.from_dataset_json({"labels": {"background": 0, **{str(n): n for n in range(1, classes)}}})
    network = to_device(build_network(architecture, 1, classes, setting.patch), recipe, device)
    loss = build_loss(scheme, False)
    loop = TrainingLoop(recipe, in_one_pass(loss) if one_pass else loss, scheme, 2, device, torch.bfloat16)
    state = TrainingState(network, build_optimizer(network, recipe, device), None)
    forward = training_forward(network, recipe, device)
    image = torch.randn(2, 1, *setting.patch, device=device)
    target = torch.randint(0, classes, (2, 1, *setting.patch), device=device).to(torch.int16)
    batch = {"image": image, "target": target}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: loop.step(state, [batch], forward), device, 1 if setting.rehearse else 10, 1)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    setting.write(name, 1000 * seconds, "ms a step", peak_gib=peak)


# -- 3: the peer ---------------------------------------------------------------------------------------------------------------


def peer(setting: Setting) -> None:
    """nnunetv2's own trainer beside ours, on the same card in the same call: benchmarks/train_step.py."""
    if importlib.util.find_spec("nnunetv2") is None:
        setting.write("nnunetv2", "not installed")
        return
    all_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for cores in (2,) if setting.rehearse else (4, 16):
        if all_cores:
            os.sched_setaffinity(0, all_cores[:cores])  # what is started from here on inherits it
        command = [
            sys.executable,
            str(HERE / "train_step.py"),
            *_TRAIN_STEP[setting.rehearse],
            "--workers",
            str(cores - 1),
        ]
        name = f"steps beside nnunetv2, {cores} cores"
        with setting.surviving(name):
            done = subprocess.run(command, capture_output=True, text=True)
            setting.write(name, (done.stdout or done.stderr).strip()[-2000:], passed=done.returncode == 0)


_TRAIN_STEP: dict[bool, list[str]] = {
    True: ["steps", "--patch", "64", "--labels", "3", "--steps", "1"],
    False: ["steps", "--patch", "160", "--labels", "5"],
}


# -- 4: prediction -------------------------------------------------------------------------------------------------------------


def prediction(setting: Setting) -> None:
    """A 30-class case: tiles with and without mirroring, and from logits to labels."""
    from nnssl_adapt.geometry.logits import logits_to_labels
    from nnssl_adapt.inference.sliding_window import sliding_window_logits

    classes = 30
    shape = (20, 30, 40) if setting.rehearse else (400, 512, 512)
    network, _, _, _ = network_and_batch(setting, classes, 4 if setting.rehearse else 32)
    patch = (16, 24, 32) if setting.rehearse else (160, 160, 160)
    image, logits = torch.randn(1, *shape), None
    for mirrored in (False, True):
        with setting.surviving(f"tiles, mirrored {mirrored}"):
            started = time.perf_counter()
            axes = (0, 1, 2) if mirrored else ()
            logits = sliding_window_logits(network, image, patch, classes, mirror_axes=axes, device=setting.device)
            setting.write(f"tiles, mirrored {mirrored}", time.perf_counter() - started, "s, with the way to the CPU")
    if logits is not None:
        started = time.perf_counter()
        logits_to_labels(logits, shape, (1, 1, 1), (1, 1, 1))
        setting.write("logits to labels", time.perf_counter() - started, "s, same grid, on the CPU")


STAGES = {0: machine, 1: correctness, 2: step_time, 3: peer, 4: prediction}


# -- around them -----------------------------------------------------------------------------------------------------------------


def read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for each stage, of nothing but the rows."""
    lines = []
    for stage, title in TITLES.items():
        mine = [row for row in rows if row["stage"] == stage]
        if not mine:
            continue
        lines += [f"**{title}** ({mine[-1]['device']})", "", "| what | figure | |", "|---|---|---|"]
        for row in mine:
            value = f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"]).replace("\n", "; ")
            more = f"{row['unit']}" + (f", peak {row['peak_gib']:.2f} GiB" if row.get("peak_gib") else "")
            lines.append(f"| {row['name']} | {value} | {row.get('error', more)} |")
        lines.append("")
    return "\n".join(lines)


def publish(rows: list[dict[str, Any]], document: Path = DOCUMENT) -> str | None:
    """Put the tables into the document, between its two marks. Returns why not, if not."""
    if not rows:
        return "there are no figures to publish"
    if others := sorted({row["name"] for row in rows if not row["on_gpu"]}):
        return f"not measured on a GPU: {', '.join(others[:3])}{' …' * (len(others) > 3)}"
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        return f"{document} has no {BEGIN} … {END}"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    head = f"{date.today()}, commit `{commit or 'unknown'}`, `python benchmarks/gpu.py`:"
    before, rest = text.split(BEGIN)
    document.write_text(f"{before}{BEGIN}\n\n{head}\n\n{tables(rows)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return None


def run_stage(folder: Path, stage: int, rehearse: bool) -> bool:
    """Run a stage in a process of its own; whether it came to its end."""
    print(f"stage {stage}: {TITLES[stage]}", flush=True)
    command = [
        sys.executable,
        __file__,
        "-o",
        str(folder),
        "--child",
        str(stage),
        *(["--rehearse"] if rehearse else []),
    ]
    try:
        ended = subprocess.run(command, timeout=SECONDS[stage]).returncode
        problem = None if ended == 0 else f"ended with {ended}"
    except subprocess.TimeoutExpired:
        problem = f"took more than {SECONDS[stage]} s"
    if problem:
        print(f"stage {stage} {problem}; what it had measured is kept", flush=True)
    return problem is None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--stage", type=int, choices=list(STAGES))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--child", type=int, choices=list(STAGES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.output
    if arguments.publish:
        refusal = publish(read_rows(folder))
        print(f"not published: {refusal}" if refusal else f"{DOCUMENT} has the tables")
        return 1 if refusal else 0
    if not arguments.rehearse and not torch.cuda.is_available():
        print("there is no CUDA device here: --rehearse runs every stage on the CPU, and measures nothing")
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.child is not None:
        STAGES[arguments.child](Setting(folder, arguments.child, arguments.rehearse))
        return 0
    stages = list(STAGES) if arguments.stage is None else [arguments.stage]
    ended = [run_stage(folder, stage, arguments.rehearse) for stage in stages]
    rows = read_rows(folder)
    (folder / "tables.md").write_text(tables(rows), encoding="utf-8")
    failed = [row["name"] for row in rows if row["value"] == "failed" or row.get("passed") is False]
    print(f"{len(rows)} figures in {folder}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 0 if all(ended) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
