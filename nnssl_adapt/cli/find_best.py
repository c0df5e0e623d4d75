"""Compare trained models and their ensembles by cross-validation, and say how to predict with the best."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import EXIT_OK, add_verbose, checked_workers
from nnssl_adapt.cli.nnunet_words import add_find_best_words, dataset_of

if TYPE_CHECKING:
    from nnssl_adapt.evaluation.crossval import TrainedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", dest="dataset", help="dataset id or name")
    parser.add_argument("-p", dest="plans", nargs="+", help="names of plans (default: all that were trained)")
    parser.add_argument("-c", dest="configurations", nargs="+", help="configurations (likewise)")
    parser.add_argument("-tr", dest="trainers", nargs="+", help="trainers (likewise)")
    parser.add_argument("-f", dest="folds", nargs="+", type=int, help="folds (default: those that the models have)")
    parser.add_argument(
        "--disable_ensembling",
        "--no-ensembles",
        dest="no_ensembles",
        action="store_true",
        help="single models only; ensembles need probabilities (--npz) of every validation",
    )
    parser.add_argument(
        "-np", dest="workers", type=int, default=None, help="processes (default: the cores there are, at most 8)"
    )
    add_find_best_words(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.evaluation.instructions import instructions_text
    from nnssl_adapt.evaluation.selection import find_best, save_selection, score_of
    from nnssl_adapt.evaluation.tables import text_table

    selection = find_best(
        dataset_of(arguments),
        arguments.plans,
        arguments.configurations,
        arguments.trainers,
        arguments.folds,
        ensembles=not arguments.no_ensembles,
        workers=checked_workers(arguments.workers),
        progress=True,
    )
    names = selection.best.summary.class_names
    numbers = {model.name: str(number) for number, model in enumerate(selection.models, start=1)}
    rows = [
        [
            ("* " if candidate is selection.best else "  ") + _shown(candidate.models, numbers),
            f"{candidate.score:.4f}",
            *(f"{metrics['Dice']:.4f}" for metrics in candidate.summary.mean.values()),
        ]
        for candidate in selection.candidates
    ]
    print(text_table(["mean Dice over cases (* best)", "mean", *names], rows))
    decision = selection.decision
    print(f"with postprocessing: {score_of(decision.after):.4f} ({decision.postprocessing})\n")
    instructions = instructions_text(selection)
    print(instructions, end="")
    print(f"kept in {save_selection(selection, instructions).parent}")
    return EXIT_OK


def _shown(models: Sequence[TrainedModel], numbers: dict[str, str]) -> str:
    """Models by their names and numbers, ensembles by the numbers of their members: their names are very long."""
    if len(models) == 1:
        return f"{numbers[models[0].name]}  {models[0].name}"
    return f"   ensemble of {' and '.join(numbers[model.name] for model in models)}"
