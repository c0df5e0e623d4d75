"""Validation of a fold after training: whole cases through the sliding window, judged against the reference labels."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nnssl_adapt.data.images import ImageGeometry, write_labels
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import TrainingError
from nnssl_adapt.evaluation.metrics import Summary, evaluate_folder
from nnssl_adapt.files import make_folder, write_json
from nnssl_adapt.inference.export import logits_to_probabilities, logits_to_segmentation, write_probabilities
from nnssl_adapt.inference.sliding_window import Progress, sliding_window_logits
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training.checkpointing import StopRequest

logger = logging.getLogger(__name__)


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
        device: where the network runs.
        save_probabilities: also write nnU-Net's ``.npz`` and ``.pkl``.
    """

    plan: FinetunePlan
    labels: LabelScheme
    file_ending: str
    store: CaseStore
    cases: Sequence[str]
    references: Path
    folder: Path
    device: torch.device
    save_probabilities: bool = False

    @property
    def output(self) -> Path:
        return self.folder / "validation"

    def run(self, network: nn.Module, mirror_axes: Sequence[int], weights_id: str | None, stop: StopRequest) -> Summary:
        """Predict every case that is not done, write ``summary.json``, and return it.

        Cases are done when an earlier call with the same ``weights_id`` (a digest; None: never the same) wrote them.
        Changes nothing in ``network`` but its device. Raises TrainingError when ``stop`` was asked for.
        """
        make_folder(self.output)
        done = self._done(weights_id)
        for number, case in enumerate(self.cases, start=1):
            if case in done:
                continue

            def leave_if_asked(tile: int, tiles: int, finished: int = len(done)) -> None:
                if stop:
                    raise TrainingError(
                        f"stopped by {stop.signal_name} in validation, {finished} of {len(self.cases)} cases done; "
                        "the same command with --val goes on"
                    )

            logger.info("validating %s (%d/%d)", case, number, len(self.cases))
            self._predict(network, case, mirror_axes, leave_if_asked)
            done.append(case)
            if weights_id is not None:
                write_json(self._record, {"weights": weights_id, "cases": done})
        return evaluate_folder(
            self.output,
            self.references,
            self.labels,
            self.file_ending,
            cases=list(self.cases),
            output=self.output / "summary.json",
        )

    def _predict(self, network: nn.Module, identifier: str, mirror_axes: Sequence[int], after_tile: Progress) -> None:
        case = self.store.open(identifier)
        logits = sliding_window_logits(
            network,
            torch.from_numpy(case.data[:]),
            self.plan.patch_size,
            self.labels.num_heads,
            mirror_axes=mirror_axes,
            device=self.device,
            progress=after_tile,
        )
        if self.save_probabilities:
            labels, probabilities = logits_to_probabilities(logits, case.properties, self.plan, self.labels)
            write_probabilities(self.output / identifier, probabilities, case.properties)
        else:
            labels = logits_to_segmentation(logits, case.properties, self.plan, self.labels)
        geometry = ImageGeometry.from_properties(case.properties, labels.shape)
        write_labels(self.output / f"{identifier}{self.file_ending}", labels, geometry)

    @property
    def _record(self) -> Path:
        return self.folder / "validation_done.json"

    def _done(self, weights_id: str | None) -> list[str]:
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            recorded = set(record["cases"]) if weights_id is not None and record["weights"] == weights_id else set()
        except (OSError, ValueError, KeyError, TypeError):
            recorded = set()
        endings = (self.file_ending, ".npz") if self.save_probabilities else (self.file_ending,)
        return [c for c in self.cases if c in recorded and all((self.output / f"{c}{e}").is_file() for e in endings)]
