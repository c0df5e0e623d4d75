"""Preprocessing of whole cases, from .nii.gz to the stored case: ours beside nnunetv2's, one thread, in one run.

    python benchmarks/preprocess.py [--cases A B …] [--repeats 3]
    python benchmarks/preprocess.py --road [--cases A B …] [--repeats 1]

Makes the volumes, runs both on the same files (ours alone where nnunetv2 is not installed), checks that labels are the same
and intensities agree, and prints medians and ratios. Machines are noisy: read the ratios.
With ``--road`` the commands that a user types, from the raw dataset to the preprocessed cases, one worker each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np
import SimpleITK as sitk
from road import compare

from nnssl_adapt.data.dataset import RawCase
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.preprocess import PreprocessSettings, ResamplingRule, preprocess_case
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.machine.memory import reuse_freed_memory

# name: shape (Z, Y, X), spacing (mm), labels with background, share of the body that is labelled, what it resembles
CASES = {
    "A": ((180, 256, 256), (1.0, 1.0, 1.0), 28, 0.9, "brain at 1 mm, nothing to resample"),
    "A2": ((150, 217, 181), (1.2, 0.94, 0.94), 29, 0.9, "brain, all axes resampled"),
    "B": ((40, 512, 512), (5.0, 0.7, 0.7), 6, 0.15, "thick slices, separate z"),
    "D": ((48, 448, 448), (3.0, 0.5, 0.5), 5, 0.15, "thick slices, separate z"),
    "C": ((150, 512, 512), (2.5, 0.8, 0.8), 16, 0.25, "CT, separate z in the target's eyes only"),
    "C2": ((150, 512, 512), (2.0, 0.8, 0.8), 16, 0.25, "CT, all axes resampled"),
    "small": ((60, 90, 80), (1.5, 0.8, 0.9), 8, 0.5, "for a quick look"),
}
TARGET = (1.0, 1.0, 1.0)
PATCH = (128, 128, 128)


def make_case(folder: Path, name: str) -> RawCase:
    """Write an image of an ellipsoid with noise, and compact structures in it: the cells of random points, rounded off."""
    shape, spacing, labels, labelled, _ = CASES[name]
    random = np.random.default_rng(0)
    extent = np.array(shape) * spacing
    axes = [
        ((np.arange(n) + 0.5) * s - e / 2).astype(np.float32) for n, s, e in zip(shape, spacing, extent, strict=True)
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    radii = 0.45 * extent
    body = (z / radii[0]) ** 2 + (y / radii[1]) ** 2 + (x / radii[2]) ** 2 < 1
    nearest = np.full(shape, np.inf, np.float32)
    label = np.zeros(shape, np.uint8)
    for value in range(1, labels):
        direction = random.normal(size=3)
        centre = direction / np.linalg.norm(direction) * radii * random.uniform(0.1, 0.9)
        distance = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
        closer = distance < nearest
        nearest[closer], label[closer] = distance[closer], value
    label[~body | (nearest > np.quantile(nearest[body], labelled))] = 0
    image = ((300 + 40.0 * label + random.normal(0, 20, shape)) * body).astype(np.int16)
    paths = folder / f"{name}_0000.nii.gz", folder / f"{name}.nii.gz"
    for path, array in zip(paths, (image, label), strict=True):
        picture = sitk.GetImageFromArray(array)
        picture.SetSpacing(spacing[::-1])
        sitk.WriteImage(picture, str(path), True)
    return RawCase(name, (paths[0],), paths[1])


def settings() -> PreprocessSettings:
    return PreprocessSettings(
        spacing=TARGET,
        transpose_forward=(0, 1, 2),
        transpose_backward=(0, 1, 2),
        normalization_schemes=("ZScoreNormalization",),
        use_mask_for_norm=(False,),
        intensity_properties={},
        patch_size=PATCH,
        resampling_data=ResamplingRule(3, 0, None),
        resampling_seg=ResamplingRule(1, 0, None),
    )


def dataset_json(labels: int) -> dict:
    names = {"background": 0, **{f"label{i}": i for i in range(1, labels)}}
    return {"channel_names": {"0": "MR"}, "labels": names, "numTraining": 1, "file_ending": ".nii.gz"}


def ours(case: RawCase, labels: int, folder: Path) -> Callable[[], None]:
    scheme = LabelScheme.from_dataset_json(dataset_json(labels))
    store = CaseStore(folder)

    def run() -> None:
        store.write(case.identifier, preprocess_case(case, settings(), scheme), PATCH)

    return run


def theirs(case: RawCase, labels: int, folder: Path) -> Callable[[], None] | None:
    try:
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    except ImportError:
        return None
    resampling = {"order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing": list(TARGET),
        "patch_size": list(PATCH),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {**resampling, "is_seg": False},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "architecture": {},
    }
    plans = PlansManager(
        {
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "image_reader_writer": "SimpleITKIO",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {"3d_fullres": configuration},
        }
    )
    folder.mkdir(exist_ok=True)
    preprocessor = DefaultPreprocessor(verbose=False)
    target = str(folder / case.identifier)

    def run() -> None:
        for leftover in folder.glob(f"{case.identifier}*"):
            leftover.unlink()
        preprocessor.run_case_save(
            target,
            [str(p) for p in case.images],
            str(case.label),
            plans,
            plans.get_configuration("3d_fullres"),
            dataset_json(labels),
        )

    return run


@dataclass(frozen=True)
class Measured:
    """What preprocessing one case took: median seconds on the clock and of the processor, and megabytes at the peak."""

    wall: float
    cpu: float
    peak: float


def measured(which: str, folder: Path, name: str, repeats: int) -> Measured:
    """Run one side in this process, which does nothing else; the peak is above where it started."""
    labels = CASES[name][2]
    case = RawCase(name, (folder / f"{name}_0000.nii.gz",), folder / f"{name}.nii.gz")
    run = (ours if which == "ours" else theirs)(case, labels, folder / which)
    assert run is not None
    small = RawCase("small", (folder / "small_0000.nii.gz",), folder / "small.nii.gz")
    warm_up = (ours if which == "ours" else theirs)(small, CASES["small"][2], folder / f"{which}_small")
    assert warm_up is not None
    if which == "ours":
        reuse_freed_memory()  # as our worker processes do
    warm_up()  # so that libraries are loaded, and their memory is not counted
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew (Linux)
    before = memory_in_kb("VmRSS")
    wall, cpu = [], []
    for _ in range(repeats):
        started, spent = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - spent)
    peak = (memory_in_kb("VmHWM") - before) / 1024
    return Measured(statistics.median(wall), statistics.median(cpu), peak)


def memory_in_kb(what: str) -> int:
    """Resident memory now (VmRSS) or at most (VmHWM) of this process, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1])


def in_a_process(which: str, folder: Path, name: str, repeats: int) -> Measured:
    """:func:`measured` in a process of its own."""
    command = [sys.executable, __file__, "--measure", which, str(folder), name, str(repeats)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return Measured(**json.loads(answer))


def differences(name: str, folders: tuple[Path, Path]) -> str:
    first, second = (CaseStore(folder).open(name) for folder in folders)
    image = float(np.abs(np.asarray(first.data[:]) - np.asarray(second.data[:])).max())
    labels = int((np.asarray(first.seg[:]) != np.asarray(second.seg[:])).sum())
    one, other = first.properties["class_locations"], second.properties["class_locations"]
    same = one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    return f"image {image:.1e}, labels {labels}, class locations {'the same' if same else 'DIFFER'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["A", "A2", "B", "D", "C", "C2"], choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=None, help="runs of each case (3), or rounds of the road (1)")
    parser.add_argument("--road", action="store_true", help="the whole commands, verification and fingerprint included")
    arguments = parser.parse_args()
    has_peer = importlib.util.find_spec("nnunetv2") is not None
    if arguments.road:
        with tempfile.TemporaryDirectory() as temporary:
            labels = max(CASES[name][2] for name in arguments.cases)
            compare(Path(temporary), arguments.cases, labels, make_case, has_peer, arguments.repeats or 1)
        return
    print(
        f"{'case':6s} {'s':>14s} {'ratio':>6s} {'CPU s':>14s} {'ratio':>6s} {'MB':>11s}  differences   (ours, nnunetv2)"
    )
    wall, cpu, memory = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_case(folder, "small")
        for name in arguments.cases:
            make_case(folder, name)
            repeats = arguments.repeats or 3
            our = in_a_process("ours", folder, name, repeats)
            if not has_peer:
                print(
                    f"{name:6s} {our.wall:6.2f} {our.cpu:6.2f} {our.peak:5.0f}  nnunetv2 is not installed", flush=True
                )
                continue
            their = in_a_process("theirs", folder, name, repeats)
            wall.append(their.wall / our.wall)
            cpu.append(their.cpu / our.cpu)
            memory.append(our.peak / their.peak)
            print(
                f"{name:6s} {our.wall:6.2f} {their.wall:7.2f} {wall[-1]:6.1f} {our.cpu:6.2f} {their.cpu:7.2f} {cpu[-1]:6.1f} "
                f"{our.peak:5.0f} {their.peak:5.0f}  " + differences(name, (folder / "ours", folder / "theirs")),
                flush=True,
            )
    for what, ratios in (("on the clock", wall), ("in CPU seconds", cpu)):
        if ratios:
            print(
                f"theirs by ours {what}: geometric mean {statistics.geometric_mean(ratios):.1f}, least {min(ratios):.1f}"
            )
    if memory:
        print(f"peak memory above the start, ours by theirs: at most {max(memory):.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        which, where, name, repeats = sys.argv[2:]
        print(json.dumps(asdict(measured(which, Path(where), name, int(repeats)))))
    else:
        main()
