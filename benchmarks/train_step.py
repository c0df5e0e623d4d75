"""What feeds a GPU and what it is fed for: seconds to make a batch, and seconds a training step, ours beside nnU-Net's.

    python benchmarks/train_step.py [batches] [--patch 160 128] [--labels 30 15 5] [--batches 24]
    python benchmarks/train_step.py [steps] [--patch 160] [--labels 5] [--steps 30] [--workers 4]

Without a word in front it does both. It prints what it ran on, and writes nothing outside a temporary folder.

batches   CPU seconds for a training batch of 2 with nnU-Net's default 3D augmentation: one process, one thread, one channel.
          Ours, ours as it is left to do for ``augmentation: gpu``, and nnU-Net's loader with its own chain, on the same stored
          cases, in turns, each in a process of its own. Handing batches over to the training process is in neither.
steps     seconds a training step, batches included: our loop and nnU-Net's trainer on the same network (ResEnc-L), patch,
          cases and machine, one after the other. On CUDA where there is one; else on the CPU with a tiny network.

Where nnunetv2 is not installed, ours is measured alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPES = ((224, 256, 212), (208, 240, 232))
"""Of the stored cases, about a head at 0.8 mm."""


# -- cases ---------------------------------------------------------------------------------------------------------------


def write_cases(folder: Path, patch: int, labels: int, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[str]:
    """Smooth images with regions of ``labels`` labels, background included, where tissue meets as in a head."""
    from scipy.ndimage import gaussian_filter, zoom
    from scipy.spatial import cKDTree

    from nnssl_adapt.data.store import CaseStore, PreprocessedCase

    store, random = CaseStore(folder), np.random.RandomState(labels)
    store.begin({"digest": "benchmark"})
    for number, shape in enumerate(shapes):
        coarse = [n // 4 for n in shape]
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in coarse], indexing="ij"), -1)
        bent = grid + np.moveaxis(gaussian_filter(random.randn(3, *coarse), (0, 3, 3, 3)), 0, -1)
        seeds = random.uniform(-0.8, 0.8, (2 * labels, 3))
        regions = cKDTree(seeds).query(bent.reshape(-1, 3))[1].reshape(coarse) % (labels - 1) + 1
        regions[(grid**2).sum(-1) > 0.8] = 0
        seg = zoom(regions, [n / m for n, m in zip(shape, coarse, strict=True)], order=0).astype(np.int16)
        data = gaussian_filter(random.randn(*shape).astype(np.float32), 1)
        data = (data / data.std() + seg / labels)[None]
        where = {label: np.argwhere(seg[None] == label)[:10000] for label in range(1, labels)}
        case = PreprocessedCase(data, seg[None], {"class_locations": where})
        store.write(f"case_{number}", case, (patch,) * 3, digest="benchmark")
    return [f"case_{number}" for number in range(len(shapes))]


def dataset_json(labels: int) -> dict[str, Any]:
    """With so many labels, background included."""
    names = {"background": 0, **{f"part_{value}": value for value in range(1, labels)}}
    return {"labels": names, "channel_names": {"0": "MRI"}, "numTraining": len(SHAPES), "file_ending": ".nii.gz"}


# -- batches -------------------------------------------------------------------------------------------------------------


class OurBatches:
    """What a worker of ours does."""

    def __init__(self, folder: Path, patch: int, labels: int, on_device: bool = False) -> None:
        from nnssl_adapt.data.labels import LabelScheme
        from nnssl_adapt.training.batches.augment import SpatialRange, training_transforms
        from nnssl_adapt.training.batches.augment_gpu import device_transforms
        from nnssl_adapt.training.batches.patches import TRAINING, Batches, PatchSampler, PhaseData, prepare_data_worker

        prepare_data_worker(0)
        size, scheme = (patch,) * 3, LabelScheme.from_dataset_json(dataset_json(labels))
        spatial = SpatialRange.of(size)
        if on_device:
            chain: Any = device_transforms(spatial, (0, 1, 2), scheme)
        else:
            chain = training_transforms(size, spatial, (0, 1, 2), (False,), scheme)
        cases = tuple(f"case_{number}" for number in range(len(SHAPES)))
        phase = PhaseData(cases, PatchSampler(spatial.read_size, size), chain)
        self.batches, self.made, self.phase = Batches(folder, {TRAINING: phase}, 2, 0.33, 0), 0, TRAINING

    def make(self) -> Any:
        from nnssl_adapt.training.batches.patches import BatchRequest

        self.made += 1
        return self.batches[BatchRequest(self.phase, 0, self.made)]


class TheirBatches:
    """What a worker of nnU-Net does."""

    def __init__(self, folder: Path, patch: int, labels: int) -> None:
        from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
        from nnunetv2.utilities.label_handling.label_handling import LabelManager

        np.random.seed(0)
        torch.manual_seed(0)
        size = (patch,) * 3
        manager = LabelManager(dataset_json(labels)["labels"], None)
        rotation, dummy_2d, read_size, mirror_axes = _Configuration(size).spatial(nnUNetTrainer)
        chain = nnUNetTrainer.get_training_transforms(
            size, rotation, None, mirror_axes, dummy_2d, [False], foreground_labels=manager.foreground_labels
        )
        data = nnUNetDatasetBlosc2(str(folder))
        self.loader = nnUNetDataLoader(data, 2, read_size, size, manager, 0.33, None, None, transforms=chain)

    def make(self) -> Any:
        return self.loader.generate_train_batch()


class _Configuration:
    """Enough of a trainer to ask nnU-Net's for its rotation and sizes."""

    def __init__(self, patch_size: tuple[int, ...]) -> None:
        self.configuration_manager = type("Configuration", (), {"patch_size": patch_size})

    def print_to_log_file(self, *words: Any) -> None:
        pass

    def spatial(self, trainer: Any) -> Any:
        return trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(self)


def _serve(kind: str, arguments: tuple[Any, ...], link: Connection) -> None:
    """Make as many batches as asked for, and answer with the CPU seconds of each."""
    torch.set_num_threads(1)
    maker: Any = TheirBatches(*arguments) if kind == "nnU-Net" else OurBatches(*arguments, kind != "ours")
    for _ in range(2):  # files, caches, and what nnU-Net's blur finds out by trying
        maker.make()
    link.send("ready")
    while count := link.recv():
        seconds = []
        for _ in range(count):
            start = time.process_time()
            maker.make()
            seconds.append(time.process_time() - start)
        link.send(seconds)


def measure_batches(patch: int, labels: int, batches: int, rounds: int = 6) -> None:
    kinds = ["ours", "ours, rest on the GPU"] + (["nnU-Net"] if has_peer() else [])
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        write_cases(Path(name), patch, labels)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        links: dict[str, Connection] = {}
        for kind in kinds:
            links[kind], theirs = context.Pipe()
            context.Process(target=_serve, args=(kind, (Path(name), patch, labels), theirs), daemon=True).start()
        for link in links.values():
            link.recv()
        for _ in range(rounds):
            for kind, link in links.items():  # in turns, so that a busy machine is busy for all
                link.send(-(-batches // rounds) * (1 if kind == "nnU-Net" else 4))
                seconds[kind] += link.recv()
        for link in links.values():
            link.send(0)
    means = {kind: statistics.mean(values) for kind, values in seconds.items()}
    texts = [f"{kind} {mean:.3f} s (± {_error(seconds[kind]):.3f})" for kind, mean in means.items()]
    times = f"; {means['nnU-Net'] / means['ours']:.1f} times as fast" if "nnU-Net" in means else ""
    print(f"batch of 2, {patch}³, {labels:2d} labels: {', '.join(texts)}{times}", flush=True)


def _error(values: list[float]) -> float:
    """Standard error of the mean: how much is drawn for a sample varies."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def has_peer() -> bool:
    return importlib.util.find_spec("nnunetv2") is not None


# -- steps ---------------------------------------------------------------------------------------------------------------

DATASET = "Dataset999_Benchmark"
TINY = {"features_per_stage": [4, 6, 8, 10, 12, 12]}
"""What the network has on a CPU, instead of 32 to 320 features."""


def network_of(tiny: bool) -> Any:
    """ResEnc-L."""
    from nnssl_adapt.weights.network.architectures import Architecture

    return Architecture.named("ResEncL", **(TINY if tiny else {}))


@contextlib.contextmanager
def our_training(
    folder: Path, patch: int, labels: int, device: str, workers: int, augmentation: str, network: Any, recipe: Any
) -> Iterator[Callable[[], Any]]:
    """Our loop, as a run has it: deep supervision as nnU-Net, batches from worker processes. Gives what takes a step."""
    from nnssl_adapt.data.labels import LabelScheme
    from nnssl_adapt.training.batches.ahead import prepared_ahead
    from nnssl_adapt.training.batches.augment import SpatialRange, training_transforms
    from nnssl_adapt.training.batches.augment_gpu import DeviceAugmentation, device_transforms
    from nnssl_adapt.training.batches.patches import (
        TRAINING,
        Batches,
        BatchSchedule,
        PatchSampler,
        PhaseData,
        iterate_batches,
    )
    from nnssl_adapt.training.loop import TrainingLoop
    from nnssl_adapt.training.optimise.loss_choice import choose_loss
    from nnssl_adapt.training.optimise.network_options import to_device, training_forward
    from nnssl_adapt.training.optimise.optimizer import autocast_dtype, build_optimizer, grad_scaler
    from nnssl_adapt.training.run.checkpointing import TrainingState
    from nnssl_adapt.weights.network.architectures import build_network

    where, size, scheme = torch.device(device), (patch,) * 3, LabelScheme.from_dataset_json(dataset_json(labels))
    torch.backends.cudnn.benchmark = where.type == "cuda"
    built = to_device(build_network(network, 1, scheme.num_heads, size), recipe, where).train()
    dtype = autocast_dtype(recipe.precision, where)
    scaler = grad_scaler() if dtype is torch.float16 else None
    loss = choose_loss(recipe, scheme, False, network.strides)
    loop = TrainingLoop(recipe, loss, scheme, batch_size=2, device=where, autocast_dtype=dtype)
    state = TrainingState(built, build_optimizer(built, recipe, where), scaler)
    spatial = SpatialRange.of(size)
    chain: Any = training_transforms(size, spatial, (0, 1, 2), (False,), scheme)
    if augmentation == "gpu":
        chain = device_transforms(spatial, (0, 1, 2), scheme)
    cases = tuple(sorted(path.stem for path in folder.glob("*.pkl")))
    phase = PhaseData(cases, PatchSampler(spatial.read_size, size), chain)
    batches = Batches(folder, {TRAINING: phase}, 2, recipe.foreground_fraction, 0)
    forward = training_forward(built, recipe, where)
    stream = iterate_batches(batches, BatchSchedule(1, 10**6, 0), workers, where.type == "cuda")
    if augmentation == "gpu":
        stream = prepared_ahead(stream, DeviceAugmentation(scheme, (False,)), where)
    with contextlib.closing(stream):
        yield lambda: loop.step(state, [next(stream)], forward)


def our_steps(folder: Path, patch: int, labels: int, device: str, steps: int, workers: int, augmentation: str) -> Any:
    """Our loop's seconds for each step."""
    from nnssl_adapt.training.recipe.recipe import Recipe

    recipe, network = Recipe.load("default").override(deep_supervision=True), network_of(device == "cpu")
    with our_training(folder, patch, labels, device, workers, augmentation, network, recipe) as step:
        return timed(step, steps, torch.device(device))


def their_training(patch: int, labels: int, device: str, network: Any) -> Callable[[], Any]:
    """nnU-Net's trainer, which finds its files by three variables, and the number of its processes by another. Returns what
    takes a step."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    where = torch.device(device)
    plans = their_plans(network, patch)
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, {**dataset_json(labels), "numTraining": len(SHAPES)}, device=where)
    trainer.initialize()
    torch.backends.cudnn.benchmark = where.type == "cuda"
    stream, _ = trainer.get_dataloaders()
    trainer.network.train()
    return lambda: trainer.train_step(next(stream))


def their_steps(folder: Path, patch: int, labels: int, device: str, steps: int, workers: int) -> Any:
    """Its seconds for each step."""
    step = their_training(patch, labels, device, network_of(device == "cpu"))
    return timed(step, steps, torch.device(device))


def tell_peer(folder: str, workers: int) -> None:
    """Where nnU-Net finds its files, and how many processes make its batches."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[variable] = folder
    os.environ["nnUNet_n_proc_DA"] = str(workers)


def write_store(folder: Path, patch: int, labels: int, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Path:
    """Cases where both find them, below ``folder``; returns the store."""
    store = folder / DATASET / "nnUNetPlans_3d_fullres"
    cases = write_cases(store, patch, labels, shapes)
    (store.parent / "splits_final.json").write_text(json.dumps([{"train": cases, "val": cases}] * 5))
    return store


def their_plans(architecture: Any, patch: int) -> dict[str, Any]:
    """nnU-Net's plan of the same network."""
    resampling = "resample_data_or_seg_to_shape"
    options = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    module = "dynamic_network_architectures.architectures.unet"
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "continue_training": False,
        "original_median_spacing_after_transp": [1.0] * 3,
        "original_median_shape_after_transp": list(SHAPES[0]),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [patch] * 3,
                "median_image_size_in_voxels": list(SHAPES[0]),
                "spacing": [1.0] * 3,
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                **{f"resampling_fn_{kind}": resampling for kind in ("data", "seg", "probabilities")},
                **{f"resampling_fn_{kind}_kwargs": options for kind in ("data", "seg", "probabilities")},
                "batch_dice": False,
                "architecture": {
                    "network_class_name": f"{module}.{architecture.class_name}",
                    "arch_kwargs": architecture.kwargs,
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            }
        },
    }


def timed(step: Any, steps: int, device: torch.device, warm_up: int = 5) -> list[float]:
    """Seconds of each step; the first ones compile, and fill the queues of batches."""
    seconds = []
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:]


def _run_steps(kind: str, arguments: tuple[Any, ...], link: Connection) -> None:
    torch.manual_seed(0)
    link.send(their_steps(*arguments) if kind == "nnU-Net" else our_steps(*arguments, kind.split()[-1]))
    link.close()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)  # threads that pin memory don't end by themselves


def measure_steps(patch: int, labels: int, steps: int, workers: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = ["ours, augmentation default", "ours, augmentation gpu"] + (["nnU-Net"] if has_peer() else [])
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        store = write_store(Path(name), patch, labels)
        tell_peer(name, workers)
        medians = {}
        for kind in kinds:
            mine, theirs = context.Pipe(duplex=False)
            arguments = (store, patch, labels, device, steps, workers)
            context.Process(target=_run_steps, args=(kind, arguments, theirs)).start()
            theirs.close()
            seconds = mine.recv()
            medians[kind] = statistics.median(seconds)
            print(
                f"step, {patch}³, {labels} labels, {device}, {workers} workers: {kind}: median {medians[kind]:.3f} s, mean "
                f"{statistics.mean(seconds):.3f} s ({len(seconds)} steps)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("batches", "steps", "both"), default="both")
    parser.add_argument("--patch", type=int, nargs="+", default=[160, 128], help="edge of the patch in voxels")
    parser.add_argument("--labels", type=int, nargs="+", default=[30, 15, 5], help="labels, background included")
    parser.add_argument("--batches", type=int, default=24, help="of nnU-Net's; ours are four times as many")
    parser.add_argument("--steps", type=int, default=30, help="measured, after 5 to warm up")
    parser.add_argument("--workers", type=int, default=4, help="processes that make batches, ours and nnU-Net's")
    options = parser.parse_args()
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if options.what in ("batches", "both"):
        for patch in options.patch:
            for labels in options.labels:
                measure_batches(patch, labels, options.batches)
    if options.what in ("steps", "both"):
        for patch in options.patch:
            measure_steps(patch, options.labels[0], options.steps, options.workers)


if __name__ == "__main__":
    main()
