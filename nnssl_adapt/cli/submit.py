"""From a raw dataset and a checkpoint to a cross-validated model, as jobs of Slurm (or, without one, on this machine).

The same command again submits only what is missing. --status shows where everything stands, --cancel ends it.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    add_source,
    add_verbose,
    source_options,
    stop_in_order,
)
from nnssl_adapt.cli.job_flags import add_job_flags, resources_from, settings_from, stage_words
from nnssl_adapt.cli.planning_flags import add_planning_flags, open_source_if_any, plan_options_from
from nnssl_adapt.cli.training_flags import add_training_flags, recipe_from

if TYPE_CHECKING:
    from nnssl_adapt.cluster.scripts import SlurmSettings
    from nnssl_adapt.cluster.submission import Submission

_RENEWED_EVERY = 20.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_planning_flags(parser, source_required=False)
    parser.add_argument("-n", dest="name", help="short name of the pre-training (default: pretrained)")
    group = parser.add_argument_group("the jobs")
    group.add_argument("--folds", default="0-4", help="such as 0-4 (default) or 0,2")
    group.add_argument(
        "--shards", type=int, default=1, help="jobs that preprocess, each a part of the cases (default 1)"
    )
    group.add_argument("--nodes", type=int, default=1, help="machines that train one fold together (default 1)")
    add_job_flags(group, cluster="slurm")
    group.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="tensorboard|wandb|mlflow|trackio",
        help="send each epoch's figures there as well",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="check everything, show the scripts, and submit nothing")
    what.add_argument("--status", action="store_true", help="where everything stands")
    what.add_argument("--watch", action="store_true", help="the same, renewed until all is over")
    what.add_argument("--cancel", action="store_true", help="cancel all jobs; none of them comes back")
    add_training_flags(parser)
    add_source(parser)
    stop_in_order(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.status or arguments.watch:
        return _show_status(arguments)
    if arguments.cancel:
        return _cancel(arguments)
    return _submit(arguments)


def _submit(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.cluster.submit import submit
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.weights.network.architectures import Architecture

    arguments.name = arguments.name or "pretrained"
    dataset = RawDataset.open(arguments.dataset)
    checkpoint = open_source_if_any(arguments)
    # Without weights the network is known once it is planned, which submit() does; then it checks the recipe again.
    architecture = Architecture.named("ResEncL") if checkpoint is None else checkpoint.architecture
    submitted = submit(
        dataset.name,
        arguments.source,
        arguments.name,
        folds=parse_folds(arguments.folds),
        shards=arguments.shards,
        recipe=recipe_from(arguments, architecture, dataset.labels),
        device=arguments.device,
        resources=resources_from(arguments, arguments.device),
        throttle=arguments.throttle,
        cluster=arguments.cluster,
        settings=settings_from(arguments),
        plan_options=plan_options_from(arguments, dataset, checkpoint),
        source_options=source_options(arguments),
        training=_training_words(arguments),
        dry_run=arguments.dry_run,
        command=("nnssl-adapt", *arguments.command_line),
    )
    if arguments.dry_run:
        _show_scripts(submitted.submission, settings_from(arguments))
        print("Nothing was written or submitted: leave --dry-run out to go on")
        return EXIT_OK
    print(submitted)
    print(f"next:\n  nnssl-adapt submit -d {arguments.dataset} -n {arguments.name} --status")
    return EXIT_OK


def _show_scripts(submission: Submission, settings: SlurmSettings) -> None:
    from nnssl_adapt.cluster.scripts import group_script

    for group in submission.graph.groups:
        print(f"# {submission.script(group)}")
        print(group_script(submission.folder, submission.graph, group, settings, submission.command))


def _show_status(arguments: argparse.Namespace) -> int:
    """Exits with 1 when something failed."""
    if not arguments.watch:
        return _show_table(arguments)[0]
    from nnssl_adapt.cluster.slurm import SlurmError

    try:
        while True:
            try:
                code, over = _show_table(arguments)
            except SlurmError as error:  # a controller that is busy or is started again
                print(f"{error}; asked again in {_RENEWED_EVERY:.0f} s", file=sys.stderr, flush=True)
            else:
                if over:
                    return code
            time.sleep(_RENEWED_EVERY)
    except KeyboardInterrupt:
        print("no longer watched; the jobs go on (--cancel ends them)", file=sys.stderr)
        return EXIT_INTERRUPTED


def _show_table(arguments: argparse.Namespace) -> tuple[int, bool]:
    """Show where everything stands; returns the exit code, and whether all is over."""
    from nnssl_adapt.cluster.status import FAILED, status_of
    from nnssl_adapt.cluster.submission import find_submissions

    found = [status_of(submission) for submission in find_submissions(arguments.dataset, arguments.name)]
    if arguments.watch and sys.stdout.isatty():
        print("\033[2J\033[H", end="")  # an empty screen
    print("\n\n".join(str(status) for status in found), flush=True)
    failed = any(step.state == FAILED for status in found for step in status.steps)
    return EXIT_FAILED if failed else EXIT_OK, all(status.is_over for status in found)


def _cancel(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.cluster.submission import find_submissions

    for submission in find_submissions(arguments.dataset, arguments.name):
        print(f"{submission.graph.name}: {submission.cancel()} jobs cancelled; what is finished is kept")
    return EXIT_OK


def _training_words(arguments: argparse.Namespace) -> list[str]:
    """Flags of the training beside the recipe, which the jobs get as a file."""
    words = ["--npz"] if arguments.npz else []
    words += [] if arguments.workers is None else ["--workers", str(arguments.workers)]
    return [*words, *stage_words(arguments), *(word for tracker in arguments.track for word in ("--track", tracker))]


def parse_folds(text: str) -> list[int]:
    """``0-4``, ``0,2`` or ``0,2-4``. Raises ConfigurationError."""
    from nnssl_adapt.errors import ConfigurationError

    folds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ConfigurationError(f"--folds {text}: expected such as 0-4, or 0,2")
        folds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return folds
