"""Preprocessing of whole cases, from .nii.gz to the stored case: ours beside nnunetv2's, one thread, in one run.

    python benchmarks/preprocess.py [--cases A B …] [--repeats 3]

Makes the volumes, runs both on the same files (ours alone where nnunetv2 is not installed), checks that labels are the same
and intensities agree, and prints medians and ratios. Machines are noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnssl_adapt.data.dataset import RawCase
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.preprocess import PreprocessSettings, ResamplingRule, preprocess_case
from nnssl_adapt.data.store import CaseStore

# name: shape (Z, Y, X), spacing (mm), labels with background, what it resembles
CASES = {
    "A": ((180, 256, 256), (1.0, 1.0, 1.0), 28, "brain at 1 mm, nothing to resample"),
    "A2": ((150, 217, 181), (1.2, 0.94, 0.94), 29, "brain, all axes resampled"),
    "B": ((40, 512, 512), (5.0, 0.7, 0.7), 6, "thick slices, separate z"),
    "D": ((48, 448, 448), (3.0, 0.5, 0.5), 5, "thick slices, separate z"),
    "C2": ((150, 512, 512), (2.0, 0.8, 0.8), 16, "CT, all axes resampled"),
    "small": ((60, 90, 80), (1.5, 0.8, 0.9), 8, "for a quick look"),
}
TARGET = (1.0, 1.0, 1.0)
PATCH = (128, 128, 128)


def make_case(folder: Path, name: str) -> RawCase:
    """Write an image of a smooth body with noise, and nested smooth labels in it."""
    shape, spacing, labels, _ = CASES[name]
    random = np.random.default_rng(0)
    coarse = gaussian_filter(random.normal(size=[max(4, n // 8) for n in shape]), 1.5)
    factors = [n / c for n, c in zip(shape, coarse.shape, strict=True)]
    from scipy.ndimage import zoom

    field = zoom(coarse, factors, order=1)[tuple(slice(n) for n in shape)]
    field = np.pad(field, [(0, n - m) for n, m in zip(shape, field.shape, strict=True)], mode="edge")
    body = field > np.quantile(field, 0.3)
    edges = np.quantile(field[body], np.linspace(0.3, 1, labels)[:-1])
    label = (np.digitize(field, edges) * body).astype(np.uint8)
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


def median_seconds(run: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def differences(name: str, folders: tuple[Path, Path]) -> str:
    first, second = (CaseStore(folder).open(name) for folder in folders)
    image = float(np.abs(np.asarray(first.data[:]) - np.asarray(second.data[:])).max())
    labels = int((np.asarray(first.seg[:]) != np.asarray(second.seg[:])).sum())
    return f"image {image:.1e}, labels {labels}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["small", "A2", "B", "D"], choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'case':6s} {'ours s':>8s} {'nnunetv2 s':>11s} {'ratio':>6s}  largest differences")
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.cases:
            folder = Path(temporary)
            case, labels = make_case(folder, name), CASES[name][2]
            own, peer = folder / "ours", folder / "theirs"
            seconds = median_seconds(ours(case, labels, own), arguments.repeats)
            run = theirs(case, labels, peer)
            if run is None:
                print(f"{name:6s} {seconds:8.2f} {'-':>11s} {'-':>6s}  nnunetv2 is not installed")
                continue
            peer_seconds = median_seconds(run, arguments.repeats)
            ratios.append(peer_seconds / seconds)
            print(
                f"{name:6s} {seconds:8.2f} {peer_seconds:11.2f} {ratios[-1]:6.1f}  {differences(name, (own, peer))}",
                flush=True,
            )
    if ratios:
        print(f"geometric mean of the ratios: {statistics.geometric_mean(ratios):.1f}")


if __name__ == "__main__":
    main()
