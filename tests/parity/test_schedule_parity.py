"""Learning rates, epoch by epoch, against nnunetv2's own schedulers put together as its trainers do."""

import pytest
import torch

pytest.importorskip("nnunetv2")
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.lr_scheduler.warmup import (
    Lin_incr_LRScheduler,
    Lin_incr_offset_LRScheduler,
    PolyLRScheduler_offset,
)
from torch.optim.lr_scheduler import CosineAnnealingLR

from nnssl_adapt.training.optimise.schedule import learning_rate
from nnssl_adapt.training.recipe.recipe import Recipe


def optimizer_at(rate):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], rate)


def rates(scheduler, optimizer, epochs):
    found = []
    for epoch in epochs:
        scheduler.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def ours(recipe):
    return [learning_rate(epoch, recipe) for epoch in range(recipe.epochs)]


@pytest.mark.parametrize(
    "name",
    ["PretrainedTrainer", "PretrainedTrainer_150ep", "PretrainedTrainer_300ep", "PretrainedTrainer_Primus_150ep"],
)
def test_warm_up_of_everything(name):
    recipe = Recipe.for_trainer_name(name)
    optimizer = optimizer_at(recipe.learning_rate)
    warmup, highest = recipe.warmup_epochs, recipe.learning_rate
    theirs = rates(Lin_incr_LRScheduler(optimizer, highest, warmup), optimizer, range(warmup))
    falling = PolyLRScheduler_offset(optimizer, highest, recipe.epochs, warmup)
    theirs += rates(falling, optimizer, range(warmup, recipe.epochs))
    assert ours(recipe) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "factor"),  # of the decoder's rate while it learns alone
    [
        ("PretrainedTrainer_sawtooth", 1),
        ("PretrainedTrainer_sawtooth_150ep", 1),
        ("PretrainedTrainer_Primus_sawtooth", 0.01),
        ("PretrainedTrainer_Primus_sawtooth_150ep", 0.1),
    ],
)
def test_sawtooth(name, factor):
    recipe = Recipe.for_trainer_name(name)
    alone, together, highest = recipe.decoder_warmup_epochs, recipe.warmup_epochs, recipe.learning_rate
    half, both = alone // 2, alone + together
    optimizer = optimizer_at(highest)
    theirs = rates(Lin_incr_LRScheduler(optimizer, highest * factor, half), optimizer, range(half))
    theirs += rates(PolyLRScheduler_offset(optimizer, highest * factor, alone, half), optimizer, range(half, alone))
    theirs += rates(Lin_incr_offset_LRScheduler(optimizer, highest, both, alone), optimizer, range(alone, both))
    falling = PolyLRScheduler_offset(optimizer, highest, recipe.epochs, both)
    theirs += rates(falling, optimizer, range(both, recipe.epochs))
    assert ours(recipe) == pytest.approx(theirs, rel=1e-9)


def test_nnunets_default():
    recipe = Recipe.for_trainer_name("nnUNetTrainer_250epochs")
    optimizer = optimizer_at(1e-2)
    assert ours(recipe) == pytest.approx(rates(PolyLRScheduler(optimizer, 1e-2, 250), optimizer, range(250)), rel=1e-9)


def test_cosine():
    recipe = Recipe.for_trainer_name("nnUNetTrainerCosAnneal").override(epochs=80)
    optimizer = optimizer_at(1e-2)
    scheduler = CosineAnnealingLR(optimizer, T_max=80)
    theirs = []
    for _ in range(80):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert ours(recipe) == pytest.approx(theirs, rel=1e-6, abs=1e-12)
