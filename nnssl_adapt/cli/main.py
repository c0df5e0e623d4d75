"""``nnssl-adapt``: one command with a subcommand for every step."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nnssl_adapt.cli import (
    compare,
    convert,
    demo,
    doctor,
    ensemble,
    evaluate,
    fetch,
    find_best,
    finetune,
    inspect,
    install,
    models,
    name,
    package,
    postprocess,
    predict,
    preprocess,
    push,
    reorient,
    report,
    study,
    submit,
    train,
    verify,
)
from nnssl_adapt.cli.common import run_command
from nnssl_adapt.cli.parser import Parser

_COMMANDS = {
    "finetune": (finetune, "raw dataset + checkpoint -> validated model, in one go"),
    "fetch": (fetch, "download a checkpoint beforehand, for a machine without internet"),
    "inspect": (inspect, "what a checkpoint is, and what a dataset would get of it"),
    "preprocess": (preprocess, "plan and preprocess a dataset (as nnUNetv2_preprocess_like_nnssl)"),
    "train": (train, "fine-tune one fold (as nnUNetv2_train_pretrained)"),
    "submit": (submit, "the whole road as jobs of a cluster: preprocess, train the folds, choose; with their status"),
    "convert": (convert, "make a dataset of the Decathlon's, BIDS or any other files"),
    "verify": (verify, "everything that is wrong with a raw dataset, with the fix for each"),
    "reorient": (reorient, "copies of a dataset whose images all lie the same way"),
    "predict": (predict, "segment images with a trained model"),
    "evaluate": (evaluate, "compare segmentations with reference labels"),
    "compare": (compare, "compare models case by case, with confidence intervals"),
    "find-best": (find_best, "compare trained models and ensembles, and say how to predict with the best"),
    "ensemble": (ensemble, "average the probabilities that several models saved"),
    "postprocess": (postprocess, "keep only the largest component where that helps"),
    "study": (study, "compare ways to train: weights, spacings, schedules, amounts of data"),
    "report": (report, "one HTML page about a trained model"),
    "package": (package, "a release package of a trained model, for SCT and nnU-Net"),
    "push": (push, "upload a trained model to the Hugging Face hub"),
    "install": (install, "put somebody's trained model where predict finds it"),
    "models": (models, "trained models on this machine, and published checkpoints"),
    "name": (name, "make or check the name of a model's repository"),
    "demo": (demo, "the whole road on an embedded example, in minutes on a CPU"),
    "doctor": (doctor, "versions, devices, folders, and who owns which command"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="nnssl-adapt", description="Fine-tune pre-trained 3D networks for segmentation, in nnU-Net's file formats."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command, (module, summary) in _COMMANDS.items():
        subparser = subparsers.add_parser(command, help=summary, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), lambda parsed: int(parsed.run(parsed)), arguments)


if __name__ == "__main__":
    sys.exit(main())
