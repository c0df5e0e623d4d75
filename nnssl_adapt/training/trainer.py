"""Fine-tuning of one fold: what stands before the training loop and after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.evaluation.metrics import Summary
from nnssl_adapt.files import make_folder, sha256_of
from nnssl_adapt.inference.convolutions import cudnn_benchmark, exact_float32
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.machine.copying import Stage
from nnssl_adapt.machine.device import check_device
from nnssl_adapt.machine.lock import only_run_in
from nnssl_adapt.machine.resources import default_data_workers
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.provenance import package_version
from nnssl_adapt.training.batches.patches import explained_worker_death
from nnssl_adapt.training.batches.staging import staged
from nnssl_adapt.training.batches.store_check import store_compared
from nnssl_adapt.training.description import describe_run
from nnssl_adapt.training.device.layout import Layout
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.loop import Batch, TrainingLoop
from nnssl_adapt.training.optimise.loss_choice import choose_loss, loss_mistakes
from nnssl_adapt.training.optimise.losses import Reduce, alone
from nnssl_adapt.training.optimise.optimizer import autocast_dtype
from nnssl_adapt.training.optimise.out_of_memory import explained_memory_errors, explained_validation_memory
from nnssl_adapt.training.progress.display import log_epoch, log_file
from nnssl_adapt.training.progress.history import History
from nnssl_adapt.training.progress.picture import ProgressPicture
from nnssl_adapt.training.progress.trackers import Trackers, check_trackers
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.recipe.values import raise_if_any
from nnssl_adapt.training.run.checkpointing import (
    BEST,
    FINAL,
    LATEST,
    CheckpointWriter,
    TrainingState,
    load_checkpoint,
    predicting_weights,
)
from nnssl_adapt.training.run.comparison import check_validation, checked_acceptance
from nnssl_adapt.training.run.deadline import Deadline
from nnssl_adapt.training.run.folder import RunFolder
from nnssl_adapt.training.run.identity import RunIdentity, cases_of_fold, splits_of
from nnssl_adapt.training.run.stages import check_previous_stage, previous_stage
from nnssl_adapt.training.run.stopping import StopRequest, stop_on_signals
from nnssl_adapt.training.setup import (
    adapted_plan,
    batch_bytes,
    batches_of_fold,
    finished_on_device,
    layout_of_run,
    restored_random_state,
    without_pretraining,
)
from nnssl_adapt.training.start import RunStart, new_network
from nnssl_adapt.training.validation import FoldValidation
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


class PretrainedTrainer:
    """Fine-tunes the network of a plan on one fold and validates it. ``PretrainedTrainer(plan).run()``.

    Args:
        plan: of the dataset, preprocessed already; see :func:`nnssl_adapt.preprocess_dataset`.
        fold: 0, 1, … of the dataset's splits, or ``"all"`` to train (and validate) on every case.
        recipe: what to vary; None: the one for this kind of network (``default``, ``primus``, ``swin_unetr``).
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
        trackers: where else to send the figures: ``tensorboard``, ``wandb``, ``mlflow``, ``trackio``.
        ranks: the processes that train together, if there are several; see :mod:`nnssl_adapt.training.launch.distributed`.
        stage: a folder on a disk of the machine that the fold's cases are copied to while the training begins; ``none`` for no
            copies; None: ``SLURM_TMPDIR`` where it is set and large enough.

    Raises:
        DeviceUnavailable: no such device here.
        ConfigurationError: the fold does not exist, or the recipe does not go with the device; the previous stage of a
            cascade is missing.
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
        stage: str | None = None,
    ) -> None:
        self.stage = Stage.of(stage)
        self.ranks = ranks or Ranks()
        self.device = check_device(self.ranks.device(str(device)))
        recipe = recipe or Recipe.load(plan.architecture.kind.recipe)
        self.recipe = without_pretraining(recipe) if from_scratch or recipe.from_scratch else recipe
        self.autocast_dtype = autocast_dtype(self.recipe.precision, self.device)
        self.recipe.check_against(plan.architecture, self.device.type)
        self.plan = adapted_plan(plan, self.recipe)
        self.ranks.samples(self.plan.batch_size)  # refuses more ranks than samples
        dataset = self.plan.dataset_json
        self.labels = LabelScheme.from_dataset_json(dataset.raw)
        self.file_ending = dataset.file_ending
        self.store = CaseStore(self.plan.store_folder)
        self.fold, self.training_cases, self.validation_cases = cases_of_fold(
            self.plan, self.store, fold, self.file_ending, splits_file
        )
        self.checkpoint = checkpoint
        self.source_options = dict(source_options or {})
        self.previous = previous_stage(self.plan, self.recipe.trainer_name, results_folder)
        cases = [*self.training_cases, *self.validation_cases]
        splits = splits_of(self.plan, self.store.identifiers, self.file_ending, splits_file) if self.previous else []
        check_previous_stage(self.previous, self.plan, self.fold, cases, splits)
        self.identity = RunIdentity(
            plan=self.plan,
            dataset=dataset,
            fold=self.fold,
            training_cases=tuple(self.training_cases),
            validation_cases=tuple(self.validation_cases),
            recipe=self.recipe,
            version=package_version(),
            stored=self.store.digests(cases),
            previous={} if self.previous is None else self.previous.made_by(cases),
            citations=tuple(self.plan.pretrain_info.get("citations") or ()),
        )
        if workers is None:
            workers = default_data_workers(self.device.type, self.ranks.local_size, batch_bytes(self.plan, self.recipe))
        self.workers = int(workers)
        if self.workers < 0:
            raise ConfigurationError(f"workers: expected 0 or more, got {workers}")
        self.checkpointing = not disable_checkpointing
        self.folder = RunFolder.of(self.plan, self.recipe.trainer_name, self.fold, results_folder)
        self.progress = progress
        self.trackers = check_trackers(trackers) if self.ranks.is_main else ()
        self.accept_changed: frozenset[str] = frozenset()
        self._tracked = Trackers()
        self._trained_here = False
        self.summary: Summary | None = None
        self.history = History()
        raise_if_any(
            list(loss_mistakes(self.recipe, self.labels)), f"recipe {self.recipe.name!r} for {plan.dataset_name}"
        )
        self.loss = self._loss(self.ranks.sum)

    def _loss(self, reduce: Reduce) -> nn.Module:
        """The recipe's loss; ``reduce`` sums over the processes that share a batch."""
        strides = self.plan.architecture.strides if self.recipe.deep_supervision else None
        return choose_loss(self.recipe, self.labels, self.plan.batch_dice, strides, reduce=reduce)

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
        accept_changed: Collection[str] = (),
    ) -> ModelFolder:
        """Train, then predict and evaluate the fold's validation cases. Returns the model folder.

        Afterwards ``.history`` has the figures of each epoch and ``.summary`` those of the validation.

        Args:
            resume: go on from ``checkpoint_latest``; a run that was finished is only validated. ``"auto"``: start if
                there is nothing to go on from.
            validate_only: don't train.
            checkpoint_for_validation: ``final`` or ``best``.
            save_probabilities: of the validation cases, as nnU-Net's ``.npz``.
            deadline: when to have stopped; see :func:`~nnssl_adapt.training.run.deadline.find_deadline`.
            accept_changed: what may have changed since the checkpoint was written: ``splits`` (other cases), ``data`` (cases
                that were preprocessed again).

        Raises:
            TrainingStopped: a signal asked for it, or the deadline is near; what there is is saved.
            NothingToResume: ``resume`` or ``validate_only``, and there is no checkpoint.
            ConfigurationError: going on would make another model than the checkpoint's (other cases, data, labels, network,
                …); other folds have another network; the plan names no weights.
            SourceError, TransferError: the pre-trained weights are missing, or don't fit.
            NonFiniteLoss: the loss was NaN or infinite too often in a row.
            TrainingError: a worker died, the memory is too small, or another process trains this fold.
            OutputError: files can't be written.
        """
        self.accept_changed = checked_acceptance(accept_changed)
        if validate_only:
            self.folder.require_checkpoint(BEST if checkpoint_for_validation == "best" else FINAL)
        make_folder(self.folder.path)
        with (
            only_run_in(self.folder.path) if self.ranks.is_main else nullcontext(),
            log_file(self.folder.path) if self.ranks.is_main else nullcontext(),
            stop_on_signals(deadline, alone=self.ranks.size == 1) as stop,
            restored_random_state(self.device),
            cudnn_benchmark(self.device),
            exact_float32(self.device),
            explained_worker_death(),
        ):
            going_on = self.ranks.from_main(self.can_resume) if resume == "auto" else resume
            with explained_memory_errors(self.plan, self.recipe, self.device):
                network = None if validate_only else self._train_if_needed(going_on, stop)
            with explained_validation_memory(self.plan, self.device):
                self.summary = self._validate(network, checkpoint_for_validation, save_probabilities, stop)
        return ModelFolder.open(self.folder.model) if self.checkpointing else ModelFolder(self.folder.model)

    def _train_if_needed(self, resume: bool, stop: StopRequest) -> nn.Module | None:
        """The trained network if it is nowhere on disk, else None."""
        # Ranks may know different things from earlier runs: none waits for another in a trial, and the main one's counts.
        found = layout_of_run(self.identity, self.device, self.autocast_dtype, self._loss(alone), self.ranks)
        layout = self.ranks.from_main(found)
        self.recipe = layout.of(self.recipe)
        begun = self._start(layout).begin(self.identity, resume)
        if begun is None:
            return None
        state, self.identity = begun.state, begun.identity
        self.plan, self.history = self.identity.plan, state.history
        describe_run(
            self.identity,
            self.recipe,
            state.network,
            self.folder,
            self.device,
            autocast_dtype=self.autocast_dtype,
            workers=self.workers,
            stopping=stop.describe(),
            is_main=self.ranks.is_main,
        )
        self._train(state, stop)
        self._trained_here = True
        if self.checkpointing:
            return None
        network = new_network(self.identity)
        network.load_state_dict(predicting_weights(state))
        return network

    def _train(self, state: TrainingState, stop: StopRequest) -> None:
        cases = [*self.training_cases, *self.validation_cases]
        with (
            store_compared(self.store, cases if self.ranks.is_main else []) as compared,
            staged(self.store, cases, self.stage, self.ranks) as copies,
        ):

            def watch() -> None:
                compared()
                copies.refuse_damaged()

            self._train_watched(state, stop, watch, copies.folder)

    def _train_watched(
        self, state: TrainingState, stop: StopRequest, watch: Callable[[], None], copies: Path | None
    ) -> None:
        loop = TrainingLoop(
            recipe=self.recipe,
            loss=self.loss,
            labels=self.labels,
            batch_size=self.plan.batch_size,
            device=self.device,
            autocast_dtype=self.autocast_dtype,
            ranks=self.ranks,
            epoch_ended=self._show,
            watch=watch,
            progress=self.progress and self.ranks.is_main,
        )
        folder, identity = self.folder.path, self.identity
        names, settings = self.labels.class_names, self.recipe.to_dict()
        self._picture = ProgressPicture(folder / "progress.png", names)
        with (
            closing(self._batches_from(state, copies)) as batches,  # ends its workers, whatever still refers to it
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

    def _start(self, layout: Layout) -> RunStart:
        return RunStart(
            folder=self.folder,
            device=self.device,
            autocast_dtype=self.autocast_dtype,
            checkpoint=self.checkpoint,
            source_options=self.source_options,
            accept_changed=self.accept_changed,
            checkpointing=self.checkpointing,
            is_main=self.ranks.is_main,
            layout=layout,
        )

    def _batches_from(self, state: TrainingState, copies: Path | None) -> Generator[Batch]:
        batches = batches_of_fold(
            self.plan,
            self.store,
            self.recipe,
            (self.training_cases, self.validation_cases),
            (state.epoch, state.iteration),
            self.ranks,
            self.workers,
            pin_memory=self.device.type == "cuda",
            copies=copies,
            previous=self.previous,
        )
        return finished_on_device(batches, self.plan, self.recipe, self.device)

    # -- after it ----------------------------------------------------------------------------------------------------

    def _validate(
        self, network: nn.Module | None, which: Literal["final", "best"], save_probabilities: bool, stop: StopRequest
    ) -> Summary:
        plan, mirror_axes, weights_id = self.plan, self.plan.axes_to_mirror(self.recipe.mirror_axes), None
        self.ranks.barrier()  # the main rank has written its last checkpoint
        if self.checkpointing or network is None:  # what lies on disk is what will be used, so that is evaluated
            model = ModelFolder.open(self.folder.model)
            path = model.checkpoint_path(self.fold, which)
            weights = model.load_weights(self.fold, which)
            if network is None and not self._trained_here:
                check_validation(path, load_checkpoint(path), self.identity, self.accept_changed)
            network = model.build_network()
            model.load_into(network, weights, path)
            plan, weights_id = model.plan, sha256_of(path)
            mirror_axes = plan.mirrored_in_volume(weights.mirror_axes)
        validation = FoldValidation(
            plan=plan,
            labels=self.labels,
            file_ending=self.file_ending,
            store=self.store,
            cases=self.validation_cases,
            references=self.plan.dataset_folder / "gt_segmentations",
            folder=self.folder.path,
            fold=self.fold,
            previous=self.previous,
            device=self.device,
            autocast_dtype=self.autocast_dtype,
            save_probabilities=save_probabilities,
            ranks=self.ranks,
        )
        summary = validation.run(network, mirror_axes, weights_id, stop)
        logger.info("validation of fold %s: %s", self.fold, summary)
        return summary
