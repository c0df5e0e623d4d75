"""Plan a dataset for fine-tuning from a checkpoint, and preprocess it as the pre-training was."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nnssl_adapt.cli.common import EXIT_OK, add_source, add_verbose, checked_workers, open_source, run_command

MODES = ("like_pretrained", "median", "default_nnunet", "fixed", "no_resample")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or name, e.g. 41 or Dataset041_DeepGrey")
    parser.add_argument("-n", dest="name", required=True, help="short name of the pre-training, e.g. mae")
    parser.add_argument(
        "-pc",
        dest="source",
        required=True,
        help="checkpoint: file, folder, Hugging Face id (owner/name[@revision]) or URL",
    )
    parser.add_argument(
        "-am",
        dest="mode",
        default="like_pretrained",
        choices=MODES,
        help="target spacing: the pre-training's (default), the dataset's median (median = default_nnunet), "
        "fixed (with -os), or every image's own (no_resample)",
    )
    parser.add_argument(
        "-os", dest="spacing", nargs=3, type=float, metavar=("Z", "Y", "X"), help="spacing in mm for -am fixed"
    )
    parser.add_argument(
        "-pl", dest="base_plans", help="existing nnU-Net plans to start from (default: nnUNetPlans if there)"
    )
    parser.add_argument(
        "-np", dest="workers", type=int, default=None, help="processes (default: the cores there are, at most 8)"
    )
    parser.add_argument("--overwrite_pp", action="store_true", help="preprocess every case again, replace the plan")
    add_source(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    import nnssl_adapt as na
    from nnssl_adapt.data.dataset import RawDataset

    workers = checked_workers(arguments.workers)
    dataset = RawDataset.open(arguments.dataset)  # cheap, and wrong ids should not wait for a download
    checkpoint = open_source(arguments)
    plan = na.make_plan(
        dataset,
        checkpoint,
        mode=arguments.mode,
        name=arguments.name,
        spacing=arguments.spacing,
        base_plans=arguments.base_plans,
        workers=workers,
        progress=True,
    )
    print(plan)
    store = na.preprocess_dataset(plan, workers=workers, overwrite=arguments.overwrite_pp)
    print(f"\n{len(store.identifiers)} cases preprocessed in {store.folder}")
    print(f"plan {plan.plans_name}\n  in {plan.plans_file}")
    print(
        f"next:\n  nnUNetv2_train_pretrained -d {dataset_id(plan.dataset_name)} -c 3d_fullres -f 0 -p {plan.plans_name}"
    )
    return EXIT_OK


def dataset_id(dataset_name: str) -> int:
    """41 of ``Dataset041_DeepGrey``."""
    return int(dataset_name[7:10])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``nnUNetv2_preprocess_like_nnssl``."""
    parser = argparse.ArgumentParser(prog="nnUNetv2_preprocess_like_nnssl", description=__doc__)
    add_arguments(parser)
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
