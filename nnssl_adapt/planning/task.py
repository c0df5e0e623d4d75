"""What a planner is given: a dataset, weights, and how to plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.reorient import reorient_dataset
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.planning.dataset_files import load_or_make_fingerprint
from nnssl_adapt.planning.plans_file import refuse_to_replace_unknown
from nnssl_adapt.planning.preflight import check_orientation, find_other_orientations
from nnssl_adapt.planning.request import PlanRequest
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.architectures import Architecture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanningTask:
    """A dataset and the weights to train on it.

    Attributes:
        raw: the dataset.
        given: the weights; None for a network that is trained from scratch.
        request: how to plan.
        workers: processes that read images.
        progress: whether to draw progress bars.
        known_fingerprint: of the dataset, where it is known.
    """

    raw: RawDataset
    given: Checkpoint | None
    request: PlanRequest
    workers: int = 2
    progress: bool = False
    known_fingerprint: DatasetFingerprint | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights, for planners that need some."""
        assert self.given is not None
        return self.given

    @property
    def network(self) -> Architecture:
        """The network of the weights."""
        return self.checkpoint.architecture

    @property
    def wanted_patch(self) -> tuple[int, int, int]:
        """The patch (Z, Y, X) in voxels that the weights are best trained with: the recommended one, else their own."""
        plan = self.checkpoint.plan
        return plan.recommended_patch_size or plan.patch_size

    @cached_property
    def fingerprint(self) -> DatasetFingerprint:
        """Of the dataset: as given or as it lies in the preprocessed folder, else made and saved."""
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        return load_or_make_fingerprint(self.raw, workers=self.workers, progress=self.progress)

    def oriented(self) -> PlanningTask:
        """With the dataset in the orientation requested, which is the one that the weights want unless that is ignored.

        Raises DatasetError where images lie in another way, PlanError where somebody else has a plan of the requested name.
        """
        raw, request = self.raw, self.request
        code = request.reorient
        if code is not None:
            if find_other_orientations(raw, code):
                raw = reorient_dataset(raw, code, workers=self.workers, progress=self.progress)
            else:
                logger.info("all images of %s are %s already: no copies are needed", raw.name, code.upper())
        wanted = None if self.given is None else self.given.plan.orientation
        if wanted is not None and not request.ignore_orientation:
            check_orientation(raw, wanted)
        if request.plans_name is not None:
            refuse_to_replace_unknown(preprocessed_folder() / raw.name / f"{request.plans_name}.json")
        return replace(self, raw=raw)
