"""List the trained models of this machine, and the pre-trained checkpoints that everybody can get."""

from __future__ import annotations

import argparse
import os

from nnssl_adapt.cli.common import EXIT_OK, add_verbose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--installed", action="store_true", help="only those in nnUNet_results")
    which.add_argument("--public", action="store_true", help="only published checkpoints")
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.public:
        _show_installed(required=arguments.installed)
    if not arguments.installed:
        _show_public()
    return EXIT_OK


def _show_installed(required: bool) -> None:
    from nnssl_adapt.paths import results_folder
    from nnssl_adapt.sharing.catalogue import installed_models

    if not required and not os.environ.get("nnUNet_results"):
        print("Trained models: nnUNet_results is not set\n")
        return
    models = installed_models()
    print(f"Trained models in {results_folder()}: {len(models) or 'none'}")
    for model in models:
        origin = f"installed from {model.source}" if model.source else "trained here"
        print(f"  {model.dataset}/{model.path.name}\n    {model.summary}; {origin}")
    print()


def _show_public() -> None:
    from nnssl_adapt.sharing.catalogue import known_checkpoints

    print("Published checkpoints, for -pc (no network was asked):")
    known = known_checkpoints()
    width = max(len(checkpoint.repo_id) for checkpoint in known)
    for checkpoint in known:
        facts = [
            checkpoint.network,
            checkpoint.data,
            f"licence: {checkpoint.licence or 'see its page'}",
            checkpoint.note,
        ]
        print(f"  {checkpoint.repo_id:<{width}}  {'; '.join(fact for fact in facts if fact)}")
    print("Each one's page, with citation and licence: https://huggingface.co/OWNER/NAME")
