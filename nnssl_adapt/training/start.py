"""How a run begins: new from starting weights, where it stopped, or after its end with more epochs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnssl_adapt.errors import NothingToResume, SourceError
from nnssl_adapt.training.batches.patches import seeds_for
from nnssl_adapt.training.device.layout import Layout
from nnssl_adapt.training.optimise.adapters import add_adapters
from nnssl_adapt.training.optimise.ema import WeightAverage
from nnssl_adapt.training.optimise.network_options import to_device
from nnssl_adapt.training.optimise.optimizer import build_optimizer, grad_scaler
from nnssl_adapt.training.run.checkpointing import (
    FINAL,
    LATEST,
    TrainingState,
    describe_extension,
    load_checkpoint,
    remove_unfinished,
    restore,
)
from nnssl_adapt.training.run.comparison import cases_seen, check_resumable, recorded_identity
from nnssl_adapt.training.run.folder import RunFolder, source_of
from nnssl_adapt.training.run.identity import RunIdentity
from nnssl_adapt.training.starting_weights import (
    build_initial_network,
    described_weights,
    fill_with_starting_weights,
    find_checkpoint,
    freezing_warnings,
    naming_none,
    naming_the_same,
)
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_INITIAL_WEIGHTS = 10
"""First counter of a random seed, beside those of :mod:`nnssl_adapt.training.batches.patches` and the loop's."""


@dataclass(frozen=True)
class Begun:
    """A run that has begun.

    Attributes:
        state: where it is.
        identity: what it is made of; its plan names the starting weights.
    """

    state: TrainingState
    identity: RunIdentity


@dataclass(frozen=True)
class RunStart:
    """What the beginning of a run depends on, beside what the run is made of.

    Attributes:
        folder: of the run.
        device: where the network is trained.
        autocast_dtype: what it computes in; None: float32.
        checkpoint: the starting weights, or where they lie; None: found from what the plan records.
        source_options: how to open them.
        accept_changed: what may have changed since an earlier run stopped.
        checkpointing: whether the run writes checkpoints.
        is_main: whether this process writes files.
        layout: the memory layout that was chosen.
    """

    folder: RunFolder
    device: torch.device
    autocast_dtype: torch.dtype | None
    checkpoint: Checkpoint | str | Path | None
    source_options: Mapping[str, Any]
    accept_changed: Collection[str] = ()
    checkpointing: bool = True
    is_main: bool = True
    layout: Layout = field(default_factory=Layout)

    def begin(self, identity: RunIdentity, resume: bool) -> Begun | None:
        """Begin, or go on with ``resume``. None: there is nothing left to train."""
        if not resume:
            return self._anew(identity)
        path = self.folder.checkpoint(FINAL)
        if path is None:
            return self._where_it_stopped(identity)
        finished = load_checkpoint(path)
        if int(finished["current_epoch"]) >= identity.recipe.epochs:
            logger.info("%s is trained already", self.folder.path)
            return None
        if self._is_longer_already(finished):
            return self._where_it_stopped(identity)
        begun = self._gone_on(identity, path, finished, finished=True)
        describe_extension(path, begun.state, identity.recipe)
        return begun

    def _anew(self, identity: RunIdentity) -> Begun:
        """Pre-trained weights into a new network, and the model folder's files. An earlier run is set aside."""
        network = new_network(identity)
        recipe = identity.recipe
        start = fill_with_starting_weights(
            network, identity.plan, self.checkpoint, recipe.from_scratch, self.source_options
        )
        for warning in freezing_warnings(recipe, start.report):
            logger.warning("%s", warning)
        if self.is_main:
            self.folder.refuse_other_model(start.plan)
            self.folder.set_earlier_run_aside(for_checkpoints=self.checkpointing)
            remove_unfinished(self.folder.path)
            self.folder.write_model_files(start.plan)
            start.report.save(self.folder.path / "transfer_report.json")
        logger.info("%s", start.report)
        identity = replace(identity, plan=start.plan, weights=start.weights, citations=start.citations)
        return Begun(self._state_of(network, identity), identity)

    def _where_it_stopped(self, identity: RunIdentity) -> Begun:
        path = self.folder.checkpoint(LATEST)
        if path is None:
            recipe = identity.recipe
            raise NothingToResume(
                f"{self.folder.path} has no {LATEST} to go on from: leave --c out to train from the start (a run writes "
                f"its first one after {recipe.checkpoint_every} epochs or {recipe.checkpoint_minutes:g} minutes)"
            )
        return self._gone_on(identity, path, load_checkpoint(path))

    def _gone_on(self, identity: RunIdentity, path: Path, content: dict[str, Any], finished: bool = False) -> Begun:
        """Go on from a checkpoint, if what there is now is what its run was made of."""
        named_now = replace(identity, weights=self._weights_named_now(identity))
        check_resumable(path, content, named_now, self.accept_changed, finished)
        recorded = recorded_identity(path, content, identity)
        plan = naming_the_same(identity.plan, self.folder.recorded_plan(identity.plan.configuration))
        plan = naming_none(plan) if identity.recipe.from_scratch else plan
        identity = replace(
            identity,
            plan=plan,
            seen_before=tuple(sorted(cases_seen(recorded) - set(identity.training_cases))),
            weights=None if identity.recipe.from_scratch else recorded.get("weights") or source_of(plan) or None,
            citations=tuple(content["nnssl_adapt"].get("citations", identity.citations)),
        )
        state = self._state_of(new_network(identity), identity)
        restore(state, content, identity.recipe)
        if self.is_main:
            remove_unfinished(self.folder.path)
            self.folder.refuse_other_model(plan)
            self.folder.write_model_files(plan)
        logger.info("going on from %s: epoch %d after %d steps", path, state.epoch + 1, state.iteration)
        return Begun(state, identity)

    def _is_longer_already(self, finished: Mapping[str, Any]) -> bool:
        """Whether ``checkpoint_latest`` has gone beyond the finished run: it was extended before, and stopped."""
        path = self.folder.checkpoint(LATEST)
        if path is None:
            return False
        content = load_checkpoint(path)
        return (content["current_epoch"], content["nnssl_adapt"]["iteration"]) > (finished["current_epoch"], 0)

    def _weights_named_now(self, identity: RunIdentity) -> Mapping[str, Any] | None:
        """What a run that begins again would start from; None where nothing names it."""
        plan = identity.plan
        if identity.recipe.from_scratch or (self.checkpoint is None and not source_of(plan)):
            return None
        if self.checkpoint is None:
            return source_of(plan)
        try:
            return described_weights(find_checkpoint(plan, self.checkpoint, self.source_options))
        except SourceError as error:
            logger.warning("the weights that the command names can't be compared with the run's: %s", error)
            return None

    def _state_of(self, network: nn.Module, identity: RunIdentity) -> TrainingState:
        recipe = identity.recipe
        torch.manual_seed(seeds_for(recipe.seed, _INITIAL_WEIGHTS, 1)[0])
        add_adapters(network, recipe)
        network = to_device(network, self.layout.of(recipe), self.device)
        scaler = grad_scaler() if self.autocast_dtype is torch.float16 else None
        average = None if recipe.ema_decay is None else WeightAverage(network, recipe.ema_decay)
        return TrainingState(network, build_optimizer(network, recipe, self.device), scaler, average)


def new_network(identity: RunIdentity) -> nn.Module:
    """The run's network on the CPU, with the random weights that follow from its seed."""
    seed = seeds_for(identity.recipe.seed, _INITIAL_WEIGHTS)[0]
    return build_initial_network(identity.plan, identity.network["num_heads"], seed)
