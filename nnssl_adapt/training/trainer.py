"""Fine-tuning of one fold: what stands before the training loop and after it."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import ConfigurationError, NothingToResume
from nnssl_adapt.evaluation.metrics import Summary
from nnssl_adapt.files import make_folder, sha256_of
from nnssl_adapt.inference.convolutions import cudnn_benchmark
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.machine.device import check_device
from nnssl_adapt.machine.lock import only_run_in
from nnssl_adapt.planning.content import package_version
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training.batches.patches import default_workers, explained_worker_death, seeds_for
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.loop import Batch, TrainingLoop
from nnssl_adapt.training.optimise.adapters import add_adapters
from nnssl_adapt.training.optimise.ema import WeightAverage
from nnssl_adapt.training.optimise.losses import build_loss
from nnssl_adapt.training.optimise.network_options import to_device
from nnssl_adapt.training.optimise.optimizer import autocast_dtype, build_optimizer, grad_scaler
from nnssl_adapt.training.optimise.out_of_memory import explained_memory_errors
from nnssl_adapt.training.progress.display import log_epoch, log_file
from nnssl_adapt.training.progress.history import History
from nnssl_adapt.training.progress.picture import ProgressPicture
from nnssl_adapt.training.progress.trackers import Trackers, check_trackers
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import (
    BEST,
    FINAL,
    LATEST,
    CheckpointWriter,
    TrainingState,
    check_resumable,
    load_checkpoint,
    predicting_weights,
    remove_unfinished,
    restore,
)
from nnssl_adapt.training.run.deadline import Deadline
from nnssl_adapt.training.run.folder import RunFolder
from nnssl_adapt.training.run.identity import RunIdentity, cases_of_fold
from nnssl_adapt.training.run.stopping import StopRequest, stop_on_signals
from nnssl_adapt.training.setup import (
    adapted_plan,
    batch_bytes,
    batches_of_fold,
    preparation,
    restored_random_state,
    without_pretraining,
)
from nnssl_adapt.training.starting_weights import (
    build_initial_network,
    describe_citations,
    fill_with_starting_weights,
    freezing_warnings,
)
from nnssl_adapt.training.validation import FoldValidation
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_INITIAL_WEIGHTS = 10
"""First counter of a random seed, beside those of :mod:`nnssl_adapt.training.batches.patches` and the loop's."""


class PretrainedTrainer:
    """Fine-tunes the network of a plan on one fold and validates it. ``PretrainedTrainer(plan).run()``.

    Args:
        plan: of the dataset, preprocessed already; see :func:`nnssl_adapt.preprocess_dataset`.
        fold: 0, 1, … of the dataset's splits, or ``"all"`` to train (and validate) on every case.
        recipe: what to vary; None: ``default``, or ``primus`` for a transformer.
        device: ``cuda``, ``cuda:1``, ``cpu`` or ``mps``.
        checkpoint: the pre-trained weights, or where they lie; None: found from what the plan records.
        source_options: how to open them, where other than the plan records: arguments of
            :func:`~nnssl_adapt.weights.checkpoint.checkpoint.open_checkpoint`.
        from_scratch: start from random weights, in a model folder of its own.
        workers: processes that make batches, 0 for none; None: what the machine allows.
        disable_checkpointing: write no checkpoints, for trying things out.
        results_folder: instead of ``nnUNet_results``.
        splits_file: instead of the dataset's ``splits_final.json``, for instance with fewer training cases.
        progress: whether to show a live line on a terminal.
        trackers: where else to send the figures: ``tensorboard``, ``wandb``.
        ranks: the processes that train together, if there are several; see :mod:`nnssl_adapt.training.launch.distributed`.

    Raises:
        DeviceUnavailable: no such device here.
        ConfigurationError: the fold does not exist, or the recipe does not go with the device.
        DatasetError: cases of the fold are not preprocessed.
    """

    def __init__(
        self,
        plan: FinetunePlan,
        fold: int | str = 0,
        recipe: Recipe | None = None,
        device: str | torch.device = "cuda",
        checkpoint: Checkpoint | str | Path | None = None,
        source_options: Mapping[str, Any] | None = None,
        from_scratch: bool = False,
        workers: int | None = None,
        disable_checkpointing: bool = False,
        results_folder: str | Path | None = None,
        splits_file: str | Path | None = None,
        progress: bool = True,
        trackers: Sequence[str] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.device = check_device(self.ranks.device(str(device)))
        recipe = recipe or Recipe.load("primus" if plan.architecture.is_transformer else "default")
        self.recipe = without_pretraining(recipe) if from_scratch or recipe.from_scratch else recipe
        self.autocast_dtype = autocast_dtype(self.recipe.precision, self.device)
        self.recipe.check_against(plan.architecture, self.device.type)
        self.plan = adapted_plan(plan, self.recipe)
        self.ranks.samples(self.plan.batch_size)  # refuses more ranks than samples
        self.labels: LabelScheme = self.plan.labels
        self.file_ending = self.plan.dataset_json.file_ending
        self.store = CaseStore(self.plan.store_folder)
        self.fold, self.training_cases, self.validation_cases = cases_of_fold(
            self.plan, self.store, fold, self.file_ending, splits_file
        )
        self.checkpoint = checkpoint
        self.source_options = dict(source_options or {})
        self.citations: tuple[dict[str, Any], ...] = tuple(self.plan.pretrain_info.get("citations") or ())
        if workers is None:
            workers = default_workers(self.device.type, self.ranks.local_size, batch_bytes(self.plan, self.recipe))
        self.workers = int(workers)
        if self.workers < 0:
            raise ConfigurationError(f"workers: expected 0 or more, got {workers}")
        self.checkpointing = not disable_checkpointing
        self.folder = RunFolder.of(self.plan, self.recipe.trainer_name, self.fold, results_folder)
        self.progress = progress
        self.trackers = check_trackers(trackers) if self.ranks.is_main else ()
        self._tracked = Trackers()
        self.summary: Summary | None = None
        self.history = History()
        strides = self.plan.architecture.strides if self.recipe.deep_supervision else None
        self._loss = build_loss(self.labels, self.plan.batch_dice, strides, reduce=self.ranks.sum)

    @property
    def can_resume(self) -> bool:
        """Whether an earlier run of this fold left a checkpoint to go on from, or is finished."""
        return any(self.folder.checkpoint(name) for name in (LATEST, FINAL))

    # -- the whole run -----------------------------------------------------------------------------------------------

    def run(
        self,
        resume: bool | Literal["auto"] = False,
        validate_only: bool = False,
        checkpoint_for_validation: Literal["final", "best"] = "final",
        save_probabilities: bool = False,
        deadline: Deadline | None = None,
    ) -> ModelFolder:
        """Train, then predict and judge the fold's validation cases. Returns the model folder.

        Afterwards ``.history`` has the figures of each epoch and ``.summary`` those of the validation.

        Args:
            resume: go on from ``checkpoint_latest``; a run that was finished is only validated. ``"auto"``: start if
                there is nothing to go on from.
            validate_only: don't train.
            checkpoint_for_validation: ``final`` or ``best``.
            save_probabilities: of the validation cases, as nnU-Net's ``.npz``.
            deadline: when to have stopped; see :func:`~nnssl_adapt.training.run.deadline.find_deadline`.

        Raises:
            TrainingStopped: a signal asked for it, or the deadline is near; what there is is saved.
            NothingToResume: ``resume`` or ``validate_only``, and there is no checkpoint.
            ConfigurationError: the checkpoint is of another network or optimiser; other folds have another network; the
                plan names no weights.
            SourceError, TransferError: the pre-trained weights are missing, or don't fit.
            NonFiniteLoss: the loss was NaN or infinite too often in a row.
            TrainingError: a worker died, the memory is too small, or another process trains this fold.
            OutputError: files can't be written.
        """
        if validate_only:
            self.folder.require_checkpoint(BEST if checkpoint_for_validation == "best" else FINAL)
        make_folder(self.folder.path)
        with (
            only_run_in(self.folder.path) if self.ranks.is_main else nullcontext(),
            log_file(self.folder.path) if self.ranks.is_main else nullcontext(),
            stop_on_signals(deadline, alone=self.ranks.size == 1) as stop,
            restored_random_state(self.device),
            cudnn_benchmark(self.device),
            explained_memory_errors(self.plan, self.recipe, self.device),
            explained_worker_death(),
        ):
            going_on = self.ranks.from_main(self.can_resume) if resume == "auto" else resume
            network = None if validate_only else self._train_if_needed(going_on, stop)
            self.summary = self._validate(network, checkpoint_for_validation, save_probabilities, stop)
        return ModelFolder.open(self.folder.model) if self.checkpointing else ModelFolder(self.folder.model)

    def _train_if_needed(self, resume: bool, stop: StopRequest) -> nn.Module | None:
        """The trained network if it is nowhere on disk, else None."""
        if resume and self.folder.checkpoint(FINAL):
            self._refuse_longer_training()
            logger.info("%s is trained already", self.folder.path)
            return None
        state = self._resumed_state() if resume else self._fresh_state()
        self._describe(state, stop)
        self._train(state, stop)
        if self.checkpointing:
            return None
        network = self._new_network()
        network.load_state_dict(predicting_weights(state))
        return network

    def _train(self, state: TrainingState, stop: StopRequest) -> None:
        loop = TrainingLoop(
            recipe=self.recipe,
            loss=self._loss,
            labels=self.labels,
            batch_size=self.plan.batch_size,
            device=self.device,
            autocast_dtype=self.autocast_dtype,
            ranks=self.ranks,
            prepare=preparation(self.plan, self.recipe),
            epoch_ended=self._show,
            progress=self.progress and self.ranks.is_main,
        )
        folder, identity = self.folder.path, self._identity
        names, settings = self.labels.class_names, self.recipe.to_dict()
        self._picture = ProgressPicture(folder / "progress.png", names)
        with (
            closing(self._batches_from(state)) as batches,  # ends its workers, whatever still refers to it
            Trackers(self.trackers, folder, folder.parent.name, settings, state.epoch, names) as self._tracked,
            CheckpointWriter(folder, identity, self.checkpointing, self.ranks.is_main, stop.saved) as checkpoints,
        ):
            loop.run(state, batches, checkpoints, stop)

    def _show(self, history: History) -> None:
        self.history = history
        if not self.ranks.is_main:
            return
        log_epoch(history, self.recipe.epochs, self.labels.class_names)
        history.write_metrics(self.folder.path / "metrics.jsonl", self.labels.class_names)
        self._picture.show(history, last=len(history) == self.recipe.epochs)
        self._tracked.log(history)

    # -- before it ---------------------------------------------------------------------------------------------------

    def _fresh_state(self) -> TrainingState:
        """Start anew: pre-trained weights into a new network, and the model folder's files. An earlier run is set aside."""
        network = self._new_network()
        start = fill_with_starting_weights(
            network, self.plan, self.checkpoint, self.recipe.from_scratch, self.source_options
        )
        self.citations = start.citations
        for warning in freezing_warnings(self.recipe, start.report):
            logger.warning("%s", warning)
        if self.ranks.is_main:
            self.folder.set_earlier_run_aside(for_checkpoints=self.checkpointing)
            remove_unfinished(self.folder.path)
            self.folder.write_model_files(self.plan)
            start.report.save(self.folder.path / "transfer_report.json")
        logger.info("%s", start.report)
        return self._state_of(network)

    def _resumed_state(self) -> TrainingState:
        path = self.folder.checkpoint(LATEST)
        if path is None:
            raise NothingToResume(
                f"{self.folder.path} has no {LATEST} to go on from: leave --c out to train from the start (a run writes "
                f"its first one after {self.recipe.checkpoint_every} epochs or {self.recipe.checkpoint_minutes:g} minutes)"
            )
        content = load_checkpoint(path)
        check_resumable(path, content, self._identity)
        state = self._state_of(self._new_network())
        restore(state, content, self.recipe)
        self.citations = tuple(content["nnssl_adapt"].get("citations", self.citations))
        if self.ranks.is_main:
            remove_unfinished(self.folder.path)
            self.folder.write_model_files(self.plan)
        self.history = state.history
        logger.info("going on from %s: epoch %d after %d steps", path, state.epoch + 1, state.iteration)
        return state

    def _refuse_longer_training(self) -> None:
        done = int(load_checkpoint(self.folder.path / FINAL)["current_epoch"])
        if done < self.recipe.epochs:
            raise ConfigurationError(
                f"{self.folder.path} was finished after {done} epochs and can't be prolonged to {self.recipe.epochs} (the "
                "optimiser's state is not kept): train anew without --c, or validate with --val"
            )

    def _new_network(self) -> nn.Module:
        seed = seeds_for(self.recipe.seed, _INITIAL_WEIGHTS)[0]
        return build_initial_network(self.plan, self.labels.num_heads, seed)

    def _state_of(self, network: nn.Module) -> TrainingState:
        torch.manual_seed(seeds_for(self.recipe.seed, _INITIAL_WEIGHTS, 1)[0])
        add_adapters(network, self.recipe)
        network = to_device(network, self.recipe, self.device)
        scaler = grad_scaler() if self.autocast_dtype is torch.float16 else None
        decay = self.recipe.ema_decay
        average = None if decay is None else WeightAverage(network, decay)
        return TrainingState(network, build_optimizer(network, self.recipe, self.device), scaler, average)

    def _batches_from(self, state: TrainingState) -> Generator[Batch]:
        return batches_of_fold(
            self.plan,
            self.store,
            self.recipe,
            (self.training_cases, self.validation_cases),
            (state.epoch, state.iteration),
            self.ranks,
            self.workers,
            pin_memory=self.device.type == "cuda",
        )

    @property
    def _identity(self) -> RunIdentity:
        return RunIdentity(
            configuration=self.plan.configuration,
            fold=self.fold,
            architecture=self.plan.architecture,
            patch_size=self.plan.patch_size,
            num_channels=self.plan.num_channels,
            num_heads=self.labels.num_heads,
            recipe=self.recipe,
            version=package_version(),
            citations=self.citations,
        )

    def _describe(self, state: TrainingState, stop: StopRequest) -> None:
        """Log what is about to run, and keep it in debug.json."""
        parameters = sum(p.numel() for p in state.network.parameters())
        logger.info("%s\n%s\n%s", self.plan, self.recipe, f"  {parameters:,} parameters on {self.device}")
        logger.info(
            "fold %s: %d training and %d validation cases, %d data workers; results in %s",
            self.fold,
            len(self.training_cases),
            len(self.validation_cases),
            self.workers,
            self.folder.path,
        )
        for line in (describe_citations(self.citations), stop.describe()):
            if line:
                logger.info("%s", line)
        content = {
            "nnssl_adapt": package_version(),
            "plans": self.plan.plans_name,
            "plans_file": str(self.plan.plans_file),
            "pretrained_weights": None if self.recipe.from_scratch else self.plan.provenance.get("source"),
            "citations": list(self.citations),
            "fold": self.fold,
            "training_cases": list(self.training_cases),
            "validation_cases": list(self.validation_cases),
            "recipe": self.recipe.to_dict(),
            "network": self._identity.network,
            "parameters": parameters,
            "patch_size": list(self.plan.patch_size),
            "batch_size": self.plan.batch_size,
            "batch_dice": self.plan.batch_dice,
            "autocast": str(self.autocast_dtype) if self.autocast_dtype else None,
            "data_workers": self.workers,
        }
        if self.ranks.is_main:
            self.folder.write_debug(content, self.device)

    # -- after it ----------------------------------------------------------------------------------------------------

    def _validate(
        self, network: nn.Module | None, which: Literal["final", "best"], save_probabilities: bool, stop: StopRequest
    ) -> Summary:
        plan, mirror_axes, weights_id = self.plan, self.recipe.mirror_axes, None
        self.ranks.barrier()  # the main rank has written its last checkpoint
        if self.checkpointing or network is None:  # what lies on disk is what will be used, so that is judged
            model = ModelFolder.open(self.folder.model)
            path = model.checkpoint_path(self.fold, which)
            weights = model.load_weights(self.fold, which)
            network = model.build_network()
            model.load_into(network, weights, path)
            plan, mirror_axes, weights_id = model.plan, weights.mirror_axes, sha256_of(path)
        validation = FoldValidation(
            plan=plan,
            labels=self.labels,
            file_ending=self.file_ending,
            store=self.store,
            cases=self.validation_cases,
            references=self.plan.dataset_folder / "gt_segmentations",
            folder=self.folder.path,
            device=self.device,
            save_probabilities=save_probabilities,
            ranks=self.ranks,
        )
        summary = validation.run(network, mirror_axes, weights_id, stop)
        logger.info("validation of fold %s: %s", self.fold, summary)
        return summary
