"""From a trained model and images to segmentations in the images' own geometry."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from nnssl_adapt.data.images import ImageGeometry
from nnssl_adapt.data.preprocess_cases import WHOLE, Shard
from nnssl_adapt.errors import ConfigurationError, PredictionError
from nnssl_adapt.files import sha256_of
from nnssl_adapt.inference.first_stage import first_predictor, with_first_stage
from nnssl_adapt.inference.fold_networks import FoldNetworks
from nnssl_adapt.inference.inputs import (
    Images,
    expected_channels,
    gather_inputs,
    is_image_file,
    is_in_memory,
    to_simpleitk,
)
from nnssl_adapt.inference.model_folder import ModelFolder, Which
from nnssl_adapt.inference.postprocess import Postprocessing, opened_postprocessing
from nnssl_adapt.inference.precision import OF_NNUNET, Precision, predicting_precision
from nnssl_adapt.inference.published import find_published
from nnssl_adapt.inference.record import PredictionRecord, failure_report, unfinished
from nnssl_adapt.inference.run_tasks import run_tasks
from nnssl_adapt.inference.sliding_window import Allocate, Progress, finish
from nnssl_adapt.inference.steps import Steps
from nnssl_adapt.inference.sums import Tiles
from nnssl_adapt.inference.task import ImageTask
from nnssl_adapt.inference.tile_bar import TileBar
from nnssl_adapt.machine.device import check_device

logger = logging.getLogger(__name__)


class Predictor:
    """A trained model, ready to segment images.

    Args:
        model_folder: what training wrote, ours or nnU-Net's (2.x), or its path; or a model on the Hugging Face hub,
            ``OWNER/NAME[@REVISION]`` (see :meth:`from_pretrained`).
        folds: networks whose logits are averaged, e.g. ``(0, 1)`` or ``"all"``; None: all that have the checkpoint.
        checkpoint: ``"final"``, or ``"best"`` by pseudo-Dice.
        device: ``cuda``, ``cuda:1``, ``mps`` or ``cpu``.
        step: largest distance between tiles, as a fraction of the patch.
        tta: average over mirrored images too, where training mirrored: more accurate, up to 8 times slower.
        accumulation_dtype: of the sums over tiles. float16 comes close to nnU-Net's labels (of 19 images 2 differed, in one voxel
            each), with its rounding: there logits are off by a thousandth, and by up to 0.5 in the corners of the image.
        precision: of the network on CUDA: ``fp16`` as nnU-Net, ``bf16``, or ``fp32``; None: as it was trained. An image whose
            numbers are too large for it is done again in float32. Other devices always compute in float32.
        batch_size: tiles, mirrored copies included, that go through the network together; None: as fits the device.
        postprocessing: done to every segmentation, or the file that says what (``postprocessing.json``, or nnU-Net's
            ``.pkl``); None: nothing.
        keep_orientation: take images as they lie, as nnU-Net does. Otherwise they are turned to how the training images lay
            (:attr:`ModelFolder.image_orientation`), exactly, and their segmentations back.

    Raises:
        DeviceUnavailable: this machine has no such device.
        ModelFolderError, PlanError, CheckpointError: the folder can't be used, see :meth:`ModelFolder.open`.
        SourceError: a model on the hub that can't be fetched, see :meth:`from_pretrained`.
        ConfigurationError: the step, the folds or the precision make no sense; the postprocessing is of other labels.
        CaseError, UnsafeCheckpoint: the postprocessing can't be read.
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
        precision: Precision | None = None,
        batch_size: int | None = None,
        postprocessing: Postprocessing | str | Path | None = None,
        keep_orientation: bool = False,
    ) -> None:
        self.device = check_device(device)
        predicting_precision(precision, OF_NNUNET, self.device)  # refuses an unknown one before anything is read
        if batch_size is not None and batch_size < 1:
            raise ConfigurationError(f"a batch of {batch_size} tiles: at least one is needed")
        if not 0 < step <= 1:
            raise ConfigurationError(f"the tile step is a fraction of the patch, 0 < step <= 1, got {step}")
        given = model_folder.path if isinstance(model_folder, ModelFolder) else model_folder
        self.model = ModelFolder.open(find_published(given, folds, checkpoint))
        self.folds = self.model.choose_folds(folds, checkpoint)
        self.step, self.tta = step, tta
        self.checkpoint = checkpoint
        self.accumulation_dtype = accumulation_dtype
        self.batch_size = batch_size
        self.keep_orientation = keep_orientation
        self.postprocessing = opened_postprocessing(postprocessing, self.model.labels)
        self.networks = FoldNetworks(
            self.model,
            self.folds,
            checkpoint,
            self.device,
            step=step,
            tta=tta,
            accumulation_dtype=accumulation_dtype,
            precision=precision,
            batch_size=batch_size,
        )
        self.plan, self.precision = self.networks.plan, self.networks.precision
        self.mirror_axes = self.networks.mirror_axes

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Predictor:
        """A predictor with a trained model of the Hugging Face hub, downloaded the first time.

        Args:
            source: ``OWNER/NAME[@REVISION]``, or a model folder.
            revision: branch, tag or commit.
            cache_dir: where downloads are kept, if not in the hub's cache.
            local_files_only: never use the network (as does ``HF_HUB_OFFLINE=1``).
            options: of :class:`Predictor`.

        Raises, beside what :class:`Predictor` does:
            ModelFolderError: the repository holds pre-trained weights and no trained model.
            SourceError: there is no such repository, it holds no model or several, or it can't be fetched.
        """
        folds, checkpoint = options.get("folds"), options.get("checkpoint", "final")
        path = find_published(source, folds, checkpoint, revision, cache_dir, local_files_only)
        return cls(path, **options)

    # -- arrays --------------------------------------------------------------------------------------------------

    def predict_logits(
        self, image: np.ndarray | Tensor, progress: Progress | None = None, allocate: Allocate | None = None
    ) -> Tensor:
        """Logits (K, Z, Y, X) on the CPU for a preprocessed image (C, Z, Y, X); mean over the folds.

        ``progress`` is called after each tile; ``allocate`` makes the tensor that is returned.
        """
        return finish(self.logits_by_tiles(image, allocate), progress)

    def logits_by_tiles(
        self, image: np.ndarray | Tensor, allocate: Allocate | None = None, keep: bool = False
    ) -> Tiles:
        """As :meth:`predict_logits`, but stops after each tile of each fold and tells how far it is.

        ``keep``: leave the logits on the device, if they have room there.
        """
        return self.networks.logits_by_tiles(image, allocate, keep)

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
            spacing: (Z, Y, X) in millimetres. The image then counts as lying like the training images.
            progress: called after each tile.

        Returns:
            Labels (Z, Y, X), uint8 (uint16 where there are 255 labels or more).

        Raises:
            ConfigurationError: neither geometry nor spacing was given.
            CaseError: the image has another number of axes or channels, or NaN voxels.
        """
        given = gather_inputs(self.model, image, None, geometry, spacing, keep_orientation=self.keep_orientation)
        (task,), failed = with_first_stage(self, given.tasks)
        if failed:
            raise failed[task.identifier]
        steps = self._steps(False)
        prepared = steps.prepare(task)
        tiles = self.logits_by_tiles(prepared.data, None, self.networks.decides_on_device)
        return steps.export(task, self.networks.decided(finish(tiles, progress), prepared), prepared)

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
        workers: int = 0,
        part: Shard = WHOLE,
        keep_folders: bool = False,
        previous: str | Path | None = None,
    ) -> np.ndarray | sitk.Image | dict[str, np.ndarray] | list[Path]:
        """Segment one image, or many.

        Reading, preprocessing, the network and export overlap; no more images are in memory than fit, by their headers.

        Args:
            images: a folder (``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``, … for each case; any format that can be read),
                files (paired by their names in the same way; see :func:`~nnssl_adapt.inference.pairing.pair_files` for
                those without a channel's number), an array (see :meth:`predict_array`), or a SimpleITK image (or the list
                of its channels).
            output: a folder, where each segmentation is called as its case; for one image also a file. None: the
                segmentation is returned and not written.
            geometry: of an array.
            spacing: (Z, Y, X) in mm of an array that has no geometry.
            overwrite: predict everything again. False: leave out what this model with these settings has finished in the
                output folder, by its ``predicted.jsonl``; whatever else lies there is predicted again.
            save_probabilities: also write ``.npz`` and ``.pkl``, as nnU-Net does, for ensembles.
            progress: whether to draw a progress bar on stderr.
            workers: processes that read and export (Linux; a script that calls this then needs the usual
                ``if __name__ == "__main__":``); 0: threads of this process. Images in memory stay in this process.
            part: do only a part of the images, for several machines.
            keep_folders: of files in different folders, write each segmentation into a folder of the same name, so that
                cases may be called alike.
            previous: for a cascade: a folder with the segmentations by its first network, called as the images. None: they
                are made by it, in a folder of the output; its model folder lies beside this one.

        Returns:
            The files, if there is an output; else labels (Z, Y, X) as an array, or as a SimpleITK image if such was given;
            for several images a dict of arrays by case.

        Raises:
            CaseError: the image can't be read, or doesn't have the model's channels; files are missing in the folder.
            PredictionError: some of several images failed (each is named; the others are done), the network's output is
                not finite, or a worker process was killed.
            OutputError: the output can't be written.
            ConfigurationError: input and output don't go together.
        """
        if output is None and save_probabilities:
            raise ConfigurationError("probabilities are written to files: give an output folder")
        target = None if output is None else Path(output)
        inputs = gather_inputs(self.model, images, target, geometry, spacing, keep_folders, self.keep_orientation)
        several, tasks = inputs.several, inputs.tasks[part.number - 1 :: part.total]
        record = None
        if target is not None and not is_image_file(target):
            record = PredictionRecord(target, self.settings)
            record.copy_model_files(self.model.path)
        waiting = tasks if overwrite else unfinished(tasks, record, save_probabilities)
        in_memory = is_in_memory(images) or output is None
        for name, problem in inputs.refused.items():
            logger.error("%s is not predicted: %s", name, problem)
        workers = 0 if in_memory else workers
        waiting, failed_first = with_first_stage(self, waiting, previous, overwrite, workers, progress)
        with TileBar(len(waiting), progress and bool(waiting)) as bar:
            results, failed = self.run_tasks(waiting, record, save_probabilities, bar, workers)
        failures: dict[str, Exception] = {**inputs.refused, **failed_first, **failed}
        if failures and not several:
            raise next(iter(failures.values()))
        if failures:
            raise PredictionError(failure_report(failures, len(tasks) + len(inputs.refused), output))
        if output is not None:
            return [task.target for task in tasks if task.target is not None]
        if several or not tasks:
            return results
        labels = next(iter(results.values()))
        if is_in_memory(images) and not isinstance(images, np.ndarray):
            assert tasks[0].loaded is not None
            return to_simpleitk(labels, tasks[0].loaded[1])
        return labels

    @cached_property
    def first_stage(self) -> Predictor:
        """Of a cascade, its first network with the same folds and settings. Raises ModelFolderError where there is none."""
        return first_predictor(self)

    def run_tasks(
        self,
        tasks: Sequence[ImageTask],
        record: PredictionRecord | None,
        save_probabilities: bool,
        bar: TileBar,
        workers: int,
    ) -> tuple[dict[str, np.ndarray], dict[str, Exception]]:
        """Predict; return label maps of tasks without a target, and what went wrong, both by identifier."""
        return run_tasks(self.networks, self._steps(save_probabilities), tasks, record, bar, workers)

    def _steps(self, save_probabilities: bool) -> Steps:
        return Steps(
            self.plan,
            self.model.labels,
            len(self.model.channel_names),
            expected_channels(self.model),
            save_probabilities,
            self.postprocessing,
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the labels depend on, for the record of what is done."""
        # An entry only where there are steps: what was predicted without them stays done.
        steps = [list(step) for step in self.postprocessing.steps]
        turned = self.model.image_orientation
        return {
            **({"postprocessing": steps} if steps else {}),
            "checkpoints": {
                str(fold): sha256_of(self.model.checkpoint_path(fold, self.checkpoint)) for fold in self.folds
            },
            "plans": sha256_of(self.model.path / "plans.json"),
            "dataset.json": sha256_of(self.model.path / "dataset.json"),
            "step": float(self.step),
            "mirror_axes": list(self.mirror_axes),
            "sums": str(self.accumulation_dtype).removeprefix("torch."),
            "precision": self.precision,
            **({} if self.keep_orientation or not turned else {"orientation": turned}),
        }
