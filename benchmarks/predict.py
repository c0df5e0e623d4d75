"""Prediction: ours beside nnunetv2's, in one run.

    python benchmarks/predict.py export [--cases brain thick ct same] [--repeats 3]
    python benchmarks/predict.py whole [--images 6] [--tta] [--device cpu]

``export`` goes from logits to labels on the image's own grid, one thread, from the same logits: nnunetv2 gets them in
float16, ours in float32, as each one's prediction hands them over; labels must be identical. ``whole`` predicts a folder of
images with a small network and random weights, each side by its own way to overlap things, from the start of the process to
its end; ours once with nnU-Net's float16 sums (labels must agree) and once with its own. Memory of ``whole`` is of all
processes of a side together, shared pages counted once. Machines are noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if sys.argv[1:2] == ["export"] or sys.argv[1:3] == ["--measure", "export"]:
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"

import numpy as np
import torch

# name: shape and spacing (mm) of the logits, of the image; classes
CASES = {
    "brain": ((216, 240, 240), (1.0, 1.0, 1.0), (180, 256, 256), (1.2, 0.94, 0.94), 30),
    "thick": ((200, 358, 358), (1.0, 1.0, 1.0), (40, 512, 512), (5.0, 0.7, 0.7), 6),
    "ct": ((300, 410, 410), (1.0, 1.0, 1.0), (150, 512, 512), (2.0, 0.8, 0.8), 16),
    "same": ((180, 256, 256), (1.0, 1.0, 1.0), (180, 256, 256), (1.0, 1.0, 1.0), 30),
    "small": ((40, 50, 60), (1.0, 1.0, 1.0), (30, 60, 70), (1.3, 0.8, 0.9), 5),
}
PATCH = (64, 64, 64)
IMAGE, SPACING, LABELS = (90, 128, 112), (1.5, 1.1, 1.2), 16


# -- what both are given -----------------------------------------------------------------------------------------------


def make_logits(path: Path, name: str) -> None:
    """About as many compact structures as classes in an ellipsoid, background around it; surfaces with a little noise."""
    shape, _, _, _, classes = CASES[name]
    generator = torch.Generator().manual_seed(0)
    axes = [torch.linspace(-1, 1, n) for n in shape]
    radius = sum((axis.reshape([-1 if a == i else 1 for a in range(3)]) / 0.9) ** 2 for i, axis in enumerate(axes))
    logits = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(classes, *shape))
    for index in range(classes):
        coarse = torch.randn((1, 1, 5, 5, 5), generator=generator)
        field = 8 * torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0, 0]
        field += 40 * (radius - 1) if index == 0 else 0
        logits[index] = (field + 0.05 * torch.randn(shape, generator=generator)).half().numpy()
    logits.flush()


def plans(spacing: tuple[float, ...]) -> dict:
    function, kwargs = "resample_data_or_seg_to_shape", {"order_z": 0, "force_separate_z": None}
    stages = 3
    configuration = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(PATCH),
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        **{f"resampling_fn_{what}": function for what in ("data", "seg", "probabilities")},
        "resampling_fn_data_kwargs": {**kwargs, "is_seg": False, "order": 3},
        "resampling_fn_seg_kwargs": {**kwargs, "is_seg": True, "order": 1},
        "resampling_fn_probabilities_kwargs": {**kwargs, "is_seg": False, "order": 1},
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [4, 8, 16],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3]] * stages,
                "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
                "n_conv_per_stage": [1] * stages,
                "n_conv_per_stage_decoder": [1] * (stages - 1),
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": "Dataset991_Benchmark",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
    }


def dataset_json(classes: int) -> dict:
    labels = {"background": 0, **{f"label{i}": i for i in range(1, classes)}}
    return {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}


def properties_of(name: str) -> dict:
    _, _, shape, spacing, _ = CASES[name]
    return {
        "spacing": list(spacing),
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
        "shape_after_cropping_and_before_resampling": shape,
    }


# -- export ------------------------------------------------------------------------------------------------------------


def our_export(name: str, logits: torch.Tensor) -> Callable[[], np.ndarray]:
    from nnssl_adapt.data.labels import LabelScheme
    from nnssl_adapt.inference.export import logits_to_segmentation
    from nnssl_adapt.planning.plan import FinetunePlan

    plan = FinetunePlan(plans(CASES[name][1]))
    labels = LabelScheme.from_dataset_json(dataset_json(CASES[name][4]))
    return lambda: logits_to_segmentation(logits, properties_of(name), plan, labels)


def their_export(name: str, logits: torch.Tensor, threads: int = 1) -> Callable[[], np.ndarray]:
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans(CASES[name][1]))
    configuration = manager.get_configuration("3d_fullres")
    labels = manager.get_label_manager(dataset_json(CASES[name][4]))
    return lambda: convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, manager, configuration, labels, properties_of(name), num_threads_torch=threads
    )


def measure_export(which: str, folder: Path, name: str, repeats: int) -> tuple[float, float]:
    """Median seconds and peak megabytes above the start; runs in a process of its own. Leaves the labels in a file."""
    export = our_export if which == "ours" else their_export
    with contextlib.redirect_stdout(io.StringIO()):
        export("small", torch.from_numpy(np.load(folder / "small.npy")))()  # libraries are loaded, and not counted
        logits = torch.from_numpy(np.load(folder / f"{name}.npy"))
        run = export(name, logits.float() if which == "ours" else logits)
        del logits
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew (Linux)
        before = memory_in_kb("VmRSS")
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            labels = run()
            times.append(time.perf_counter() - started)
    peak = (memory_in_kb("VmHWM") - before) / 1024
    np.save(folder / f"{name}_{which}.npy", labels)
    return statistics.median(times), peak


def memory_in_kb(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1])


def export(arguments: argparse.Namespace) -> None:
    print(
        f"{'case':6s} {'ours s':>8s} {'nnunetv2 s':>11s} {'ratio':>6s} {'ours MB':>8s} {'peer MB':>8s}  labels differ"
    )
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_logits(folder / "small.npy", "small")
        for name in arguments.cases:
            make_logits(folder / f"{name}.npy", name)
            results = {}
            for which in ("ours", "theirs"):
                words = [
                    sys.executable,
                    __file__,
                    "--measure",
                    "export",
                    which,
                    temporary,
                    name,
                    str(arguments.repeats),
                ]
                answer = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                results[which] = json.loads(answer)
            (ours, our_peak), (theirs, their_peak) = results["ours"], results["theirs"]
            labels = [np.load(folder / f"{name}_{which}.npy") for which in ("ours", "theirs")]
            differ = int((labels[0] != labels[1]).sum())
            if name != "same":
                ratios.append(theirs / ours)
            print(
                f"{name:6s} {ours:8.2f} {theirs:11.2f} {theirs / ours:6.1f} {our_peak:8.0f} {their_peak:8.0f}  "
                f"{differ} of {labels[0].size}",
                flush=True,
            )
            for path in folder.glob(f"{name}*.npy"):
                path.unlink()
    if ratios:
        print(
            f"where logits are resampled: geometric mean {statistics.geometric_mean(ratios):.1f}, least {min(ratios):.1f}"
        )


# -- whole -------------------------------------------------------------------------------------------------------------


def make_world(root: Path, images: int) -> None:
    import SimpleITK as sitk

    from nnssl_adapt.planning.plan import FinetunePlan
    from nnssl_adapt.weights.network.architectures import build_network

    (root / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(images):
        coarse = torch.from_numpy(random.normal(size=(1, 1, 12, 14, 13)))
        field = torch.nn.functional.interpolate(coarse, IMAGE, mode="trilinear")[0, 0].numpy()
        picture = sitk.GetImageFromArray((1000 + 300 * field + random.normal(0, 20, IMAGE)).astype(np.int16))
        picture.SetSpacing(SPACING[::-1])
        sitk.WriteImage(picture, str(root / "images" / f"case{number:02d}_0000.nii.gz"), True)
    model = root / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(plans((1.0, 1.0, 1.0))))
    (model / "dataset.json").write_text(json.dumps(dataset_json(LABELS)))
    torch.manual_seed(0)
    network = build_network(FinetunePlan(plans((1.0, 1.0, 1.0))).architecture, 1, LABELS, PATCH)
    content = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres", "fold": 0},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(content, model / "fold_0" / "checkpoint_final.pth")


def commands(root: Path, arguments: argparse.Namespace) -> dict[str, list[str]]:
    model = str(root / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    common = ["-i", str(root / "images"), "-m", model, "-f", "0", "-device", arguments.device]
    peer = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main; main()"
    ours = [sys.executable, "-m", "nnssl_adapt.cli.main", "predict", *common, *([] if arguments.tta else ["--no-tta"])]
    if arguments.workers is not None:
        ours += ["-np", str(arguments.workers)]
    theirs = [sys.executable, "-c", peer, *common, *([] if arguments.tta else ["--disable_tta"])]
    return {
        "theirs": [*theirs, "-o", str(root / "theirs")],
        "compatible": [*ours, "--float16-sums", "-o", str(root / "compatible")],
        "ours": [*ours, "-o", str(root / "ours")],
    }


def measure_whole(words: list[str]) -> tuple[float, float]:
    """Seconds, and peak megabytes of the process and all below it."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, sum(proportional_kb(pid) for pid in family(process.pid)) / 1024)
            time.sleep(0.2)
        seconds = time.perf_counter() - started
        if process.returncode != 0:
            log.seek(0)
            raise RuntimeError(f"{' '.join(words)}\n{log.read()[-3000:]}")
    return seconds, peak


def family(pid: int) -> list[int]:
    """A process and all below it (Linux)."""
    members = [pid]
    for member in members:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{member}/task").iterdir():
                members += [int(child) for child in (task / "children").read_text().split()]
    return members


def proportional_kb(pid: int) -> int:
    """Memory of a process, shared pages divided by those who share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def whole(arguments: argparse.Namespace) -> None:
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_world(root, arguments.images)
        results = {}
        for which, words in commands(root, arguments).items():
            results[which] = measure_whole(words)
            print(f"{which:10s} {results[which][0]:7.1f} s {results[which][1]:7.0f} MB", flush=True)

        def read(which: str, name: str) -> np.ndarray:
            return sitk.GetArrayFromImage(sitk.ReadImage(str(root / which / name)))

        names = sorted(path.name for path in (root / "theirs").glob("*.nii.gz"))
        for which in ("compatible", "ours"):
            equal = np.mean([(read(which, name) == read("theirs", name)).mean() for name in names])
            ratio, share = results["theirs"][0] / results[which][0], results[which][1] / results["theirs"][1]
            print(f"{which}: {ratio:.2f} times as fast, {share:.2f} of the memory, {100 * equal:.4f} % of voxels equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("export")
    one.add_argument("--cases", nargs="+", default=["brain", "thick", "ct", "same"], choices=list(CASES))
    one.add_argument("--repeats", type=int, default=3)
    two = parts.add_parser("whole")
    two.add_argument("--images", type=int, default=6)
    two.add_argument("--tta", action="store_true")
    two.add_argument("--device", default="cpu")
    two.add_argument("--workers", type=int, default=None, help="our -np")
    arguments = parser.parse_args()
    {"export": export, "whole": whole}[arguments.part](arguments)


if __name__ == "__main__":
    if sys.argv[1:3] == ["--measure", "export"]:
        _, _, _, which, where, name, repeats = sys.argv
        print(json.dumps(measure_export(which, Path(where), name, int(repeats))))
    else:
        main()
