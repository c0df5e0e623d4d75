"""Flags that ``train`` and ``finetune`` share: the device, and the fields of the recipe."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl_adapt.training.recipe import Recipe

_FIELD_OF_FLAG = {
    "epochs": "epochs",
    "iters": "iterations_per_epoch",
    "lr": "learning_rate",
    "warmup": "warmup_epochs",
    "batch": "batch_size",
    "patch": "patch_size",
}


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-tr", dest="trainer", help="trainer name that nnU-Net users know, e.g. PretrainedTrainer_150ep"
    )
    parser.add_argument("--recipe", help="recipe: a YAML file or the name of a bundled one (default, primus, short, …)")
    parser.add_argument("--epochs", type=int, help="number of epochs")
    parser.add_argument("--iters", type=int, help="iterations (optimiser steps) an epoch")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--warmup", type=int, help="epochs over which the learning rate rises")
    parser.add_argument("--batch", type=int, help="samples a batch")
    parser.add_argument("--patch", type=int, nargs=3, metavar=("Z", "Y", "X"), help="patch in voxels")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other recipe field (repeatable)",
    )
    parser.add_argument("--from_scratch", action="store_true", help="random weights: the baseline to compare with")
    parser.add_argument("-device", "--device", default="cuda", choices=("cuda", "cpu", "mps"))
    parser.add_argument("--npz", action="store_true", help="save validation probabilities as well (for ensembles)")
    parser.add_argument(
        "--workers", type=int, help="processes that make training batches (default: what the machine allows)"
    )


def recipe_from(arguments: argparse.Namespace, is_transformer: bool) -> Recipe:
    """The recipe that the flags ask for: ``-tr`` or ``--recipe``, with single fields overridden.

    Without either, the one published for the network's family.
    """
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.training.recipe import Recipe

    if arguments.trainer and arguments.recipe:
        raise ConfigurationError("-tr and --recipe both choose a recipe: give one of them")
    if arguments.trainer:
        recipe = Recipe.for_trainer_name(arguments.trainer)
    else:
        recipe = Recipe.load(arguments.recipe or ("primus" if is_transformer else "default"))
    overrides: dict[str, Any] = {}
    for flag, field in _FIELD_OF_FLAG.items():
        value = getattr(arguments, flag)
        if value is not None:
            overrides[field] = tuple(value) if isinstance(value, list) else value
    return recipe.with_settings(arguments.settings, **overrides)
