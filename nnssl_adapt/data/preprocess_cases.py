"""From a raw dataset to a store of preprocessed cases: in parallel, resumable, in parts if need be."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.data.dataset import RawCase, RawDataset
from nnssl_adapt.data.images import SIMPLE_ITK, read_geometry
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.preprocess import PreprocessSettings, digest_of, preprocess_case
from nnssl_adapt.data.store import CaseStore, describe_source
from nnssl_adapt.errors import CaseError, ConfigurationError, PreprocessingError
from nnssl_adapt.geometry.spacing import resampled_shape
from nnssl_adapt.machine.workers import over_cases
from nnssl_adapt.text import lines_and_more

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``total`` (from 1) of a dataset's cases, for arrays of cluster jobs that fill one store.

    Raises ConfigurationError unless 1 ≤ number ≤ total.
    """

    number: int = 1
    total: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.total:
            raise ConfigurationError(
                f"shard {self.number}/{self.total}: expected 1/{self.total} to {self.total}/{self.total}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/5``."""
        number, slash, total = text.partition("/")
        if not slash or not number.strip().isdigit() or not total.strip().isdigit():
            raise ConfigurationError(f"shard {text!r}: expected I/N, for instance 1/4 (the first of four parts)")
        return cls(int(number), int(total))

    def part_of(self, cases: Sequence[RawCase]) -> list[RawCase]:
        """Every ``total``-th case, so that each part of a list sorted by size has its share of large ones."""
        return list(cases[self.number - 1 :: self.total])

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


WHOLE = Shard()


def preprocess_cases(
    dataset: RawDataset,
    settings: PreprocessSettings,
    store_folder: str | Path,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool | None = None,
    shard: Shard = WHOLE,
    check: bool = False,
) -> CaseStore:
    """Preprocess every training case into a store. A case that is there, whole and unchanged is kept.

    Unchanged means: the same settings and labels, and source files of the same size and time. Cases that the dataset no
    longer has are removed from the store. Several processes may fill a store at the same time, even without ``shard``: what
    one has done, the others leave alone.

    Args:
        dataset: what to preprocess.
        settings: how.
        store_folder: where to; see :class:`CaseStore`.
        workers: processes, one case each; 1 works in this process.
        overwrite: do every case again.
        progress: whether to draw a progress bar with the cases' names.
        shard: which part of the cases to do; several processes, on several machines, may each do one at the same time.
        check: read what is there and compare it with its checksums, so that a damaged disk does not go unnoticed.

    Returns:
        The store, with every case of the dataset (of the shard).

    Raises:
        PreprocessingError: some cases failed, each named with its reason (the others are done), or a worker was killed.
        OutputError: the folder can't be written, or the disk is full.
    """
    store = CaseStore(store_folder)
    purpose = {
        "dataset": dataset.name,
        "settings": settings.to_dict(),
        "classes": [list(entry) if isinstance(entry, tuple) else entry for entry in dataset.labels.sampled_classes],
    }
    readers = sorted({case.reader for case in dataset.cases} - {SIMPLE_ITK})
    if readers:  # left out otherwise, so that older stores stay valid
        purpose["readers"] = readers
    digest = digest_of({key: purpose[key] for key in purpose if key != "dataset"})
    store.begin({**purpose, "settings_digest": settings.digest(), "digest": digest})
    _remove_strangers(store, dataset)
    needs = {case.identifier: memory_needed(case, settings) for case in dataset.cases}
    # The largest first: they would otherwise keep one process busy when all others have finished.
    mine = shard.part_of(sorted(dataset.cases, key=lambda case: (-needs[case.identifier], case.identifier)))
    tasks = []
    for case in mine:
        sources = [describe_source(path) for path in case.files]
        if overwrite or not store.is_complete(case.identifier, digest, sources):
            tasks.append(
                (case.identifier, (case, settings, dataset.labels, store.folder, digest, sources, not overwrite))
            )
        elif check and not store.is_complete(case.identifier, read_all=True):
            logger.warning("%s: what is stored of case %s is damaged: made again", store.folder, case.identifier)
            tasks.append((case.identifier, (case, settings, dataset.labels, store.folder, digest, sources, False)))
    if len(tasks) < len(mine):
        logger.info("%d of %d cases are already preprocessed", len(mine) - len(tasks), len(mine))
    failures = [
        f"{outcome.identifier}: {outcome.complaint}"
        for outcome in over_cases(_preprocess_into_store, tasks, workers, "Preprocessing", progress, needs)
        if outcome.error is not None
    ]
    if failures:
        raise PreprocessingError(
            f"{len(failures)} of {len(mine)} cases could not be preprocessed; the others are done. Correct these "
            "and run the same command again:\n" + lines_and_more(sorted(failures)),
            mistakes=sorted(failures),
        )
    return store


def memory_needed(case: RawCase, settings: PreprocessSettings) -> int:
    """Bytes that preprocessing a case takes at most, from its header alone; 0 where that can't be read (reading will tell).

    The sum of the arrays that :func:`preprocess_case` and :meth:`CaseStore.write` hold at their widest moments, as if nothing
    were cropped and noise could not be compressed.
    """
    try:
        geometry = read_geometry(case.images[0], case.reader)
    except CaseError:
        return 0
    channels = len(settings.normalization_schemes)
    source = math.prod(geometry.size)
    target = source
    if settings.spacing is not None:
        spacing = tuple(geometry.spacing[axis] for axis in settings.transpose_forward)
        size = [geometry.size[axis] for axis in settings.transpose_forward]
        target = math.prod(resampled_shape(size, spacing, settings.target_spacing(spacing) or spacing))
    reading = source * (8 * channels + 6)
    resampling = source * 4 * channels + target * (4 * channels + 10)
    locating = target * (4 * channels + 14)
    storing = target * (3 * 4 * channels + 4)  # the array, packed, and the file's content
    return max(reading, resampling, locating, storing)


def _preprocess_into_store(
    case: RawCase,
    settings: PreprocessSettings,
    label_scheme: LabelScheme,
    folder: Path,
    digest: str,
    sources: Sequence[Mapping[str, Any]],
    share: bool,
) -> None:
    """With ``share``, a case that another process has finished since this run began is left alone: it may be in use."""
    store = CaseStore(folder)
    if share and store.is_complete(case.identifier, digest, sources):
        return
    preprocessed = preprocess_case(case, settings, label_scheme)
    if not (share and store.is_complete(case.identifier, digest, sources)):
        store.write(case.identifier, preprocessed, settings.patch_size, digest, sources)


def _remove_strangers(store: CaseStore, dataset: RawDataset) -> None:
    """A case that left the dataset must not stay in a store that "all cases" are trained from."""
    known = {case.identifier for case in dataset.cases}
    for identifier in store.recorded():
        if identifier not in known:
            logger.warning("%s is no longer in %s: removed from %s", identifier, dataset.name, store.folder)
            store.remove(identifier)
