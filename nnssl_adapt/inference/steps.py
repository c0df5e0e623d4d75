"""What is done to an image before and after the network, here or in a worker process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnssl_adapt.data.images import ImageGeometry, write_labels
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.preprocess import preprocess_arrays
from nnssl_adapt.data.previous_stage import one_hot
from nnssl_adapt.data.store import PreprocessedCase
from nnssl_adapt.data.turning import turn_image
from nnssl_adapt.errors import CaseError, OutputError
from nnssl_adapt.geometry.orientation import Turn
from nnssl_adapt.inference.export import logits_to_probabilities, logits_to_segmentation, write_probabilities
from nnssl_adapt.inference.postprocess import Postprocessing
from nnssl_adapt.inference.task import ImageTask
from nnssl_adapt.machine.memory import give_back_freed_memory
from nnssl_adapt.planning.plan import FinetunePlan

_ROOM = 1 << 26
"""Bytes: with so much free, a disk is not full."""


@dataclass(frozen=True)
class PreparedImage:
    """A preprocessed image.

    Attributes:
        data: float32 (C, Z, Y, X) in transposed axes.
        properties: of the image as the network gets it.
        geometry: of the image as it is stored.
        turn: from the one to the other.
        doubts: what its owner should know.
    """

    data: np.ndarray
    properties: dict[str, Any]
    geometry: ImageGeometry
    turn: Turn = field(default_factory=Turn)
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Steps:
    """Reading and preprocessing, export and writing; small enough to be sent to a worker with every image.

    Attributes:
        plan: with the preprocessing, and the way back.
        labels: what the network's outputs mean.
        num_channels: of an image.
        expected: how an image should look, for messages.
        save_probabilities: whether to write nnU-Net's ``.npz`` and ``.pkl`` too.
        postprocessing: done to the labels; probabilities stay as they are.
    """

    plan: FinetunePlan
    labels: LabelScheme
    num_channels: int
    expected: str
    save_probabilities: bool = False
    postprocessing: Postprocessing = field(default_factory=Postprocessing)

    def prepare(self, task: ImageTask) -> PreparedImage:
        """Read and preprocess. Raises CaseError."""
        image, geometry = task.read(self.num_channels, self.expected)
        doubts, turn, turned = tuple(_doubts(image)), Turn(), geometry
        if task.orientation is not None:
            image, turned, turn = turn_image(image, geometry, task.orientation)
        try:
            previous = None if self.plan.previous_stage is None else turn.apply(task.read_previous(geometry))
            case = self.preprocess(image, turned, previous)
        except CaseError as error:
            raise CaseError(f"{task.files[0]}: {error}" if task.files else str(error)) from error
        return PreparedImage(case.data, case.properties, geometry, turn, doubts)

    def preprocess(
        self, image: np.ndarray, geometry: ImageGeometry, previous: np.ndarray | None = None
    ) -> PreprocessedCase:
        """Preprocess an image (C, Z, Y, X).

        ``previous``: of a cascade, the previous stage's labels (1, Z, Y, X), which become further channels.
        """
        case = preprocess_arrays(image, previous, geometry, self.plan.settings, self.labels)
        if previous is None:
            return case
        assert case.seg is not None
        channels = one_hot(case.seg[0], self.plan.stage_channels(self.labels))
        properties = {key: value for key, value in case.properties.items() if key != "class_locations"}
        return PreprocessedCase(np.concatenate([case.data, channels]), None, properties)

    def export(self, task: ImageTask, logits: Tensor | np.ndarray, prepared: PreparedImage) -> np.ndarray:
        """Labels (Z, Y, X) from logits (K, Z, Y, X), as the image is stored; written where the task has a target.

        Raises OutputError: nothing can be written there. CaseError: this image's labels can't.
        """
        turn, properties = prepared.turn, prepared.properties
        if task.target is not None and self.save_probabilities:
            labels, probabilities = logits_to_probabilities(logits, properties, self.plan, self.labels)
            if not turn.is_none:
                probabilities = np.ascontiguousarray(turn.undo(probabilities))
                properties = {**properties, **prepared.geometry.to_properties()}
            write_probabilities(task.beside_target(), probabilities, properties)
        else:
            labels = logits_to_segmentation(logits, properties, self.plan, self.labels)
        labels = self.postprocessing.apply(np.ascontiguousarray(turn.undo(labels)))
        if task.target is not None:
            _write_last(task.target, labels, prepared.geometry)
        return labels


def _doubts(image: np.ndarray) -> Iterator[str]:
    """Channels (of C, Z, Y, X) without content."""
    for index, channel in enumerate(image):
        value = channel[0, 0, 0]
        if (channel[::4, ::4, ::4] == value).all() and (channel == value).all():
            which = f"channel {index}" if len(image) > 1 else "the image"
            yield f"{which} is {value:g} everywhere: predicted as it is, but what comes out means nothing"


def _write_last(target: Path, labels: np.ndarray, geometry: ImageGeometry) -> None:
    """Write the label file, which is the sign that the image is done."""
    try:
        write_labels(target, labels, geometry)
    except OutputError as error:
        # What the format can't hold says nothing about the next image; a full disk and missing permissions do.
        if isinstance(error.__cause__, RuntimeError) and shutil.disk_usage(target.parent).free > _ROOM:
            raise CaseError(str(error), path=target) from error
        raise


# -- in a worker process -----------------------------------------------------------------------------------------------


class SharedMemory:
    """Memory that other processes of this machine can map, and that is gone with the last of them, whatever ends them.

    Unlike ``/dev/shm``, which containers often limit to 64 MB, it is bounded by nothing but the machine's memory.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("nnssl_adapt")

    @staticmethod
    def is_available() -> bool:
        """Linux has it."""
        return hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()

    @property
    def path(self) -> str:
        """Where others open it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def array(self, shape: tuple[int, ...], dtype: Any, new: bool = False) -> np.ndarray:
        """Map it; ``new``: zeros, of this size from now on."""
        return np.memmap(self.path, dtype=dtype, mode="w+" if new else "r+", shape=shape)

    def close(self) -> None:
        """Let go of it; arrays stay valid."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()


def prepare_in_worker(steps: Steps, task: ImageTask, memory: str) -> tuple[tuple[int, ...], PreparedImage]:
    """Prepare an image and leave it in shared memory; returns its shape and what else is known of it."""
    try:
        prepared = steps.prepare(task)
        np.memmap(memory, dtype=np.float32, mode="w+", shape=prepared.data.shape)[:] = prepared.data
        return prepared.data.shape, replace(prepared, data=np.empty(0, np.float32))
    finally:
        give_back_freed_memory()


def export_in_worker(
    steps: Steps,
    task: ImageTask,
    memory: str,
    shape: tuple[int, ...],
    dtype: str,
    prepared: PreparedImage,
) -> None:
    """Write the labels of logits that lie in shared memory."""
    try:
        logits = torch.from_numpy(np.memmap(memory, dtype=dtype, mode="r+", shape=shape))
        steps.export(task, logits, prepared)
    finally:
        give_back_freed_memory()
