"""How long commands take to start, as ratios to ``python -c "import torch"`` in fresh processes.

    python benchmarks/startup.py [--runs 5] [--folder FOLDER]

Makes a tiny checkpoint, dataset and trained model in FOLDER (default: a temporary one), then times, in rounds of one run each:
the import of torch; ``inspect``; ``preprocess`` with nothing left to do; ``predict`` of one image of one tile (the whole
command, so more than to its first tile); and two worker processes that have loaded what preprocessing needs. A ratio is
taken within a round, and the median of the rounds is printed.
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

WORKERS = """
import time
from nnssl_adapt.data.preprocess import preprocess_case
from nnssl_adapt.machine.workers import over_cases
if __name__ == "__main__":
    started = time.perf_counter()
    # Called without arguments it fails at once: then the worker is there, with all that it needs.
    outcomes = list(over_cases(preprocess_case, [("a", ()), ("b", ())], workers=2))
    assert all(isinstance(outcome.error, TypeError) for outcome in outcomes)
    print(time.perf_counter() - started)
"""


def seconds(words: list[str], environment: dict[str, str]) -> float:
    """Wall-clock time (s) of a command in a fresh process."""
    started = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, **environment})
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="rounds, of which the median is taken (default 5)")
    parser.add_argument("--folder", help="for the checkpoint, the dataset and the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as temporary:
        measure(Path(arguments.folder or temporary), arguments.runs)


def measure(folder: Path, runs: int) -> None:
    """Print the table."""
    import numpy as np
    from support.model_folders import SPACING, write_model_folder
    from support.nnssl_files import plan, state_dict, write_checkpoint
    from support.synthetic import make_dataset, write_image

    environment = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    write_checkpoint(folder / "weights", state_dict(), sidecar=plan())
    make_dataset(folder / "raw", cases=2, shape=(12, 16, 14))
    model = write_model_folder(folder / "results")
    image = folder / "image_0000.nii.gz"
    write_image(image, np.random.default_rng(0).normal(size=(12, 14, 10)), SPACING)
    script = folder / "workers.py"
    script.write_text(WORKERS, encoding="utf-8")

    ours = [sys.executable, "-m", "nnssl_adapt.cli.main"]
    preprocess = [*ours, "preprocess", "-d", "991", "-n", "mae", "-pc", str(folder / "weights"), "-np", "1"]
    predict = [*ours, "predict", "-i", str(image), "-m", str(model), "-f", "0", "-device", "cpu", "--no-tta"]
    predict += ["-o", str(folder / "segmentations"), "--overwrite"]
    rows: dict[str, tuple[list[str] | None, float | None]] = {
        "python -c import torch": ([sys.executable, "-c", "import torch"], None),
        "nnssl-adapt --help": ([*ours, "--help"], None),
        "nnssl-adapt inspect": ([*ours, "inspect", str(folder / "weights")], 1.5),
        "nnssl-adapt preprocess, nothing to do": (preprocess, 1.5),
        "nnssl-adapt predict, one tile": (predict, 2.0),
        "two workers ready to preprocess": (None, 1.5),
    }
    seconds(preprocess, environment)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(runs):
        for name, (words, _goal) in rows.items():
            if words is not None:
                times[name].append(seconds(words, environment))
            else:  # the script says how long it took to have them: its own start is no part of it
                told = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True)
                times[name].append(float(told.stdout))
    torch = times["python -c import torch"]
    print(f"{'medians of ' + str(runs) + ' rounds':40}{'seconds':>10}{'ratio':>8}   goal")
    for name, taken in times.items():
        ratio = statistics.median(one / base for one, base in zip(taken, torch, strict=True))
        goal = rows[name][1]
        print(f"{name:40}{statistics.median(taken):10.2f}{ratio:8.2f}   {'' if goal is None else f'≤ {goal}'}")


if __name__ == "__main__":
    main()
