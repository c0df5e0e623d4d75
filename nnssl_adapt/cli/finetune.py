"""The whole road in one go: plan, preprocess, fine-tune and validate one fold. Running it again goes on where it stopped."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import (
    EXIT_OK,
    add_source,
    add_verbose,
    checked_workers,
    open_source,
    source_words,
    stop_in_order,
)
from nnssl_adapt.cli.planning_flags import add_planning_flags, plan_from
from nnssl_adapt.cli.train import add_run_flags, deadline_of, parse_fold, show_end
from nnssl_adapt.cli.training_flags import add_training_flags, recipe_from

if TYPE_CHECKING:
    from nnssl_adapt.planning.plan import FinetunePlan
    from nnssl_adapt.training.recipe.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_planning_flags(parser)
    parser.add_argument(
        "-n", dest="name", default="pretrained", help="short name of the pre-training (default: pretrained)"
    )
    parser.add_argument("-f", dest="fold", default="0", help="fold: 0 to 4, or all (default 0)")
    parser.add_argument(
        "--restart", action="store_true", help="train anew although there is an earlier run (it is set aside)"
    )
    parser.add_argument("-np", dest="processes", type=int, default=None, help="processes that preprocess")
    add_training_flags(parser)
    add_run_flags(parser)
    add_source(parser)
    stop_in_order(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    started = time.time()
    import nnssl_adapt as na
    from nnssl_adapt.cli.common import require_device
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.training.launch.launch import check_processes

    fold = parse_fold(arguments.fold)
    deadline = deadline_of(arguments, started)
    require_device(arguments.device)
    _refuse_launchers()
    check_processes(arguments.num_gpus, arguments.device)
    dataset = RawDataset.open(arguments.dataset)
    checkpoint = open_source(arguments)
    recipe = recipe_from(arguments, checkpoint.architecture.is_transformer)
    processes = checked_workers(arguments.processes)
    plan = plan_from(arguments, dataset, checkpoint, processes)
    check_processes(arguments.num_gpus, arguments.device, recipe.batch_size or plan.batch_size)
    print(plan)
    na.preprocess_dataset(plan, workers=processes)
    if arguments.num_gpus > 1:
        return _train_in_processes(arguments, plan, recipe, fold, started)
    trainer = na.PretrainedTrainer(
        plan,
        fold=fold,
        recipe=recipe,
        device=arguments.device,
        checkpoint=checkpoint,
        from_scratch=arguments.from_scratch,
        workers=arguments.workers,
        trackers=arguments.track,
    )
    model = trainer.run(
        resume=False if arguments.restart else "auto", save_probabilities=arguments.npz, deadline=deadline
    )
    show_end(model.path, fold)
    return EXIT_OK


def _refuse_launchers() -> None:
    """Several of this command would plan and preprocess the same dataset at once."""
    from nnssl_adapt.errors import ConfigurationError

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigurationError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: finetune is started once. On one machine -num_gpus starts the others "
            "for the training; for several machines, preprocess first, then srun nnUNetv2_train_pretrained --ranks slurm "
            "(docs/cluster.md)"
        )


def _train_in_processes(
    arguments: argparse.Namespace, plan: FinetunePlan, recipe: Recipe, fold: int | str, started: float
) -> int:
    """Train with ``-num_gpus`` processes of ``nnUNetv2_train_pretrained``; returns their exit code."""
    import yaml

    from nnssl_adapt.training.launch.launch import run_ranks

    with tempfile.TemporaryDirectory(prefix="nnssl_adapt-recipe-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
        words = training_words(arguments, plan, recipe, fold, started)
        return run_ranks([*words, "--recipe", str(path)], arguments.num_gpus, arguments.device)


def training_words(
    arguments: argparse.Namespace, plan: FinetunePlan, recipe: Recipe, fold: int | str, started: float
) -> list[str]:
    """What ``nnUNetv2_train_pretrained`` has to be told, beside the recipe, to go on from where preprocessing ends.

    ``started`` (seconds since 1970) is when this command was; its time limit counts from there.
    """
    from nnssl_adapt.training.run.deadline import time_left

    words = ["-d", plan.dataset_name, "-c", plan.configuration, "-f", str(fold), "-p", plan.plans_name]
    words += ["-device", arguments.device, *(["--npz"] if arguments.npz else [])]
    words += [] if arguments.workers is None else ["--workers", str(arguments.workers)]
    words += [word for tracker in arguments.track for word in ("--track", tracker)]
    words += [] if arguments.time_limit is None else ["--time-limit", time_left(arguments.time_limit, started)]
    words += [] if recipe.from_scratch else ["-pc", arguments.source, *source_words(arguments)]
    words += ["--verbose"] if arguments.verbose else []
    return [*words, *([] if arguments.restart else ["--c", "auto"])]
