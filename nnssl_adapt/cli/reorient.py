"""Copy a raw dataset so that all its images lie the same way; the original stays as it is."""

from __future__ import annotations

import argparse

from nnssl_adapt.cli.common import EXIT_OK, add_verbose, checked_workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or name, e.g. 41 or Dataset041_DeepGrey")
    parser.add_argument(
        "code",
        help="orientation, such as RPI: the sides that the axes x, y, z come from, as the Spinal Cord Toolbox says it "
        "(nibabel and SimpleITK call the same LAS)",
    )
    parser.add_argument(
        "-np", dest="workers", type=int, default=None, help="processes (default: the cores there are, at most 8)"
    )
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.cli.preprocess import dataset_id
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.data.reorient import reorient_dataset

    workers = checked_workers(arguments.workers)
    copy = reorient_dataset(RawDataset.open(arguments.dataset), arguments.code, workers=workers, progress=True)
    print(f"{copy}\n  in {copy.folder}")
    print(f"next:\n  nnUNetv2_preprocess_like_nnssl -d {dataset_id(copy.name)} -n NAME -pc CHECKPOINT")
    return EXIT_OK
