"""Trainings that kill themselves, each at another place: ``python killed_training.py PLANS RECIPE_JSON RESULTS PLACE…``.

Each is a process of its own with its results in RESULTS/PLACE. They are forked from one, for importing torch takes seconds.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch
from support.tiny_plans import DATASET
from support.training_runs import at, trainer_of

from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training import validation
from nnssl_adapt.training.progress.history import History
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run import checkpointing
from nnssl_adapt.training.trainer import PretrainedTrainer


def die(*_, **__):
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
        validation.logits_by_tiles = die
    else:
        raise ValueError(place)


class Setter:
    """Stands in for pytest's monkeypatch."""

    setattr = staticmethod(setattr)


def train(place, plans, recipe, results):
    History.plot = lambda *_: None  # the picture after each epoch takes longer than the rest
    arrange(place)
    plan = FinetunePlan.find(DATASET, plans)
    trainer_of(plan, Recipe(**json.loads(recipe)), results_folder=Path(results) / place).run()
    sys.exit(f"the training survived {place!r}")


if __name__ == "__main__":
    import torch._dynamo  # the first optimizer of each would do it, for seconds

    words, places = sys.argv[1:4], sys.argv[4:]
    for place in places:
        child = os.fork()
        if child == 0:
            train(place, *words)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            sys.exit(1)
