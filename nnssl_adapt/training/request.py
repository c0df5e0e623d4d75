"""What a training is asked to do, as a record that a file can hold: several processes then do the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.files import write_json
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.text import read_json
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.deadline import Deadline
from nnssl_adapt.training.trainer import PretrainedTrainer
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class TrainingRequest:
    """One training: what is trained, on what, where, and how long.

    Attributes:
        dataset: full name (``Dataset041_DeepGrey``).
        plans: name of the plan.
        configuration: of the plan, ``3d_fullres``.
        fold: number or ``all``.
        recipe: what to vary.
        device: ``cuda``, ``cpu`` or ``mps``.
        source: the pre-trained weights; None: found from what the plan records.
        source_options: how to open them, as arguments of ``open_checkpoint``.
        workers: processes that make batches; None: what the machine allows.
        trackers: where else to send the figures.
        resume: go on from the last checkpoint; ``auto``: or start, if there is none.
        validate_only: don't train.
        checkpoint_for_validation: ``final`` or ``best``.
        save_probabilities: of the validation cases.
        disable_checkpointing: write no checkpoints.
        results: folder instead of ``nnUNet_results``.
        splits: file instead of the dataset's ``splits_final.json``.
        deadline: when to have stopped.
        accept_changed: what may have changed since the run stopped.
        stage: where to copy cases to, as ``--stage`` takes it.
    """

    dataset: str
    plans: str
    configuration: str
    fold: int | str
    recipe: Recipe
    device: str = "cuda"
    source: str | None = None
    source_options: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = None
    trackers: tuple[str, ...] = ()
    resume: bool | Literal["auto"] = False
    validate_only: bool = False
    checkpoint_for_validation: Literal["final", "best"] = "final"
    save_probabilities: bool = False
    disable_checkpointing: bool = False
    results: str | None = None
    splits: str | None = None
    deadline: Deadline | None = None
    accept_changed: tuple[str, ...] = ()
    stage: str | None = None

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, {**dataclasses.asdict(self), "recipe": self.recipe.to_dict()})

    @classmethod
    def load(cls, path: Path) -> TrainingRequest:
        """Read what :meth:`save` wrote."""
        content = read_json(path, ConfigurationError, "request for a training")
        deadline = content["deadline"]
        return cls(
            **{
                **content,
                "recipe": Recipe.from_dict(content["recipe"], str(path)),
                "trackers": tuple(content["trackers"]),
                "accept_changed": tuple(content["accept_changed"]),
                "deadline": None if deadline is None else Deadline(**deadline),
            }
        )

    def run(
        self, ranks: Ranks | None = None, plan: FinetunePlan | None = None, checkpoint: Checkpoint | None = None
    ) -> ModelFolder:
        """Train and validate. Raises what :class:`~nnssl_adapt.training.trainer.PretrainedTrainer` raises.

        Args:
            ranks: the processes that train together.
            plan: the one of :attr:`plans`, if it is open already.
            checkpoint: what :attr:`source` names, if it is open already.
        """
        ranks = ranks or Ranks()
        trainer = PretrainedTrainer(
            plan or FinetunePlan.find(self.dataset, self.plans, self.configuration),
            fold=self.fold,
            recipe=self.recipe,
            device=self.device,
            checkpoint=checkpoint or self.source,
            source_options=self.source_options,
            workers=self.workers,
            trackers=self.trackers,
            disable_checkpointing=self.disable_checkpointing,
            results_folder=self.results,
            splits_file=self.splits,
            ranks=ranks,
            stage=self.stage,
        )
        return trainer.run(
            resume=self.resume,
            validate_only=self.validate_only,
            checkpoint_for_validation=self.checkpoint_for_validation,
            save_probabilities=self.save_probabilities,
            deadline=ranks.from_main(self.deadline),
            accept_changed=self.accept_changed,
        )
