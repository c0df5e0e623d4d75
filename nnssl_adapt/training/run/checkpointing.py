"""Checkpoints: nnU-Net's keys with plain content, written whole or not at all, and loaded without running code.

``checkpoint_latest.pth`` has everything to go on from, down to the step; ``checkpoint_best.pth`` and
``checkpoint_final.pth`` are for prediction and leave out the optimiser. In each, ``network_weights`` is what predicts: the
averaged weights where the recipe averages them, with adapters merged. No running random stream is kept, because there is
none: every random draw of a run follows from its seed and the counters (see :mod:`nnssl_adapt.training.batches.patches`).

The training waits only while its state is copied to the CPU; a thread writes the copy.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.errors import ConfigurationError, UnreadableCheckpoint
from nnssl_adapt.files import TEMPORARY_PREFIX, atomic_path
from nnssl_adapt.training.optimise.adapters import has_adapters, plain_weights
from nnssl_adapt.training.optimise.ema import WeightAverage
from nnssl_adapt.training.optimise.optimizer import load_optimizer_state
from nnssl_adapt.training.progress.history import History
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.background import Background
from nnssl_adapt.training.run.identity import RunIdentity

logger = logging.getLogger(__name__)

LATEST, BEST, FINAL = "checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"

_LARGER_WITH_OPTIMISER = 4
"""How many times as much a checkpoint may hold that can be resumed from: weights, their average, and Adam's two moments."""


@dataclass
class TrainingState:
    """All that changes in the course of a training.

    Attributes:
        network: on its device; never compiled or wrapped itself.
        optimizer: of its weights.
        scaler: of the loss, in fp16 only.
        average: of the weights over the steps, where the recipe wants it.
        history: figures of the finished epochs.
        epoch: the epoch under way, from 0; equal to the recipe's epochs when training is over.
        iteration: its optimiser steps done.
        losses: its losses so far, of steps with a finite one.
        best_ema: highest smoothed pseudo-Dice so far.
        non_finite_in_a_row: last steps with a loss or gradient that was not finite.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any
    average: WeightAverage | None = None
    history: History = field(default_factory=History)
    epoch: int = 0
    iteration: int = 0
    losses: list[float] = field(default_factory=list)
    best_ema: float | None = None
    non_finite_in_a_row: int = 0


# -- copying ---------------------------------------------------------------------------------------------------------------


@contextmanager
def predicting(state: TrainingState) -> Iterator[None]:
    """Inside, the network has the weights that it is to predict with (the averaged ones); afterwards its own again."""
    if state.average is None:
        yield
        return
    own = {name: tensor.detach().clone() for name, tensor in state.network.state_dict().items()}
    state.network.load_state_dict(state.average.weights())
    try:
        yield
    finally:
        state.network.load_state_dict(own)


def predicting_weights(state: TrainingState) -> dict[str, Tensor]:
    """The weights to predict with, under the plan's own names: averaged, adapters merged. They may be the network's own."""
    return plain_weights(state.network, None if state.average is None else state.average.weights())


def take_snapshot(state: TrainingState, run: RunIdentity, resumable: bool) -> dict[str, Any]:
    """Return a checkpoint's content, copied to the CPU: training on changes nothing in it.

    With ``resumable`` it also has the optimiser, the losses of the epoch under way, and the weights as they are trained
    where those are not what predicts.
    """
    weights = copied(predicting_weights(state))
    other_weights = state.average is not None or has_adapters(state.network)
    return {
        "network_weights": weights,
        "trainer_name": run.stock_trainer,
        "init_args": {"configuration": run.plan.configuration, "fold": run.fold},
        "inference_allowed_mirroring_axes": run.plan.mirrored_in_file(run.recipe.mirror_axes) or None,
        "current_epoch": state.epoch,
        "_best_ema": state.best_ema,
        "logging": state.history.to_dict(),
        "optimizer_state": _copied_deep(state.optimizer.state_dict()) if resumable else None,
        "grad_scaler_state": state.scaler.state_dict() if resumable and state.scaler is not None else None,
        "nnssl_adapt": {
            "version": run.version,
            "recipe": run.recipe.to_dict(),
            "network": run.network,
            "identity": run.to_dict(),
            "citations": list(run.citations),
            "iteration": state.iteration,
            "losses": list(state.losses),
            "non_finite_in_a_row": state.non_finite_in_a_row,
            "figures": state.history.our_figures(),
            "resumable": resumable,
            "training_weights": copied(state.network.state_dict()) if resumable and other_weights else None,
            "average_state": _copied_deep(state.average.state_dict()) if resumable and state.average else None,
        },
    }


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, copied to the CPU. Those with two names share memory still, so that files hold them once."""
    moved: dict[tuple[Any, ...], Tensor] = {}
    result = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in moved or tensor.numel() == 0:
            moved[key] = tensor.detach().to("cpu", copy=True)
        result[name] = moved[key]
    return result


def _copied_deep(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied_deep(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied_deep(item) for item in value)
    return value


# -- writing ---------------------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all; when this returns, it is on the disk. Raises OutputError when it can't be."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)
    handle = os.open(path.parent, os.O_RDONLY)  # the new name, too, has to survive a power cut
    try:
        os.fsync(handle)
    except OSError:  # some network file systems can't
        pass
    finally:
        os.close(handle)


class CheckpointWriter:
    """Writes a run's checkpoints into its fold's folder when they are due, while the training goes on.

    Use as a context manager: at its end everything is on the disk, or the reason why not is raised.

    Args:
        folder: of the fold.
        run: what the checkpoints belong to.
        enabled: False writes nothing, for trying things out.
        here: whether this process is the one that writes.
        saved: told the seconds that ``latest`` takes from copying to renaming, or would, by what others took.
    """

    def __init__(
        self,
        folder: Path,
        run: RunIdentity,
        enabled: bool = True,
        here: bool = True,
        saved: Callable[[float], None] | None = None,
    ) -> None:
        self.folder = folder
        self.run = run
        self.enabled = enabled
        self.here = here
        self._saved = saved
        self._background = Background()
        self._latest_at = time.monotonic()

    def latest(self, state: TrainingState) -> None:
        """Have written what the run can be resumed from."""
        self._latest_at = time.monotonic()
        self._save(LATEST, state, resumable=True)

    def after_step(self, state: TrainingState, settle: Callable[[], None] = lambda: None) -> None:
        """Write ``checkpoint_latest`` when ``checkpoint_minutes`` have passed since the last one.

        ``settle`` completes the state before: the last step's figures may not have been read yet.
        """
        self._background.check()
        if time.monotonic() - self._latest_at >= 60 * self.run.recipe.checkpoint_minutes:
            settle()
            if is_good(state):
                self.latest(state)

    def after_epoch(self, state: TrainingState) -> None:
        """Write ``checkpoint_best`` when the smoothed pseudo-Dice is the best so far, ``checkpoint_latest`` every N epochs."""
        smoothed = state.history.ema_fg_dice[-1]
        if not math.isnan(smoothed) and (state.best_ema is None or smoothed > state.best_ema):
            state.best_ema = smoothed
            self._save(BEST, state, resumable=False)
        due = state.epoch % self.run.recipe.checkpoint_every == 0 and state.epoch < self.run.recipe.epochs
        if due and is_good(state):
            self.latest(state)

    def stopping(self, state: TrainingState) -> None:
        """Write ``checkpoint_latest`` and return when it is on the disk. One before weights went bad is kept instead."""
        if is_good(state) or _is_finite(state.network):
            self.latest(state)
        self._background.wait()

    def final(self, state: TrainingState) -> None:
        """Write ``checkpoint_final``; nobody needs ``checkpoint_latest`` once it is on the disk."""
        self._save(FINAL, state, resumable=False)
        self._background.wait()
        if self.enabled and self.here:
            (self.folder / LATEST).unlink(missing_ok=True)

    def _save(self, name: str, state: TrainingState, resumable: bool) -> None:
        if not self.enabled or not self.here:
            return
        started = time.monotonic()
        content = take_snapshot(state, self.run, resumable)

        def write() -> None:
            write_checkpoint(self.folder / name, content)
            if self._saved is not None:
                seconds = time.monotonic() - started
                self._saved(seconds if resumable else _LARGER_WITH_OPTIMISER * seconds)

        self._background.submit(name, write)

    def __enter__(self) -> CheckpointWriter:
        self._background.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.__exit__(kind, error, trace)


def is_good(state: TrainingState) -> bool:
    """Whether the last step was taken: weights that make the loss infinite must not replace a good checkpoint."""
    return state.non_finite_in_a_row == 0


def _is_finite(network: nn.Module) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values())


def remove_unfinished(folder: Path) -> None:
    """Delete the halves of files that a run which was killed left in a fold's folder."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_file():
            path.unlink(missing_ok=True)


# -- reading ---------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises UnreadableCheckpoint when it is damaged or not one of ours."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UnreadableCheckpoint(f"{path} can't be read ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict) or "network_weights" not in content or "nnssl_adapt" not in content:
        raise UnreadableCheckpoint(f"{path} was not written by this package; start again, without --c")
    return content


def restore(state: TrainingState, content: Mapping[str, Any], recipe: Recipe) -> None:
    """Put ``state`` where a checkpoint was written: changes its network, average, optimiser, scaler and counters.

    What the recipe says of the optimiser (learning rate, weight decay, …) stays as ``state`` has it.
    """
    ours = content["nnssl_adapt"]
    state.network.load_state_dict(ours.get("training_weights") or content["network_weights"])
    if state.average is not None:
        if ours.get("average_state"):
            state.average.load_state_dict(ours["average_state"])
        else:  # the recipe averages only from here on
            state.average = WeightAverage(state.network, state.average.decay)
    try:
        if content["optimizer_state"] is not None:  # a finished run's is not kept
            load_optimizer_state(state.optimizer, content["optimizer_state"])
    except ValueError as error:
        raise ConfigurationError(
            f"the checkpoint's optimiser has other groups of weights ({error}): freeze, rates by depth and the like can't "
            "be changed when going on; start again, without --c, or change them back"
        ) from error
    if state.scaler is not None and content["grad_scaler_state"]:
        state.scaler.load_state_dict(content["grad_scaler_state"])
    state.history = History.from_dict(content["logging"], ours.get("figures"))
    state.best_ema = content["_best_ema"]
    state.epoch = int(content["current_epoch"])
    state.iteration = min(int(ours["iteration"]), recipe.iterations_per_epoch)
    state.losses = list(ours["losses"])
    state.non_finite_in_a_row = int(ours["non_finite_in_a_row"])


def describe_extension(path: Path, state: TrainingState, recipe: Recipe) -> None:
    """Warn of what a finished run lacks, now that it is to go on for more epochs than it had."""
    missing = ["the optimiser's state (momentum), which starts from zero"]
    if state.average is not None:
        missing.append("the weights beside their average, which is what training goes on from")
    if has_adapters(state.network):
        missing.append("the adapters, which were merged into the weights: new ones are added")
    logger.warning(
        "%s is of a finished run of %d epochs, which now gets %d. It doesn't hold %s. The learning rate is that of epoch %d "
        "of %d in the longer schedule",
        path,
        state.epoch,
        recipe.epochs,
        "; nor ".join(missing),
        state.epoch + 1,
        recipe.epochs,
    )
