"""Loading pre-trained weights of the published size: seconds and memory, ours beside nnU-Net's own way, in one run.

    python benchmarks/loading.py [--repeats 5] [--channels 1 3]

Writes a ResEnc-L checkpoint as nnssl does (second names and the encoder under the decoder included), about 410 MB, into a
temporary folder. Then, each in processes of its own and with the file in the page cache:

- open     what ``open_checkpoint`` takes: the SHA-256 of the file, its plan, its tensors mapped into memory
- build    what a freshly initialised network takes, which both need
- move     what ``transfer_weights`` takes, with the report of every tensor
- peer     ``torch.load`` of the whole file, the same network, the encoder's state dict copied in by name

Memory is the peak of resident memory above what Python and its imports take. Pages of a mapped file count as resident
while they are in use although the kernel can drop them at any time; anonymous memory, which it can't, is shown apart.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import torch

PATCH = (192, 192, 192)
KEYS = {
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stem",
    "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
    "key_to_lpe": None,
}


def write_checkpoint(folder: Path) -> Path:
    """A ResEnc-L with one channel and one output, as nnFoundationCNN is published."""
    from nnssl_adapt.weights.network.architectures import Architecture, build_network

    network = build_network(Architecture.named("ResEncL"), 1, 1, PATCH)
    configuration = {
        "spacing": None,
        "patch_size": PATCH,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
    }
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {"plans_name": "nnsslPlans", "configurations": {"noresample": configuration}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": PATCH,
        **KEYS,
    }
    path = folder / "checkpoint_final.pth"
    content = {"network_weights": network.state_dict(), "nnssl_adaptation_plan": plan, "trainer_name": "BaseMAETrainer"}
    torch.save(content, path)
    return path


class Memory:
    """Peaks of this process's memory in MB while the block runs, sampled every millisecond by a thread."""

    def __enter__(self) -> Memory:
        self.start = memory()
        self.peak = self.start
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self._look()
            time.sleep(0.001)

    def _look(self) -> None:
        self.peak = tuple(max(pair) for pair in zip(self.peak, memory(), strict=True))

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self._look()

    def above(self, start: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(peak - before for peak, before in zip(self.peak, start, strict=True))


def memory() -> tuple[float, ...]:
    """(resident, anonymous) MB of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {
        line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))
    }
    return found["VmRSS"], found["RssAnon"]


def ours(path: Path, channels: int) -> dict[str, float]:
    from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
    from nnssl_adapt.weights.network.architectures import build_network
    from nnssl_adapt.weights.transfer.transfer import transfer_weights

    kept = []

    def open_it() -> None:
        kept.append(open_checkpoint(path))

    def build() -> None:
        kept.append(build_network(kept[0].architecture, channels, 4, PATCH))

    def move() -> None:
        report = transfer_weights(kept[0], kept[1])
        kept.append(str(report))
        kept.append(report.to_dict())
        assert report.coverage == 1

    return measured({"open": open_it, "build": build, "move": move})


def peer(path: Path, channels: int) -> dict[str, float]:
    """The usual way: everything into memory, then the encoder by its names; one channel only, others need a new stem."""
    from nnssl_adapt.weights.network.architectures import Architecture, build_network

    kept = []

    def load() -> None:
        kept.append(torch.load(path, map_location="cpu", weights_only=False))

    def build() -> None:
        kept.append(build_network(Architecture.named("ResEncL"), channels, 4, PATCH))

    def copy() -> None:
        weights = kept[0]["network_weights"]
        encoder = {
            name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")
        }
        if channels > 1:
            for name, value in encoder.items():
                if value.ndim == 5 and value.shape[1] == 1:
                    encoder[name] = value.repeat(1, channels, 1, 1, 1) / channels
        kept[1].encoder.load_state_dict(encoder)

    return measured({"open": load, "build": build, "move": copy})


def measured(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of each step, and memory of all together and without what the network itself takes."""
    baseline = memory()
    found: dict[str, float] = {}
    network = 0.0
    with Memory() as whole:
        for name, step in steps.items():
            before = memory()
            started = time.perf_counter()
            step()
            found[name] = time.perf_counter() - started
            if name == "build":
                network = memory()[1] - before[1]
    resident, anonymous = whole.above(baseline)
    return {**found, "resident": resident, "anonymous": anonymous, "network": network}


def in_a_process(which: str, path: Path, channels: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", which, str(path), str(channels)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return dict(json.loads(answer))


def report(which: str, runs: list[dict[str, float]], size: float) -> str:
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    without_build = statistics.median(run["open"] + run["move"] for run in runs)
    above = middle["resident"] - middle["network"]
    return (
        f"{which:10s} {middle['open']:7.2f} {middle['build']:7.2f} {middle['move']:7.2f} {without_build:10.2f} "
        f"{middle['resident']:9.0f} {middle['network']:8.0f} {above:8.0f} {above / size:7.2f} {middle['anonymous']:10.0f} "
        f"{middle['anonymous'] / size:7.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 3])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = write_checkpoint(Path(temporary))
        size = path.stat().st_size / 2**20
        print(
            f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread; Python "
            f"{platform.python_version()}, torch {torch.__version__}; file {size:.0f} MiB, {PATCH[0]}³, page cache warm; "
            f"medians of {arguments.repeats}; seconds, MiB above the imports"
        )
        print(
            f"{'':10s} {'open':>7s} {'build':>7s} {'move':>7s} {'open+move':>10s} {'peak RSS':>9s} {'network':>8s} "
            f"{'rest':>8s} {'/file':>7s} {'peak anon':>10s} {'/file':>7s}"
        )
        for channels in arguments.channels:
            for which in ("ours", "peer"):
                runs = [in_a_process(which, path, channels) for _ in range(arguments.repeats + 1)][1:]
                print(report(f"{which} 1→{channels}", runs, size), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        which, where, how_many = sys.argv[2:]
        torch.ones(8).sum()
        importlib.import_module("nnssl_adapt.weights.transfer.transfer")  # imports are no part of it
        print(json.dumps({"ours": ours, "peer": peer}[which](Path(where), int(how_many))))
    else:
        main()
