"""Fine-tune one fold of a preprocessed dataset, then validate it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import EXIT_OK, add_source, add_verbose, run_command, source_options, stop_in_order
from nnssl_adapt.cli.job_flags import add_stage
from nnssl_adapt.cli.nnunet_words import say_ignored_variables
from nnssl_adapt.cli.parser import Parser
from nnssl_adapt.cli.training_flags import add_training_flags, recipe_from

if TYPE_CHECKING:
    from nnssl_adapt.planning.plan import FinetunePlan
    from nnssl_adapt.training.request import TrainingRequest
    from nnssl_adapt.training.run.deadline import Deadline
    from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "positional",
        nargs="*",
        metavar="DATASET CONFIGURATION FOLD",
        help="as with nnUNetv2_train, instead of -d -c -f",
    )
    parser.add_argument("-d", dest="dataset", help="dataset id or name")
    parser.add_argument("-c", dest="configuration", help="configuration of the plan (default 3d_fullres)")
    parser.add_argument("-f", dest="fold", help="fold: 0 to 4, or all")
    parser.add_argument(
        "-p", dest="plans", required=True, help="plan, e.g. ptPlans__mae____Spacing__1.00_1.00_1.00___Norm__Z"
    )
    parser.add_argument(
        "-pretrained_weights",
        "-pc",
        dest="source",
        help="the pre-trained weights, for a plan that names none, or where they lie now (they must be the plan's own)",
    )
    parser.add_argument(
        "--c",
        dest="resume",
        nargs="?",
        const="yes",
        metavar="auto",
        help="go on from the last checkpoint; --c auto: or start, if there is none",
    )
    parser.add_argument(
        "--ranks",
        choices=("slurm",),
        help="slurm: srun started one task of this command for each GPU, on one machine or several; they train together",
    )
    parser.add_argument("--val", action="store_true", help="only validate checkpoint_final")
    parser.add_argument("--val_best", action="store_true", help="validate checkpoint_best instead of checkpoint_final")
    parser.add_argument(
        "--splits", metavar="FILE", help="use the folds of this file instead of the dataset's splits_final.json"
    )
    parser.add_argument("--results", metavar="FOLDER", help="write the model there instead of into nnUNet_results")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoints (for trying things)")
    add_training_flags(parser)
    add_run_flags(parser)
    add_source(parser)
    stop_in_order(parser)
    add_verbose(parser)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restart", action="store_true", help="start again although there is an earlier run (it is set aside)"
    )
    parser.add_argument(
        "--accept-changed",
        nargs="+",
        action="extend",
        default=[],
        metavar="splits|data",
        help="go on or validate although the cases of the fold (splits), or their preprocessed voxels (data), have changed",
    )
    parser.add_argument(
        "-num_gpus", type=int, default=1, help="train with so many processes on this machine, a GPU each (default 1)"
    )
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="tensorboard|wandb|mlflow|trackio",
        help="send each epoch's figures there as well (repeatable)",
    )
    parser.add_argument(
        "--time-limit",
        metavar="MINUTES|HH:MM:SS|…",
        help="save and stop before so much time is over, with exit code 75 (any form of Slurm's --time); in a Slurm job its end "
        "counts as well (none: not)",
    )
    add_stage(parser)


def deadline_of(arguments: argparse.Namespace, started: float) -> Deadline | None:
    """When the run has to be over, by ``--time-limit`` counted from ``started`` (seconds since 1970) and by Slurm."""
    from nnssl_adapt.training.run.deadline import find_deadline

    if os.environ.get("RANK", "0") == "0":
        return find_deadline(arguments.time_limit, started)
    return find_deadline(
        arguments.time_limit, started, ask_slurm=lambda job: None
    )  # hundreds of ranks need not all ask


def run(arguments: argparse.Namespace) -> int:
    if arguments.ranks == "slurm":
        os.environ.update(_ranks_by_slurm(arguments))
    with _only_the_main_rank_talks(arguments):
        say_ignored_variables()
        return _train(arguments)


def _ranks_by_slurm(arguments: argparse.Namespace) -> dict[str, str]:
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.training.launch.slurm import slurm_ranks

    if arguments.num_gpus != 1:
        raise ConfigurationError(
            f"--ranks slurm takes what srun started, -num_gpus {arguments.num_gpus} starts processes itself: give one of them"
        )
    # The second: DDP looks for weights without a gradient, and where there are none it says at length that it need not have.
    return {**slurm_ranks(os.environ), "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}


@contextlib.contextmanager
def _only_the_main_rank_talks(arguments: argparse.Namespace) -> Iterator[None]:
    """The other ranks do the same, and would say the same; their errors are still shown."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    if not arguments.verbose:
        logging.getLogger("nnssl_adapt").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _train(arguments: argparse.Namespace) -> int:
    started = time.time()
    import nnssl_adapt as na
    from nnssl_adapt.cli.common import require_device
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.paths import find_dataset_name
    from nnssl_adapt.training.launch.launch import launch_wanted, run_ranks
    from nnssl_adapt.training.request import TrainingRequest

    dataset, configuration, fold = _dataset_configuration_fold(arguments)
    if arguments.source and arguments.from_scratch:
        raise ConfigurationError("-pretrained_weights and --from_scratch contradict each other: give one of them")
    deadline = deadline_of(arguments, started)
    plan = na.FinetunePlan.find(find_dataset_name(dataset), arguments.plans, configuration)
    require_device(arguments.device)  # what was typed about the data is checked first
    if launch_wanted(arguments.num_gpus):
        return run_ranks(without_subcommand(arguments.command_line), arguments.num_gpus, arguments.device)
    recipe = recipe_from(arguments, plan.architecture, plan.labels)
    if arguments.source and recipe.from_scratch:
        raise ConfigurationError(
            f"recipe {recipe.name} starts from random weights, and -pretrained_weights names some: leave one of them out"
        )
    request = TrainingRequest(
        dataset=plan.dataset_name,
        plans=plan.plans_name,
        configuration=plan.configuration,
        fold=fold,
        recipe=recipe,
        device=arguments.device,
        source=arguments.source,
        source_options=source_options(arguments),
        workers=arguments.workers,
        trackers=tuple(arguments.track),
        resume=False if arguments.restart else "auto" if arguments.resume == "auto" else arguments.resume is not None,
        validate_only=arguments.val,
        checkpoint_for_validation="best" if arguments.val_best else "final",
        save_probabilities=arguments.npz,
        disable_checkpointing=arguments.disable_checkpointing,
        results=arguments.results,
        splits=arguments.splits,
        deadline=deadline,
        accept_changed=tuple(arguments.accept_changed),
        stage=arguments.stage,
    )
    return carry_out(request, plan=plan)


def carry_out(request: TrainingRequest, plan: FinetunePlan | None = None, checkpoint: Checkpoint | None = None) -> int:
    """Train, together with the other processes that the environment names, and show what comes next."""
    from nnssl_adapt.training.launch.distributed import distributed

    with distributed(request.device) as ranks:
        model = request.run(ranks, plan, checkpoint)
    if ranks.is_main:
        show_end(model.path, request.fold)
    return EXIT_OK


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """What a process is told that another command started: a file with the whole request."""
    parser.add_argument("--request", type=Path)
    stop_in_order(parser)
    add_verbose(parser)


def run_request(arguments: argparse.Namespace) -> int:
    """Do what the request of another command says."""
    from nnssl_adapt.training.request import TrainingRequest

    with _only_the_main_rank_talks(arguments):
        return carry_out(TrainingRequest.load(arguments.request))


def show_end(model: Path, fold: int | str) -> None:
    """Write the report, and say where everything is and what comes next."""
    from nnssl_adapt.errors import NnsslAdaptError
    from nnssl_adapt.evaluation.report.report import write_report

    print(f"model in {model}")
    try:
        print(f"report: {write_report(model)}")
    except NnsslAdaptError as error:  # the model is what matters
        print(f"no report: {error}")
    print(f"next:\n  nnssl-adapt predict -i IMAGES -o SEGMENTATIONS -m {model} -f {fold}")


def without_subcommand(command_line: Sequence[str]) -> list[str]:
    """The words of ``nnssl-adapt train …`` that ``nnUNetv2_train_pretrained`` takes, too."""
    return list(command_line[1:] if command_line[:1] == ["train"] else command_line)


def _dataset_configuration_fold(arguments: argparse.Namespace) -> tuple[str, str, int | str]:
    """Both ways of naming them: ``-d 41 -c 3d_fullres -f 0`` and ``41 3d_fullres 0`` (nnU-Net's documentation has both)."""
    from nnssl_adapt.errors import ConfigurationError

    if arguments.resume not in (None, "yes", "auto"):  # --c 41 3d_fullres 0: its value is none, but the first word
        arguments.positional, arguments.resume = [arguments.resume, *arguments.positional], "yes"
    given = arguments.positional
    flags = (arguments.dataset, arguments.configuration, arguments.fold)
    if given and any(flag is not None for flag in flags):
        raise ConfigurationError(f"got {' '.join(given)} as well as -d/-c/-f: use one way or the other")
    if given and len(given) != 3:
        raise ConfigurationError(f"expected DATASET CONFIGURATION FOLD, got: {' '.join(given)}")
    dataset, configuration, fold = given or (arguments.dataset, arguments.configuration or "3d_fullres", arguments.fold)
    missing = [flag for flag, value in (("-d", dataset), ("-f", fold)) if value is None]
    if missing:
        raise ConfigurationError(f"missing {' and '.join(missing)}: e.g. -d 41 -c 3d_fullres -f 0 -p {arguments.plans}")
    return str(dataset), str(configuration), parse_fold(str(fold))


def parse_fold(text: str) -> int | str:
    """0, 1, … or ``all``."""
    from nnssl_adapt.errors import ConfigurationError

    if text == "all":
        return text
    if not text.isdigit():
        raise ConfigurationError(f"fold {text!r}: expected a number (0 to 4) or all")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``nnUNetv2_train_pretrained``."""
    parser = Parser(prog="nnUNetv2_train_pretrained", description=__doc__)
    add_arguments(parser)
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
