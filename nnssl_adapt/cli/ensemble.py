"""Average the probabilities that several models saved (--save-probabilities), and write segmentations."""

from __future__ import annotations

import argparse

from nnssl_adapt.cli.common import EXIT_OK, add_verbose, checked_workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", help="folders of predictions with .npz and .pkl, ours or nnU-Net's")
    parser.add_argument("-i", dest="more_folders", nargs="+", default=[], help="likewise, as nnUNetv2_ensemble has it")
    parser.add_argument("-o", dest="output", required=True, help="folder to write to")
    parser.add_argument("--dataset-json", help="with the labels (default: the one in the first folder)")
    parser.add_argument(
        "--save-probabilities", "--save_npz", action="store_true", help="also write the mean as .npz and .pkl"
    )
    parser.add_argument(
        "--postprocess",
        metavar="FILE",
        help="postprocessing.json (or nnU-Net's .pkl) of find-best: do what it says, too",
    )
    parser.add_argument(
        "-np", dest="workers", type=int, default=None, help="processes (default: the cores there are, at most 8)"
    )
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.inference.ensemble import ensemble_folders

    written = ensemble_folders(
        [*arguments.folders, *arguments.more_folders],
        arguments.output,
        dataset_json=arguments.dataset_json,
        save_probabilities=arguments.save_probabilities,
        postprocessing=arguments.postprocess,
        workers=checked_workers(arguments.workers),
        progress=True,
    )
    print(f"{len(written)} segmentations in {arguments.output}")
    return EXIT_OK
