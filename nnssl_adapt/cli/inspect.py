"""Say what a checkpoint is, and what a network would get of it: that of a dataset, or the pre-training's own.

With --prove both encoders compute the same image and are compared stage by stage; the exit code is 1 if they differ.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from nnssl_adapt.cli.common import EXIT_FAILED, EXIT_OK, add_source, add_verbose, open_source
from nnssl_adapt.cli.transfer_flags import add_transfer_flags, transfer_settings_from
from nnssl_adapt.text import dimensions

if TYPE_CHECKING:
    from torch import nn

    from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
    from nnssl_adapt.weights.transfer.settings import TransferSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint: file, folder, zip, Hugging Face id (owner/name[@revision]) or URL")
    parser.add_argument("-d", dest="dataset", help="dataset id or name: show what its network would get")
    parser.add_argument(
        "-c",
        dest="configuration",
        help="with -d: 3d_cascade_fullres for the network that also sees the previous stage's labels (default 3d_fullres; 2d for "
        "the weights of a 2D network)",
    )
    parser.add_argument("--prove", action="store_true", help="run both encoders and compare what they compute")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the network, coloured by what became of each part")
    parser.add_argument("--json", metavar="FILE", help="write everything shown, tensor by tensor")
    add_transfer_flags(parser)
    add_source(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    import nnssl_adapt as na

    checkpoint = open_source(arguments)
    print(_catalogued(checkpoint))
    _check_configuration(checkpoint, arguments)
    network, settings, heads, channels, whose = _target(checkpoint, arguments)
    silent = _stage_channels(arguments)
    report = na.transfer_weights(
        checkpoint, network, **_as_arguments(settings), head_names=heads, channel_names=channels, silent=silent
    )
    own_notes = tuple(note for note in report.notes if note not in checkpoint.notes)  # the others were shown above
    print(f"\n{whose}:\n{dataclasses.replace(report, notes=own_notes)}")
    content: dict[str, Any] = {"checkpoint": describe(checkpoint), "transfer": report.to_dict()}
    passed = True
    if arguments.prove:
        from nnssl_adapt.weights.proof.prove import prove_transfer

        proof = prove_transfer(checkpoint, network, scope=settings.scope, channels=settings.channels, silent=silent)
        passed = proof.passed
        content["proof"] = proof.to_dict()
        print(f"\n{proof}")
    if arguments.plot:
        report.plot(arguments.plot)
        print(f"\npicture: {arguments.plot}")
    if arguments.json:
        from nnssl_adapt.files import write_json

        write_json(arguments.json, content)
        print(f"\ndetails: {arguments.json}")
    return EXIT_OK if passed else EXIT_FAILED


def _catalogued(checkpoint: Checkpoint) -> str:
    """What the catalogue knows of it, in one line."""
    from nnssl_adapt.text import and_more

    if checkpoint.published is not None:
        return f"  catalogue {checkpoint.published.id}: {checkpoint.published.page}"
    similar = checkpoint.similar_published()
    if not similar:
        return "  catalogue no published network that is known here has this layout"
    return f"  catalogue by its layout it may be {and_more((model.id for model in similar), 6)}"


def _target(
    checkpoint: Checkpoint, arguments: argparse.Namespace
) -> tuple[nn.Module, TransferSettings, tuple[str, ...], tuple[str, ...], str]:
    """The network to fill, how, names of its outputs and channels, and a line that says whose it is."""
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.weights.network.architectures import build_network, nearest_patch
    from nnssl_adapt.weights.transfer.by_name import pair_by_name

    plan = checkpoint.plan
    patch = nearest_patch(checkpoint.architecture, plan.patch_size)
    size = dimensions(patch)
    if arguments.dataset is None:
        names = plan.channel_names or tuple(str(index) for index in range(plan.num_input_channels))
        heads = plan.head_names
        outputs = len(heads) or 2
        whose = f"A new network of the same kind ({len(names)} channel(s), {outputs} outputs, patch {size}) would get"
    else:
        raw = RawDataset.open(arguments.dataset)
        names, heads, outputs = tuple(raw.channel_names), raw.labels.head_names, raw.labels.num_heads
        whose = f"The network of {raw.name} ({len(names)} channel(s), {outputs} outputs, patch {size}) would get"
    settings = transfer_settings_from(arguments, names if arguments.dataset is not None else ())
    pairing = pair_by_name(settings.channels, names, plan.channel_names, plan.num_input_channels)
    settings = dataclasses.replace(settings, channels=pairing.rule)
    inputs = len(names) + _stage_channels(arguments)
    return build_network(checkpoint.architecture, inputs, outputs, patch), settings, heads, names, whose


def _check_configuration(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """Fill in the configuration where none was given; raise ConfigurationError where weights or images don't go with it."""
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.planning.plan import CONFIGURATION, PLANAR
    from nnssl_adapt.planning.planar import refuse_other_sources, refuse_volumes_of_pictures
    from nnssl_adapt.planning.request import check_configurations

    if arguments.configuration is None:
        arguments.configuration = PLANAR if checkpoint.architecture.is_planar else CONFIGURATION
    names = check_configurations(arguments.configuration)
    refuse_other_sources(checkpoint.architecture, names)
    if arguments.dataset is not None:
        refuse_volumes_of_pictures(RawDataset.open(arguments.dataset), names)


def _stage_channels(arguments: argparse.Namespace) -> int:
    """How many channels of the network are of a cascade's previous stage. Raises ConfigurationError."""
    from nnssl_adapt.data.dataset import RawDataset
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.planning.plan import CASCADE
    from nnssl_adapt.planning.request import check_configurations

    if check_configurations(arguments.configuration) != (CASCADE,):
        return 0
    if arguments.dataset is None:
        raise ConfigurationError(f"-c {CASCADE} sees the labels of a dataset as channels: say which with -d")
    return len(RawDataset.open(arguments.dataset).labels.foreground_labels)


def _as_arguments(settings: TransferSettings) -> dict[str, Any]:
    return {
        "scope": settings.scope,
        "channels": settings.channels,
        "token_order": settings.token_order,
        "waive": settings.waive,
    }


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is printed of a checkpoint, as plain content for JSON."""
    plan, architecture = checkpoint.plan, checkpoint.architecture
    return {
        "origin": checkpoint.origin.to_dict(),
        "choices": dict(checkpoint.choices),
        "architecture": {
            "class": architecture.class_name,
            "preset": architecture.preset,
            "kwargs": dict(architecture.kwargs),
        },
        "numbers_stored": checkpoint.num_parameters,
        "trainer_name": checkpoint.trainer_name,
        "supervised": plan.supervised,
        "channels": plan.num_input_channels,
        "normalization_schemes": list(plan.normalization_schemes),
        "spacing": list(plan.spacing) if plan.spacing else None,
        "patch_size": list(plan.patch_size),
        "recommended_patch_size": list(plan.recommended_patch_size) if plan.recommended_patch_size else None,
        "licence": checkpoint.licence,
        "published": checkpoint.published.id if checkpoint.published else None,
        "similar_published": [model.id for model in checkpoint.similar_published()],
        "citations": list(checkpoint.citations),
        "notes": list(checkpoint.notes),
    }
