"""The whole road in one go: plan, preprocess, fine-tune and validate one fold. Running it again goes on where it stopped.

Before a cascade (-c 3d_cascade_fullres), 3d_lowres is trained on all folds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import (
    EXIT_OK,
    add_source,
    add_verbose,
    checked_workers,
    source_options,
    stop_in_order,
)
from nnssl_adapt.cli.nnunet_words import add_preprocess_words, say_ignored_variables
from nnssl_adapt.cli.planning_flags import add_planning_flags, open_source_if_any, plan_from
from nnssl_adapt.cli.train import add_run_flags, carry_out, deadline_of, parse_fold
from nnssl_adapt.cli.training_flags import add_training_flags, recipe_from

if TYPE_CHECKING:
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.planning.plan import FinetunePlan
    from nnssl_adapt.training.request import TrainingRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_planning_flags(parser, source_required=False, several=False)
    parser.add_argument(
        "-n",
        "--pretraining_name",
        dest="name",
        default="pretrained",
        help="short name of the pre-training (default: pretrained)",
    )
    parser.add_argument("-f", dest="fold", help="fold: 0 to 4, or all (default 0; all where one case can't be split)")
    parser.add_argument("-np", dest="processes", type=int, default=None, help="processes that preprocess")
    add_preprocess_words(parser)
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
    from nnssl_adapt.training.request import TrainingRequest

    say_ignored_variables()
    deadline = deadline_of(arguments, started)
    _refuse_launchers()
    dataset = RawDataset.open(arguments.dataset)
    fold = _fold(arguments.fold, dataset)
    require_device(arguments.device)  # what was typed about the data is checked first
    check_processes(arguments.num_gpus, arguments.device)
    checkpoint = open_source_if_any(arguments)
    if checkpoint is not None:  # mistakes are told before anything is read
        recipe = recipe_from(arguments, checkpoint.architecture, dataset.labels)
    processes = checked_workers(arguments.processes or arguments.fingerprint_processes)
    plan = plan_from(arguments, dataset, checkpoint, processes)
    if checkpoint is None:
        recipe = recipe_from(arguments, plan.architecture, dataset.labels)
    check_processes(arguments.num_gpus, arguments.device, recipe.batch_size or plan.batch_size)
    print(plan)
    na.preprocess_dataset(plan, workers=processes, progress=not arguments.no_pbar)
    request = TrainingRequest(
        dataset=plan.dataset_name,
        plans=plan.plans_name,
        configuration=plan.configuration,
        fold=fold,
        recipe=recipe,
        device=arguments.device,
        source=None if recipe.from_scratch else arguments.source,
        source_options=source_options(arguments),
        workers=arguments.workers,
        trackers=tuple(arguments.track),
        resume=False if arguments.restart else "auto",
        save_probabilities=arguments.npz,
        deadline=deadline,
        accept_changed=tuple(arguments.accept_changed),
        stage=arguments.stage,
    )
    for one in (*_first_stages(request, plan, dataset), request):
        if arguments.num_gpus > 1:
            code = _train_in_processes(one, arguments.num_gpus, arguments.verbose)
        else:
            code = carry_out(one, plan.seen_through(one.configuration), checkpoint)
        if code != EXIT_OK:
            break
    return code


def _first_stages(request: TrainingRequest, plan: FinetunePlan, dataset: RawDataset) -> list[TrainingRequest]:
    """Of a cascade, the trainings of its first stage, on all folds; what is finished of them is kept."""
    from nnssl_adapt.data.splits import count_folds

    if plan.previous_stage is None:
        return []
    identifiers = [case.identifier for case in dataset.cases]
    folds = range(count_folds(plan.dataset_folder, identifiers, dataset.folder))
    first = replace(request, configuration=plan.previous_stage, resume="auto")
    return [replace(first, fold=fold) for fold in folds]


def _fold(text: str | None, dataset: RawDataset) -> int | str:
    """The fold asked for, which the dataset must have; without one, 0, or ``all`` where a single case can't be split."""
    from nnssl_adapt.data.splits import count_folds
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.paths import preprocessed_folder

    folds = count_folds(
        preprocessed_folder() / dataset.name, [case.identifier for case in dataset.cases], dataset.folder
    )
    fold = parse_fold(text if text is not None else "0" if folds else "all")
    if isinstance(fold, int) and fold >= folds:
        known = (
            f"it has the folds 0 to {folds - 1}, and all" if folds else "one case can't be split: -f all trains on it"
        )
        raise ConfigurationError(f"-f {fold}: {dataset.name} has no such fold; {known}")
    return fold


def _refuse_launchers() -> None:
    """Several of this command would plan and preprocess the same dataset at once."""
    from nnssl_adapt.errors import ConfigurationError

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigurationError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: finetune is started once. On one machine -num_gpus starts the others "
            "for the training; for several machines, preprocess first, then srun nnUNetv2_train_pretrained --ranks slurm "
            "(docs/cluster.md)"
        )


def _train_in_processes(request: TrainingRequest, processes: int, verbose: bool) -> int:
    """Train with several processes on this machine; returns their exit code."""
    from nnssl_adapt.training.launch.launch import run_ranks

    with tempfile.TemporaryDirectory(prefix="nnssl_adapt-request-") as folder:
        path = Path(folder) / "request.json"
        request.save(path)
        return run_ranks(["--request", str(path), *["--verbose"][: int(verbose)]], processes, request.device)
