"""Say what a checkpoint is; with a dataset, also what of it a network for that dataset would get."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import EXIT_OK, add_source, add_verbose, open_source

if TYPE_CHECKING:
    from nnssl_adapt.weights.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint: file, folder, Hugging Face id (owner/name[@revision]) or URL")
    parser.add_argument("-d", dest="dataset", help="dataset id or name: show what would be transferred for it")
    add_source(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    checkpoint = open_source(arguments)
    if arguments.dataset is not None:
        _show_transfer(checkpoint, arguments.dataset)
    return EXIT_OK


def _show_transfer(checkpoint: Checkpoint, dataset: str) -> None:
    import nnssl_adapt as na
    from nnssl_adapt.data.dataset import RawDataset

    raw = RawDataset.open(dataset)
    patch = checkpoint.plan.patch_size
    network = na.build_network(checkpoint.architecture, raw.num_channels, raw.labels.num_heads, patch)
    print(f"\nFor {raw.name} ({raw.num_channels} channels, {raw.labels.num_heads} outputs) at patch {tuple(patch)}:")
    print(na.transfer_weights(checkpoint, network))
