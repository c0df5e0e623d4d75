"""The whole road from a raw dataset to its preprocessed cases, ours beside nnunetv2's: ``preprocess.py --road``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.nnssl_files import state_dict, write_checkpoint

from nnssl_adapt.data.dataset import RawCase

DATASET = "Dataset997_Road"
COMMANDS = {
    "ours, first time": ["nnssl-adapt", "preprocess", "-d", "997", "-n", "road", "-am", "fixed", "-os", "1", "1", "1"],
    "nnunetv2, fingerprint and verification": [
        "nnUNetv2_extract_fingerprint",
        "-d",
        "997",
        "--verify_dataset_integrity",
    ],
    "nnunetv2, preprocessing": ["nnUNetv2_preprocess", "-d", "997", "-c", "3d_fullres"],
    "ours, asked again": [],
}


def compare(
    folder: Path, names: Sequence[str], labels: int, make_case: Callable[[Path, str], RawCase], has_peer: bool
) -> None:
    """Run the commands a user types, one worker each, and print their times and the ratio."""
    raw = folder / "raw" / DATASET
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    for name in names:
        case = make_case(folder, name)
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
    checkpoint = write_checkpoint(folder / "checkpoint.pth", state_dict())
    first = [*COMMANDS["ours, first time"], "-pc", str(checkpoint), "-np", "1"]
    seconds = {"ours, first time": _timed(first, folder, "ours"), "ours, asked again": _timed(first, folder, "ours")}
    if has_peer:
        theirs = folder / "theirs" / DATASET
        theirs.mkdir(parents=True)
        (plan,) = (folder / "ours" / DATASET).glob("ptPlans__road*.json")
        for file in (plan, folder / "ours" / DATASET / "dataset.json"):
            shutil.copyfile(file, theirs / file.name)
        for what in ("nnunetv2, fingerprint and verification", "nnunetv2, preprocessing"):
            more = ["-plans_name", plan.stem] if what.endswith("preprocessing") else []
            seconds[what] = _timed([*COMMANDS[what], *more, "-np", "1"], folder, "theirs")
    for what, taken in seconds.items():
        print(f"{what:40s} {taken:8.1f} s")
    if has_peer:
        peer = sum(taken for what, taken in seconds.items() if what.startswith("nnunetv2"))
        print(f"{'whole road, theirs by ours':40s} {peer / seconds['ours, first time']:8.1f} ×")


def _timed(command: Sequence[str], folder: Path, whose: str) -> float:
    environment = {
        **os.environ,
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / whose),
        "nnUNet_results": str(folder / "results"),
    }
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - started
