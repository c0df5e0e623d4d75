"""Compare ways to train: weights, spacings, schedules, amounts of data. Running it again goes on where it stopped."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import EXIT_OK, add_verbose, stop_in_order

if TYPE_CHECKING:
    from nnssl_adapt.cluster.submission import Submission
    from nnssl_adapt.studies.study import Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study", help="a study.yaml, or the name of one that comes with the package (weights_vs_scratch, …)"
    )
    parser.add_argument("-d", dest="dataset", help="dataset id or name, instead of the file's")
    parser.add_argument("-device", help="cuda, cpu or mps, instead of the file's")
    jobs = parser.add_argument_group("where the runs are done")
    jobs.add_argument(
        "--cluster", choices=("local", "slurm"), default="local", help="on this machine (default), or as jobs of Slurm"
    )
    jobs.add_argument("--gpus", help="GPUs of each training, or TYPE:NUMBER such as a100:1 (default 1 for cuda)")
    jobs.add_argument("--cpus", type=int, default=8, help="cores of each training (default 8)")
    jobs.add_argument("--mem", default="", help="memory of each job, as Slurm writes it (48G)")
    jobs.add_argument("--time", default="", help="of each job (24:00:00); it is queued again if need be")
    jobs.add_argument("--partition", default="")
    jobs.add_argument("--account", default="")
    jobs.add_argument("--throttle", type=int, default=0, metavar="K", help="most trainings of a plan at the same time")
    jobs.add_argument(
        "--setup", type=Path, metavar="FILE", help="what every job sources first: modules, an environment"
    )
    jobs.add_argument(
        "--sbatch", action="append", default=[], metavar="'FLAGS'", help="more flags of sbatch, as --sbatch='--qos=low'"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="show the commands of all runs, and do nothing")
    what.add_argument("--status", action="store_true", help="show how far every run is")
    what.add_argument("--table", action="store_true", help="write the results so far, without running anything")
    what.add_argument("--cancel", action="store_true", help="cancel all jobs; none of them comes back")
    stop_in_order(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.studies.page import command_line
    from nnssl_adapt.studies.study import Study

    changes = {"dataset": arguments.dataset, "device": arguments.device}
    study = Study.load(arguments.study, **{name: value for name, value in changes.items() if value is not None})
    arguments.how_to_go_on = "run the same command again"
    if arguments.dry_run:
        for preparation in study.preparations:
            print(command_line("preprocess", preparation.words))
        for one in study.runs:
            print(command_line("train", one.words))
        print(
            f"{len(study.preparations)} plan(s) and {len(study.runs)} run(s); {sum(r.is_done for r in study.runs)} done"
        )
        return EXIT_OK
    if arguments.status:
        print(study.status())
        return EXIT_OK
    if arguments.cancel:
        print(f"{study.cancel()} job(s) cancelled")
        return EXIT_OK
    if not arguments.table:
        submission = _run(study, arguments)
        if submission.cluster == "slurm":
            print(
                f"{len(submission.graph.steps)} steps in {submission.folder}\nnext:\n  nnssl-adapt study {study.file} --status"
            )
            return EXIT_OK
    print(study)
    print(f"\npage: {study.save()}\nnumbers: {study.folder / 'study.csv'}")
    return EXIT_OK


def _run(study: Study, arguments: argparse.Namespace) -> Submission:
    from nnssl_adapt.cluster.graph import Resources
    from nnssl_adapt.cluster.scripts import SlurmSettings

    gpus = arguments.gpus or ("1" if study.spec.device.startswith("cuda") else "0")
    return study.run(
        arguments.cluster,
        Resources(cpus=arguments.cpus, gpus=gpus, mem=arguments.mem, time=arguments.time),
        arguments.throttle,
        SlurmSettings(
            arguments.partition,
            arguments.account,
            None if arguments.setup is None else arguments.setup.expanduser().resolve(),
            tuple(word for text in arguments.sbatch for word in shlex.split(text)),
        ),
        ("nnssl-adapt", *arguments.command_line),
    )
