"""What became of images: those that are done, by which model, so that ``--continue`` trusts nothing else; and failures.

``predicted.jsonl`` lies beside the segmentations: a line for every way of predicting that was used there, and a line for
every finished image. Lines are only ever appended, so that several processes, each with its part, can share the file.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nnssl_adapt.data.preprocess import digest_of
from nnssl_adapt.data.store import describe_source
from nnssl_adapt.errors import NnsslAdaptError
from nnssl_adapt.files import atomic_path, explain_write_errors, leftovers, make_folder, sha256_of
from nnssl_adapt.inference.task import ImageTask

logger = logging.getLogger(__name__)

RECORD = "predicted.jsonl"

_LISTED = 20
"""How many failed images are named."""


@dataclass
class PredictionRecord:
    """What is finished in a folder.

    Attributes:
        folder: of the segmentations.
        settings: everything that the labels depend on beside the image: the weights' digests, the step, … (plain values).
    """

    folder: Path
    settings: Mapping[str, Any]
    _known: dict[str, Mapping[str, Any]] = field(default_factory=dict, init=False)
    _images: dict[str, Mapping[str, Any]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.digest = digest_of(self.settings)[:16]
        for line in _lines(self.folder / RECORD):
            if isinstance(line.get("settings"), dict):
                self._known[str(line.get("id"))] = line["settings"]
            elif "image" in line:
                self._images[str(line["image"])] = line

    def is_done(self, task: ImageTask, with_probabilities: bool) -> bool:
        """Whether this model with these settings has finished this image, whose files are unchanged and whole."""
        line = self._images.get(task.identifier)
        if line is None or line.get("settings_id") != self.digest or line.get("sources") != _sources(task):
            return False
        written = line.get("files")
        return isinstance(written, dict) and all(
            path.is_file() and written.get(path.name) == path.stat().st_size
            for path in task.outputs(with_probabilities)
        )

    def changed_since(self, task: ImageTask) -> tuple[str, ...]:
        """Names of the settings that differ from those that this image was last predicted with."""
        line = self._images.get(task.identifier, {})
        before = self._known.get(str(line.get("settings_id")))
        if before is None:
            return ()
        names = sorted({*before, *self.settings})
        plain = json.loads(json.dumps(dict(self.settings)))
        return tuple(name for name in names if before.get(name) != plain.get(name))

    def copy_model_files(self, model: Path) -> None:
        """Copy a model's dataset.json and plans.json to the segmentations: evaluation and nnU-Net's tools look for them there."""
        make_folder(self.folder)
        for name, key in (("dataset.json", "dataset.json"), ("plans.json", "plans")):
            path = self.folder / name
            there = sha256_of(path) if path.is_file() else None
            if there is None or there in self.used(key):  # that of the model before this one
                with atomic_path(path) as temporary:
                    shutil.copyfile(model / name, temporary)
            elif there != self.settings[key]:  # somebody's dataset, which segmentations are added to
                logger.warning("%s stays as it was; it is not the model's", path)

    def used(self, name: str) -> list[Any]:
        """Values of a setting with which images in this folder were predicted at some time."""
        return [settings.get(name) for settings in self._known.values()]

    def add(self, task: ImageTask, with_probabilities: bool) -> None:
        """Note that an image is done. Raises OutputError when that can't be written."""
        files = {path.name: path.stat().st_size for path in task.outputs(with_probabilities)}
        line = {"image": task.identifier, "settings_id": self.digest, "sources": _sources(task), "files": files}
        if self.digest not in self._known:
            self._append({"id": self.digest, "settings": dict(self.settings)})
            self._known[self.digest] = dict(self.settings)
        self._append(line)
        self._images[task.identifier] = line

    def _append(self, line: Mapping[str, Any]) -> None:
        path = make_folder(self.folder) / RECORD
        # A line begins with a line break too: what a killed process or a full disk left of one then spoils no other.
        text = "\n" + json.dumps(line) + "\n"
        with explain_write_errors(path):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(handle, text.encode())
            finally:
                os.close(handle)


def unfinished(
    tasks: Sequence[ImageTask], record: PredictionRecord | None, with_probabilities: bool
) -> list[ImageTask]:
    """The images that are still to be predicted; the log says why, where they look as if they were done."""
    if record is None:  # a single output file: nothing says what it was made with
        return list(tasks)
    waiting = [task for task in tasks if not record.is_done(task, with_probabilities)]
    if len(waiting) < len(tasks):
        logger.info("%d of %d images are already predicted", len(tasks) - len(waiting), len(tasks))
    there = [task for task in waiting if task.target is not None and task.target.is_file()]
    if there:
        logger.warning(
            "%d segmentations in %s are predicted again: %s",
            len(there),
            record.folder,
            _why_again(there, record),
        )
    return waiting


def _why_again(tasks: Sequence[ImageTask], record: PredictionRecord) -> str:
    changed = sorted({name for task in tasks for name in record.changed_since(task)})
    if changed:
        return f"made with other {', '.join(changed)}"
    if all(record.is_done(task, with_probabilities=False) for task in tasks):
        return "their probabilities (.npz, .pkl) are missing"
    return "not known to be whole and of this model and these images"


def remove_unfinished(task: ImageTask, with_probabilities: bool) -> None:
    """Delete what a killed run left of this image."""
    for path in task.outputs(with_probabilities):
        for leftover in leftovers(path):
            leftover.unlink(missing_ok=True)


def _sources(task: ImageTask) -> list[dict[str, Any]]:
    return [describe_source(path) for path in task.files]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a record."""
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text) if text.strip() else None
        except ValueError:
            logger.debug("%s: half a line, left out", path)
            continue
        if isinstance(line, dict):
            yield line


# -- failures ------------------------------------------------------------------------------------------------------


def complaint(error: Exception) -> str:
    """What went wrong with one image, in a line."""
    if isinstance(error, NnsslAdaptError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is too small for a single tile: close other programs on it, or use -device cpu"
    if isinstance(error, MemoryError):
        return "not enough memory"
    return f"{type(error).__name__}: {error}"


def failure_report(failures: Mapping[str, Exception], total: int, output: str | Path | None) -> str:
    """Which of ``total`` images failed (identifier → error), why, and where the others are, if written to ``output``."""
    lines = [f"  {name}: {complaint(error)}" for name, error in failures.items()]
    if len(lines) > _LISTED:
        lines = [*lines[:_LISTED], f"  ... and {len(lines) - _LISTED} more"]
    kept = f"; the others are in {output}" if output is not None and len(failures) < total else ""
    return "\n".join([f"{len(failures)} of {total} images could not be predicted{kept}:", *lines])
