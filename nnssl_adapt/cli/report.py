"""Write one HTML page about a trained model: from what, how, and how good it is."""

from __future__ import annotations

import argparse

from nnssl_adapt.cli.common import EXIT_OK, add_verbose
from nnssl_adapt.cli.lesion_flags import add_lesion_flags, lesion_rule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="trained model folder (the one with plans.json)")
    parser.add_argument("-o", dest="output", help="HTML file to write (default: report.html in the model folder)")
    parser.add_argument(
        "--no-overlays", action="store_true", help="no pictures of cases, which need the images in nnUNet_raw"
    )
    parser.add_argument(
        "--viewer",
        action="store_true",
        help="with the volumes of the worst cases in 3D (NiiVue), also without a network",
    )
    parser.add_argument(
        "--viewer-mb",
        type=float,
        metavar="MB",
        help="as --viewer, with at most so many megabytes of volumes in the page (default 100); what is left out is said",
    )
    add_lesion_flags(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.evaluation.report.report import write_report

    viewer = arguments.viewer if arguments.viewer_mb is None else arguments.viewer_mb
    path = write_report(arguments.model, arguments.output, not arguments.no_overlays, lesion_rule(arguments), viewer)
    print(f"report: {path}")
    return EXIT_OK
