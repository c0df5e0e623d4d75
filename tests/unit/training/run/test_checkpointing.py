"""Checkpoints: what is in them, and how they are written."""

import copy
import math
import threading

import pytest
import torch
from support.tiny_plans import CNN, TRANSFORMER, identity_of
from support.training_runs import fold_of, interrupt, trainer_of

from nnssl_adapt.errors import NonFiniteLoss, OutputError, TrainingError
from nnssl_adapt.inference.trainer_class import PRIMUS_FROM_PLANS
from nnssl_adapt.training.loop import TrainingLoop
from nnssl_adapt.training.optimise.ema import WeightAverage
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run import checkpointing
from nnssl_adapt.training.run.background import Background
from nnssl_adapt.training.run.checkpointing import TrainingState, copied, load_checkpoint, take_snapshot
from nnssl_adapt.weights.network.architectures import Architecture


def test_time_calls_for_a_checkpoint_too(plan, recipe, monkeypatch):
    written = []
    monkeypatch.setattr(checkpointing.CheckpointWriter, "latest", lambda self, state: written.append(state.iteration))
    trainer_of(plan, recipe.override(checkpoint_minutes=1e-9)).run()
    assert written == [1, 2, 3] * 2


def test_a_checkpoint_that_could_not_be_written_leaves_the_old_one(plan, recipe, stopped, monkeypatch):
    path = trainer_of(plan, recipe).folder.path / "checkpoint_latest.pth"
    before = path.read_bytes()

    def full_disk(content, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing.torch, "save", full_disk)
    with pytest.raises(OutputError, match="no space left"):
        trainer_of(plan, recipe).run(resume=True)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".unfinished*"))


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (CNN, "nnUNetTrainer"),
        (TRANSFORMER, PRIMUS_FROM_PLANS),
        (Architecture.named("ResEncL"), "nnUNetTrainer"),
        (Architecture.named("PrimusS"), "nnUNet_Primus_S_Trainer"),
        (Architecture("Primus", dict(Architecture.named("PrimusM").kwargs)), "nnUNet_Primus_M_Trainer"),
        (Architecture.named("PrimusM", eva_depth=3), PRIMUS_FROM_PLANS),
    ],
    ids=["cnn", "other primus", "ResEncL", "PrimusS", "PrimusM spelled out", "PrimusM changed"],
)
def test_the_stock_trainer_that_builds_the_same_network(architecture, expected):
    assert identity_of(architecture, Recipe(), patch=(64, 64, 64)).stock_trainer == expected


@pytest.fixture
def stopped(plan, recipe):
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, step=4)
        with pytest.raises(TrainingError):
            trainer_of(plan, recipe).run()


def test_weights_with_two_names_are_held_once():
    inner = torch.nn.Conv3d(1, 2, 3)
    network = torch.nn.ModuleDict({"conv": inner, "all_modules": torch.nn.Sequential(inner)})
    weights = copied(network.state_dict())
    assert set(weights) == {"conv.weight", "conv.bias", "all_modules.0.weight", "all_modules.0.bias"}
    assert weights["conv.weight"] is weights["all_modules.0.weight"]


# -- what is in them -------------------------------------------------------------------------------------------------------


def test_a_snapshot_stays_what_it_was():
    network = torch.nn.Linear(2, 3)
    network.key_to_encoder = network.key_to_stem = ""
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = TrainingState(network, optimizer, None, average=WeightAverage(network, 0.9))
    run = identity_of(CNN, Recipe(ema_decay=0.9))
    before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(network.state_dict())
    content = take_snapshot(state, run, resumable=True)
    for _ in range(2):
        optimizer.step()
        state.average.update(network)
    ours = content["nnssl_adapt"]
    for name, tensor in before[1].items():
        assert torch.equal(content["network_weights"][name], tensor)
        assert torch.equal(ours["training_weights"][name], tensor) and not torch.equal(
            network.state_dict()[name], tensor
        )
        assert torch.equal(ours["average_state"]["weights"][name], tensor)
    saved = content["optimizer_state"]["state"]
    assert all(torch.equal(saved[key]["momentum_buffer"], before[0]["state"][key]["momentum_buffer"]) for key in saved)


def test_only_what_can_be_resumed_has_the_optimiser(plan, recipe):
    model = trainer_of(plan, recipe.override(ema_decay=0.9)).run()
    for name in ("best", "final"):
        content = torch.load(fold_of(model) / f"checkpoint_{name}.pth", weights_only=True)
        assert content["optimizer_state"] is None
        assert content["nnssl_adapt"]["training_weights"] is None and content["nnssl_adapt"]["average_state"] is None


# -- how they are written --------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(plan, recipe, monkeypatch):
    steps, writing = [], threading.Event()

    def slow(path, content, original=checkpointing.write_checkpoint):
        if path.name == "checkpoint_latest.pth":
            assert writing.wait(60)  # which is set two steps later
        original(path, content)

    def counting(self, *arguments, original=TrainingLoop.step):
        steps.append(original(self, *arguments))
        if len(steps) == 3:
            writing.set()
        return steps[-1]

    monkeypatch.setattr(checkpointing, "write_checkpoint", slow)
    monkeypatch.setattr(TrainingLoop, "step", counting)
    trainer_of(plan, recipe.override(checkpoint_minutes=1e-9)).run()
    assert len(steps) == 6


def test_what_fails_in_the_thread_ends_the_training(plan, recipe, monkeypatch):
    def refused(path, content):
        raise OutputError("no space left")

    monkeypatch.setattr(checkpointing, "write_checkpoint", refused)
    with pytest.raises(OutputError, match="no space left"):  # the last one has nobody after it to notice
        trainer_of(plan, recipe).run()


def test_bad_weights_do_not_replace_a_good_checkpoint(plan, recipe, monkeypatch):
    recipe = recipe.override(epochs=3, checkpoint_every=1, checkpoint_minutes=1e-9, non_finite_limit=4)

    def going_bad(self, state, *arguments, original=TrainingLoop.step):
        if state.epoch == 1 and state.iteration == 1:
            for weight in state.network.parameters():
                weight.data.fill_(math.nan)
        return original(self, state, *arguments)

    monkeypatch.setattr(TrainingLoop, "step", going_bad)
    with pytest.raises(NonFiniteLoss, match="4 times in a row"):
        trainer_of(plan, recipe).run()
    content = load_checkpoint(trainer_of(plan, recipe).folder.path / "checkpoint_latest.pth")
    assert (content["current_epoch"], content["nnssl_adapt"]["iteration"]) == (1, 1)
    assert all(torch.isfinite(tensor).all() for tensor in content["network_weights"].values())


def test_jobs_run_in_order_and_the_newest_of_a_name_counts():
    done, begun, go = [], threading.Event(), threading.Event()

    def first():
        begun.set()
        go.wait(60)
        done.append("first")

    with Background() as background:
        background.submit("latest", first)
        begun.wait(60)
        background.submit("latest", lambda: done.append("dropped"))
        background.submit("best", lambda: done.append("best"))
        background.submit("latest", lambda: done.append("newest"))
        go.set()
        background.wait()
        assert done == ["first", "newest", "best"]


def fail():
    raise OutputError("disk full")


def test_a_failure_surfaces_at_the_next_chance_or_at_the_end():
    with pytest.raises(OutputError, match="disk full"), Background() as background:
        background.submit("a", fail)
    with Background() as background:
        background.submit("a", fail)
        with pytest.raises(OutputError):
            background.wait()
        background.submit("b", lambda: None)  # it was told once


def test_a_failure_does_not_hide_the_error_that_came_first(package_log):
    with pytest.raises(NonFiniteLoss), Background() as background:
        background.submit("a", fail)
        raise NonFiniteLoss("first")
    assert "besides: disk full" in package_log.text


def test_ctrl_c_does_not_wait():
    go = threading.Event()
    with pytest.raises(KeyboardInterrupt), Background() as background:
        background.submit("a", lambda: go.wait(60))
        raise KeyboardInterrupt
    go.set()
