"""How long commands take to start, as ratios to ``python -c "import torch"``: medians of a few runs in fresh processes.

    python benchmarks/startup.py [--runs 5] [--folder FOLDER]

Makes a tiny checkpoint and dataset in FOLDER (default: a temporary one), preprocesses it, then times: the import of torch,
``inspect``, and ``preprocess`` with nothing left to do. Goals: at most 1.5 each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

GOAL = 1.5


def seconds(words: list[str], runs: int, environment: dict[str, str]) -> float:
    """Median wall-clock time (s) of a command in fresh processes."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True, env={**os.environ, **environment})
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of which the median is taken (default 5)")
    parser.add_argument("--folder", help="for the checkpoint and the dataset")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as temporary:
        measure(Path(arguments.folder or temporary), arguments.runs)


def measure(folder: Path, runs: int) -> None:
    """Print the table."""
    from support.nnssl_files import plan, state_dict, write_checkpoint
    from support.synthetic import make_dataset

    environment = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    write_checkpoint(folder / "weights", state_dict(), sidecar=plan())
    make_dataset(folder / "raw", cases=2, shape=(12, 16, 14))
    ours = [sys.executable, "-m", "nnssl_adapt.cli.main"]
    preprocess = [*ours, "preprocess", "-d", "991", "-n", "mae", "-pc", str(folder / "weights"), "-np", "1"]
    subprocess.run(preprocess, check=True, capture_output=True, env={**os.environ, **environment})
    commands = {
        "nnssl-adapt --help": [*ours, "--help"],
        "nnssl-adapt inspect": [*ours, "inspect", str(folder / "weights")],
        "nnssl-adapt preprocess, nothing to do": preprocess,
    }
    torch = seconds([sys.executable, "-c", "import torch"], runs, environment)
    print(f"{'command':40}{'seconds':>10}{'ratio':>8}   goal")
    print(f"{'python -c import torch':40}{torch:10.2f}{1:8.2f}")
    for name, words in commands.items():
        taken = seconds(words, runs, environment)
        print(f"{name:40}{taken:10.2f}{taken / torch:8.2f}   {GOAL}")


if __name__ == "__main__":
    main()
