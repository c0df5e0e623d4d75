"""Validation of a fold after training: whole cases through the sliding window, compared with the reference labels."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_adapt.data.images import ImageGeometry, write_labels
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.previous_stage import PreviousStage, one_hot
from nnssl_adapt.data.store import CaseStore, StoredCase
from nnssl_adapt.errors import TrainingStopped
from nnssl_adapt.evaluation.metrics import Summary, evaluate_folder
from nnssl_adapt.files import make_folder, write_json
from nnssl_adapt.inference.export import (
    can_decide_on_device,
    decided_on_device,
    labels_for_next_stage,
    logits_to_probabilities,
    logits_to_segmentation,
    write_probabilities,
)
from nnssl_adapt.inference.pipeline import Pipeline, Result
from nnssl_adapt.inference.sliding_window import Allocate, logits_by_tiles, with_float32_as_fallback
from nnssl_adapt.inference.steps import PreparedImage
from nnssl_adapt.inference.sums import Tiles
from nnssl_adapt.inference.task import ImageTask
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training.batches.store_check import explained_damage
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.run.stages import next_stage
from nnssl_adapt.training.run.stopping import StopRequest

logger = logging.getLogger(__name__)

_SEEN_WITHIN = 120.0
"""Seconds after which a file that another machine wrote is seen: twice what NFS remembers a directory by default."""


@dataclass(frozen=True)
class FoldValidation:
    """What is validated, and where the results go.

    Attributes:
        plan: of the trained model.
        labels: what the outputs mean.
        file_ending: of the segmentations, e.g. ``.nii.gz``.
        store: of the preprocessed cases; they are predicted from there, nothing is preprocessed again.
        cases: identifiers of the fold's validation cases.
        references: folder with the reference labels (``gt_segmentations``).
        folder: of the fold; results go to ``validation/`` in it.
        fold: that is validated.
        device: where the network runs.
        autocast_dtype: what the network computes in on CUDA, as in training; None: float32. A case whose numbers are too
            large for it is done again in float32.
        save_probabilities: also write nnU-Net's ``.npz`` and ``.pkl``.
        previous: of a cascade, the segmentations of its previous stage.
        ranks: the processes that share the cases; the main one evaluates what all have predicted.
    """

    plan: FinetunePlan
    labels: LabelScheme
    file_ending: str
    store: CaseStore
    cases: Sequence[str]
    references: Path
    folder: Path
    fold: int | str
    device: torch.device
    autocast_dtype: torch.dtype | None = torch.float16
    save_probabilities: bool = False
    previous: PreviousStage | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def output(self) -> Path:
        return self.folder / "validation"

    def run(self, network: nn.Module, mirror_axes: Sequence[int], weights_id: str | None, stop: StopRequest) -> Summary:
        """Predict every case that is not done, write ``summary.json``, and return it (on all ranks).

        Cases are done when an earlier call with the same ``weights_id`` (a digest; None: never the same) wrote them, with
        however many ranks. Changes nothing in ``network`` but its device. Raises TrainingStopped when ``stop`` was asked
        for, OtherRankFailed when another rank can't go on.
        """
        stop.begin()
        make_folder(self.output)
        self._warn_of_missing_stages()
        done = self._done(weights_id)
        if self.ranks.is_main:  # before the others hear of it and begin to write
            self._remove_others(done)
        done = self.ranks.from_main(done)
        stopped = not self._predict_share(network, mirror_axes, weights_id, done, stop)
        self.ranks.barrier()
        # Agreed only here, and not case by case: a signal and a deadline reach all ranks, which then meet within a tile.
        stopped = self.ranks.any(stopped)
        if self.ranks.is_main:
            done = self._done(weights_id) if stopped else list(self.cases)
            self._merge_records(weights_id, done)
        if stopped:
            done = self.ranks.from_main(done)
            raise TrainingStopped(
                f"stopped by {stop.reason or 'another process'} in validation, {len(done)} of {len(self.cases)} cases done; "
                "the same command with --val goes on"
            )
        return self.ranks.from_main(self._judge() if self.ranks.is_main else None)  # type: ignore[return-value]

    def _predict_share(
        self,
        network: nn.Module,
        mirror_axes: Sequence[int],
        weights_id: str | None,
        done: Sequence[str],
        stop: StopRequest,
    ) -> bool:
        """Predict this rank's part of the cases that are not done; False when stopped in the middle of it."""
        remaining = [case for case in self.cases if case not in done]
        costs = {case: math.prod(self.store.open(case).data.shape[1:]) for case in remaining}
        mine = self.ranks.share_of(remaining, [costs[case] for case in remaining])
        known = list(done) if self.ranks.is_main else []
        numbers = {case: number for number, case in enumerate(mine, start=1)}
        keep = (
            not self.save_probabilities
            and not self.plan.next_stages  # which need the logits
            and self.device.type == "cuda"
            and can_decide_on_device(self.plan, self.labels)
        )

        def predict(task: ImageTask, image: np.ndarray, allocate: Allocate) -> Tiles:
            logger.info("validating %s (%d/%d)", task.identifier, numbers[task.identifier], len(mine))
            return self._tiles(network, torch.from_numpy(image), mirror_axes, keep)

        def decide(logits: Tensor, prepared: PreparedImage) -> Tensor:
            on_device = keep and logits.device.type == "cuda"
            return decided_on_device(logits, prepared.properties, self.plan) if on_device else logits

        def settle(result: Result) -> None:
            if result.error is not None:
                raise result.error
            known.append(result.task.identifier)
            if weights_id is not None:
                write_json(self._record(self.ranks.rank), {"weights": weights_id, "cases": known})

        def leave_if_asked(tiles: int) -> None:
            if stop:
                raise TrainingStopped("in validation")

        memory = {case: voxels * self._bytes_a_voxel for case, voxels in costs.items()}
        steps = _StoredCases(self, weights_id)
        tasks = [ImageTask(case, (), self.output / f"{case}{self.file_ending}") for case in mine]
        try:
            # One case is exported and the next is read while the network works on another.
            for _ in Pipeline(steps, predict, 0, memory, settle, leave_if_asked, decide).run(tasks):
                pass
        except TrainingStopped:
            return False
        return True

    @property
    def _bytes_a_voxel(self) -> int:
        """Of a case on the network's grid: the image, the logits twice, float32."""
        return 4 * (self.plan.num_channels + len(self.plan.stage_channels(self.labels)) + 2 * self.labels.num_heads)

    def _judge(self) -> Summary:
        if self.ranks.size > self.ranks.local_size:
            self._wait_for_predictions()
        return evaluate_folder(
            self.output,
            self.references,
            self.labels,
            self.file_ending,
            cases=list(self.cases),
            output=self.output / "summary.json",
        )

    def _wait_for_predictions(self) -> None:
        """Until files that other machines wrote are seen here: network file systems remember for a while what was not there."""
        until = time.monotonic() + _SEEN_WITHIN
        wanted = {f"{case}{self.file_ending}" for case in self.cases}
        while wanted - {path.name for path in self.output.iterdir()} and time.monotonic() < until:
            time.sleep(1)

    def _tiles(self, network: nn.Module, image: Tensor, mirror_axes: Sequence[int], keep: bool) -> Tiles:
        def run(precision: torch.dtype | None) -> Tiles:
            return logits_by_tiles(
                network,
                image,
                self.plan.patch_size,
                self.labels.num_heads,
                mirror_axes=mirror_axes,
                device=self.device,
                autocast_dtype=precision,
                keep=keep,
            )

        return with_float32_as_fallback(run, self.autocast_dtype, self.device)

    def _warn_of_missing_stages(self) -> None:
        for name in self.plan.next_stages:
            if name in self.plan.content["configurations"]:
                store = CaseStore(self.plan.seen_through(name).store_folder)
                if self.ranks.is_main and any(not store.is_complete(case) for case in self.cases):
                    logger.warning(
                        "%s has not all cases: nothing is left for %s. Preprocess with -c %s and validate again (--val) if it "
                        "is to be trained",
                        store.folder,
                        name,
                        name,
                    )

    def next_stages(self, identifier: str) -> Iterator[tuple[PreviousStage, StoredCase]]:
        """Where to leave a case for the networks that go on from this one, and how they see it. Those that can't are left out."""
        for name in self.plan.next_stages:
            if name not in self.plan.content["configurations"]:
                continue
            store = CaseStore(self.plan.seen_through(name).store_folder)
            if store.is_complete(identifier):
                yield next_stage(self.folder.parent, name), store.open(identifier)

    def _remove_others(self, done: Sequence[str]) -> None:
        """Remove what earlier calls wrote of other cases or with other weights: it must not be taken for this model's."""
        endings = (self.file_ending, ".npz", ".pkl")
        for path in self.output.iterdir():
            ending = next((ending for ending in endings if path.name.endswith(ending)), None)
            if ending is not None and path.name.removesuffix(ending) not in done:
                path.unlink(missing_ok=True)
        if len(done) < len(self.cases):
            (self.output / "summary.json").unlink(missing_ok=True)

    # -- what is done ------------------------------------------------------------------------------------------------

    def _record(self, rank: int) -> Path:
        """Where a rank notes what it has done: a file of its own, so that two never write the same one."""
        return self.folder / "validation_done.json" if rank == 0 else self.output / f".done_{rank}.json"

    def _done(self, weights_id: str | None) -> list[str]:
        records = [self._record(0), *self.output.glob(".done_*.json")]
        recorded = {case for path in records for case in _read_record(path, weights_id)}
        endings = (self.file_ending, ".npz") if self.save_probabilities else (self.file_ending,)
        return [
            case
            for case in self.cases
            if case in recorded
            and all((self.output / f"{case}{ending}").is_file() for ending in endings)
            and all(stage.is_by(case, weights_id) for stage, _ in self.next_stages(case))
        ]

    def _merge_records(self, weights_id: str | None, cases: Sequence[str]) -> None:
        """Note what is done in one record instead of one for each rank."""
        if weights_id is not None:
            write_json(self._record(0), {"weights": weights_id, "cases": list(cases)})
        for path in self.output.glob(".done_*.json"):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _StoredCases:
    """What is done before and after the network with cases that are preprocessed already."""

    of: FoldValidation
    weights_id: str | None

    def prepare(self, task: ImageTask) -> PreparedImage:
        case = self.of.store.open(task.identifier)
        with explained_damage(case):
            image = case.data[:]
            if self.of.previous is not None:
                labels = self.of.previous.open(task.identifier, image.shape[1:])[:]
                image = np.concatenate([image, one_hot(labels, self.of.plan.stage_channels(self.of.labels))])
        shape = np.asarray(case.properties["shape_before_cropping"])[list(self.of.plan.transpose_backward)]
        return PreparedImage(
            image, case.properties, ImageGeometry.from_properties(case.properties, tuple(shape.tolist()))
        )

    def export(self, task: ImageTask, logits: Tensor | np.ndarray, prepared: PreparedImage) -> np.ndarray:
        plan, labels = self.of.plan, self.of.labels
        assert task.target is not None
        if self.of.save_probabilities:
            segmentation, probabilities = logits_to_probabilities(logits, prepared.properties, plan, labels)
            write_probabilities(task.beside_target(), probabilities, prepared.properties)
        else:
            segmentation = logits_to_segmentation(logits, prepared.properties, plan, labels)
        for stage, case in self.of.next_stages(task.identifier):
            seen = labels_for_next_stage(logits, case.data.shape[1:], plan, labels)
            stage.write(task.identifier, seen, plan.patch_size, self.of.fold, self.weights_id)
        write_labels(task.target, segmentation, prepared.geometry)
        return segmentation


def _read_record(path: Path, weights_id: str | None) -> set[str]:
    """The cases that a record says were predicted with these weights."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return set(record["cases"]) if weights_id is not None and record["weights"] == weights_id else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()
