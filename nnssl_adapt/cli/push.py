"""Upload a trained model to the Hugging Face hub, with its card, as .pth and as safetensors."""

from __future__ import annotations

import argparse

from nnssl_adapt.cli.common import EXIT_OK, add_verbose
from nnssl_adapt.cli.package import add_content_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", metavar="OWNER/NAME", help="on the hub; made if there is none")
    parser.add_argument("model", help="trained model folder, or a package (its zip or folder)")
    parser.add_argument("--private", action="store_true", help="make the new repository private")
    add_content_flags(parser)
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--overwrite", action="store_true", help="commit over the model that is there")
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    from nnssl_adapt.sharing.push import push_model

    pushed = push_model(
        arguments.repository,
        arguments.model,
        private=arguments.private,
        overwrite=arguments.overwrite,
        licence=arguments.licence,
        orientation=arguments.orientation,
        folds=arguments.folds,
        message=arguments.message,
    )
    print(f"pushed {len(pushed.files)} files to {pushed.repo_id}, commit {pushed.commit}")
    print("others use it with")
    print(f"  nnssl-adapt predict -i IMAGES -o SEGMENTATIONS -m {pushed.repo_id}")
    print(f"  nnssl-adapt install {pushed.repo_id}")
    print(f"  nnUNetv2_preprocess_like_nnssl -d ID -n NAME -pc {pushed.repo_id}@{pushed.commit}")
    return EXIT_OK
