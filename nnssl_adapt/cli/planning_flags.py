"""Flags that ``preprocess``, ``nnUNetv2_plan_like_dynamic`` and ``finetune`` share: what a plan is made from, and how."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nnssl_adapt.cli.transfer_flags import add_transfer_flags, transfer_settings_from

if TYPE_CHECKING:
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
    from nnssl_adapt.planning.plan import FinetunePlan
    from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint

MODES = ("like_pretrained", "median", "default_nnunet", "fixed", "no_resample", "auto")

PRESETS = (
    *("default", "ResEncM", "ResEncL", "ResEncXL"),
    *(f"Primus{version}{size}" for version in ("", "V2", "V3") for size in "SBML"),
)

WEIGHTS_OWN = "as-weights"
"""``--reorient`` without a code: the orientation that the weights want."""


def add_planning_flags(
    parser: argparse.ArgumentParser, dynamic: bool = False, source_required: bool = True, several: bool = True
) -> None:
    """Add ``-d -pc -am -os -pl`` and the flags of orientation and transfer; with ``dynamic`` those of --keep-topology only.

    ``several``: whether ``-c`` takes more than one configuration.
    """
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or name, e.g. 41 or Dataset041_DeepGrey")
    parser.add_argument(
        "-c",
        dest="configurations",
        nargs="+" if several else 1,
        default=["3d_fullres"],
        metavar="CONFIGURATION",
        help="nnU-Net's configurations to plan: 3d_fullres (default), 3d_lowres or 3d_cascade_fullres (where images are large), "
        "or 2d (weights of a 2D nnU-Net, or none)",
    )
    parser.add_argument(
        "-pc",
        "--pretrained_checkpoint",
        dest="source",
        required=source_required,
        help="checkpoint: file, folder, trained nnU-Net model, zip, Hugging Face id (owner/name[@revision]) or URL; -c 2d can be "
        "trained without",
    )
    if dynamic:
        parser.set_defaults(mode=MODES[0], spacing=None, keep_topology=True, normalization="from_pretraining")
    else:
        parser.add_argument(
            "-am",
            "--adaptation_mode",
            dest="mode",
            default=MODES[0],
            choices=MODES,
            help="target spacing: the pre-training's (default), the dataset's median (median = default_nnunet), "
            "fixed (with -os), every image's own (no_resample), or auto: picked by how the dataset compares (see --dry-run)",
        )
        parser.add_argument(
            "-os",
            "--override_spacing",
            dest="spacing",
            nargs=3,
            type=float,
            metavar=("Z", "Y", "X"),
            help="spacing in mm for -am fixed",
        )
        parser.add_argument(
            "--normalization",
            default="from_pretraining",
            metavar="SCHEME[,SCHEME…]",
            help="from_pretraining (default), from_data (nnU-Net's rule by channel names), zscore, ct, none, rescale_to_0_1, "
            "rgb_to_0_1, or a fixed window scaled to 0 … 1 (window:-175:250) or to other limits (window:-175:250:-1:1); one for "
            "all channels, or one for each separated by commas",
        )
        parser.add_argument(
            "--keep-topology",
            action="store_true",
            help="keep network, spacing and patch of the dataset's nnU-Net plans (-pl; where there are none, plan them here by "
            "nnU-Net's rules), fit the weights to them, and call the plan ptPlans_dynamic__NAME (as nnUNetv2_plan_like_dynamic)",
        )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="default|ResEncM|ResEncL|ResEncXL|PrimusV3S|…",
        help="plan the network of --keep-topology here, as nnU-Net's planner of this name, whatever plans there are; Primus, "
        "PrimusV2 and PrimusV3 in the sizes S, B, M and L "
        "(default: the dataset's nnU-Net plans, else ResEncL for weights of residual encoders and default for plain ones)",
    )
    parser.add_argument(
        "--fit-gpu",
        "-gpu_memory_target",
        metavar="auto|16GB",
        help="choose the largest patch, then batch, that train in the memory of the GPU here (auto) or in this much",
    )
    parser.add_argument(
        "-pl",
        "--plans_identifier",
        dest="base_plans",
        help="existing nnU-Net plans to start from (default: nnUNetPlans if there)",
    )
    parser.add_argument(
        "--plans_name",
        "--plans-name",
        "-overwrite_plans_name",
        metavar="NAME",
        help="full name of the new plan, e.g. nnUNetPlans_contrast_agnostic (default: made up of -n, spacing, normalisation)",
    )
    orientation = parser.add_mutually_exclusive_group()
    orientation.add_argument(
        "--reorient",
        nargs="?",
        const=WEIGHTS_OWN,
        metavar="CODE",
        help="work on copies of the images in this orientation, such as RPI (where the axes x, y, z come from, as the Spinal "
        "Cord Toolbox says it; default: as the weights want them). They become a dataset of their own",
    )
    orientation.add_argument(
        "--ignore-orientation",
        action="store_true",
        help="go on although images lie another way than the weights were trained with",
    )
    add_transfer_flags(parser)


def open_source_if_any(arguments: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint of ``-pc``. None for ``2d`` without one, which is then trained from random weights (``from_scratch``).

    Raises ConfigurationError for other configurations without one.
    """
    from nnssl_adapt.cli.common import open_source
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.planning.plan import PLANAR

    if arguments.source is not None:
        return open_source(arguments)
    if PLANAR not in arguments.configurations:
        raise ConfigurationError(f"-pc is missing: which weights to fine-tune (only -c {PLANAR} is trained without)")
    arguments.from_scratch = True
    return None


def plan_from(
    arguments: argparse.Namespace,
    dataset: RawDataset,
    checkpoint: Checkpoint | None,
    workers: int,
    fingerprint: DatasetFingerprint | None = None,
) -> FinetunePlan:
    """The plan that the flags of :func:`add_planning_flags` ask for. Raises what :func:`make_plan` raises."""
    import nnssl_adapt as na

    return na.make_plan(
        dataset,
        checkpoint,
        name=arguments.name,
        workers=workers,
        progress=not getattr(arguments, "no_pbar", False),
        fingerprint=fingerprint,
        **plan_options_from(arguments, dataset, checkpoint),
    )


def plan_options_from(
    arguments: argparse.Namespace, dataset: RawDataset, checkpoint: Checkpoint | None
) -> dict[str, Any]:
    """What these flags say, as keywords of :func:`make_plan`. Raises ConfigurationError where they contradict each other."""
    from nnssl_adapt.errors import ConfigurationError

    if arguments.keep_topology and arguments.normalization != "from_pretraining":
        raise ConfigurationError(
            "--keep-topology keeps the normalisation of the nnU-Net plans too: leave --normalization out"
        )
    reorient = arguments.reorient
    if reorient == WEIGHTS_OWN:
        reorient = None if checkpoint is None else checkpoint.plan.orientation
        if reorient is None:
            raise ConfigurationError(
                "--reorient: these weights don't say which orientation they want; add one, e.g. RPI"
            )
    return {
        "mode": arguments.mode,
        "spacing": arguments.spacing,
        "base_plans": arguments.base_plans,
        "transfer": transfer_settings_from(arguments, dataset.channel_names),
        "plans_name": arguments.plans_name,
        "keep_topology": arguments.keep_topology,
        "reorient": reorient,
        "ignore_orientation": arguments.ignore_orientation,
        "normalization": arguments.normalization,
        "preset": arguments.preset,
        "fit_gpu": arguments.fit_gpu,
        "configurations": arguments.configurations,
    }
