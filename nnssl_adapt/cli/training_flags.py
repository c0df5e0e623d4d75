"""Flags that ``train`` and ``finetune`` share: the device, and the fields of the recipe.

Values of fields are taken as text and read by the recipe, so that all mistakes are found together and said in one voice.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl_adapt.data.labels import LabelScheme
    from nnssl_adapt.training.recipe.recipe import Recipe
    from nnssl_adapt.weights.network.architectures import Architecture


@dataclass(frozen=True)
class FieldFlag:
    """A flag for one field of the recipe.

    Attributes:
        flag: as typed.
        field: of the recipe.
        metavar: what the flag takes.
        help: one line.
        constant: the value of a flag that takes none; with ``metavar``, of one that may be given without.
    """

    flag: str
    field: str
    metavar: str | None
    help: str
    constant: str | None = None

    @property
    def dest(self) -> str:
        """Name in the parsed arguments; its prefix keeps it apart from other flags of the command."""
        return f"recipe_{self.field}"


_GROUPS: dict[str, tuple[FieldFlag, ...]] = {
    "length and schedule": (
        FieldFlag("--epochs", "epochs", "N", "epochs in all"),
        FieldFlag("--iters", "iterations_per_epoch", "N", "steps of the optimiser an epoch"),
        FieldFlag("--val-iters", "validation_iterations", "N", "validation batches after each epoch"),
        FieldFlag("--warmup", "warmup_epochs", "N", "epochs over which the learning rate rises"),
        FieldFlag("--decoder-warmup", "decoder_warmup_epochs", "N", "epochs of the decoder alone, before the warm-up"),
        FieldFlag("--schedule", "schedule", "poly|cosine|constant", "how the learning rate falls after the warm-up"),
    ),
    "optimiser": (
        FieldFlag("--optimizer", "optimizer", "sgd|adamw|adam", "what takes the steps"),
        FieldFlag("--lr", "learning_rate", "RATE", "highest learning rate"),
        FieldFlag("--encoder-lr", "encoder_learning_rate", "RATE", "highest learning rate of the encoder"),
        FieldFlag(
            "--llrd",
            "layer_decay",
            "FACTOR",
            "learning rate times this for each encoder layer further down (0.75, say)",
        ),
        FieldFlag("--weight-decay", "weight_decay", "DECAY", "pull of the weights towards zero"),
        FieldFlag("--clip", "gradient_clip", "NORM", "largest norm of all gradients together"),
        FieldFlag("--accumulate", "accumulate", "N", "batches whose gradients make one step"),
        FieldFlag("--ema", "ema_decay", "DECAY", "predict with averaged weights (without a number: 0.999)", "0.999"),
    ),
    "loss": (
        FieldFlag(
            "--loss", "loss", "dice_ce|dice|ce|dice_topk|dice_focal|tversky_ce", "what is minimised (default: dice_ce)"
        ),
        FieldFlag("--class-weights", "class_weights", "NAME=WEIGHT,…", "weights of classes in the cross-entropy"),
    ),
    "what learns": (
        FieldFlag("--freeze", "freeze", "encoder|stages:K|all_but_head", "what stays as it was pre-trained"),
        FieldFlag(
            "--lora", "lora_rank", "RANK", "adapters in a transformer's attention instead of its encoder's weights"
        ),
    ),
    "data": (
        FieldFlag("--batch", "batch_size", "N", "samples a batch (default: the plan's)"),
        FieldFlag(
            "--patch",
            "patch_size",
            "Z Y X",
            "patch in voxels, in the plan's order of axes: X Y Z for a Swin UNETR (default: the plan's)",
        ),
        FieldFlag("--augment", "augmentation", "default|gpu|none", "augmentation on the CPU, on the GPU, or none"),
        FieldFlag("--no-mirror", "mirror_axes", None, "don't flip, in training and in prediction", ""),
    ),
    "network and machine": (
        FieldFlag("--deep-supervision", "deep_supervision", None, "a loss at every resolution (CNNs)", "true"),
        FieldFlag("--precision", "precision", "auto|bf16|fp16|fp32", "of the network's arithmetic"),
        FieldFlag("--compile", "compile", "auto|on|off", "torch.compile (default auto: on GPUs)", "on"),
        FieldFlag("--channels-last", "channels_last", None, "channels last in the network's memory", "true"),
        FieldFlag("--fused-norm", "fused_norm", "auto|on|off", "normalisation and activation in one operation", "on"),
        FieldFlag("--activation-checkpointing", "activation_checkpointing", None, "less memory, more time", "true"),
        FieldFlag("--seed", "seed", "N", "of everything random"),
    ),
}

FIELD_FLAGS = tuple(flag for group in _GROUPS.values() for flag in group)
"""Every flag that stands for a field of the recipe."""


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``-tr``, ``--recipe``, a flag for each of the recipe's common fields, ``--set``, and the device."""
    parser.add_argument(
        "-tr", dest="trainer", help="trainer name that nnU-Net users know, e.g. PretrainedTrainer_150ep"
    )
    parser.add_argument("--recipe", help="recipe: a YAML file or the name of a bundled one (default, primus, short, …)")
    parser.add_argument("--from_scratch", action="store_true", help="random weights: the baseline to compare with")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other field of the recipe (repeatable)",
    )
    for title, flags in _GROUPS.items():
        group = parser.add_argument_group(f"recipe: {title}")
        for flag in flags:
            _add(group, flag)
    parser.add_argument("-device", "--device", default="cuda", choices=("cuda", "cpu", "mps"))
    parser.add_argument("--npz", action="store_true", help="save validation probabilities as well (for ensembles)")
    parser.add_argument(
        "--workers", type=int, help="processes that make training batches (default: what the machine allows)"
    )


def _add(group: argparse._ArgumentGroup, flag: FieldFlag) -> None:
    options: dict[str, Any] = {"dest": flag.dest, "help": flag.help}
    if flag.field == "patch_size":
        options |= {"nargs": 3, "metavar": ("Z", "Y", "X")}
    elif flag.metavar is None:
        options |= {"action": "store_const", "const": flag.constant}
    else:
        options["metavar"] = flag.metavar
        if flag.constant is not None:
            options |= {"nargs": "?", "const": flag.constant}
    group.add_argument(flag.flag, **options)


def recipe_from(arguments: argparse.Namespace, architecture: Architecture, labels: LabelScheme | None = None) -> Recipe:
    """The recipe that the flags ask for: ``-tr`` or ``--recipe``, with single fields overridden.

    Without either, the one published for the network's family. nnU-Net's own trainers (``-tr nnUNetTrainer_250epochs``)
    fine-tune the weights that the command names, and start from random ones where it names none.

    Args:
        arguments: with what :func:`add_training_flags` adds, and perhaps ``source``, the weights that were named.
        architecture: of the network; what it can't do is found here, before anything starts.
        labels: of the dataset, if it is known; likewise.

    Raises ConfigurationError with all mistakes: of the flags, of ``--set``, and of what the network or device can't do.
    """
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.training.optimise.loss_choice import loss_mistakes
    from nnssl_adapt.training.progress.trackers import tracker_mistakes
    from nnssl_adapt.training.recipe.recipe import Recipe, as_far_as_readable, read_settings
    from nnssl_adapt.training.recipe.rules import machine_mistakes
    from nnssl_adapt.training.recipe.values import raise_if_any

    mistakes: list[str] = []
    try:
        recipe = _chosen(arguments, architecture.kind.recipe)
    except ConfigurationError as error:  # the rest is checked anyway
        mistakes, recipe = [str(error)], Recipe()
    changes = changes_from(arguments)
    where = f"changes to recipe {recipe.name!r}" if changes or arguments.settings else f"recipe {recipe.name!r}"
    try:
        wanted: Any = recipe.with_settings(arguments.settings, **changes)
    except ConfigurationError as error:
        mistakes += error.mistakes
        wanted = as_far_as_readable({**recipe.to_dict(), **read_settings(arguments.settings)[0], **changes})
    mistakes += machine_mistakes(architecture, wanted, arguments.device)
    mistakes += loss_mistakes(wanted, labels) if labels is not None else ()
    mistakes += tracker_mistakes(getattr(arguments, "track", ()))
    raise_if_any(mistakes, where)
    assert isinstance(wanted, Recipe)  # whatever is less has mistakes
    return wanted


def _chosen(arguments: argparse.Namespace, usual: str) -> Recipe:
    """What ``-tr`` or ``--recipe`` names, or the one that is usual for the network."""
    from nnssl_adapt.errors import ConfigurationError
    from nnssl_adapt.training.recipe.recipe import Recipe

    if arguments.trainer and arguments.recipe:
        raise ConfigurationError("-tr and --recipe both choose a recipe: give one of them")
    if arguments.trainer:
        return Recipe.for_trainer_name(arguments.trainer, pretrained=bool(getattr(arguments, "source", None)))
    return Recipe.load(arguments.recipe or usual)


def changes_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields that flags were given for, as text."""
    given = {flag.field: getattr(arguments, flag.dest) for flag in FIELD_FLAGS}
    changes = {field: value for field, value in given.items() if value is not None}
    if arguments.from_scratch:
        changes["from_scratch"] = True
    return changes
