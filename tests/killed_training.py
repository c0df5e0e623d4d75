"""A training that kills itself at a given place: ``python killed_training.py PLACE PLANS RECIPE_JSON RESULTS``."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny_plans import DATASET
from training_runs import at, trainer_of

from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training import checkpointing, validation
from nnssl_adapt.training.recipe import Recipe
from nnssl_adapt.training.trainer import PretrainedTrainer


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written(number):
    """Die in the ``number``-th checkpoint, half of which is in its file."""
    save, count = torch.save, itertools.count(1)

    def dying(content, path):
        save(content, path)
        if next(count) == number:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            die()

    checkpointing.torch.save = dying


def arrange(place):
    if place == "middle of an epoch":
        at(Setter, die, step=5)
    elif place == "validation batch":
        at(Setter, die, judgement=4)
    elif place == "writing a checkpoint":
        die_half_written(4)
    elif place == "end of an epoch":
        PretrainedTrainer._show = lambda self, history: die() if len(history) == 2 else None
    elif place == "before the last checkpoint":
        checkpointing.CheckpointWriter.final = die
    elif place == "validation":
        validation.FoldValidation._predict = die
    else:
        raise ValueError(place)


class Setter:
    """Stands in for pytest's monkeypatch."""

    setattr = staticmethod(setattr)


if __name__ == "__main__":
    place, plans, recipe, results = sys.argv[1:]
    arrange(place)
    plan = FinetunePlan.find(DATASET, plans)
    trainer_of(plan, Recipe(**json.loads(recipe)), results_folder=results).run()
