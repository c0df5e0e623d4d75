"""Segment images with a trained model folder, ours or one that nnU-Net trained."""

from __future__ import annotations

import argparse

from nnssl_adapt.cli.common import EXIT_OK, add_verbose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i", dest="images", required=True, nargs="+", help="folder of images, or the channel files of one case"
    )
    parser.add_argument("-o", dest="output", required=True, help="folder (or, for one case, file) to write to")
    parser.add_argument("-m", dest="model", required=True, help="trained model folder (the one with plans.json)")
    parser.add_argument(
        "-f", dest="folds", nargs="+", default=None, help="folds to average (default: all that are trained)"
    )
    parser.add_argument("--checkpoint", choices=("final", "best"), default="final")
    parser.add_argument(
        "--step-size", type=float, default=0.5, help="tile step as a fraction of the patch (default 0.5)"
    )
    parser.add_argument(
        "--no-tta", action="store_true", help="no mirroring: up to 8 times faster, a little less accurate"
    )
    parser.add_argument("--save-probabilities", action="store_true", help="also write nnU-Net's .npz and .pkl")
    parser.add_argument(
        "--continue", dest="keep_existing", action="store_true", help="skip segmentations that already exist"
    )
    parser.add_argument(
        "--float16-sums",
        action="store_true",
        help="add overlapping tiles up in float16 as nnU-Net does, to reproduce its labels exactly (default: float32)",
    )
    parser.add_argument("-device", "--device", default="cuda", choices=("cuda", "cpu", "mps"))
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    import torch

    import nnssl_adapt as na

    predictor = na.Predictor(
        arguments.model,
        folds=arguments.folds,
        checkpoint=arguments.checkpoint,
        device=arguments.device,
        step=arguments.step_size,
        tta=not arguments.no_tta,
        accumulation_dtype=torch.float16 if arguments.float16_sums else torch.float32,
    )
    images = arguments.images[0] if len(arguments.images) == 1 else arguments.images
    predictor.predict(
        images,
        arguments.output,
        overwrite=not arguments.keep_existing,
        save_probabilities=arguments.save_probabilities,
        progress=True,
    )
    print(f"segmentations in {arguments.output}")
    return EXIT_OK
