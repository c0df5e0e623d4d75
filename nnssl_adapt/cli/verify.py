"""List everything that is wrong with a raw dataset, with the fix for each. Exits with 1 when there are errors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import EXIT_FAILED, EXIT_OK, add_verbose, checked_workers

if TYPE_CHECKING:
    from nnssl_adapt.data.verifying.findings import Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id, name or folder, e.g. 41")
    parser.add_argument(
        "--fix",
        action="store_true",
        help="make a copy of the dataset whose labels a rounding error away from whole numbers (0.99999) are repaired",
    )
    parser.add_argument(
        "--fix-geometry",
        action="store_true",
        help="give labels and further channels whose grid differs by rounding only the first channel's header; voxels stay",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="what counts as rounding, in voxels (default: 0.001)"
    )
    parser.add_argument("--subject", metavar="REGEX", help="finds the subject in a case's name (default: BIDS' sub-XX)")
    parser.add_argument("--csv", metavar="FILE", help="write the table there too")
    parser.add_argument(
        "-np", dest="workers", type=int, default=None, help="processes (default: the cores there are, at most 8)"
    )
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.data.verifying.examine import verify_dataset
    from nnssl_adapt.errors import DatasetNotFound
    from nnssl_adapt.files import write_text
    from nnssl_adapt.paths import find_dataset_name, raw_folder

    workers = checked_workers(arguments.workers)
    given = Path(arguments.dataset).expanduser()
    folder = given.resolve() if len(given.parts) > 1 else raw_folder() / find_dataset_name(arguments.dataset)
    if not folder.is_dir():
        raise DatasetNotFound(f"{folder}: no such dataset folder")
    verdict = verify_dataset(folder, workers, True, arguments.tolerance, arguments.fix_geometry, arguments.subject)
    print(verdict)
    if arguments.csv:
        write_text(arguments.csv, verdict.to_csv())
        print(f"table: {arguments.csv}")
    if arguments.fix:
        return _repair(verdict, workers)
    return EXIT_OK if verdict.is_good else EXIT_FAILED


def _repair(verdict: Verdict, workers: int) -> int:
    from nnssl_adapt.data.convert.repair import repair_dataset

    if verdict.is_good:
        print("nothing to repair")
        return EXIT_OK
    copy = repair_dataset(verdict, workers, True)
    print(f"repaired copy: {copy.folder}\nnext:\n  nnssl-adapt verify -d {copy.name}")
    return EXIT_OK
