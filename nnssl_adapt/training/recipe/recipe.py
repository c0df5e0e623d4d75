"""Everything that a fine-tuning run can vary, in one record.

A YAML file in ``configs/`` is a Recipe, a command-line flag overrides one field, and a trainer name that nnU-Net's users
know is an alias of a Recipe (:mod:`nnssl_adapt.training.recipe.trainer_names`). There are no trainer subclasses.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import yaml

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.text import did_you_mean
from nnssl_adapt.training.recipe.rules import contradictions, frozen_stages, machine_mistakes, range_mistakes
from nnssl_adapt.training.recipe.trainer_names import resolve
from nnssl_adapt.training.recipe.values import raise_if_any, settled

if TYPE_CHECKING:
    from nnssl_adapt.weights.network.architectures import Architecture


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning run's options. All mistakes are found when it is made, and reported in one ConfigurationError.

    The defaults are the published fine-tuning of pre-trained CNNs (``configs/default.yaml``).

    Attributes:
        name: what the recipe is called in logs.
        trainer_name: first part of the model folder's name (``<trainer_name>__<plans>__3d_fullres``).
        network: which the recipe is for: a class (``Primus``) or a preset (``PrimusS``), which the plan's must be; None for any.
        from_scratch: start from random weights.
        epochs: epochs in all, warm-ups included.
        iterations_per_epoch: optimiser steps an epoch.
        validation_iterations: random validation batches after each epoch, from which the pseudo-Dice comes.
        optimizer: ``sgd`` (Nesterov momentum), ``adamw`` (weight decay apart from the gradient) or ``adam`` (weight decay
            as part of the gradient).
        learning_rate: the highest one, reached at the end of the warm-up.
        encoder_learning_rate: the encoder's highest one; None for ``learning_rate``.
        layer_decay: above 0 to 1; each encoder layer's learning rate is this times that of the layer above it.
        momentum: of SGD.
        betas: of Adam and AdamW.
        weight_decay: per step and unit of learning rate, as torch's optimisers define it.
        gradient_clip: largest L2 norm of all gradients together.
        accumulate: micro-batches of ``batch_size`` samples whose gradients make one step.
        ema_decay: of the running average of the weights that predicts in their place; None for no average.
        schedule: what follows the warm-up: ``poly``, ``cosine`` (to 0 at the end) or ``constant``.
        decoder_warmup_epochs: epochs in which the decoder and head learn alone, before the warm-up of everything: half of
            them linear increase, half polynomial decrease; 0 for none.
        decoder_warmup_learning_rate: the highest one in those; None for ``learning_rate``.
        warmup_epochs: epochs of linear increase of everything; 0 for none.
        warmup_fraction: above 0 to 1, of ``learning_rate``, that the warm-up of everything ends at.
        poly_exponent: ``poly`` is ``(1 - fraction done) ** poly_exponent`` of the highest learning rate.
        loss: ``dice_ce`` (nnU-Net's), ``dice``, ``ce``, ``dice_topk`` (the 10% of voxels with the highest cross-entropy),
            ``dice_focal``, or ``tversky_ce`` (missed voxels count more than wrong ones).
        dice_smooth: added to numerator and denominator of each Dice; 0 for nnU-Net's ``noSmooth``.
        batch_dice: Dice over the batch as a whole; None: as the plan says.
        class_weights: weight of a class or region in the cross-entropy, by its name; 1 for those not named; None: all alike.
        freeze: ``none``, ``encoder`` (only decoder and head learn), ``stages:K`` (the stem and the encoder's first K stages or
            blocks don't learn) or ``all_but_head`` (only the segmentation head learns).
        lora_rank: of low-rank adapters in the attention of a transformer, which then learn in the encoder's place; 0 for
            none.
        lora_alpha: the adapters count ``lora_alpha / lora_rank``; None for twice the rank.
        foreground_fraction: 0 to 1, of a batch's samples that are centred on foreground (nnU-Net's rounding: of a batch of
            2, a third is one sample).
        batch_size: samples a batch, of all GPUs together; None for the plan's.
        patch_size: voxels (Z, Y, X) after the plan's transpose; None for the plan's.
        augmentation: ``default`` (nnU-Net's 3D chain, on the CPU), ``gpu`` (the same distributions, in batches on the
            device) or ``none``.
        mirror_axes: spatial axes (0, 1, 2) that may be flipped, in training and in prediction; empty for none.
        deep_supervision: a loss at every resolution of the decoder (CNNs only).
        precision: of the network's arithmetic: ``auto`` is bf16 on CUDA devices that have it, fp16 with loss scaling on
            other CUDA devices, fp32 elsewhere.
        compile: torch.compile of the network: ``auto`` is on for CUDA devices, as in nnU-Net.
        channels_last: whether the network's memory has channels last; None: on CUDA devices the faster layout, by a few steps
            in each before the training, elsewhere no.
        fused_norm: instance normalisation, sum and activation in one operation, which wants channels last: ``auto`` tries it
            along with the layouts, on CUDA devices with Triton, and keeps what is fastest; ``on`` or ``off``.
        activation_checkpointing: whether activations are computed again in the backward pass instead of being kept.
        checkpoint_every: epochs between two writings of ``checkpoint_latest.pth``.
        checkpoint_minutes: minutes after which it is written in any case.
        non_finite_limit: steps in a row with a loss that is NaN or infinite after which the run stops.
        seed: of everything random.
    """

    name: str = "default"
    trainer_name: str = "PretrainedTrainer"
    network: str | None = None
    from_scratch: bool = False
    # length
    epochs: int = 1000
    iterations_per_epoch: int = 250
    validation_iterations: int = 50
    # optimiser
    optimizer: Literal["sgd", "adamw", "adam"] = "sgd"
    learning_rate: float = 1e-3
    encoder_learning_rate: float | None = None
    layer_decay: float = 1.0
    momentum: float = 0.99
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 3e-5
    gradient_clip: float = 12.0
    accumulate: int = 1
    ema_decay: float | None = None
    # schedule
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    decoder_warmup_epochs: int = 0
    decoder_warmup_learning_rate: float | None = None
    warmup_epochs: int = 50
    warmup_fraction: float = 1.0
    poly_exponent: float = 0.9
    # loss
    loss: Literal["dice_ce", "dice", "ce", "dice_topk", "dice_focal", "tversky_ce"] = "dice_ce"
    dice_smooth: float = 1e-5
    batch_dice: bool | None = None
    class_weights: dict[str, float] | None = None
    # what learns
    freeze: str = "none"
    lora_rank: int = 0
    lora_alpha: float | None = None
    # data
    foreground_fraction: float = 0.33
    batch_size: int | None = None
    patch_size: tuple[int, int, int] | None = None
    augmentation: Literal["default", "gpu", "none"] = "default"
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    # network and machine
    deep_supervision: bool = False
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    channels_last: bool | None = None
    fused_norm: Literal["auto", "on", "off"] = "auto"
    activation_checkpointing: bool = False
    # keeping
    checkpoint_every: int = 50
    checkpoint_minutes: float = 30.0
    non_finite_limit: int = 10
    seed: int = 12345

    def __post_init__(self) -> None:
        fields, mistakes = settled(
            vars(self), get_type_hints(Recipe)
        )  # Recipe(learning_rate="1e-3") is as good as a number
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        rest = SimpleNamespace(**{**_defaults(), **fields})  # ranges are checked beside values of the wrong type
        mistakes += [*range_mistakes(rest), *contradictions(rest)]
        raise_if_any(mistakes, f"recipe {self.name!r}")

    # -- where recipes come from -------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a recipe: the name of one in ``configs/`` (``default``, ``primus``, ``short``, …) or a YAML file.

        Raises ConfigurationError: no such recipe (the names are listed), or every mistake in it at once.
        """
        path = _find(source)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise ConfigurationError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from error
        if not isinstance(content, Mapping):
            raise ConfigurationError(f"{path}: expected lines 'field: value', got {type(content).__name__}")
        return cls.from_dict({"name": path.stem, **content}, where=str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Make a recipe from field names and values; ``where`` names their origin in the error message."""
        return _make({}, content, where)

    @classmethod
    def for_trainer_name(cls, trainer_name: str, pretrained: bool = False) -> Recipe:
        """Return the recipe that a trainer name known from nnU-Net stands for. Unknown: ConfigurationError listing them.

        nnU-Net's own trainers (``nnUNetTrainer_250epochs``) start from random weights, unless ``pretrained`` says that some were
        given along with the name.
        """
        config, changes = resolve(trainer_name, pretrained)
        return cls.load(config).override(**changes)

    # -- variations ----------------------------------------------------------------------------------------------------

    def override(self, **fields: Any) -> Recipe:
        """Return a copy with other values. Strings are read as the field's own type (``"1e-4"``, ``"96,96,64"``, ``"none"``)."""
        return _make(self.to_dict(), fields, f"changes to recipe {self.name!r}")

    def with_settings(self, assignments: Iterable[str], **values: Any) -> Recipe:
        """Return a copy changed by ``field=value`` strings, as ``--set`` takes them, and by ``values``, which win.

        Both at once, since fields are checked against each other. When the number of epochs changes and no stage of the
        schedule does, the stages keep their share of the epochs; the log says so.
        """
        settings, mistakes = read_settings(assignments)
        fields: dict[str, Any] = {**settings, **values}
        if "epochs" in fields and not {"warmup_epochs", "decoder_warmup_epochs"} & fields.keys():
            fields |= _scaled_stages(self, fields["epochs"])
        return _make(self.to_dict(), fields, f"changes to recipe {self.name!r}", mistakes)

    def check_against(self, architecture: Architecture, device_type: str | None = None) -> None:
        """Raise ConfigurationError for all that this asks for and the network, or this kind of device, can't do.

        Args:
            architecture: of the plan, or of the checkpoint as long as there is no plan.
            device_type: ``cuda``, ``cpu`` or ``mps``; None when it is not known yet.
        """
        mistakes = list(machine_mistakes(architecture, self, device_type))
        raise_if_any(mistakes, f"recipe {self.name!r} for {architecture}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values (lists instead of tuples), fit for YAML, JSON and checkpoints."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def __str__(self) -> str:
        """What is on, in a few indented lines, and nothing about what is off."""
        lines = [
            f"recipe {self.name}: {_epochs(self.epochs)} of {self.iterations_per_epoch} steps",
            f"  {_optimizer(self)}, weight decay {self.weight_decay:g}, gradients clipped at {self.gradient_clip:g}",
            f"  learning rate {self.learning_rate:g}: {_schedule(self)}",
            f"  augmentation {self.augmentation}, mirroring {list(self.mirror_axes)}, precision {self.precision}",
        ]
        if special := ", ".join(_special(self)):
            lines.append(f"  {special}")
        return "\n".join(lines)


def configs_folder() -> Path:
    """The folder of recipes: ``nnssl_adapt/configs`` of an installed package, ``configs`` of a source checkout."""
    package = Path(str(resources.files("nnssl_adapt")))
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in configs_folder().glob("*.yaml"))


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    named = configs_folder() / f"{str(source).removesuffix('.yaml')}.yaml"
    if named.is_file():
        return named
    names = recipe_names()
    raise ConfigurationError(
        f"no recipe {str(source)!r}{did_you_mean(str(source), names)}: give a YAML file or one of {', '.join(names)}"
    )


def _make(base: Mapping[str, Any], changes: Mapping[str, Any], where: str, mistakes: Iterable[str] = ()) -> Recipe:
    """Make a recipe of ``base`` with ``changes``, collecting unknown names, wrong types and wrong ranges together.

    ``mistakes`` are those found before, to be reported along with them.
    """
    known = {field.name for field in dataclasses.fields(Recipe)}
    fields = {**base, **changes}
    found = [
        *mistakes,
        *(f"unknown field {name!r}{did_you_mean(str(name), known)}" for name in fields if name not in known),
    ]
    try:
        recipe = Recipe(**{name: value for name, value in fields.items() if name in known})
    except ConfigurationError as error:
        found.extend(error.mistakes)
    raise_if_any(found, where)
    return recipe


def as_far_as_readable(content: Mapping[str, Any]) -> SimpleNamespace:
    """The fields among ``content`` that have a value of their type, unchecked otherwise, and every other at its default.

    To look for more mistakes beside those that keep a recipe from being made.
    """
    wanted = get_type_hints(Recipe)
    readable, _ = settled({name: value for name, value in content.items() if name in wanted}, wanted)
    return SimpleNamespace(**{**_defaults(), **readable})


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(Recipe)}


def _scaled_stages(recipe: Recipe, epochs: Any) -> dict[str, Any]:
    """The stages before the highest learning rate, of the same share of another number of epochs (as text or a number)."""
    readable, _ = settled({"epochs": epochs}, {"epochs": int})
    wanted = readable.get("epochs", 0)
    old = {name: getattr(recipe, name) for name in ("decoder_warmup_epochs", "warmup_epochs")}
    if wanted < 1 or wanted == recipe.epochs or not any(old.values()):
        return {}
    new: dict[str, Any] = {name: max(1, round(n * wanted / recipe.epochs)) if n else 0 for name, n in old.items()}
    while sum(new.values()) >= wanted:  # one epoch at least is left for the rest
        new[max(new, key=lambda name: new[name])] -= 1
    words = ", ".join(f"{name} {new[name]} instead of {n}" for name, n in old.items() if n != new[name])
    if words:
        logger.info("%d epochs instead of %d: %s, their share (--warmup changes it)", wanted, recipe.epochs, words)
    if not new["decoder_warmup_epochs"]:
        new["decoder_warmup_learning_rate"] = None
    return new


def read_settings(assignments: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The fields and texts of ``field=value`` strings, as ``--set`` takes them, and the mistakes in the others."""
    fields, mistakes = {}, []
    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        if equals:
            fields[field.strip().replace("-", "_")] = value.strip()
        else:
            mistakes.append(f"--set {assignment}: expected field=value")
    return fields, mistakes


def _optimizer(recipe: Recipe) -> str:
    if recipe.optimizer == "sgd":
        return f"SGD momentum {recipe.momentum:g}"
    return f"{'AdamW' if recipe.optimizer == 'adamw' else 'Adam'} betas {recipe.betas}"


def _schedule(recipe: Recipe) -> str:
    parts = []
    if recipe.decoder_warmup_epochs:
        parts.append(f"the decoder alone for {_epochs(recipe.decoder_warmup_epochs)}")
    if recipe.warmup_epochs:
        parts.append(f"warm-up over {_epochs(recipe.warmup_epochs)}")
    return ", then ".join([*parts, recipe.schedule])


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' if number != 1 else ''}"


def _loss(recipe: Recipe) -> Iterable[str]:
    if recipe.loss != "dice_ce":
        yield f"loss {recipe.loss}"
    if recipe.dice_smooth != Recipe.dice_smooth:
        yield f"Dice smoothed by {recipe.dice_smooth:g}"
    if recipe.batch_dice is not None:
        yield f"Dice of {'the whole batch' if recipe.batch_dice else 'each sample'}"
    if recipe.class_weights:
        yield "class weights " + ", ".join(f"{name} {weight:g}" for name, weight in recipe.class_weights.items())


def _frozen(freeze: str) -> str:
    stages = frozen_stages(freeze)
    if stages is not None:
        return f"stem and first {stages} stage{'s' * (stages != 1)} frozen"
    return "encoder frozen" if freeze == "encoder" else "only the segmentation head learns"


def _special(recipe: Recipe) -> Iterable[str]:
    if recipe.from_scratch:
        yield "from random weights"
    if recipe.encoder_learning_rate is not None:
        yield f"encoder's learning rate {recipe.encoder_learning_rate:g}"
    if recipe.layer_decay != 1:
        yield f"learning rate times {recipe.layer_decay:g} per encoder layer"
    yield from _loss(recipe)
    if recipe.freeze != "none":
        yield _frozen(recipe.freeze)
    if recipe.lora_rank:
        yield f"adapters of rank {recipe.lora_rank} in place of the encoder"
    if recipe.accumulate > 1:
        yield f"{recipe.accumulate} batches a step"
    if recipe.ema_decay is not None:
        yield f"weights averaged with decay {recipe.ema_decay:g}"
    if recipe.deep_supervision:
        yield "deep supervision"
    if recipe.activation_checkpointing:
        yield "activation checkpointing"
