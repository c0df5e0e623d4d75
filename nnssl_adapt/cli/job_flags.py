"""Flags that ``submit`` and ``study`` share: what each job asks the cluster for, and where the jobs run."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl_adapt.cluster.graph import Resources
    from nnssl_adapt.cluster.scripts import SlurmSettings


def add_job_flags(group: argparse._ArgumentGroup, cluster: str) -> None:
    """Add them to a group of a parser; ``cluster`` is where the jobs run unless the command says otherwise."""
    places = {"slurm": "as jobs of Slurm", "local": "on this machine, without Slurm"}
    described = "; ".join(f"{name}: {what}" + " (default)" * (name == cluster) for name, what in places.items())
    group.add_argument("--cluster", choices=tuple(places), default=cluster, help=described)
    group.add_argument(
        "--gpus",
        help="GPUs of each machine that trains, or TYPE:NUMBER such as a100:2 (default 1 for cuda; on CPUs: processes)",
    )
    group.add_argument("--cpus", type=int, default=8, help="cores for each process, of each GPU (default 8)")
    group.add_argument("--mem", default="", help="memory of each machine, as Slurm writes it (48G)")
    group.add_argument(
        "--time", default="", help="of each job, in any form of Slurm's (24:00:00); it is queued again if need be"
    )
    group.add_argument("--partition", default="", help="the cluster's name for some of its machines")
    group.add_argument("--account", default="", help="whose share of the cluster is used")
    group.add_argument("--throttle", type=int, default=0, metavar="K", help="most trainings at the same time")
    group.add_argument(
        "--setup", type=Path, metavar="FILE", help="what every job sources first: modules, an environment"
    )
    group.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="'FLAGS'",
        help="more flags of sbatch, as --sbatch='--qos=low' (repeatable)",
    )
    add_stage(group)


def add_stage(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add ``--stage``."""
    parser.add_argument(
        "--stage",
        metavar="DIR",
        help="copy the fold's cases to this folder on a disk of the machine while the training begins, and read them there "
        "(default: $SLURM_TMPDIR where it is set and large enough; none: no copies)",
    )


def resources_from(arguments: argparse.Namespace, device: str) -> Resources:
    """What each training asks for. On CPUs, ``--gpus`` counts processes. Raises ConfigurationError for what is no number."""
    from nnssl_adapt.cluster.graph import Resources

    on_gpu = device.startswith("cuda")
    gpus = arguments.gpus or ("1" if on_gpu else "0")
    asked = Resources(
        cpus=arguments.cpus,
        gpus=gpus,
        nodes=getattr(arguments, "nodes", 1),
        mem=arguments.mem,
        time=arguments.time,
    )
    return asked if on_gpu else replace(asked, gpus="0", tasks=max(1, asked.num_gpus))


def stage_words(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Flags of the trainings that ``--stage`` asks for. Raises ConfigurationError for a folder that makes no sense anywhere."""
    if arguments.stage is None:
        return ()
    from nnssl_adapt.machine.copying import check_stage

    check_stage(arguments.stage)
    return ("--stage", arguments.stage)


def settings_from(arguments: argparse.Namespace) -> SlurmSettings:
    """What holds for all jobs."""
    from nnssl_adapt.cluster.scripts import SlurmSettings

    flags = tuple(word for text in arguments.sbatch for word in shlex.split(text))
    setup = None if arguments.setup is None else arguments.setup.expanduser().resolve()
    return SlurmSettings(arguments.partition, arguments.account, setup, flags)
