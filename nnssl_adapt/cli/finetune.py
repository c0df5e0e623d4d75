"""The whole road in one go: plan, preprocess, fine-tune and validate one fold. Running it again goes on where it stopped."""

from __future__ import annotations

import argparse
import time

from nnssl_adapt.cli.common import EXIT_OK, add_source, add_verbose, checked_workers, open_source
from nnssl_adapt.cli.planning_flags import add_planning_flags, plan_from
from nnssl_adapt.cli.train import add_run_flags, deadline_of, parse_fold, show_end
from nnssl_adapt.cli.training_flags import add_training_flags, recipe_from


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
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    started = time.time()
    import nnssl_adapt as na
    from nnssl_adapt.cli.common import require_device
    from nnssl_adapt.data.dataset import RawDataset

    fold = parse_fold(arguments.fold)
    deadline = deadline_of(arguments, started)
    require_device(arguments.device)
    dataset = RawDataset.open(arguments.dataset)
    checkpoint = open_source(arguments)
    recipe = recipe_from(arguments, checkpoint.architecture.is_transformer)
    processes = checked_workers(arguments.processes)
    plan = plan_from(arguments, dataset, checkpoint, processes)
    print(plan)
    na.preprocess_dataset(plan, workers=processes)
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
