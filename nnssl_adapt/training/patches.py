"""Random patches out of a case store, in batches: which case, where, and how batches reach the trainer.

Every draw follows from (seed, phase, epoch, iteration, sample) and from nothing that ran before. So a batch is the same
in whatever process it is made and however often the run was stopped and resumed.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.store import CaseStore, StoredCase
from nnssl_adapt.errors import NnsslAdaptError, TrainingError

logger = logging.getLogger(__name__)

Transform = Callable[..., dict[str, Any]]
"""A chain of batchgeneratorsv2: takes and returns ``image`` (C, Z, Y, X) and ``segmentation`` (1, Z, Y, X)."""

TRAINING, VALIDATION = "training", "validation"
_PHASES = (TRAINING, VALIDATION)

OUTSIDE = -1
"""Label of voxels beyond the image, as preprocessing marks what lies outside its nonzero region."""


# -- where ---------------------------------------------------------------------------------------------------------------


def is_forced_foreground(sample: int, batch_size: int, foreground_fraction: float) -> bool:
    """Whether a sample of a batch is centred on foreground: the last ones are, nnU-Net's rounding (1 of 2 at 33%)."""
    return not sample < round(batch_size * (1 - foreground_fraction))


@dataclass(frozen=True)
class PatchSampler:
    """nnU-Net's rule for where a patch lies.

    Attributes:
        read_size: voxels (Z, Y, X) that are read; larger than the patch when the augmentation rotates and scales.
        patch_size: voxels (Z, Y, X) that the network sees. Patches may stick out of the image by half the difference, so
            that these reach its border.
        annotated_key: with an ignore label, the key under which preprocessing put all annotated voxels; else None.
    """

    read_size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    annotated_key: tuple[int, ...] | None = None

    def lower_corner(
        self,
        shape: Sequence[int],
        forced: bool,
        class_locations: Callable[[], Mapping[Any, np.ndarray]],
        random: np.random.RandomState,
    ) -> tuple[int, int, int]:
        """Draw the first voxel (Z, Y, X; may be negative) of a patch of ``read_size`` in an image of ``shape``.

        Without ``forced`` every position is equally likely; with it, a class that the case has is drawn (all equally
        likely), one of its voxels, and the patch is centred on that as far as the borders allow. With an ignore label,
        other patches are centred on annotated voxels. ``class_locations`` is only called when they are needed, since
        they are most of what a case's properties weigh. The draws and their order are nnU-Net 2.8's.
        """
        lowest, highest = self._range(shape)
        voxel = None
        if forced or self.annotated_key is not None:
            voxel = self._draw_voxel(forced, class_locations(), random)
        if voxel is None:
            z, y, x = (int(random.randint(low, high + 1)) for low, high in zip(lowest, highest, strict=True))
        else:
            z, y, x = (
                max(low, int(at) - size // 2) for low, at, size in zip(lowest, voxel, self.read_size, strict=True)
            )
        return z, y, x

    def _range(self, shape: Sequence[int]) -> tuple[list[int], list[int]]:
        lowest, highest = [], []
        for size, read, patch in zip(shape, self.read_size, self.patch_size, strict=True):
            padding = max(read - patch, read - size)
            lowest.append(-padding // 2)
            highest.append(size + padding // 2 + padding % 2 - read)
        return lowest, highest

    def _draw_voxel(
        self, forced: bool, locations: Mapping[Any, np.ndarray], random: np.random.RandomState
    ) -> np.ndarray | None:
        """A voxel (Z, Y, X) to centre on, or None when the case has none of the kind."""
        if forced:
            present = [key for key, voxels in locations.items() if len(voxels) > 0]
            if self.annotated_key in present and len(present) > 1:
                present.remove(self.annotated_key)
            if not present:
                return None
            key = present[random.choice(len(present))]
        else:
            key = self.annotated_key
        voxels = locations.get(key, ())
        return None if len(voxels) == 0 else np.asarray(voxels[random.choice(len(voxels))])[1:]


def read_patch(case: StoredCase, corner: Sequence[int], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Read a patch, unpacking only the blocks that it touches; beyond the image are zeros and label -1.

    Returns float32 (C, Z, Y, X) and int16 (1, Z, Y, X).
    """
    shape = case.data.shape[1:]
    start = [min(max(0, c), n) for c, n in zip(corner, shape, strict=True)]
    stop = [max(min(c + s, n), a) for c, s, n, a in zip(corner, size, shape, start, strict=True)]
    source = (slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))
    target = (slice(None), *(slice(a - c, b - c) for a, b, c in zip(start, stop, corner, strict=True)))
    image = np.zeros((case.data.shape[0], *size), np.float32)
    labels = np.full((1, *size), OUTSIDE, np.int16)
    if all(b > a for a, b in zip(start, stop, strict=True)):
        image[target] = case.data[source]
        labels[target] = case.seg[source]
    return torch.from_numpy(image), torch.from_numpy(labels)


# -- which, and in what random state ---------------------------------------------------------------------------------------


def seeds_for(*key: int) -> list[int]:
    """Return three independent 32-bit seeds for a tuple of counters."""
    return [int(seed) for seed in np.random.SeedSequence(key).generate_state(3)]


@contextmanager
def global_random_state(numpy_seed: int, torch_seed: int) -> Iterator[None]:
    """Seed NumPy's and torch's (CPU) global generators, which batchgeneratorsv2 draws from, and put them back after."""
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    np.random.seed(numpy_seed)
    # Not torch.manual_seed, which would also reach for the CUDA generators, thousands of times an epoch.
    torch.default_generator.manual_seed(torch_seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


@dataclass(frozen=True)
class BatchRequest:
    """Which batch of a run: enough to make it anywhere."""

    phase: str
    epoch: int
    iteration: int


@dataclass(frozen=True)
class BatchSchedule:
    """All batches of a run from some point on, in the order in which they are needed."""

    epochs: int
    training_iterations: int
    validation_iterations: int
    first_epoch: int = 0
    first_iteration: int = 0

    def __iter__(self) -> Iterator[BatchRequest]:
        for epoch in range(self.first_epoch, self.epochs):
            start = self.first_iteration if epoch == self.first_epoch else 0
            for iteration in range(start, self.training_iterations):
                yield BatchRequest(TRAINING, epoch, iteration)
            for iteration in range(self.validation_iterations):
                yield BatchRequest(VALIDATION, epoch, iteration)

    def __len__(self) -> int:
        per_epoch = self.training_iterations + self.validation_iterations
        return max(0, (self.epochs - self.first_epoch) * per_epoch - self.first_iteration)


@dataclass(frozen=True)
class PhaseData:
    """What batches of one phase are made of: cases, where patches lie in them, and what is done to them."""

    cases: tuple[str, ...]
    sampler: PatchSampler
    transform: Transform


class Batches(Dataset):  # type: ignore[type-arg]
    """Makes any batch of a run on request. Picklable, so that it travels to worker processes.

    ``self[BatchRequest(...)]`` is a dict with ``image`` float32 (B, C, Z, Y, X), ``target`` (B, 1, Z, Y, X) int16 labels or
    (B, R, Z, Y, X) bool regions, and ``cases``, the B identifiers.
    """

    def __init__(
        self,
        store_folder: Path,
        phases: Mapping[str, PhaseData],
        batch_size: int,
        foreground_fraction: float,
        seed: int,
    ) -> None:
        self.store = CaseStore(store_folder)
        self.phases = dict(phases)
        self.batch_size = batch_size
        self.foreground_fraction = foreground_fraction
        self.seed = seed

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        samples = [self._sample(request, index) for index in range(self.batch_size)]
        return {
            "image": torch.stack([sample["image"] for sample in samples]),
            "target": torch.stack([sample["segmentation"] for sample in samples]),
            "cases": [sample["case"] for sample in samples],
        }

    def _sample(self, request: BatchRequest, index: int) -> dict[str, Any]:
        data = self.phases[request.phase]
        seed, numpy_seed, torch_seed = seeds_for(
            self.seed, _PHASES.index(request.phase), request.epoch, request.iteration, index
        )
        random = np.random.RandomState(seed)
        case = self.store.open(data.cases[random.randint(len(data.cases))])
        forced = is_forced_foreground(index, self.batch_size, self.foreground_fraction)
        corner = data.sampler.lower_corner(
            case.data.shape[1:], forced, lambda: case.properties.get("class_locations") or {}, random
        )
        image, labels = read_patch(case, corner, data.sampler.read_size)
        with global_random_state(numpy_seed, torch_seed), torch.no_grad():
            return {**data.transform(image=image, segmentation=labels), "case": case.identifier}


# -- how they reach the trainer ----------------------------------------------------------------------------------------------


def iterate_batches(
    batches: Batches, schedule: BatchSchedule, workers: int, pin_memory: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the schedule's batches in order, made ahead by ``workers`` processes, or here when there are none."""
    if workers == 0:
        for request in schedule:
            yield batches[request]
        return
    loader = DataLoader(
        _ErrorsAsItems(batches),
        batch_size=None,
        sampler=schedule,  # type: ignore[arg-type]  # any iterable will do
        num_workers=workers,
        multiprocessing_context="spawn",  # a fork of a process that uses CUDA or threads may hang
        worker_init_fn=_prepare_worker,
        pin_memory=pin_memory,
        prefetch_factor=2,
        generator=torch.Generator(),  # keeps its hands off the global one
    )
    for item in loader:
        if isinstance(item, NnsslAdaptError):
            raise item
        yield item


@contextmanager
def explained_worker_death() -> Iterator[None]:
    """Turn torch's error for a dead worker into a TrainingError that says why it happens.

    Not only while waiting for a batch: torch raises it wherever the process is when it learns of the death.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a data-loading worker died ({str(error).splitlines()[0].rstrip('. ')}); the usual cause is too little memory "
            "or shared memory (/dev/shm): try fewer --workers, and go on with --c"
        ) from error


class _ErrorsAsItems(Dataset):  # type: ignore[type-arg]
    """Hands our own errors over as items: the loader would raise them with a traceback for a message."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, request: BatchRequest) -> dict[str, Any] | NnsslAdaptError:
        try:
            return self.batches[request]
        except NnsslAdaptError as error:
            return error


def _prepare_worker(number: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach all processes of a job. The trainer decides when workers end, so that it can
    # finish its step; but the second SIGTERM, which is the trainer's own, must work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def default_workers(device_type: str) -> int:
    """Processes that make batches when nothing else is asked for.

    ``nnUNet_n_proc_DA`` decides where it is set. Beside a GPU: one less than the cores this process may use, at most
    nnU-Net's 12. On a CPU the network needs the cores: none of two, at most two of more.
    """
    wish = os.environ.get("nnUNet_n_proc_DA", "")
    if wish.isdigit():
        return int(wish)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device_type == "cpu":
        return min(2, cores - 1) if cores > 2 else 0
    return max(1, min(12, cores - 1))


def annotated_key(labels: LabelScheme) -> tuple[int, ...] | None:
    """The key under which preprocessing keeps all annotated voxels (background and outside included), if it does."""
    return None if labels.ignore_label is None else (-1, *labels.all_labels)
