"""The training loop: take a step, judge, end the epoch."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import NonFiniteLoss, TrainingError, TrainingStopped
from nnssl_adapt.files import write_json
from nnssl_adapt.training.batches.patches import seeds_for
from nnssl_adapt.training.device.late import LateFigures
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.optimise.layers import says_where_its_encoder_is
from nnssl_adapt.training.optimise.losses import count_overlap, pseudo_dice
from nnssl_adapt.training.optimise.network_options import training_forward
from nnssl_adapt.training.optimise.optimizer import begin_momenta, is_fused, step_if_finite
from nnssl_adapt.training.optimise.schedule import prepare_epoch
from nnssl_adapt.training.progress.clock import EpochClock
from nnssl_adapt.training.progress.display import EpochDisplay
from nnssl_adapt.training.progress.history import History
from nnssl_adapt.training.progress.kernels import KernelProfile
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import CheckpointWriter, TrainingState, predicting
from nnssl_adapt.training.run.stopping import STOPPED, StopRequest

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

_NETWORK = 11
"""First counter of the network's random seeds, beside those of :mod:`nnssl_adapt.training.batches.patches`."""

_SMALLEST_SCALE = 1.0
"""Loss scales above it are still looking for their size, and gradients that overflow are part of that."""


def moved(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch's image and target, moved."""
    return batch["image"].to(device, non_blocking=True), batch["target"].to(device, non_blocking=True)


@dataclass
class TrainingLoop:
    """Trains a network from where its state is to the recipe's last epoch.

    Attributes:
        recipe: what to do.
        loss: of (logits, target).
        labels: what the logits mean.
        batch_size: samples of a batch, those of all processes together.
        device: where it happens.
        autocast_dtype: what the network computes in; None: float32.
        ranks: the processes that share the work.
        epoch_ended: called with the history after each epoch.
        watch: called after each step; what it raises ends the training.
        progress: whether to show a live line on a terminal.
    """

    recipe: Recipe
    loss: Callable[[Any, Tensor], Tensor]
    labels: LabelScheme
    batch_size: int
    device: torch.device
    autocast_dtype: torch.dtype | None = None
    ranks: Ranks = field(default_factory=Ranks)
    epoch_ended: Callable[[History], None] = lambda history: None
    watch: Callable[[], None] = lambda: None
    progress: bool = False
    _wrapped: tuple[tuple[bool, ...], nn.Module, Callable[[Tensor], Any]] | None = field(default=None, init=False)
    _stop: StopRequest | None = field(default=None, init=False)
    _others_ask: bool = field(default=False, init=False)
    _figures: LateFigures = field(init=False)
    _flags: LateFigures = field(init=False)
    _sent_of: tuple[int, int] = field(default=(0, 0), init=False)
    _last_loss: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._figures, self._flags = LateFigures(self.device), LateFigures(self.device)

    def run(
        self, state: TrainingState, batches: Iterator[Batch], checkpoints: CheckpointWriter, stop: StopRequest
    ) -> None:
        """Train: changes ``state``. ``batches`` are those that are still to come, of all epochs.

        Raises:
            TrainingStopped: asked for by ``stop``, and saved.
            NonFiniteLoss: the loss was NaN or infinite too often in a row.
            OutputError: a checkpoint can't be written.
        """
        recipe, clock = self.recipe, EpochClock(self.device)
        kernels = KernelProfile(self.device, self.ranks.is_main)
        batches = clock.watched(batches)
        self._stop = stop
        stop.begin()
        while state.epoch < recipe.epochs:
            started = time.time()
            clock.start()
            resumed_at = state.iteration
            kernels.begin_epoch(state.epoch, recipe.epochs, recipe.iterations_per_epoch, resumed_at)
            rate = prepare_epoch(state.network, state.optimizer, state.epoch, recipe)
            forward = self._forward(state.network)
            with self._display(state, rate) as display:
                state.network.train()
                while state.iteration < recipe.iterations_per_epoch:
                    kernels.before(state.iteration)
                    loss = self.step(state, itertools.islice(batches, recipe.accumulate), forward)
                    kernels.after(state.iteration - 1)
                    clock.rest()
                    display.step(loss)
                    if self._asked(stop):
                        self._leave(state, checkpoints, stop)
                    checkpoints.after_step(state, lambda: self.settle(state))
                    self.watch()
                self.settle(state)
                clock.steps_done(state.iteration - resumed_at)
                judged = self._judge_epoch(state, batches, forward, display, stop)
                if judged is None:
                    self._leave(state, checkpoints, stop)
            val_loss, dice = judged
            ran = kernels.take()
            figures = replace(clock.stop(), kernel_busy=ran.busy, kernel_idle=ran.idle_ms)
            state.history.add(_mean(state.losses), val_loss, dice, rate, started, time.time(), figures)
            state.epoch, state.iteration, state.losses = state.epoch + 1, 0, []
            checkpoints.after_epoch(state)
            self.epoch_ended(state.history)
        checkpoints.final(state)

    # -- a step ------------------------------------------------------------------------------------------------------

    def step(self, state: TrainingState, batches: Iterable[Batch], forward: Callable[[Tensor], Any]) -> float | None:
        """One optimiser step, on the mean gradient of ``batches``; returns the last loss that is known.

        A step whose loss or gradient is not finite changes no weight. Where the optimiser can find that out on the device,
        nothing waits: loss and norm of this step are read while the device does the next one (:meth:`settle`), and what is
        returned is the loss of the step before (None for the first). Elsewhere it is this step's.
        """
        state.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            self._seed(state, number)
            image, target = moved(batch, self.device)
            # Of the samples of all processes, times the processes, over which gradients are averaged; 1 for a single one.
            share = len(image) * self.ranks.size / self.batch_size / self.recipe.accumulate
            with self._gradients_kept_here(last=number + 1 == self.recipe.accumulate):
                with self._autocast():
                    loss = self.loss(forward(image), target) * share
                (loss if state.scaler is None else state.scaler.scale(loss)).backward()
            total += loss.detach().float()
        if state.scaler is not None:
            state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.network.parameters(), self.recipe.gradient_clip)
        total, asked = self._with_flag(total)
        figures = torch.stack([total / self.ranks.size, norm.detach().float()])
        self.settle(state)  # the step before, while the device has this one to do
        scale = self._update(state, figures)
        state.iteration += 1
        self._figures.send(torch.cat([figures, torch.stack([asked, scale])]))
        self._sent_of = state.epoch, state.iteration
        if not is_fused(state.optimizer):
            self.settle(state)
        return self._last_loss

    def _update(self, state: TrainingState, figures: Tensor) -> Tensor:
        """Change the weights if all is finite; returns the scale of the loss after it (1 without)."""
        one = torch.ones((), device=self.device)
        if state.scaler is None:
            step_if_finite(state.optimizer, figures)
            return one
        begin_momenta(state.optimizer)
        state.scaler.step(state.optimizer)  # skips steps with gradients that overflowed
        state.scaler.update()  # and lowers the scale
        scale: Tensor = state.scaler.scale(one)
        return scale

    def settle(self, state: TrainingState) -> None:
        """Read the figures of the last step, if they have not been read, and do what depends on them.

        To be called before anything that must know: the next update of the weights, the end of an epoch, a checkpoint.

        Raises NonFiniteLoss: too many steps in a row were not finite.
        """
        if not self._figures.on_their_way:
            return
        loss, norm, asked, scale = self._figures.take()
        self._last_loss, self._others_ask = loss, asked > 0
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and state.average is not None:
            state.average.update(state.network)
        searching = state.scaler is not None and math.isfinite(loss) and scale >= _SMALLEST_SCALE
        self._account(state, loss, finite or searching)

    def _seed(self, state: TrainingState, number: int) -> None:
        """Dropout and the like depend on where the run is, not on how it got there."""
        counters = [state.epoch, state.iteration * self.recipe.accumulate + number]
        counters += [self.ranks.rank] if self.ranks.rank else []
        torch.manual_seed(seeds_for(self.recipe.seed, _NETWORK, *counters)[0])

    def _account(self, state: TrainingState, loss: float, good: bool) -> None:
        if good:
            state.losses.append(loss)
            state.non_finite_in_a_row = 0
            return
        epoch, step = self._sent_of
        state.non_finite_in_a_row += 1
        logger.warning("epoch %d, step %d: the loss or its gradient is not finite, skipped", epoch + 1, step)
        if state.non_finite_in_a_row >= self.recipe.non_finite_limit:
            raise NonFiniteLoss(
                f"the loss or its gradient was not finite {state.non_finite_in_a_row} times in a row (epoch {epoch + 1}, "
                f"step {step}); the last good checkpoint is kept. Try a lower --lr or --set precision=fp32, with "
                "--c to go on from there"
            )

    # -- several processes -------------------------------------------------------------------------------------------

    def _gradients_kept_here(self, last: bool) -> AbstractContextManager[Any]:
        """Of the batches of a step only the last one's backward pass exchanges gradients with the other processes."""
        wrapped = None if self._wrapped is None else self._wrapped[1]
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext()

    def _with_flag(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """A figure summed over the processes, and in the same message how many of them are asked to stop."""
        if self.ranks.size == 1 or self._stop is None:
            return self.ranks.sum(total), torch.zeros((), device=self.device)
        asked = torch.full((), float(self._stop.asked()), device=self.device)
        both = self.ranks.sum(torch.stack([total, asked]))
        return both[0], both[1]

    def _asked(self, stop: StopRequest) -> bool:
        """Whether to stop; of several processes all get the same answer after the same step."""
        return stop.asked() if self.ranks.size == 1 else self._others_ask

    # -- judging -----------------------------------------------------------------------------------------------------

    def _judge_epoch(
        self,
        state: TrainingState,
        batches: Iterator[Batch],
        forward: Callable[[Tensor], Any],
        display: EpochDisplay,
        stop: StopRequest,
    ) -> tuple[float, list[float]] | None:
        """Mean loss and pseudo-Dice of each class, by the weights that are to predict; None when asked to stop."""
        losses: list[Tensor] = []
        counts = torch.zeros(3, len(self.labels.class_names), dtype=torch.int64, device=self.device)
        state.network.eval()
        with predicting(state):
            for batch in itertools.islice(batches, self.recipe.validation_iterations):
                loss, overlap = self.judge(forward, batch)
                losses.append(loss)
                counts += overlap
                display.step(float(loss) if self.device.type == "cpu" else None)  # a GPU is not waited for
                if self._asked(stop):
                    return None
        return _mean(torch.stack(losses).tolist() if losses else ()), pseudo_dice(self.ranks.sum(counts).cpu())

    @torch.no_grad()
    def judge(self, forward: Callable[[Tensor], Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a validation batch over all processes, and this one's overlap counts (3, classes); on the device."""
        image, target = moved(batch, self.device)
        with self._autocast():
            output = forward(image)
            loss = self.loss(output, target) * (len(image) / self.batch_size)
        logits = output[0] if isinstance(output, (list, tuple)) else output
        counts = count_overlap(logits, target, self.labels)
        loss, asked = self._with_flag(loss.float())
        self._hear(asked)
        return loss, counts

    def _hear(self, asked: Tensor) -> None:
        """Whether any process asks for a stop: on a GPU known one batch late, which nothing waits for."""
        if self.ranks.size == 1:
            return
        late = self.device.type == "cuda"
        if late and self._flags.on_their_way:
            self._others_ask = self._flags.take()[0] > 0
        self._flags.send(asked.view(1))
        if not late:
            self._others_ask = self._flags.take()[0] > 0

    # -- around them -------------------------------------------------------------------------------------------------

    def _forward(self, network: nn.Module) -> Callable[[Tensor], Any]:
        """The network as it is called: compiled, and of one gradient with the other processes'.

        Made again only when an epoch trains other weights than the one before: wrappers look at that once.
        """
        trained = tuple(weight.requires_grad for weight in network.parameters())
        if self._wrapped is None or self._wrapped[0] != trained:
            wrapped = self.ranks.wrap(network, find_unused=self._has_unused(network))
            self._wrapped = trained, wrapped, training_forward(wrapped, self.recipe, self.device)
        return self._wrapped[2]

    def _has_unused(self, network: nn.Module) -> bool:
        """Whether weights that learn may get no gradient: then DDP has to look for them in every step.

        Of deep supervision the coarsest output has no part in the loss. Other weights without a use are frozen
        (:func:`~nnssl_adapt.training.optimise.schedule.learns`), where the network says what they are.
        """
        return self.recipe.deep_supervision or not says_where_its_encoder_is(network)

    def _leave(self, state: TrainingState, checkpoints: CheckpointWriter, stop: StopRequest) -> NoReturn:
        self.settle(state)
        checkpoints.stopping(state)
        if checkpoints.enabled and self.ranks.is_main:  # for whoever asks whether the run gets ahead
            write_json(checkpoints.folder / STOPPED, {"epoch": state.epoch, "step": state.iteration})
        self.ranks.barrier()  # nobody leaves before the one that writes has written
        where = (
            f"stopped by {stop.reason or 'another process'} in epoch {state.epoch + 1} after {state.iteration} of "
            f"{self.recipe.iterations_per_epoch} steps"
        )
        if not checkpoints.enabled:
            raise TrainingError(f"{where}; nothing was saved, as asked")
        raise TrainingStopped(f"{where}; run the same command with --c to go on")

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _display(self, state: TrainingState, rate: float) -> EpochDisplay:
        steps = self.recipe.iterations_per_epoch + self.recipe.validation_iterations
        return EpochDisplay(state.history, state.epoch, self.recipe.epochs, steps, state.iteration, rate, self.progress)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
