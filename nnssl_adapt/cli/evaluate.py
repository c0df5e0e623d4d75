"""Compare a folder of segmentations with reference labels: overlap, distances of surfaces, volumes."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnssl_adapt.cli.common import EXIT_OK, add_verbose, checked_workers
from nnssl_adapt.cli.lesion_flags import add_lesion_flags, lesion_rule
from nnssl_adapt.cli.nnunet_words import add_evaluate_words, folders_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", dest="predictions", help="folder of segmentations, CASE.nii.gz")
    parser.add_argument("-g", dest="references", help="folder of reference labels with the same names")
    parser.add_argument(
        "--dataset-json",
        "-djfile",
        dest="dataset_json",
        help="with the labels' names and regions (default: in the folder of segmentations, or beside the references')",
    )
    parser.add_argument(
        "-o",
        dest="output",
        help="file to write, and a .csv beside it (default: summary.json in -p; summary_empty_0.json with --empty 0)",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1.0, metavar="MM", help="of the normalised surface Dice (default 1 mm)"
    )
    parser.add_argument(
        "--empty",
        choices=("nan", "0", "1"),
        default="nan",
        help="what a class in neither label nor prediction counts: nothing (nan, the default and nnU-Net's), 0 or 1",
    )
    parser.add_argument(
        "--surface-dice",
        choices=("voxels", "area"),
        default="voxels",
        help="NSD weighs surface voxels alike (default), or by area as DeepMind's surface-distance does (needs MONAI)",
    )
    add_lesion_flags(parser)
    parser.add_argument("--chill", action="store_true", help="references without a prediction are fine")
    parser.add_argument(
        "-np", dest="workers", type=int, default=None, help="processes (default: the cores there are, at most 8)"
    )
    add_evaluate_words(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.data.dataset import DatasetJson
    from nnssl_adapt.data.labels import LabelScheme
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.evaluation.measures import Judging
    from nnssl_adapt.evaluation.metrics import evaluate_folder, refuse_missing_predictions
    from nnssl_adapt.evaluation.tables import summary_table, write_summary_csv

    predictions, references = map(Path, folders_of(arguments))
    judging = Judging(arguments.tolerance, arguments.empty, arguments.surface_dice, lesion_rule(arguments))
    workers = checked_workers(arguments.workers)
    # summary.json itself is nnU-Net's, which reads it and has its own rule for empty classes.
    name = "summary.json" if judging.empty == "nan" else f"summary_empty_{judging.empty}.json"
    output = Path(arguments.output) if arguments.output else predictions / name
    if output.suffix != ".json":
        raise ConfigurationError(f"-o {output}: expected a file name that ends in .json")
    path = _dataset_json(arguments.dataset_json, predictions, references)
    description = DatasetJson.load(path)
    labels = LabelScheme.from_dataset_json(description.raw, path)
    if not arguments.chill:
        refuse_missing_predictions(predictions, references, description.file_ending)
    summary = evaluate_folder(
        predictions,
        references,
        labels,
        description.file_ending,
        output=output,
        workers=workers,
        judging=judging,
        progress=True,
    )
    table = output.with_suffix(".csv")
    write_summary_csv(table, summary, description.file_ending)
    print(summary_table(summary))
    print(f"summary: {output}\nper case: {table}")
    return EXIT_OK


def _dataset_json(given: str | None, predictions: Path, references: Path) -> Path:
    """The dataset.json given, or that nnU-Net and we put where predictions or labels lie."""
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.inference.postprocess import description_of

    if given is not None:
        return Path(given)
    places = [description_of(predictions), references.parent / "dataset.json"]
    for place in places:
        if place.is_file():
            return place
    raise ConfigurationError(
        f"no dataset.json in {places[0].parent} or {places[1].parent}: name it with --dataset-json"
    )
