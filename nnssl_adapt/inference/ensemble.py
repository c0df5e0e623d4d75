"""One segmentation from several models: the mean of the probabilities that each saved.

``CASE.npz`` (array ``probabilities``, (K, Z, Y, X)) and ``CASE.pkl`` are nnU-Net's files, which we write as well.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.data.images import ImageGeometry, write_labels
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.properties import load_properties
from nnssl_adapt.errors import CaseError, ConfigurationError
from nnssl_adapt.files import make_folder, write_json
from nnssl_adapt.inference.heads import is_identity, order_of_heads
from nnssl_adapt.inference.postprocess import Postprocessing, copy_descriptions, description_of, raise_failures
from nnssl_adapt.machine.workers import over_cases

logger = logging.getLogger(__name__)

_NOTHING = Postprocessing()
_ENTRY = "probabilities.npy"
_BYTES_PER_VOXEL = 24
"""Two maps of float32 (of one output each), the best so far, its label, and a mask; or postprocessing the labels."""


@dataclass(frozen=True)
class EnsembleTask:
    """One case.

    Attributes:
        members: ``.npz`` files of the models, the first one's ``.pkl`` says where the image lies.
        target: label file to write.
        file_ending: of ``target``.
        labels: what the outputs mean.
        orders: for each member the number of its output for each of ours, empty where they are the same; or empty for all.
        save_probabilities: also write the mean, as ``.npz`` and ``.pkl``.
        postprocessing: done to the labels; probabilities stay as they are.
    """

    members: tuple[Path, ...]
    target: Path
    file_ending: str
    labels: LabelScheme
    save_probabilities: bool = False
    postprocessing: Postprocessing = _NOTHING
    orders: tuple[tuple[int, ...], ...] = ()


def ensemble_folders(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    dataset_json: str | Path | None = None,
    save_probabilities: bool = False,
    postprocessing: str | Path | None = None,
    workers: int = 1,
    progress: bool = False,
) -> list[Path]:
    """Average the probabilities in several folders, each with the same cases, and write segmentations.

    Outputs of different models are paired by the names of their labels or regions; segmentations have the values of the first.

    Args:
        folders: of predictions with probabilities, ours or nnU-Net's.
        output: folder to write to; gets the first folder's dataset.json and plans.json, too.
        dataset_json: with the labels; None: the first folder's, see :func:`description_of`.
        save_probabilities: also write the mean, as ``.npz`` and ``.pkl``.
        postprocessing: ``postprocessing.json``, or nnU-Net's ``.pkl``: done to the segmentations.
        workers: processes, one case each, and no more than fit into memory.
        progress: whether to draw a progress bar on stderr.

    Returns:
        The label files.

    Raises:
        ConfigurationError: the output is one of the folders, or none was given; models have labels that the first has not, or
            the other way round; the postprocessing is of others.
        CaseError: a folder has no ``.npz``, or lacks some that another one has.
        DatasetJsonError: dataset.json is missing or wrong.
        PredictionError: some cases failed (each is named); the others are done.
    """
    sources, output = list(dict.fromkeys(Path(folder) for folder in folders)), Path(output)
    if not sources:
        raise ConfigurationError("no folder of predictions was given")
    if output.resolve() in [source.resolve() for source in sources]:
        raise ConfigurationError(f"{output} is one of the folders to average: choose another one for the result")
    files = _same_cases({str(source): {p.name: p for p in saved_probabilities(source)} for source in sources})
    path = description_of(sources[0]) if dataset_json is None else Path(dataset_json)
    description = DatasetJson.load(path)
    labels = LabelScheme.from_dataset_json(description.raw, path)
    orders = [_order_in(source, labels, path) for source in sources]
    steps = Postprocessing()
    if postprocessing is not None:
        steps = Postprocessing.load(postprocessing)
        steps.refuse_unknown(labels, postprocessing)
    make_folder(output)
    copy_descriptions(description_of(sources[0]).parent, output)
    write_json(output / "dataset.json", description.raw)
    return ensemble_cases(
        files, output, labels, description.file_ending, orders, save_probabilities, steps, workers, progress
    )


def ensemble_cases(
    files: Mapping[str, Sequence[Path]],
    output: Path,
    labels: LabelScheme,
    file_ending: str,
    orders: Sequence[Sequence[int]] = (),
    save_probabilities: bool = False,
    postprocessing: Postprocessing = _NOTHING,
    workers: int = 1,
    progress: bool = False,
) -> list[Path]:
    """Average given files (identifier → one ``.npz`` a model) into ``output``; return the label files. See above.

    ``orders``: for each model, see :func:`nnssl_adapt.inference.heads.order_of_heads`; empty: all models have the same.
    """
    tasks, numbers = [], tuple(() if is_identity(order) else tuple(order) for order in orders)
    for identifier, members in files.items():
        target = output / f"{identifier}{file_ending}"
        task = EnsembleTask(tuple(members), target, file_ending, labels, save_probabilities, postprocessing, numbers)
        tasks.append((identifier, (task,)))
    memory = {name: _memory_for(arguments[0]) for name, arguments in tasks} if workers > 1 else None
    raise_failures(over_cases(ensemble_case, tasks, workers, "Averaging", progress, memory), len(tasks), output)
    return [arguments[0].target for _, arguments in tasks]


def saved_probabilities(folder: Path) -> list[Path]:
    """The ``.npz`` files of a folder, sorted. Raises CaseError if there are none."""
    if not folder.is_dir():
        raise CaseError(f"{folder}: no such folder")
    found = sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))
    if not found:
        raise CaseError(
            f"{folder} has no probabilities (.npz): predict with --save-probabilities, or validate with --npz, as in "
            "nnUNetv2_train_pretrained … --val --npz"
        )
    return found


def _same_cases(files: Mapping[str, Mapping[str, Path]]) -> dict[str, list[Path]]:
    """Identifier → its file of each model. Raises CaseError if a model lacks a case that another has."""
    every = sorted({name for found in files.values() for name in found})
    for source, found in files.items():
        missing = [name for name in every if name not in found]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CaseError(f"{source} lacks {', '.join(missing[:5])}{more}, which another folder has")
    return {name.removesuffix(".npz"): [found[name] for found in files.values()] for name in every}


def _order_in(folder: Path, labels: LabelScheme, where: Path) -> tuple[int, ...]:
    """Which of a folder's outputs is which of ours, by the names in its dataset.json."""
    path = description_of(folder)
    if path == where or not path.is_file():
        if path != where:
            logger.warning("%s has no dataset.json: its outputs are taken in the order of %s", folder, where)
        return tuple(range(labels.num_heads))
    return order_of_heads(labels, where, LabelScheme.from_dataset_json(DatasetJson.load(path).raw, path), path)


def ensemble_case(task: EnsembleTask) -> None:
    """Average one case and write it. Raises CaseError naming the file that is bad; OutputError."""
    properties = load_properties(task.members[0].with_suffix(".pkl"))
    maps: list[np.ndarray] = []
    segmentation = best = None
    with ExitStack() as stack:
        orders = task.orders or ((),) * len(task.members)
        streams = [
            stack.enter_context(_ProbabilityStream(path, order))
            for path, order in zip(task.members, orders, strict=True)
        ]
        _refuse_other_shapes(streams, task.labels.num_heads)
        segmentation = np.zeros(streams[0].shape[1:], np.uint16)
        for head, mean in enumerate(_mean_maps(streams)):
            if task.save_probabilities:
                maps.append(mean)
            if task.labels.has_regions:
                segmentation[mean > 0.5] = task.labels.regions_class_order[head]
            elif best is None:
                best = mean.copy()
            else:
                larger = mean > best  # ties stay with the lower label, as with argmax
                segmentation[larger] = head
                np.maximum(best, mean, out=best)
    segmentation = task.postprocessing.apply(segmentation)
    write_labels(task.target, segmentation, ImageGeometry.from_properties(properties, segmentation.shape))
    if task.save_probabilities:
        from nnssl_adapt.inference.export import write_probabilities  # torch, which workers need not wait for

        stem = task.target.name.removesuffix(task.file_ending)
        write_probabilities(task.target.with_name(stem), np.stack(maps), properties)


def _mean_maps(streams: Sequence[_ProbabilityStream]) -> Iterator[np.ndarray]:
    """For each output in turn the models' mean, float32 (Z, Y, X), added up in nnU-Net's order."""
    for _ in range(streams[0].shape[0]):
        total = streams[0].next_map()
        for stream in streams[1:]:
            total += stream.next_map()
        total /= len(streams)
        yield total


def _refuse_other_shapes(streams: Sequence[_ProbabilityStream], heads: int) -> None:
    first = streams[0]
    if len(first.shape) != 4 or first.shape[0] != heads:
        raise CaseError(f"{first.path}: expected probabilities ({heads}, Z, Y, X) by dataset.json, got {first.shape}")
    for other in streams[1:]:
        if other.shape != first.shape:
            raise CaseError(f"{other.path} has shape {other.shape} and {first.path} {first.shape}: not the same image")


class _ProbabilityStream:
    """Reads ``probabilities`` of an ``.npz`` one output after the other, so that they need not all be in memory.

    ``order``: the numbers in which the outputs are wanted; empty: as they lie. In another order all are in memory.
    """

    def __init__(self, path: Path, order: Sequence[int] = ()) -> None:
        self.path = path
        self._order = tuple(order)
        self._head = 0
        self._whole: np.ndarray | None = None

    def __enter__(self) -> _ProbabilityStream:
        try:
            self._archive = zipfile.ZipFile(self.path)
            self._file: IO[bytes] = self._archive.open(_ENTRY)
            self.shape, fortran, self._dtype = _npy_header(self._file)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise CaseError(f"{self.path} can't be read as probabilities ({error}): predict this case again") from error
        if self._dtype.kind != "f":
            raise CaseError(f"{self.path}: probabilities must be floating-point numbers, got {self._dtype}")
        if fortran or self._order:  # outputs do not come one after the other then
            self._whole = self._all_of_it()
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._archive.close()

    def _all_of_it(self) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as content:
                whole: np.ndarray = content["probabilities"]
                return whole
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise CaseError(f"{self.path} is damaged ({error}): predict this case again") from error

    def next_map(self) -> np.ndarray:
        """The next output, float32 (Z, Y, X), the caller's own."""
        head, self._head = self._head, self._head + 1
        if self._whole is not None:
            found: np.ndarray = self._whole[self._order[head] if self._order else head].astype(np.float32)
            return found
        count = int(np.prod(self.shape[1:])) * self._dtype.itemsize
        try:
            content = self._file.read(count)
            if self._head == self.shape[0]:
                self._file.read(1)  # the end, where the checksum is compared
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise CaseError(f"{self.path} is damaged ({error}): predict this case again") from error
        if len(content) != count:
            raise CaseError(f"{self.path} is truncated: predict this case again")
        return np.frombuffer(content, self._dtype).reshape(self.shape[1:]).astype(np.float32)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return tuple(shape), bool(fortran), dtype


def _memory_for(task: EnsembleTask) -> int:
    """Bytes that averaging a case takes, by its file's header; 0 where that can't be read (which is reported later)."""
    try:
        with _ProbabilityStream(task.members[0]) as stream:
            voxels = int(np.prod(stream.shape[1:]))
            outputs = stream.shape[0] if task.save_probabilities or any(task.orders) else 0
    except CaseError:
        return 0
    return voxels * (_BYTES_PER_VOXEL + 8 * outputs)  # the maps, and the array they are stacked into
