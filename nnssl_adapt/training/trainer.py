"""Fine-tuning of one fold: the training loop, and what has to stand before and after it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import ConfigurationError, NonFiniteLoss, NothingToResume, TrainingError
from nnssl_adapt.evaluation.metrics import Summary
from nnssl_adapt.files import make_folder, sha256_of
from nnssl_adapt.inference.device import check_device
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.planning.content import package_version
from nnssl_adapt.planning.patch import describe_fit, fit_patch
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training.augment import SpatialRange, plain_transforms, training_transforms
from nnssl_adapt.training.checkpointing import (
    FINAL,
    LATEST,
    CheckpointWriter,
    RunIdentity,
    StopRequest,
    TrainingState,
    check_resumable,
    load_checkpoint,
    restore,
    stop_on_signals,
)
from nnssl_adapt.training.fold import cases_of_fold
from nnssl_adapt.training.losses import build_loss, count_overlap, pseudo_dice
from nnssl_adapt.training.optimizer import autocast_dtype, build_optimizer, grad_scaler
from nnssl_adapt.training.patches import (
    TRAINING,
    VALIDATION,
    Batches,
    BatchSchedule,
    PatchSampler,
    PhaseData,
    annotated_key,
    default_workers,
    explained_worker_death,
    iterate_batches,
    seeds_for,
)
from nnssl_adapt.training.progress import EpochDisplay, History, log_epoch, log_file
from nnssl_adapt.training.recipe import Recipe
from nnssl_adapt.training.run_folder import RunFolder
from nnssl_adapt.training.schedule import learning_rate
from nnssl_adapt.training.starting_weights import build_initial_network, fill_with_starting_weights
from nnssl_adapt.training.validation import FoldValidation
from nnssl_adapt.weights.checkpoint import Checkpoint

__all__ = ["PretrainedTrainer", "check_device"]

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

_INITIAL_WEIGHTS, _NETWORK = 10, 11
"""First counters of random seeds, beside those of :mod:`nnssl_adapt.training.patches`."""


class PretrainedTrainer:
    """Fine-tunes the network of a plan on one fold and validates it. ``PretrainedTrainer(plan).run()``.

    Args:
        plan: of the dataset, preprocessed already; see :func:`nnssl_adapt.preprocess_dataset`.
        fold: 0, 1, … of the dataset's splits, or ``"all"`` to train (and validate) on every case.
        recipe: what to vary; None: ``default``, or ``primus`` for a transformer.
        device: ``cuda``, ``cuda:1``, ``cpu`` or ``mps``.
        checkpoint: the pre-trained weights, or where they lie; None: found from what the plan records.
        from_scratch: start from random weights, in a model folder of its own.
        workers: processes that make batches, 0 for none; None: what the machine allows.
        disable_checkpointing: write no checkpoints, for trying things out.
        results_folder: instead of ``nnUNet_results``.
        progress: whether to show a live line on a terminal.

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
        from_scratch: bool = False,
        workers: int | None = None,
        disable_checkpointing: bool = False,
        results_folder: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        self.device = check_device(device)
        recipe = recipe or Recipe.load("primus" if plan.architecture.is_transformer else "default")
        self.recipe = _from_scratch(recipe) if from_scratch or recipe.from_scratch else recipe
        self.autocast_dtype = autocast_dtype(self.recipe.precision, self.device)
        self.plan = _adapted(plan, self.recipe)
        self.labels: LabelScheme = self.plan.labels
        self.file_ending = self.plan.dataset_json.file_ending
        self.store = CaseStore(self.plan.store_folder)
        self.fold, self.training_cases, self.validation_cases = cases_of_fold(
            self.plan, self.store, fold, self.file_ending
        )
        self.checkpoint = checkpoint
        self.workers = default_workers(self.device.type) if workers is None else int(workers)
        if self.workers < 0:
            raise ConfigurationError(f"workers: expected 0 or more, got {workers}")
        self.checkpointing = not disable_checkpointing
        self.folder = RunFolder.of(self.plan, self.recipe.trainer_name, self.fold, results_folder)
        self.progress = progress
        self.summary: Summary | None = None
        self.history = History()
        self._loss = build_loss(self.labels, self.plan.batch_dice)

    @property
    def can_resume(self) -> bool:
        """Whether an earlier run of this fold left a checkpoint to go on from, or is finished."""
        return any(self.folder.checkpoint(name) for name in (LATEST, FINAL))

    # -- the whole run -----------------------------------------------------------------------------------------------

    def run(
        self,
        resume: bool = False,
        validate_only: bool = False,
        checkpoint_for_validation: Literal["final", "best"] = "final",
        save_probabilities: bool = False,
    ) -> ModelFolder:
        """Train, then predict and judge the fold's validation cases. Returns the model folder.

        Afterwards ``.history`` has the figures of each epoch and ``.summary`` those of the validation.

        Args:
            resume: go on from ``checkpoint_latest``; a run that was finished is only validated.
            validate_only: don't train.
            checkpoint_for_validation: ``final`` or ``best``.
            save_probabilities: of the validation cases, as nnU-Net's ``.npz``.

        Raises:
            NothingToResume: ``resume``, and there is no checkpoint.
            ConfigurationError: the checkpoint is of another network or optimiser; other folds have another network; the
                plan names no weights.
            SourceError, TransferError: the pre-trained weights are missing, or don't fit.
            NonFiniteLoss: the loss was NaN or infinite too often in a row.
            TrainingError: SIGINT or SIGTERM came, a worker died, or the GPU's memory is too small. What there is is saved.
            OutputError: files can't be written.
        """
        make_folder(self.folder.path)
        with (
            log_file(self.folder.path),
            stop_on_signals() as stop,
            _restored_random_state(self.device),
            _cudnn_benchmark(self.device),
            self._explained_memory_errors(),
            explained_worker_death(),
        ):
            network = None if validate_only else self._train_if_needed(resume, stop)
            self.summary = self._validate(network, checkpoint_for_validation, save_probabilities, stop)
        return ModelFolder.open(self.folder.model) if self.checkpointing else ModelFolder(self.folder.model)

    def _train_if_needed(self, resume: bool, stop: StopRequest) -> nn.Module | None:
        """The trained network if it is nowhere on disk, else None."""
        if resume and self.folder.checkpoint(FINAL) and not self.folder.checkpoint(LATEST):
            self._refuse_longer_training()
            logger.info("%s is trained already", self.folder.path)
            return None
        state = self._resumed_state() if resume else self._fresh_state()
        self._describe(state)
        self._train(state, stop)
        return None if self.checkpointing else state.network

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _train(self, state: TrainingState, stop: StopRequest) -> None:
        recipe = self.recipe
        checkpoints = CheckpointWriter(self.folder.path, self._identity, self.checkpointing)
        batches = self._batches_from(state)
        while state.epoch < recipe.epochs:
            started = time.time()
            rate = learning_rate(state.epoch, recipe)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            with self._display(state, rate) as display:
                state.network.train()
                while state.iteration < recipe.iterations_per_epoch:
                    loss = self._step(state, next(batches))
                    display.step(loss)
                    if stop:
                        self._stop(state, checkpoints, stop)
                    checkpoints.after_step(state)
                state.network.eval()
                losses, counts = [], torch.zeros(3, len(self.labels.class_names), dtype=torch.int64)
                for _ in range(recipe.validation_iterations):
                    loss, overlap = self._judge(state, next(batches))
                    losses.append(loss)
                    counts += overlap
                    display.step(loss)
                    if stop:
                        self._stop(state, checkpoints, stop)
            state.history.add(_mean(state.losses), _mean(losses), pseudo_dice(counts), rate, started, time.time())
            state.epoch, state.iteration, state.losses = state.epoch + 1, 0, []
            checkpoints.after_epoch(state)
            self._show(state.history)
        checkpoints.final(state)

    def _step(self, state: TrainingState, batch: Batch) -> float:
        """One optimiser step; returns the loss. A step whose loss or gradient is not finite changes no weight."""
        # Dropout and the like depend on where the run is, not on how it got there.
        torch.manual_seed(seeds_for(self.recipe.seed, _NETWORK, state.epoch, state.iteration)[0])
        image, target = self._on_device(batch)
        state.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self._loss(state.network(image), target)
        if state.scaler is not None:
            state.scaler.scale(loss).backward()
            state.scaler.unscale_(state.optimizer)
        else:
            loss.backward()
        norm = nn.utils.clip_grad_norm_(state.network.parameters(), self.recipe.gradient_clip)
        value, norm_value = torch.stack([loss.detach().float(), norm.detach().float()]).tolist()
        finite = math.isfinite(value) and (math.isfinite(norm_value) or state.scaler is not None)
        if state.scaler is not None:  # it skips steps with gradients that overflowed, and lowers the scale
            state.scaler.step(state.optimizer)
            state.scaler.update()
        elif finite:
            state.optimizer.step()
        self._account(state, value, finite)
        return value

    def _account(self, state: TrainingState, loss: float, finite: bool) -> None:
        state.iteration += 1
        if finite:
            state.losses.append(loss)
            state.non_finite_in_a_row = 0
            return
        state.non_finite_in_a_row += 1
        logger.warning(
            "epoch %d, step %d: the loss or its gradient is not finite, skipped", state.epoch, state.iteration
        )
        if state.non_finite_in_a_row >= self.recipe.non_finite_limit:
            raise NonFiniteLoss(
                f"the loss or its gradient was not finite {state.non_finite_in_a_row} times in a row (epoch {state.epoch}, "
                f"step {state.iteration}); the last good checkpoint in {self.folder.path} is kept. Try a lower --lr or "
                "--set precision=fp32, with --c to go on from there"
            )

    @torch.no_grad()
    def _judge(self, state: TrainingState, batch: Batch) -> tuple[float, torch.Tensor]:
        """Loss of a validation batch, and its overlap counts (3, classes)."""
        image, target = self._on_device(batch)
        with self._autocast():
            logits = state.network(image)
            loss = self._loss(logits, target)
        return float(loss), count_overlap(logits, target, self.labels)

    def _stop(self, state: TrainingState, checkpoints: CheckpointWriter, stop: StopRequest) -> NoReturn:
        checkpoints.latest(state)
        kept = "run the same command with --c to go on" if self.checkpointing else "nothing was saved, as asked"
        raise TrainingError(
            f"stopped by {stop.signal_name} in epoch {state.epoch} after {state.iteration} of "
            f"{self.recipe.iterations_per_epoch} steps; {kept}"
        )

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            batch["image"].to(self.device, non_blocking=True),
            batch["target"].to(self.device, non_blocking=True),
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _display(self, state: TrainingState, rate: float) -> EpochDisplay:
        steps = self.recipe.iterations_per_epoch + self.recipe.validation_iterations
        return EpochDisplay(state.history, state.epoch, self.recipe.epochs, steps, state.iteration, rate, self.progress)

    def _show(self, history: History) -> None:
        self.history = history
        log_epoch(history, self.recipe.epochs, self.labels.class_names)
        history.write_metrics(self.folder.path / "metrics.jsonl")
        history.plot(self.folder.path / "progress.png", self.labels.class_names)

    # -- before it ---------------------------------------------------------------------------------------------------

    def _fresh_state(self) -> TrainingState:
        """Start anew: pre-trained weights into a new network, and the model folder's files. An earlier run is set aside."""
        network = self._new_network()
        report = fill_with_starting_weights(network, self.plan, self.checkpoint, self.recipe.from_scratch)
        self.folder.set_earlier_run_aside()
        self.folder.write_model_files(self.plan)
        report.save(self.folder.path / "transfer_report.json")
        logger.info("%s", report)
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
        self.folder.write_model_files(self.plan)
        self.history = state.history
        logger.info("going on from %s: epoch %d, step %d", path, state.epoch, state.iteration)
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
        network = network.to(self.device)
        scaler = grad_scaler() if self.autocast_dtype is torch.float16 else None
        return TrainingState(network, build_optimizer(network, self.recipe, self.device), scaler)

    def _batches_from(self, state: TrainingState) -> Iterator[Batch]:
        recipe, patch = self.recipe, self.plan.patch_size
        key = annotated_key(self.labels)
        spatial, chain = SpatialRange.of(patch), plain_transforms(self.labels)
        read_size = patch
        if recipe.augmentation == "default":
            masks = self.plan.settings.use_mask_for_norm
            chain = training_transforms(patch, spatial, recipe.mirror_axes, masks, self.labels)
            read_size = spatial.read_size
        phases = {
            TRAINING: PhaseData(tuple(self.training_cases), PatchSampler(read_size, patch, key), chain),
            VALIDATION: PhaseData(
                tuple(self.validation_cases), PatchSampler(patch, patch, key), plain_transforms(self.labels)
            ),
        }
        batches = Batches(self.store.folder, phases, self.plan.batch_size, recipe.foreground_fraction, recipe.seed)
        schedule = BatchSchedule(
            recipe.epochs, recipe.iterations_per_epoch, recipe.validation_iterations, state.epoch, state.iteration
        )
        return iterate_batches(batches, schedule, self.workers, pin_memory=self.device.type == "cuda")

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
        )

    def _describe(self, state: TrainingState) -> None:
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
        content = {
            "nnssl_adapt": package_version(),
            "plans": self.plan.plans_name,
            "plans_file": str(self.plan.plans_file),
            "pretrained_weights": None if self.recipe.from_scratch else self.plan.provenance.get("source"),
            "citations": self.plan.pretrain_info.get("citations", []),
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
        self.folder.write_debug(content, self.device)

    # -- after it ----------------------------------------------------------------------------------------------------

    def _validate(
        self, network: nn.Module | None, which: Literal["final", "best"], save_probabilities: bool, stop: StopRequest
    ) -> Summary:
        plan, mirror_axes, weights_id = self.plan, self.recipe.mirror_axes, None
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
        )
        summary = validation.run(network, mirror_axes, weights_id, stop)
        logger.info("validation of fold %s: %s", self.fold, summary)
        return summary

    @contextmanager
    def _explained_memory_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            patch = " × ".join(str(n) for n in self.plan.patch_size)
            raise TrainingError(
                f"the GPU's memory is too small for patch {patch} in batches of {self.plan.batch_size}: try --batch "
                f"{max(1, self.plan.batch_size // 2)} or a smaller --patch Z Y X"
            ) from error


# -- parts that need no trainer --------------------------------------------------------------------------------------------


def _from_scratch(recipe: Recipe) -> Recipe:
    """The recipe with random weights, and a folder of its own: the pre-trained run must not be overwritten by its baseline."""
    name = recipe.trainer_name
    return recipe.override(
        from_scratch=True, trainer_name=name if name.endswith("_from_scratch") else f"{name}_from_scratch"
    )


def _adapted(plan: FinetunePlan, recipe: Recipe) -> FinetunePlan:
    """The plan with the recipe's patch and batch, the patch fitted to the network's strides and the images."""
    if recipe.patch_size is None and recipe.batch_size is None:
        return plan
    patch = plan.patch_size
    if recipe.patch_size is not None:
        extent = plan.settings_of_configuration.get("median_image_size_in_voxels") or recipe.patch_size
        patch = fit_patch(recipe.patch_size, plan.architecture.total_stride, extent)
        if message := describe_fit(recipe.patch_size, patch, extent):
            logger.warning(message)
    return plan.replaced(patch_size=patch, batch_size=recipe.batch_size)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@contextmanager
def _restored_random_state(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, torch's generators are as they were afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _cudnn_benchmark(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose its fastest convolutions by trying: patches all have one size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
