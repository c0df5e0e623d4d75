"""Plan a dataset for fine-tuning from a checkpoint, and preprocess it as the pre-training was."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import (
    EXIT_OK,
    add_source,
    add_verbose,
    checked_workers,
    open_source,
    run_command,
    stop_in_order,
)
from nnssl_adapt.cli.nnunet_words import add_preprocess_words
from nnssl_adapt.cli.parser import Parser
from nnssl_adapt.cli.planning_flags import add_planning_flags, plan_from

if TYPE_CHECKING:
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser, dynamic: bool = False) -> None:
    """Add the flags; with ``dynamic`` those of ``nnUNetv2_plan_like_dynamic``."""
    parser.add_argument(
        "-n", "--pretraining_name", dest="name", required=True, help="short name of the pre-training, e.g. mae"
    )
    add_planning_flags(parser, dynamic, source_required=False)
    parser.add_argument(
        "-np", dest="workers", type=int, default=None, help="processes (default: the cores there are, at most 8)"
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="do only part I of N of the cases, so that N jobs can fill one store together"
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="verify and fingerprint the dataset and see that it can be planned, but preprocess nothing: once, before N parts",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare what is there with its checksums, and make damaged cases again"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="compare the spacing modes, show the plan, and write nothing"
    )
    parser.add_argument("--overwrite_pp", action="store_true", help="preprocess every case again, replace the plan")
    add_preprocess_words(parser)
    add_source(parser)
    stop_in_order(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    import nnssl_adapt as na
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.data.preprocess_cases import WHOLE, Shard
    from nnssl_adapt.data.splits import count_folds
    from nnssl_adapt.errors import ConfigurationError

    workers = checked_workers(arguments.workers or arguments.fingerprint_processes)
    shard = Shard.parse(arguments.shard) if arguments.shard else WHOLE
    dataset = RawDataset.open(arguments.dataset)  # cheap, and wrong ids should not wait for a download
    if arguments.source is None and "2d" not in arguments.configurations:
        raise ConfigurationError("-pc CHECKPOINT is missing: what to fine-tune (only -c 2d is planned without)")
    checkpoint = None if arguments.source is None else open_source(arguments)
    if arguments.dry_run:
        return _show_only(arguments, dataset, checkpoint, workers)
    plan = plan_from(arguments, dataset, checkpoint, workers)
    print(plan)
    if arguments.prepare:
        print(f"\n{dataset.name} is verified and fingerprinted; nothing was preprocessed")
        return EXIT_OK
    store = na.preprocess_dataset(
        plan,
        workers=workers,
        overwrite=arguments.overwrite_pp,
        shard=shard,
        check=arguments.check,
        progress=not arguments.no_pbar,
        configurations=arguments.configurations,
    )
    if shard != WHOLE and not plan.plans_file.is_file():
        print(f"\npart {shard} is done; the plan is saved when all parts are")
        return EXIT_OK
    print(f"\n{len(store.identifiers)} cases preprocessed in {store.folder}")
    print(f"plan {plan.plans_name}\n  in {plan.plans_file}")
    identifiers = [case.identifier for case in dataset.cases]
    fold = "0" if count_folds(plan.dataset_folder, identifiers, dataset.folder) else "all"
    words = f"-d {dataset_id(plan.dataset_name)} -c {plan.configuration} -f {fold} -p {plan.plans_name}"
    words += " --from_scratch" if checkpoint is None else ""
    print(f"next:\n  nnUNetv2_train_pretrained {words}")
    return EXIT_OK


def _show_only(arguments: argparse.Namespace, dataset: RawDataset, checkpoint: Checkpoint | None, workers: int) -> int:
    """Compare the spacing modes, show the plan that would be made and the memory it takes; nothing is written."""
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.geometry.spacing import check_fixed
    from nnssl_adapt.planning.dataset_files import load_or_make_fingerprint
    from nnssl_adapt.planning.fit_gpu import plan_memory
    from nnssl_adapt.planning.like_pretrained import spacing_advice

    if arguments.reorient is not None:
        raise ConfigurationError(
            "--dry-run writes nothing, and --reorient copies images: run 'nnssl-adapt reorient' first"
        )
    if arguments.mode == "fixed":
        check_fixed(arguments.mode, arguments.spacing)  # before the images are read
    fingerprint = load_or_make_fingerprint(dataset, workers, progress=True, save=False)
    if checkpoint is not None and not arguments.keep_topology and not checkpoint.architecture.is_planar:
        advice = spacing_advice(checkpoint, fingerprint, arguments.spacing, dataset.labels.num_heads)
        print(f"\nSpacing modes for {dataset.name}:\n{advice}\n")
        arguments.mode = advice.picked if arguments.mode == "auto" else arguments.mode
        if arguments.mode != "fixed":
            arguments.spacing = None  # was only to be compared
    plan = plan_from(arguments, dataset, checkpoint, workers, fingerprint)
    print(plan)
    stages = len(plan.stage_channels(dataset.labels))
    print(f"Memory on a GPU, predicted: {plan_memory(plan, dataset.labels.num_heads, stage_channels=stages)}")
    print("Nothing was written: leave --dry-run out to go on")
    return EXIT_OK


def dataset_id(dataset_name: str) -> int:
    """41 of ``Dataset041_DeepGrey``."""
    return int(dataset_name[7:10])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``nnUNetv2_preprocess_like_nnssl``."""
    parser = Parser(prog="nnUNetv2_preprocess_like_nnssl", description=__doc__)
    add_arguments(parser)
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
