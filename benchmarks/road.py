"""The whole road from a raw dataset to its preprocessed cases, ours beside nnunetv2's: ``preprocess.py --road``."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.nnssl_files import plan, state_dict, write_checkpoint

from nnssl_adapt.data.dataset import RawCase

DATASET = "Dataset997_Road"
PATCH = (160, 160, 160)
"""What the made-up checkpoint was pre-trained with, as published ones are. It decides how stored files are cut into pieces."""

OURS, AGAIN = "ours, first time", "ours, asked again"
PEER = ("nnunetv2, fingerprint and verification", "nnunetv2, preprocessing")
COMMANDS = {
    OURS: ["nnssl-adapt", "preprocess", "-d", "997", "-n", "road", "-am", "fixed", "-os", "1", "1", "1", "-np", "1"],
    PEER[0]: ["nnUNetv2_extract_fingerprint", "-d", "997", "--verify_dataset_integrity", "-np", "1"],
    PEER[1]: ["nnUNetv2_preprocess", "-d", "997", "-c", "3d_fullres", "-np", "1"],
}


@dataclass(frozen=True)
class Cost:
    """Seconds that a command took: on the clock, and of processors (its own and those of its workers)."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


def compare(
    folder: Path,
    names: Sequence[str],
    labels: int,
    make_case: Callable[[Path, str], RawCase],
    has_peer: bool,
    rounds: int,
) -> None:
    """Run the commands that a user types, one worker each, ours and nnunetv2's in turns; print their times and the ratios."""
    _write_dataset(folder / "raw" / DATASET, names, labels, make_case)
    embedded = plan(patch=PATCH, spacing=(1, 1, 1), recommended_downstream_patchsize=PATCH)
    checkpoint = write_checkpoint(folder / "checkpoint", state_dict(), embedded=embedded)
    print(f"{'':40s} {'wall s':>8s} {'CPU s':>8s}   (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)")
    ratios = []
    for _ in range(rounds):
        costs = _round(folder, checkpoint, has_peer)
        for what, cost in costs.items():
            print(f"{what:40s} {cost.wall:8.1f} {cost.cpu:8.1f}")
        if has_peer:
            theirs = costs[PEER[0]] + costs[PEER[1]]
            ratios.append(Cost(theirs.wall / costs[OURS].wall, theirs.cpu / costs[OURS].cpu))
            print(f"{'theirs by ours':40s} {ratios[-1].wall:8.1f} {ratios[-1].cpu:8.1f}", flush=True)
    if ratios:
        wall, cpu = statistics.median(r.wall for r in ratios), statistics.median(r.cpu for r in ratios)
        print(f"whole road, theirs by ours, median of {rounds}: {wall:.1f} × on the clock, {cpu:.1f} × in CPU seconds")


def _write_dataset(raw: Path, names: Sequence[str], labels: int, make_case: Callable[[Path, str], RawCase]) -> None:
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    for name in names:
        case = make_case(raw, name)
        assert case.label is not None
        case.images[0].rename(raw / "imagesTr" / f"{name}_0000.nii.gz")
        case.label.rename(raw / "labelsTr" / f"{name}.nii.gz")
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, **{f"label{i}": i for i in range(1, labels)}},
        "numTraining": len(names),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content))


def _round(folder: Path, checkpoint: Path, has_peer: bool) -> dict[str, Cost]:
    for whose in ("ours", "theirs"):
        shutil.rmtree(folder / whose, ignore_errors=True)
    first = [*COMMANDS[OURS], "-pc", str(checkpoint)]
    costs = {OURS: _cost(first, folder, "ours"), AGAIN: _cost(first, folder, "ours")}
    if has_peer:
        theirs = folder / "theirs" / DATASET
        theirs.mkdir(parents=True)
        (made,) = (folder / "ours" / DATASET).glob("ptPlans__road*.json")
        for file in (made, folder / "ours" / DATASET / "dataset.json"):
            shutil.copyfile(file, theirs / file.name)
        costs[PEER[0]] = _cost(COMMANDS[PEER[0]], folder, "theirs")
        costs[PEER[1]] = _cost([*COMMANDS[PEER[1]], "-plans_name", made.stem], folder, "theirs")
    return costs


def _cost(command: Sequence[str], folder: Path, whose: str) -> Cost:
    environment = {
        **os.environ,
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / whose),
        "nnUNet_results": str(folder / "results"),
    }
    before, started = _processor_seconds(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return Cost(time.perf_counter() - started, _processor_seconds() - before)


def _processor_seconds() -> float:
    """Of all processes that this one has started and that have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
