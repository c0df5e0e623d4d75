"""Runs of a tiny training, and ways to disturb them."""

import itertools
import signal

import numpy as np
import torch

from nnssl_adapt.training.loop import TrainingLoop
from nnssl_adapt.training.run.checkpointing import load_checkpoint
from nnssl_adapt.training.trainer import PretrainedTrainer


class Killed(BaseException):
    """What a process that is killed is like from inside: nothing after it runs."""


def trainer_of(plan, recipe, workers=0, **options):
    return PretrainedTrainer(plan, recipe=recipe, device="cpu", workers=workers, progress=False, **options)


def fold_of(model, fold=0):
    return model.path / f"fold_{fold}"


def at(monkeypatch, do, step=None, judgement=None):
    """Call ``do`` before a training step or a validation batch (counted from 1 over the whole run)."""
    for name, number in (("step", step), ("judge", judgement)):
        original, count = getattr(TrainingLoop, name), itertools.count(1)

        def counting(self, *arguments, original=original, count=count, number=number):
            if next(count) == number:
                do()
            return original(self, *arguments)

        monkeypatch.setattr(TrainingLoop, name, counting)


def interrupt(monkeypatch, step=None, judgement=None, number=signal.SIGTERM):
    """Make the process get a signal before a training step or a validation batch."""
    at(monkeypatch, lambda: signal.raise_signal(number), step, judgement)


def assert_same_training(left, right):
    """Both models' final checkpoints are the same, down to the last bit of weights and figures; times may differ."""
    one, two = (load_checkpoint(fold_of(model) / "checkpoint_final.pth") for model in (left, right))
    assert one["network_weights"].keys() == two["network_weights"].keys()
    for name, tensor in one["network_weights"].items():
        assert torch.equal(tensor, two["network_weights"][name]), name
    for key, values in one["logging"].items():
        if key in ("train_losses", "val_losses", "dice_per_class_or_region", "mean_fg_dice", "ema_fg_dice", "lrs"):
            assert np.array_equal(values, two["logging"][key], equal_nan=True), key
    assert one["_best_ema"] == two["_best_ema"]
