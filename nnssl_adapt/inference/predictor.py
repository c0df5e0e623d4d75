"""From a trained model and images to segmentations in the images' own geometry."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnssl_adapt.data.images import ImageGeometry, write_labels
from nnssl_adapt.data.preprocess import preprocess_arrays
from nnssl_adapt.data.store import PreprocessedCase
from nnssl_adapt.errors import ConfigurationError, NnsslAdaptError, OutputError, PredictionError
from nnssl_adapt.files import atomic_path, make_folder
from nnssl_adapt.inference.device import check_device
from nnssl_adapt.inference.export import logits_to_probabilities, logits_to_segmentation, write_probabilities
from nnssl_adapt.inference.model_folder import Fold, FoldWeights, ModelFolder, Which
from nnssl_adapt.inference.sliding_window import Progress, sliding_window_logits
from nnssl_adapt.inference.tasks import Images, ImageTask, checked_array, image_tasks

logger = logging.getLogger(__name__)

_LISTED_FAILURES = 20


class Predictor:
    """A trained model, ready to segment images.

    Args:
        model_folder: what training wrote, ours or nnU-Net's (2.x), or its path.
        folds: networks whose logits are averaged, e.g. ``(0, 1)`` or ``"all"``; None: all that have the checkpoint.
        checkpoint: ``"final"``, or ``"best"`` by pseudo-Dice.
        device: ``cuda``, ``cuda:1``, ``mps`` or ``cpu``.
        step: largest distance between tiles, as a fraction of the patch.
        tta: average over mirrored images too, where training mirrored: more accurate, up to 8 times slower.
        accumulation_dtype: of the sums over tiles. float16 gives nnU-Net's labels to the voxel, with its rounding: there
            logits are off by a thousandth, and by up to 0.5 in the corners of the image.

    Raises:
        DeviceUnavailable: this machine has no such device.
        ModelFolderError, PlanError, CheckpointError: the folder can't be used, see :meth:`ModelFolder.open`.
        ConfigurationError: the step or the folds make no sense.
    """

    def __init__(
        self,
        model_folder: ModelFolder | str | Path,
        folds: int | str | Sequence[int | str] | None = None,
        checkpoint: Which = "final",
        device: str | torch.device = "cuda",
        step: float = 0.5,
        tta: bool = True,
        accumulation_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = check_device(device)
        if not 0 < step <= 1:
            raise ConfigurationError(f"the tile step is a fraction of the patch, 0 < step <= 1, got {step}")
        path = model_folder.path if isinstance(model_folder, ModelFolder) else model_folder
        self.model = ModelFolder.open(path)
        self.folds = _choose_folds(self.model, folds, checkpoint)
        self.step = step
        self.accumulation_dtype = accumulation_dtype
        self._network = self.model.build_network()
        self._weights = [self._load(fold, checkpoint) for fold in self.folds]
        self._loaded = len(self._weights) - 1
        self.mirror_axes = self._weights[0].mirror_axes if tta else ()
        self.plan = replace(self.model.plan, configuration=self._weights[0].configuration)

    def _load(self, fold: Fold, checkpoint: Which) -> FoldWeights:
        weights = self.model.load_weights(fold, checkpoint)
        self.model.load_into(self._network, weights, self.model.checkpoint_path(fold, checkpoint))
        return weights

    # -- arrays --------------------------------------------------------------------------------------------------

    def predict_logits(self, image: np.ndarray | Tensor, progress: Progress | None = None) -> Tensor:
        """Logits (K, Z, Y, X) on the CPU for a preprocessed image (C, Z, Y, X); mean over the folds."""
        tensor = torch.as_tensor(image)
        total: Tensor | None = None
        for index, weights in enumerate(self._weights):
            if index != self._loaded:
                self._network.load_state_dict(weights.network_weights)
                self._loaded = index
            logits = sliding_window_logits(
                self._network,
                tensor,
                self.plan.patch_size,
                self.model.labels.num_heads,
                step=self.step,
                mirror_axes=self.mirror_axes,
                device=self.device,
                accumulation_dtype=self.accumulation_dtype,
                progress=_part_of(progress, index, len(self._weights)),
            )
            total = logits if total is None else total.add_(logits)
        assert total is not None
        return total.div_(len(self._weights))

    def predict_array(
        self,
        image: np.ndarray,
        geometry: ImageGeometry | None = None,
        spacing: Sequence[float] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Segment one image in memory.

        Args:
            image: (C, Z, Y, X), or (Z, Y, X) for a model of one channel; raw intensities, any number type; unchanged.
            geometry: where its voxels lie, or
            spacing: (Z, Y, X) in millimetres, which is all that matters here.
            progress: called after each tile.

        Returns:
            Labels (Z, Y, X), uint8 (uint16 where there are 255 labels or more).

        Raises:
            ConfigurationError: neither geometry nor spacing was given.
            CaseError: the image has another number of axes or channels, or NaN voxels.
        """
        array, geometry = checked_array(self.model, image, geometry, spacing)
        case = self._preprocess(array, geometry)
        return logits_to_segmentation(
            self.predict_logits(case.data, progress), case.properties, self.plan, self.model.labels
        )

    # -- files -----------------------------------------------------------------------------------------------------

    def predict(
        self,
        images: Images,
        output: str | Path | None = None,
        *,
        geometry: ImageGeometry | None = None,
        spacing: Sequence[float] | None = None,
        overwrite: bool = True,
        save_probabilities: bool = False,
        progress: bool = False,
    ) -> np.ndarray | dict[str, np.ndarray] | list[Path]:
        """Segment one image or a folder of images.

        Args:
            images: a folder (``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``, … for each case), one file, the list of one
                image's channel files, or an array (see :meth:`predict_array`).
            output: a folder, where each segmentation is called as its case; for one image also a file. None: the
                segmentation is returned and not written.
            geometry: of an array.
            spacing: (Z, Y, X) in mm of an array that has no geometry.
            overwrite: predict again what is already there; otherwise that is skipped.
            save_probabilities: also write ``.npz`` and ``.pkl``, as nnU-Net does, for ensembles.
            progress: whether to draw a progress bar on stderr.

        Returns:
            The files, if there is an output; else labels (Z, Y, X), and for a folder a dict of them by case.

        Raises:
            CaseError: the image can't be read, or doesn't have the model's channels; files are missing in the folder.
            PredictionError: some images of a folder failed (each is named; the others are done), or the network's
                output is not finite.
            OutputError: the output can't be written.
            ConfigurationError: input and output don't go together.
        """
        if output is None and save_probabilities:
            raise ConfigurationError("probabilities are written to files: give an output folder")
        is_folder = isinstance(images, (str, Path)) and Path(images).is_dir()
        tasks = image_tasks(self.model, images, None if output is None else Path(output), geometry, spacing)
        if is_folder and output is not None:
            self._describe_output(Path(output))
        waiting = [task for task in tasks if overwrite or not task.is_done(save_probabilities)]
        if len(waiting) < len(tasks):
            logger.info("%d of %d images are already predicted", len(tasks) - len(waiting), len(tasks))
        results, failures = self._run(waiting, save_probabilities, progress)
        if failures and not is_folder:
            raise next(iter(failures.values()))
        if failures:
            raise PredictionError(_report(failures, len(tasks), output))
        if output is not None:
            return [task.target for task in tasks if task.target is not None]
        return results if is_folder else next(iter(results.values()))

    # -- one image after the other -----------------------------------------------------------------------------------

    def _run(
        self, tasks: Sequence[ImageTask], save_probabilities: bool, progress: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, Exception]]:
        """Predict; return label maps of tasks without a target, and what went wrong, both by identifier."""
        results: dict[str, np.ndarray] = {}
        failures: dict[str, Exception] = {}
        with tqdm(total=len(tasks), desc="Predicting", unit="image", disable=not progress) as bar:
            for task, prepared in self._prepared(tasks):
                bar.set_postfix_str(task.identifier)
                tiles = (
                    _show_tiles(bar, task.identifier) if progress and sys.stderr.isatty() else None
                )  # not into log files
                try:
                    labels = self._finish(task, *prepared.result(), save_probabilities, tiles)
                except OutputError:
                    raise  # the next image could not be written either
                except Exception as error:
                    failures[task.identifier] = error
                    logger.error("%s: %s", task.identifier, _complaint(error))
                    logger.debug("%s failed", task.identifier, exc_info=error)
                else:
                    if task.target is None:
                        results[task.identifier] = labels
                bar.update()
        return results, failures

    def _prepared(
        self, tasks: Sequence[ImageTask]
    ) -> Iterator[tuple[ImageTask, Future[tuple[PreprocessedCase, ImageGeometry]]]]:
        """Tasks with their preprocessed images; while one is being predicted the next is prepared, and no more."""
        with _one_thread() as thread:
            coming: Future[tuple[PreprocessedCase, ImageGeometry]] | None = None
            for index, task in enumerate(tasks):
                now = coming if coming is not None else thread.submit(self._prepare, task)
                now.exception()  # wait, so that two images are never in memory before the network has started on one
                coming = thread.submit(self._prepare, tasks[index + 1]) if index + 1 < len(tasks) else None
                yield task, now

    def _prepare(self, task: ImageTask) -> tuple[PreprocessedCase, ImageGeometry]:
        image, geometry = task.read()
        return self._preprocess(image, geometry), geometry

    def _finish(
        self,
        task: ImageTask,
        case: PreprocessedCase,
        geometry: ImageGeometry,
        save_probabilities: bool,
        progress: Progress | None,
    ) -> np.ndarray:
        logits = self.predict_logits(case.data, progress)
        if task.target is None:
            return logits_to_segmentation(logits, case.properties, self.plan, self.model.labels)
        if save_probabilities:
            labels, probabilities = logits_to_probabilities(logits, case.properties, self.plan, self.model.labels)
            write_probabilities(task.beside_target(), probabilities, case.properties)
        else:
            labels = logits_to_segmentation(logits, case.properties, self.plan, self.model.labels)
        write_labels(task.target, labels, geometry)  # last: it is the sign that the image is done
        return labels

    def _preprocess(self, image: np.ndarray, geometry: ImageGeometry) -> PreprocessedCase:
        return preprocess_arrays(image, None, geometry, self.plan.settings, self.model.labels)

    def _describe_output(self, folder: Path) -> None:
        """Copy dataset.json and plans.json to the segmentations, where nnU-Net's tools look for them."""
        make_folder(folder)
        for name in ("dataset.json", "plans.json"):
            if not (folder / name).exists():  # it may be somebody's dataset that segmentations are added to
                with atomic_path(folder / name) as temporary:
                    shutil.copyfile(self.model.path / name, temporary)


@contextmanager
def _one_thread() -> Iterator[ThreadPoolExecutor]:
    thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
    try:
        yield thread
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


def _choose_folds(
    model: ModelFolder, asked: int | str | Sequence[int | str] | None, checkpoint: Which
) -> tuple[Fold, ...]:
    """The folds asked for, all of which must have the checkpoint; by default all that have it."""
    if asked is None:
        folds = model.folds_with(checkpoint)
        if not folds:
            model.checkpoint_path(model.folds[0], checkpoint)  # says which there are
        return folds
    names = [asked] if isinstance(asked, (int, str)) else list(asked)
    chosen: list[Fold] = []
    for name in names:
        if str(name) != "all" and not str(name).isdigit():
            raise ConfigurationError(f"fold {name!r}: expected a number (0 to 4) or all")
        fold: Fold = "all" if str(name) == "all" else int(name)
        model.checkpoint_path(fold, checkpoint)
        chosen.append(fold)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigurationError(f"folds must be given once each, got {', '.join(str(n) for n in names) or 'none'}")
    return tuple(chosen)


def _part_of(progress: Progress | None, index: int, parts: int) -> Progress | None:
    if progress is None or parts == 1:
        return progress
    whole: Progress = progress
    return lambda done, total: whole(index * total + done, parts * total)


def _show_tiles(bar: Any, identifier: str) -> Progress:
    return lambda done, total: bar.set_postfix_str(f"{identifier}, tile {done} of {total}")


def _complaint(error: Exception) -> str:
    if isinstance(error, NnsslAdaptError):
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory"
    return f"{type(error).__name__}: {error}"


def _report(failures: dict[str, Exception], total: int, output: str | Path | None) -> str:
    lines = [f"  {name}: {_complaint(error)}" for name, error in failures.items()]
    if len(lines) > _LISTED_FAILURES:
        lines = [*lines[:_LISTED_FAILURES], f"  ... and {len(lines) - _LISTED_FAILURES} more"]
    kept = f"; the others are in {output}" if output is not None and len(failures) < total else ""
    return "\n".join([f"{len(failures)} of {total} images could not be predicted{kept}:", *lines])
