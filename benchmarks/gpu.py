"""What only a GPU can show, in one command:  python benchmarks/gpu.py -o FOLDER

    --stage N     one stage: 0 machine, 1 correctness, 2 step time, 3 beside nnunetv2, 4 prediction
    --rehearse    every stage on the CPU with tiny sizes, by the same code: finds typing errors, measures nothing
    --publish     put FOLDER's tables and plots into docs/benchmarks.md; refused for figures that were not measured on a GPU
    --commit ID   of this copy of the repository, where it has no .git

Each stage runs in a process of its own with a time limit (about half an hour in all). Figures are appended to
FOLDER/results.jsonl as they come, so that a crash loses one of them; tables.md and the plots come last. The last lines say which
goals were missed and what is wrong; then the exit code is 1.

A bare machine needs this repository and a Python with torch, numpy, scipy and PyYAML; nothing has to be installed.

    stage 0       torch alone
    stage 1, 2    also pydantic (with pydantic-core, annotated-types and typing-inspection), dynamic-network-architectures (with
                  einops; with timm for Primus), isal, safetensors, tqdm; stage 1 pytest and pytest-xdist, and blosc2 (with
                  ndindex and numexpr) for its test of worker processes. Without SimpleITK the tests beside the code are left out
    stage 3, 4    the whole package, blosc2 and SimpleITK included; and nnunetv2, or ours is measured alone

To carry wheels to a machine without a network: on one of the same kind with a network, ``pip download --no-deps -d WHEELS NAME``
for each that ``python -c "import NAME"`` does not find there (pydantic, dynamic-network-architectures, isal and blosc2 with
theirs are 11 MB together); then there ``pip install --no-index --no-deps --target SITE WHEELS/*.whl`` and ``PYTHONPATH=SITE``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):  # the parts of this program; the package, where it is not installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gpu_program.plots import draw
from gpu_program.results import RUN, TITLES, failures, figures_of, missed, publish, read_rows, tables

DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
SECONDS = {0: 90, 1: 540, 2: 540, 3: 540, 4: 330}
STAGES = {0: "machine", 1: "correctness", 2: "step_time", 3: "peer", 4: "prediction"}
"""Modules of gpu_program, each with ``run(setting)``."""


def run_stage(folder: Path, stage: int, options: Sequence[str] = ()) -> bool:
    """Run a stage in a process of its own, with ``--rehearse`` or ``--commit``; whether it came to its end."""
    print(f"stage {stage}: {TITLES[stage]}", flush=True)
    command = [sys.executable, __file__, "-o", str(folder), "--child", str(stage), *options]
    environment = dict(os.environ)
    if "--rehearse" in options:
        environment["OMP_NUM_THREADS"] = "1"  # tiny arrays gain nothing from threads
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        ended = process.wait(timeout=SECONDS[stage])
        problem = None if ended == 0 else f"ended with {ended}"
    except subprocess.TimeoutExpired:
        problem = f"took more than {SECONDS[stage]} s"
    finally:
        end_with_all_below(process)
    if problem:
        print(f"stage {stage} {problem}; what it had measured is kept", flush=True)
    return problem is None


def end_with_all_below(process: subprocess.Popen[bytes]) -> None:
    """What a stage started must not use the card while the next one measures."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def run_here(folder: Path, stage: int, rehearse: bool, commit: str) -> int:
    """A stage, in this process."""
    from gpu_program.setting import Setting

    setting = Setting(folder, stage, rehearse)
    if not rehearse and not torch_cuda_is_available():
        return 1
    command = "python benchmarks/gpu.py -o FOLDER"
    setting.write(RUN, stage, date=str(date.today()), commit=commit or head_commit(), command=command)
    importlib.import_module(f"gpu_program.{STAGES[stage]}").run(setting)
    return 0


def torch_cuda_is_available() -> bool:
    import torch  # not at the top: of a rehearsal only the stages need it

    if not torch.cuda.is_available():
        print("there is no CUDA device here: --rehearse runs every stage on the CPU, and measures nothing")
    return torch.cuda.is_available()


def head_commit() -> str:
    """The commit of this copy, marked where files were changed; empty where git does not know."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def summarise(folder: Path) -> int:
    """Tables, plots and the last lines; how many rows are wrong or missed their goals."""
    rows = read_rows(folder)
    (folder / "tables.md").write_text(tables(rows), encoding="utf-8")
    try:
        draw(figures_of(rows), folder)
    except ImportError as error:
        print(f"no plots: {error}")
    wrong, too_low = failures(rows), missed(rows)
    for line in too_low:
        print(f"MISSED: {line}")
    print(f"{len(figures_of(rows))} figures in {folder}" + (f"; WRONG: {', '.join(wrong)}" if wrong else ""))
    return len(wrong) + len(too_low)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--stage", type=int, choices=list(STAGES))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--commit", default="", metavar="ID")
    parser.add_argument("--child", type=int, choices=list(STAGES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.output
    if arguments.publish:
        refusal = publish(folder, DOCUMENT)
        print(f"not published: {refusal}" if refusal else f"{DOCUMENT} has the tables")
        return 1 if refusal else 0
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.child is not None:
        return run_here(folder, arguments.child, arguments.rehearse, arguments.commit)
    if not arguments.rehearse and not torch_cuda_is_available():
        return 1
    stages = list(STAGES) if arguments.stage is None else [arguments.stage]
    options = ["--rehearse"] * arguments.rehearse + (["--commit", arguments.commit] if arguments.commit else [])
    ended = [run_stage(folder, stage, options) for stage in stages]
    return 0 if summarise(folder) == 0 and all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
