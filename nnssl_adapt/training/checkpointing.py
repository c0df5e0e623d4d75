"""Checkpoints: nnU-Net's keys with plain content, written whole or not at all, and loaded without running code.

``checkpoint_latest.pth`` has everything to go on from, down to the iteration; ``checkpoint_best.pth`` and
``checkpoint_final.pth`` are for prediction and leave out the optimiser. No running random stream is kept, because there
is none: every random draw of a run follows from its seed and the counters (see :mod:`nnssl_adapt.training.patches`).
"""

from __future__ import annotations

import logging
import math
import pickle
import signal
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.errors import ConfigurationError, UnreadableCheckpoint
from nnssl_adapt.files import atomic_path
from nnssl_adapt.training.progress import History
from nnssl_adapt.training.recipe import Recipe
from nnssl_adapt.weights.architectures import Architecture

logger = logging.getLogger(__name__)

LATEST, BEST, FINAL = "checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"

_STOCK_PRIMUS_TRAINERS = {f"Primus{size}": f"nnUNet_Primus_{size}_Trainer" for size in "SBML"}
_SAFE_TO_CHANGE = ("name", "trainer_name", "checkpoint_every", "checkpoint_minutes", "non_finite_limit")


@dataclass
class TrainingState:
    """All that changes in the course of a training.

    Attributes:
        network: on its device.
        optimizer: of all its weights.
        scaler: of the loss, in fp16 only.
        history: figures of the finished epochs.
        epoch: the epoch under way, from 0; equal to the recipe's epochs when training is over.
        iteration: its steps done.
        losses: its losses so far, of steps with a finite one.
        best_ema: highest smoothed pseudo-Dice so far.
        non_finite_in_a_row: last steps with a loss or gradient that was not finite.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any
    history: History = field(default_factory=History)
    epoch: int = 0
    iteration: int = 0
    losses: list[float] = field(default_factory=list)
    best_ema: float | None = None
    non_finite_in_a_row: int = 0


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint belongs to; a run only goes on from a checkpoint of its own.

    Attributes:
        configuration: of the plan, ``3d_fullres``.
        fold: number or ``all``.
        architecture: of the network.
        patch_size: voxels (Z, Y, X).
        num_channels: of the images.
        num_heads: output channels.
        recipe: of the run.
        version: of this package.
    """

    configuration: str
    fold: int | str
    architecture: Architecture
    patch_size: tuple[int, int, int]
    num_channels: int
    num_heads: int
    recipe: Recipe
    version: str

    @property
    def network(self) -> dict[str, Any]:
        """The network as plain values; equal for equal networks."""
        plans = self.architecture.to_plans_dict(self.patch_size)
        return {"architecture": plans, "num_channels": self.num_channels, "num_heads": self.num_heads}

    @property
    def stock_trainer(self) -> str:
        """The trainer class of released nnU-Net that builds this network: its prediction needs the name of one it has.

        The plan spells CNNs out, so its default trainer does; presets of Primus have trainers of their own.
        """
        preset = _primus_preset(self.architecture)
        return _STOCK_PRIMUS_TRAINERS[preset] if preset else "nnUNetTrainer"


def _primus_preset(architecture: Architecture) -> str | None:
    """The Primus preset that an architecture equals, whatever it is called."""
    if not architecture.is_transformer:
        return None
    for preset in _STOCK_PRIMUS_TRAINERS:
        if dict(architecture.kwargs) == dict(Architecture.named(preset).kwargs):
            return preset
    return None


# -- writing ---------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: TrainingState, run: RunIdentity, resumable: bool) -> None:
    """Write a checkpoint; with ``resumable`` it also has the optimiser and the losses of the epoch under way.

    Raises OutputError when it can't be written.
    """
    content = {
        "network_weights": weights_on_cpu(state.network),
        "trainer_name": run.stock_trainer,
        "init_args": {"configuration": run.configuration, "fold": run.fold},
        "inference_allowed_mirroring_axes": tuple(run.recipe.mirror_axes) or None,
        "current_epoch": state.epoch,
        "_best_ema": state.best_ema,
        "logging": state.history.to_dict(),
        "optimizer_state": _on_cpu(state.optimizer.state_dict()) if resumable else None,
        "grad_scaler_state": state.scaler.state_dict() if resumable and state.scaler is not None else None,
        "nnssl_adapt": {
            "version": run.version,
            "recipe": run.recipe.to_dict(),
            "network": run.network,
            "iteration": state.iteration,
            "losses": list(state.losses),
            "non_finite_in_a_row": state.non_finite_in_a_row,
            "resumable": resumable,
        },
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def weights_on_cpu(network: nn.Module) -> dict[str, Tensor]:
    """The network's state dict on the CPU. Tensors with two names share memory still, so that files hold them once."""
    moved: dict[tuple[Any, ...], Tensor] = {}
    weights = {}
    for name, tensor in network.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        weights[name] = moved.setdefault(key, tensor.detach().cpu())
    return weights


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value


class CheckpointWriter:
    """Writes a run's checkpoints into its fold's folder, when they are due.

    Args:
        folder: of the fold.
        run: what the checkpoints belong to.
        enabled: False writes nothing, for trying things out.
    """

    def __init__(self, folder: Path, run: RunIdentity, enabled: bool = True) -> None:
        self.folder = folder
        self.run = run
        self.enabled = enabled
        self._latest_at = time.monotonic()

    def latest(self, state: TrainingState) -> None:
        """Write what the run can be resumed from."""
        self._save(LATEST, state, resumable=True)
        self._latest_at = time.monotonic()

    def after_step(self, state: TrainingState) -> None:
        """Write ``checkpoint_latest`` when ``checkpoint_minutes`` have passed since the last one."""
        if time.monotonic() - self._latest_at >= 60 * self.run.recipe.checkpoint_minutes:
            self.latest(state)

    def after_epoch(self, state: TrainingState) -> None:
        """Write ``checkpoint_best`` when the smoothed pseudo-Dice is the best so far, ``checkpoint_latest`` every N epochs."""
        smoothed = state.history.ema_fg_dice[-1]
        if not math.isnan(smoothed) and (state.best_ema is None or smoothed > state.best_ema):
            state.best_ema = smoothed
            self._save(BEST, state, resumable=False)
        if state.epoch % self.run.recipe.checkpoint_every == 0 and state.epoch < self.run.recipe.epochs:
            self.latest(state)

    def final(self, state: TrainingState) -> None:
        """Write ``checkpoint_final``; nobody needs ``checkpoint_latest`` then."""
        self._save(FINAL, state, resumable=False)
        if self.enabled:
            (self.folder / LATEST).unlink(missing_ok=True)

    def _save(self, name: str, state: TrainingState, resumable: bool) -> None:
        if self.enabled:
            save_checkpoint(self.folder / name, state, self.run, resumable)


# -- reading ---------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises UnreadableCheckpoint when it is damaged or not one of ours."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UnreadableCheckpoint(f"{path} can't be read ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict) or "network_weights" not in content or "nnssl_adapt" not in content:
        raise UnreadableCheckpoint(f"{path} was not written by this package; train anew, without --c")
    return content


def check_resumable(path: Path, content: Mapping[str, Any], run: RunIdentity) -> None:
    """Raise ConfigurationError, with all reasons, when going on from a checkpoint would make no sense.

    Other changes of the recipe (learning rate, seed, …) are allowed, and logged.
    """
    ours = content["nnssl_adapt"]
    old, new = ours["recipe"], run.recipe.to_dict()
    reasons = []
    if ours["network"] != run.network:
        reasons.append("it has another network (architecture, patch of a transformer, channels or classes)")
    if content["init_args"]["fold"] != run.fold:
        reasons.append(f"it is of fold {content['init_args']['fold']}")
    if old.get("optimizer") != new["optimizer"]:
        reasons.append(f"its optimizer was {old.get('optimizer')}, now {new['optimizer']}")
    if not ours["resumable"]:
        reasons.append("it has no optimiser state")
    if content["current_epoch"] > run.recipe.epochs:
        reasons.append(
            f"it has done {content['current_epoch']} epochs, more than the {run.recipe.epochs} of the recipe"
        )
    if reasons:
        raise ConfigurationError(
            f"can't go on from {path}: {'; '.join(reasons)}. Train anew, without --c, or change it back"
        )
    for name, value in new.items():
        if name not in _SAFE_TO_CHANGE and old.get(name) != value:
            logger.warning("resuming with another %s than before: %s instead of %s", name, value, old.get(name))


def restore(state: TrainingState, content: Mapping[str, Any], recipe: Recipe) -> None:
    """Put ``state`` where a checkpoint was written: changes its network, optimiser, scaler and counters."""
    ours = content["nnssl_adapt"]
    state.network.load_state_dict(content["network_weights"])
    state.optimizer.load_state_dict(content["optimizer_state"])
    if state.scaler is not None and content["grad_scaler_state"]:
        state.scaler.load_state_dict(content["grad_scaler_state"])
    state.history = History.from_dict(content["logging"])
    state.best_ema = content["_best_ema"]
    state.epoch = int(content["current_epoch"])
    state.iteration = min(int(ours["iteration"]), recipe.iterations_per_epoch)
    state.losses = list(ours["losses"])
    state.non_finite_in_a_row = int(ours["non_finite_in_a_row"])


# -- stopping in good order ----------------------------------------------------------------------------------------------------


class StopRequest:
    """Whether somebody asked the run to stop, and how."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note SIGINT (Ctrl-C) and SIGTERM (a scheduler's end of time) instead of dying of them; the second one kills.

    Where handlers can't be set, outside the main thread, signals do what they did before.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        logger.warning("%s: finishing the step and saving (once more to stop at once)", request.signal_name)
        for known in signals:
            signal.signal(known, before[known])

    for number in signals:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number in signals:
            signal.signal(number, before[number])
