"""Find out which postprocessing helps (-g), or do what was found to help (--steps), with a folder of segmentations."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import EXIT_OK, add_verbose, checked_workers
from nnssl_adapt.cli.nnunet_words import add_postprocess_words

if TYPE_CHECKING:
    from nnssl_adapt.data.labels import LabelScheme


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", dest="input", required=True, help="folder of segmentations")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--steps",
        "-pp_pkl_file",
        metavar="FILE",
        help="postprocessing.json (or nnU-Net's .pkl) with what to do; needs -o",
    )
    what.add_argument(
        "-g",
        "-ref",
        dest="references",
        help="folder of reference labels: find out which steps improve the Dice, best on cross-validation's predictions",
    )
    parser.add_argument("-o", dest="output", help="folder to write to")
    parser.add_argument(
        "--dataset-json",
        "-dataset_json",
        dest="dataset_json",
        help="with labels and file ending (default: the one in -i)",
    )
    parser.add_argument(
        "-np", dest="workers", type=int, default=None, help="processes (default: the cores there are, at most 8)"
    )
    add_postprocess_words(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.data.dataset import DatasetJson
    from nnssl_adapt.data.labels import LabelScheme
    from nnssl_adapt.errors import CaseError, ConfigurationError
    from nnssl_adapt.inference.postprocess import Postprocessing, description_of, postprocess_folder

    folder = Path(arguments.input)
    if not folder.is_dir():
        raise CaseError(f"{folder}: no such folder")
    path = Path(arguments.dataset_json) if arguments.dataset_json else description_of(folder)
    workers = checked_workers(arguments.workers)
    if (arguments.output is None) == (arguments.steps is not None):
        raise ConfigurationError("-o goes with --steps (what -g finds is written into the input folder)")
    description = DatasetJson.load(path)
    labels = LabelScheme.from_dataset_json(description.raw, path)
    if arguments.steps is not None:
        steps = Postprocessing.load(arguments.steps)
        steps.refuse_unknown(labels, arguments.steps)
        written = postprocess_folder(folder, arguments.output, steps, description.file_ending, workers, progress=True)
        print(f"{steps}: {len(written)} segmentations in {arguments.output}")
        return EXIT_OK
    code = _determine(folder, Path(arguments.references), labels, description.file_ending, workers)
    if arguments.remove_postprocessed:
        from nnssl_adapt.evaluation.postprocessing import POSTPROCESSED

        shutil.rmtree(folder / POSTPROCESSED)
        print("the processed segmentations are removed, as --remove_postprocessed says")
    return code


def _determine(folder: Path, references: Path, labels: LabelScheme, file_ending: str, workers: int) -> int:
    from nnssl_adapt.evaluation.postprocessing import FILE, POSTPROCESSED, determine_postprocessing

    decision = determine_postprocessing(folder, references, labels, file_ending, workers, progress=True)
    before, after = decision.before.foreground_mean_dice, decision.after.foreground_mean_dice
    print(f"{decision.postprocessing}: mean Dice {before:.4f} -> {after:.4f}")
    print(f"steps: {folder / FILE}\nprocessed: {folder / POSTPROCESSED}")
    return EXIT_OK
