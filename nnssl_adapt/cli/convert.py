"""Make a raw dataset in nnU-Net's format of other people's folders; the source stays as it is."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from nnssl_adapt.cli import reorient
from nnssl_adapt.cli.common import EXIT_OK, add_verbose, checked_workers
from nnssl_adapt.cli.nnunet_words import add_convert_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="sources", dest="kind", metavar="SOURCE", required=True)
    msd = kinds.add_parser("msd", help="a task of the Medical Segmentation Decathlon, e.g. Task05_Prostate")
    msd.add_argument("folder")
    _add_common(msd, required=False)
    add_convert_words(msd)
    old = kinds.add_parser("nnunetv1", help="a task of nnU-Net 1, e.g. Task005_Prostate")
    old.add_argument("folder")
    _add_common(old, required=False)
    bids = kinds.add_parser("bids", help="a BIDS folder with its labels in derivatives")
    bids.add_argument("folder")
    bids.add_argument("--suffix", required=True, help="of the images, e.g. T2w; several channels: T1w,T2w")
    bids.add_argument("--label-suffix", required=True, help="of the labels, e.g. seg or label-SC_seg")
    bids.add_argument(
        "--derivatives", default="derivatives/labels", help="where the labels are (default: derivatives/labels)"
    )
    bids.add_argument(
        "--unlabelled",
        default="error",
        choices=("error", "skip", "test"),
        help="images without label: an error (default), left out, or test images",
    )
    _add_label_names(bids)
    _add_common(bids)
    pairs = kinds.add_parser("pairs", help="any files that patterns can pair (quote the patterns)")
    pairs.add_argument(
        "--images", required=True, action="append", metavar="GLOB", help="once a channel, e.g. 'scans/*.nii.gz'"
    )
    pairs.add_argument("--labels", required=True, metavar="GLOB", help="e.g. 'masks/*_mask.nii.gz'")
    pairs.add_argument("--channel-names", help="e.g. T1,FLAIR; CT is normalised in its own way")
    pairs.add_argument(
        "--subject", metavar="REGEX", help="finds the subject in a case's name; folds then keep subjects together"
    )
    _add_label_names(pairs)
    _add_common(pairs)
    turned = kinds.add_parser(
        "reorient", help="a dataset whose images shall all lie the same way (as nnssl-adapt reorient)"
    )
    turned.add_argument("-d", dest="dataset", required=True, help="dataset id or name, e.g. 41 or Dataset041_DeepGrey")
    turned.add_argument(
        "--to", dest="code", required=True, metavar="RPI", help="the sides that the axes x, y, z come from"
    )
    _add_workers(turned)


def _add_label_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--label-names",
        nargs="+",
        metavar="NAME=VALUE",
        help="what values in your label files mean, e.g. cord=1 lesion=255; copies are renumbered where values have gaps "
        "(default: label_1, …)",
    )


def _add_common(parser: argparse.ArgumentParser, required: bool = True) -> None:
    told = "" if required else " (default: that of the task)"
    parser.add_argument("-d", dest="number", type=int, required=required, help=f"id of the new dataset, 1 to 999{told}")
    parser.add_argument("--name", required=required, help=f"name of the new dataset{told}")
    parser.add_argument(
        "--link",
        nargs="?",
        const="symbolic",
        choices=("symbolic", "hard"),
        help="link files instead of copying them, where they need no rewriting",
    )
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-np", dest="workers", type=int, default=None, help="processes (default: the cores there are, at most 8)"
    )
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.kind == "reorient":
        return reorient.run(arguments)
    from nnssl_adapt.cli.preprocess import dataset_id
    from nnssl_adapt.data.convert.cases import Target
    from nnssl_adapt.data.convert.decathlon import convert_msd, convert_nnunetv1
    from nnssl_adapt.data.convert.loose import convert_bids, convert_pairs

    workers = checked_workers(arguments.workers)
    if arguments.kind in ("msd", "nnunetv1"):
        number, name = _of_task(arguments)
        convert = convert_msd if arguments.kind == "msd" else convert_nnunetv1
        dataset = convert(arguments.folder, Target.named(number, name, arguments.link), workers, True)
    else:
        target = Target.named(arguments.number, arguments.name, arguments.link)
        names = _label_names(arguments.label_names)
        if arguments.kind == "bids":
            dataset = convert_bids(
                arguments.folder,
                target,
                _list(arguments.suffix),
                arguments.label_suffix,
                arguments.derivatives,
                arguments.unlabelled,
                names,
                workers,
                True,
            )
        else:
            channels = _list(arguments.channel_names) if arguments.channel_names else None
            dataset = convert_pairs(
                arguments.images, arguments.labels, target, channels, names, arguments.subject, workers, True
            )
    print(f"{dataset}\n  in {dataset.folder}\n  what became of which file: conversion.csv")
    print(f"next:\n  nnssl-adapt verify -d {dataset_id(dataset.name)}")
    return EXIT_OK


def _of_task(arguments: argparse.Namespace) -> tuple[int, str]:
    """Id and name as given, or as in ``Task05_Prostate``."""
    from nnssl_adapt.errors import ConfigurationError

    match = re.fullmatch(r"Task(\d+)_(.+)", Path(arguments.folder).expanduser().resolve().name)
    if match is None and (arguments.number is None or arguments.name is None):
        raise ConfigurationError(
            f"{arguments.folder}: the folder is not called like Task05_Prostate: give the new dataset's -d ID and --name NAME"
        )
    number = arguments.number if arguments.number is not None else int(match.group(1) if match else 0)
    return number, arguments.name or (match.group(2) if match else "")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _label_names(words: list[str] | None) -> dict[str, int] | None:
    from nnssl_adapt.errors import ConfigurationError

    if words is None:
        return None
    table: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not name or not value.isdigit() or name in table:
            raise ConfigurationError(f"--label-names {word!r}: expected NAME=VALUE, each name once, e.g. cord=1")
        table[name] = int(value)
    return table
