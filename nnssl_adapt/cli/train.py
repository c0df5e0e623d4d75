"""Fine-tune one fold of a preprocessed dataset, then validate it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nnssl_adapt.cli.common import EXIT_OK, add_verbose, run_command
from nnssl_adapt.cli.training_flags import add_training_flags, recipe_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "positional",
        nargs="*",
        metavar="DATASET CONFIGURATION FOLD",
        help="as with nnUNetv2_train, instead of -d -c -f",
    )
    parser.add_argument("-d", dest="dataset", help="dataset id or name")
    parser.add_argument("-c", dest="configuration", help="configuration of the plan (3d_fullres)")
    parser.add_argument("-f", dest="fold", help="fold: 0 to 4, or all")
    parser.add_argument(
        "-p", dest="plans", required=True, help="plan, e.g. ptPlans__mae____Spacing__1.00_1.00_1.00___Norm__Z"
    )
    parser.add_argument(
        "-pretrained_weights",
        "-pc",
        dest="source",
        help="the pre-trained weights, for a plan that names none, or where they lie now (they must be the plan's own)",
    )
    parser.add_argument("-num_gpus", type=int, default=1, help="GPUs (only 1 so far)")
    parser.add_argument("--c", dest="resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--val", action="store_true", help="only validate checkpoint_final")
    parser.add_argument("--val_best", action="store_true", help="validate checkpoint_best instead of checkpoint_final")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoints (for trying things)")
    add_training_flags(parser)
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    import nnssl_adapt as na
    from nnssl_adapt.cli.common import require_device
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.paths import find_dataset_name

    dataset, configuration, fold = _dataset_configuration_fold(arguments)
    if arguments.num_gpus != 1:
        raise ConfigurationError(f"-num_gpus {arguments.num_gpus}: training on several GPUs is not there yet; use 1")
    if arguments.source and arguments.from_scratch:
        raise ConfigurationError("-pretrained_weights and --from_scratch contradict each other: give one of them")
    require_device(arguments.device)
    plan = na.FinetunePlan.find(find_dataset_name(dataset), arguments.plans, configuration)
    trainer = na.PretrainedTrainer(
        plan,
        fold=fold,
        recipe=recipe_from(arguments, plan.architecture.is_transformer),
        device=arguments.device,
        checkpoint=arguments.source,
        from_scratch=arguments.from_scratch,
        workers=arguments.workers,
        disable_checkpointing=arguments.disable_checkpointing,
    )
    model = trainer.run(
        resume=arguments.resume,
        validate_only=arguments.val,
        checkpoint_for_validation="best" if arguments.val_best else "final",
        save_probabilities=arguments.npz,
    )
    print(f"model in {model.path}\nnext:\n  nnssl-adapt predict -i IMAGES -o SEGMENTATIONS -m {model.path} -f {fold}")
    return EXIT_OK


def _dataset_configuration_fold(arguments: argparse.Namespace) -> tuple[str, str, int | str]:
    """Both ways of naming them: ``-d 41 -c 3d_fullres -f 0`` and ``41 3d_fullres 0`` (nnU-Net's documentation has both)."""
    from nnssl_adapt.errors import ConfigurationError

    given = arguments.positional
    flags = (arguments.dataset, arguments.configuration, arguments.fold)
    if given and any(flag is not None for flag in flags):
        raise ConfigurationError(f"got {' '.join(given)} as well as -d/-c/-f: use one way or the other")
    if given and len(given) != 3:
        raise ConfigurationError(f"expected DATASET CONFIGURATION FOLD, got: {' '.join(given)}")
    dataset, configuration, fold = given or (arguments.dataset, arguments.configuration or "3d_fullres", arguments.fold)
    missing = [flag for flag, value in (("-d", dataset), ("-f", fold)) if value is None]
    if missing:
        raise ConfigurationError(f"missing {' and '.join(missing)}: e.g. -d 41 -c 3d_fullres -f 0 -p {arguments.plans}")
    return str(dataset), str(configuration), parse_fold(str(fold))


def parse_fold(text: str) -> int | str:
    """0, 1, … or ``all``."""
    from nnssl_adapt.errors import ConfigurationError

    if text == "all":
        return text
    if not text.isdigit():
        raise ConfigurationError(f"fold {text!r}: expected a number (0 to 4) or all")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``nnUNetv2_train_pretrained``."""
    parser = argparse.ArgumentParser(prog="nnUNetv2_train_pretrained", description=__doc__)
    add_arguments(parser)
    return run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
