"""Compare ways to train: weights, spacings, schedules, amounts of data. Running it again goes on where it stopped."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import EXIT_OK, add_verbose, stop_in_order
from nnssl_adapt.cli.job_flags import add_job_flags, resources_from, settings_from, stage_words

if TYPE_CHECKING:
    from nnssl_adapt.cluster.submission import Submission
    from nnssl_adapt.studies.study import Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study", help="a study.yaml, or the name of one that comes with the package (weights_vs_scratch, …)"
    )
    parser.add_argument("-d", dest="dataset", help="dataset id or name, instead of the file's")
    parser.add_argument(
        "-c",
        dest="configuration",
        metavar="CONFIGURATION",
        help="3d_fullres, 3d_lowres, 3d_cascade_fullres or 2d, instead of the file's (arms that name one keep it)",
    )
    parser.add_argument("-device", help="cuda, cpu or mps, instead of the file's")
    add_job_flags(parser.add_argument_group("where the runs are done"), cluster="local")
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

    changes = {
        "dataset": arguments.dataset,
        "device": arguments.device,
        "configuration": arguments.configuration,
    }
    study = Study.load(arguments.study, **{name: value for name, value in changes.items() if value is not None})
    arguments.how_to_go_on = "run the same command again"
    if arguments.dry_run:
        for preparation in study.preparations:
            print(command_line("preprocess", preparation.words))
        for one in study.trainings:
            print(command_line("train", one.words))
        done = sum(one.is_done for one in study.trainings)
        print(f"{len(study.preparations)} plan(s) and {len(study.trainings)} run(s); {done} done")
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
    return study.run(
        arguments.cluster,
        resources_from(arguments, study.spec.device),
        arguments.throttle,
        settings_from(arguments),
        ("nnssl-adapt", *arguments.command_line),
        training=stage_words(arguments),
    )
