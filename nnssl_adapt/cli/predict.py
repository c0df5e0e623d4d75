"""Segment images with a trained model folder, ours or one that nnU-Net trained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.cli.common import EXIT_OK, add_verbose, default_processes
from nnssl_adapt.cli.nnunet_words import add_predict_words, part_of, processes_of

if TYPE_CHECKING:
    from nnssl_adapt.data.preprocess_cases import Shard

_WORTH_PROCESSES = 3
"""Images from which on starting worker processes, which takes seconds, pays."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i", dest="images", required=True, nargs="+", help="folder of images, or files: of one case, or of several"
    )
    parser.add_argument("-o", dest="output", required=True, help="folder (or, for one case, file) to write to")
    _add_model(parser)
    parser.add_argument(
        "-f",
        dest="folds",
        nargs="+",
        default=None,
        help="folds to average, or all (default: every one that is trained)",
    )
    parser.add_argument("--checkpoint", choices=("final", "best"), default="final")
    parser.add_argument(
        "--step-size", "-step_size", type=float, default=0.5, help="tile step as a fraction of the patch (default 0.5)"
    )
    parser.add_argument(
        "--no-tta",
        "--disable_tta",
        action="store_true",
        help="no mirroring: up to 8 times faster, a little less accurate",
    )
    parser.add_argument(
        "--save-probabilities", "--save_probabilities", action="store_true", help="also write nnU-Net's .npz and .pkl"
    )
    parser.add_argument(
        "--postprocess",
        metavar="FILE",
        help="postprocessing.json (or nnU-Net's .pkl) of find-best: what it says is done to every segmentation; "
        "probabilities stay as they are",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="predict every image again (the default)")
    again.add_argument(
        "--continue",
        "--continue_prediction",
        "--c",
        dest="keep_finished",
        action="store_true",
        help="leave out what this model with these settings has finished in the output folder",
    )
    parser.add_argument("--part", metavar="I/N", help="only the I-th of N parts of the images, for several machines")
    parser.add_argument(
        "-np",
        dest="workers",
        type=int,
        default=None,
        help="processes that read and export images; 0: threads of this process (default: by the cores, 0 on a CPU)",
    )
    parser.add_argument(
        "--float16-sums",
        action="store_true",
        help="add overlapping tiles up in float16 as nnU-Net does, to come close to its labels: of 19 images 2 differed, in one "
        "voxel each (default: float32)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp16", "bf16", "fp32"),
        help="of the network on a GPU (default: as it was trained; fp16 for nnU-Net's models)",
    )
    parser.add_argument("-device", "--device", default="cuda", help="cuda, cuda:1, mps or cpu (default cuda)")
    parser.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")
    add_predict_words(parser)
    parser.add_argument(
        "--keep-folders",
        action="store_true",
        help="of files in different folders, write segmentations into folders of the same names",
    )
    parser.add_argument(
        "--keep-orientation",
        action="store_true",
        help="take images as they lie, as nnU-Net does (default: turned to how the training images lay, if the model says)",
    )
    add_verbose(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model: its folder, or what finds it in nnUNet_results")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "-m",
        dest="model",
        help="trained model folder (the one with plans.json), a model on the Hugging Face hub "
        "(OWNER/NAME[@REVISION]), or a dataset's id or name",
    )
    which.add_argument("-d", dest="dataset", help="dataset's id or name")
    group.add_argument("-p", dest="plans", help="name of the plans (default: whichever there is)")
    group.add_argument("-tr", dest="trainer", help="name of the trainer (likewise)")
    group.add_argument("-c", dest="configuration", help="name of the configuration (likewise)")


def run(arguments: argparse.Namespace) -> int:
    import torch

    import nnssl_adapt as na
    from nnssl_adapt.errors import OutputError, PredictionError
    from nnssl_adapt.inference.record import RECORD
    from nnssl_adapt.machine.memory import reuse_freed_memory

    arguments.how_to_go_on = "run the same command with --continue"
    part = _part(part_of(arguments))
    workers = _workers(arguments)
    predictor = na.Predictor(
        _model_folder(arguments),
        folds=arguments.folds,
        checkpoint=arguments.checkpoint,
        device=arguments.device,
        step=arguments.step_size,
        tta=not arguments.no_tta,
        accumulation_dtype=torch.float16 if arguments.float16_sums else torch.float32,
        precision=arguments.precision,
        postprocessing=arguments.postprocess,
        keep_orientation=arguments.keep_orientation,
    )
    if predictor.postprocessing.steps:
        print(f"postprocessing: {predictor.postprocessing}")
    if predictor.device.type == "cpu":
        # Every layer's output would be fresh memory, which the kernel clears page by page: a quarter of the time.
        reuse_freed_memory()
    images = arguments.images[0] if len(arguments.images) == 1 else arguments.images
    try:
        predictor.predict(
            images,
            arguments.output,
            overwrite=not arguments.keep_finished,
            save_probabilities=arguments.save_probabilities,
            progress=not arguments.disable_progress_bar,
            workers=workers,
            part=part,
            keep_folders=arguments.keep_folders,
            previous=arguments.previous,
        )
    except (OutputError, PredictionError) as error:
        kept = not arguments.keep_finished and (Path(arguments.output) / RECORD).is_file()
        if kept and "--continue" not in str(error):
            raise type(error)(f"{error}\n(with --continue, what is finished is not done again)") from error
        raise
    print(f"segmentations in {arguments.output}")
    return EXIT_OK


def _part(text: str | None) -> Shard:
    from nnssl_adapt.data.preprocess_cases import WHOLE, Shard
    from nnssl_adapt.errors import ConfigurationError

    try:
        return WHOLE if text is None else Shard.parse(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"--part {str(error).removeprefix('shard ')}") from None


def _model_folder(arguments: argparse.Namespace) -> Path | str:
    """The folder or the name on the hub given by ``-m``, or the folder found by dataset, plans, trainer and configuration."""
    from nnssl_adapt.errors import ConfigurationError, DatasetNotFound
    from nnssl_adapt.inference.find_model import find_model_folder

    dataset = arguments.dataset
    if dataset is None:
        path = Path(arguments.model).expanduser()
        if path.exists() or len(path.parts) > 1:
            flags = {"-p": arguments.plans, "-tr": arguments.trainer, "-c": arguments.configuration}
            extra = [flag for flag, value in flags.items() if value is not None]
            if extra:
                raise ConfigurationError(f"{', '.join(extra)}: they choose among the models of a dataset (-d)")
            return str(arguments.model)
        dataset = arguments.model
    try:
        return find_model_folder(dataset, arguments.plans, arguments.trainer, arguments.configuration)
    except DatasetNotFound as error:
        if arguments.model is None:
            raise
        raise DatasetNotFound(f"-m {arguments.model}: no such folder, and {error}") from None


def _workers(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.errors import ConfigurationError

    requested = processes_of(arguments)
    if requested is not None:
        if requested < 0:
            raise ConfigurationError(f"-np {requested}: expected 0 (threads) or a number of processes")
        return requested
    if arguments.device == "cpu":
        return 0  # the network takes all cores: other processes would only take them away, after seconds of starting
    given = Path(arguments.images[0])
    images = sum(1 for _ in given.iterdir()) if len(arguments.images) == 1 and given.is_dir() else len(arguments.images)
    return min(default_processes(), images) if images >= _WORTH_PROCESSES else 0
