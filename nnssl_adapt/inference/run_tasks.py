"""Many images through one model: what they will take is foreseen, what is done is recorded, what goes wrong is told."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from nnssl_adapt.inference.fold_networks import FoldNetworks
from nnssl_adapt.inference.inputs import tell_doubts, tell_orientation
from nnssl_adapt.inference.pipeline import Pipeline, Result
from nnssl_adapt.inference.record import PredictionRecord, complaint, remove_unfinished
from nnssl_adapt.inference.sliding_window import Allocate
from nnssl_adapt.inference.steps import PreparedImage, Steps
from nnssl_adapt.inference.sums import Tiles
from nnssl_adapt.inference.task import ImageTask, count_tiles, foresee
from nnssl_adapt.inference.tile_bar import TileBar

logger = logging.getLogger(__name__)


def run_tasks(
    networks: FoldNetworks,
    steps: Steps,
    tasks: Sequence[ImageTask],
    record: PredictionRecord | None,
    bar: TileBar,
    workers: int,
) -> tuple[dict[str, np.ndarray], dict[str, Exception]]:
    """Predict; return label maps of tasks without a target, and what went wrong, both by identifier.

    Args:
        networks: that predict.
        steps: before and after the network.
        tasks: the images.
        record: to which each image is added when it is done.
        bar: that shows how far it is.
        workers: processes that read and export; 0: threads of this process.

    Raises what :meth:`Pipeline.run` does.
    """
    results: dict[str, np.ndarray] = {}
    failures: dict[str, Exception] = {}
    bytes_per_logit = networks.accumulation_dtype.itemsize
    foreseen = {
        task.identifier: foresee(
            task,
            networks.plan,
            networks.labels,
            networks.step,
            bytes_per_logit,
            with_probabilities=steps.save_probabilities,
            with_postprocessing=bool(steps.postprocessing.steps),
        )
        for task in tasks
    }
    tell_orientation(networks.model, tasks, [foresight.lies for foresight in foreseen.values()])
    tell_doubts([doubt for foresight in foreseen.values() for doubt in foresight.doubts])
    bar.expect({name: foresight.tiles * len(networks) for name, foresight in foreseen.items()})

    keep = networks.decides_on_device and not steps.save_probabilities
    decide = networks.decided if keep else _left

    def predict(task: ImageTask, image: np.ndarray, allocate: Allocate) -> Tiles:
        bar.start(
            task.identifier, count_tiles(image.shape[1:], networks.plan.patch_size, networks.step) * len(networks)
        )
        return networks.logits_by_tiles(image, allocate, keep)

    def settle(result: Result) -> None:
        name = result.task.identifier
        if result.error is not None:
            failures[name] = result.error
            logger.error("%s: %s", name, complaint(result.error))
            logger.debug("%s failed", name, exc_info=result.error)
        elif result.labels is not None and result.task.target is None:
            results[name] = result.labels
        elif record is not None:
            record.add(result.task, steps.save_probabilities)
        bar.finish(name)

    for task in tasks:
        remove_unfinished(task, steps.save_probabilities)
    memory = {name: foresight.memory for name, foresight in foreseen.items()}
    for _ in Pipeline(steps, predict, workers, memory, settle, bar.advance, decide).run(tasks):
        pass
    return {task.identifier: results[task.identifier] for task in tasks if task.identifier in results}, failures


def _left(logits: Tensor, prepared: PreparedImage) -> Tensor:
    return logits
