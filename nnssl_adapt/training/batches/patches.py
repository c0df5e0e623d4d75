"""Random patches out of a case store, in batches: which case, where, and how batches reach the trainer.

Every draw follows from (seed, phase, epoch, iteration, sample) and from nothing that ran before. So a batch is the same
in whatever process it is made and however often the run was stopped and resumed.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.previous_stage import PreviousStage
from nnssl_adapt.data.store import CaseStore, StoredCase
from nnssl_adapt.errors import NnsslAdaptError, TrainingError
from nnssl_adapt.machine.memory import reuse_freed_memory
from nnssl_adapt.machine.resources import memory_kills, why_a_worker_died
from nnssl_adapt.training.batches.spatial import Box, Size
from nnssl_adapt.training.batches.staging import open_nearest
from nnssl_adapt.training.launch.distributed import Ranks

if TYPE_CHECKING:
    import blosc2

logger = logging.getLogger(__name__)

Transform = Callable[[Sequence["Place"]], dict[str, Any]]
"""Makes a batch of the places of its samples: ``image``, ``target`` and what else it is to carry."""

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


@dataclass(frozen=True)
class Place:
    """Where a sample comes from.

    Attributes:
        case: its case.
        corner: first voxel (Z, Y, X; may be negative) of what would be read for it.
        read_size: how much that is; beyond, nothing of the image is seen, however the patch is turned.
        patch_size: what the network sees, in the middle of it.
        seed: what else is drawn for the sample follows from it.
        previous: labels (Z, Y, X) of a cascade's previous stage for the case, if it is one.
    """

    case: StoredCase
    corner: Size
    read_size: Size
    patch_size: Size
    seed: int
    previous: blosc2.NDArray | None = None

    @property
    def channels(self) -> int:
        """Of the image."""
        return int(self.case.data.shape[0])

    @property
    def patch_box(self) -> Box:
        """The patch, if it is not turned."""
        start = [c + r // 2 - p // 2 for c, r, p in zip(self.corner, self.read_size, self.patch_size, strict=True)]
        z, y, x = self.patch_size
        return Box((start[0], start[1], start[2]), (start[0] + z, start[1] + y, start[2] + x))

    @property
    def filled(self) -> Box:
        """The voxels that have values: what would be read, as far as there is an image."""
        shape = self.case.data.shape[1:]
        start = [min(max(0, c), n) for c, n in zip(self.corner, shape, strict=True)]
        stop = [max(min(c + r, n), a) for c, r, n, a in zip(self.corner, self.read_size, shape, start, strict=True)]
        return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


# -- which, and in what random state ---------------------------------------------------------------------------------------


def seeds_for(*key: int) -> list[int]:
    """Return three independent 32-bit seeds for a tuple of counters."""
    return [int(seed) for seed in np.random.SeedSequence(key).generate_state(3)]


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

    ``self[BatchRequest(...)]`` is what the phase's transform returns, usually ``image`` float32 (B, C, Z, Y, X) and ``target``
    (B, 1, Z, Y, X) int16 labels or (B, R, Z, Y, X) bool regions; and ``cases``, the B identifiers.

    Of several processes ("ranks") each makes its share of every batch, and together they make what one would.

    Args:
        store_folder: of the preprocessed cases.
        phases: what batches are made of.
        batch_size: samples of the combined batch.
        foreground_fraction: of samples centred on foreground.
        seed: of all that is drawn.
        rank: of this process.
        size: how many processes there are.
        copies: folder with copies of cases on this machine's own disk, now or later; see :mod:`.staging`.
        previous: of a cascade, the segmentations of its previous stage.

    Raises:
        ConfigurationError: there are more processes than samples.
    """

    def __init__(
        self,
        store_folder: Path,
        phases: Mapping[str, PhaseData],
        batch_size: int,
        foreground_fraction: float,
        seed: int,
        rank: int = 0,
        size: int = 1,
        copies: Path | None = None,
        previous: PreviousStage | None = None,
    ) -> None:
        self.store = CaseStore(store_folder)
        self.previous = previous
        self.copies = None if copies is None else CaseStore(copies)
        self.phases = dict(phases)
        self.batch_size = batch_size
        self.foreground_fraction = foreground_fraction
        self.seed = seed
        self.samples = Ranks(rank=rank, size=size).samples(batch_size)

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        places = [self._place(request, index) for index in self.samples]
        with torch.no_grad():
            batch = self.phases[request.phase].transform(places)
        return {**batch, "cases": [place.case.identifier for place in places]}

    def _place(self, request: BatchRequest, index: int) -> Place:
        data = self.phases[request.phase]
        counters = self.seed, _PHASES.index(request.phase), request.epoch, request.iteration, index
        seed, later, _ = seeds_for(*counters)
        random = np.random.RandomState(seed)
        case = open_nearest(self.store, self.copies, data.cases[random.randint(len(data.cases))])
        forced = is_forced_foreground(index, self.batch_size, self.foreground_fraction)
        corner = data.sampler.lower_corner(
            case.data.shape[1:], forced, lambda: case.properties.get("class_locations") or {}, random
        )
        previous = None if self.previous is None else self.previous.open(case.identifier, case.data.shape[1:])
        return Place(case, corner, data.sampler.read_size, data.sampler.patch_size, later, previous)


# -- how they reach the trainer ----------------------------------------------------------------------------------------------


def iterate_batches(
    batches: Batches, schedule: BatchSchedule, workers: int, pin_memory: bool = False
) -> Generator[dict[str, Any]]:
    """Yield the schedule's batches in order, made ahead by ``workers`` processes, or here when there are none.

    Close it (:func:`contextlib.closing`) when no more are wanted: workers that are left when the program ends take its one
    SIGTERM for a scheduler's (see :func:`prepare_data_worker`), and it would wait for them for ever.
    """
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
        worker_init_fn=prepare_data_worker,
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
    """Turn torch's error for a dead worker into a TrainingError that says why it happened, as far as can be told.

    Not only while waiting for a batch: torch raises it wherever the process is when it learns of the death.
    """
    kills = memory_kills()
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        message = str(error)
        raise TrainingError(
            f"a data-loading worker died ({message.splitlines()[0].rstrip('. ')}); "
            f"{why_a_worker_died(message, kills)}; go on with --c"
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


def prepare_data_worker(number: int) -> None:
    """Make this process a worker: one thread, freed memory is used again, signals are left to the trainer."""
    torch.set_num_threads(1)
    reuse_freed_memory()
    # Ctrl-C, a scheduler's SIGTERM and SIGUSR1, and a closed terminal's SIGHUP reach all processes of a job. The trainer
    # decides when workers end, so that it can finish its step; but the second SIGTERM, which is the trainer's own, must work.
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):  # Windows has only the first
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def annotated_key(labels: LabelScheme) -> tuple[int, ...] | None:
    """The key under which preprocessing keeps all annotated voxels (background and outside included), if it does."""
    return None if labels.ignore_label is None else (-1, *labels.all_labels)
