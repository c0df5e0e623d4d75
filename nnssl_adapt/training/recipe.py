"""Everything that a fine-tuning run can vary, in one record.

A YAML file in ``configs/`` is a Recipe, a command-line flag overrides one field, and a trainer name that nnU-Net's users
know is an alias of a Recipe. There are no trainer subclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from nnssl_adapt.errors import ConfigurationError

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
AUGMENTATIONS = ("default", "none")


@dataclass(frozen=True)
class Recipe:
    """One fine-tuning run's options. All mistakes are found when it is made, and reported in one ConfigurationError.

    The defaults are the published fine-tuning of pre-trained CNNs (``configs/default.yaml``).

    Attributes:
        name: what the recipe is called in logs.
        trainer_name: first part of the model folder's name (``<trainer_name>__<plans>__3d_fullres``).
        epochs: epochs in all, warm-up included.
        iterations_per_epoch: optimiser steps an epoch.
        validation_iterations: random validation batches after each epoch, from which the pseudo-Dice comes.
        optimizer: ``sgd`` (Nesterov momentum) or ``adamw``.
        learning_rate: the highest one, reached at the end of the warm-up.
        momentum: of SGD.
        betas: of AdamW.
        weight_decay: per step and unit of learning rate, as torch's optimisers define it.
        gradient_clip: largest L2 norm of all gradients together.
        warmup_epochs: epochs of linear increase; 0 for none.
        poly_exponent: after the warm-up the learning rate is ``(1 - fraction done) ** poly_exponent`` of the highest.
        foreground_fraction: 0 to 1, of a batch's samples that are centred on foreground (nnU-Net's rounding: of a batch of
            2, a third is one sample).
        batch_size: samples a step; None for the plan's.
        patch_size: voxels (Z, Y, X) after the plan's transpose; None for the plan's.
        augmentation: ``default`` (nnU-Net's 3D chain) or ``none``.
        mirror_axes: spatial axes (0, 1, 2) that may be flipped, in training and in prediction; empty for none.
        precision: of the network's arithmetic: ``auto`` is bf16 on CUDA devices that have it, fp16 with loss scaling on
            other CUDA devices, fp32 elsewhere.
        from_scratch: start from random weights.
        checkpoint_every: epochs between two writings of ``checkpoint_latest.pth``.
        checkpoint_minutes: minutes after which it is written in any case.
        non_finite_limit: steps in a row with a loss that is NaN or infinite after which the run stops.
        seed: of everything random.
    """

    name: str = "default"
    trainer_name: str = "PretrainedTrainer"
    epochs: int = 1000
    iterations_per_epoch: int = 250
    validation_iterations: int = 50
    optimizer: str = "sgd"
    learning_rate: float = 1e-3
    momentum: float = 0.99
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 3e-5
    gradient_clip: float = 12.0
    warmup_epochs: int = 50
    poly_exponent: float = 0.9
    foreground_fraction: float = 0.33
    batch_size: int | None = None
    patch_size: tuple[int, int, int] | None = None
    augmentation: str = "default"
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    precision: str = "auto"
    from_scratch: bool = False
    checkpoint_every: int = 50
    checkpoint_minutes: float = 30.0
    non_finite_limit: int = 10
    seed: int = 12345

    def __post_init__(self) -> None:
        mistakes = list(_type_mistakes(self))
        if not mistakes:  # ranges are only worth checking on values of the right type
            mistakes = list(_range_mistakes(self))
        _raise_if_any(mistakes, f"recipe {self.name!r}")

    # -- where recipes come from -------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a recipe: the name of one in ``configs/`` (``default``, ``primus``, ``short``, …) or a YAML file.

        Raises ConfigurationError: no such recipe (the names are listed), or every mistake in it at once.
        """
        path = _find(source)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigurationError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from error
        if not isinstance(content, Mapping):
            raise ConfigurationError(f"{path}: expected lines 'field: value', got {type(content).__name__}")
        return cls.from_dict({"name": path.stem, **content}, where=str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Make a recipe from field names and values; ``where`` names their origin in the error message."""
        return _make({}, content, where)

    @classmethod
    def for_trainer_name(cls, trainer_name: str) -> Recipe:
        """Return the recipe that a trainer name known from nnU-Net stands for. Unknown: ConfigurationError listing them."""
        if trainer_name in TRAINER_ALIASES:
            config, changes = TRAINER_ALIASES[trainer_name]
            return cls.load(config).override(**changes)
        if match := re.fullmatch(r"nnUNetTrainer_(\d+)epochs?", trainer_name):
            changes = {"epochs": int(match[1]), "trainer_name": f"PretrainedTrainer_{match[1]}ep_from_scratch"}
            return cls.load("from_scratch").override(**changes)
        known = ", ".join([*TRAINER_ALIASES, "nnUNetTrainer_<N>epochs"])
        raise ConfigurationError(
            f"-tr {trainer_name}: no recipe has this trainer name{_did_you_mean(trainer_name, TRAINER_ALIASES)}; "
            f"known: {known}. Any other variation is a recipe file (--recipe) or --set field=value"
        )

    # -- variations ----------------------------------------------------------------------------------------------------

    def override(self, **fields: Any) -> Recipe:
        """Return a copy with other values. Strings are read as the field's own type (``"1e-4"``, ``"96,96,64"``, ``"none"``)."""
        return _make(self.to_dict(), fields, f"changes to recipe {self.name!r}")

    def with_settings(self, assignments: Iterable[str], **values: Any) -> Recipe:
        """Return a copy changed by ``field=value`` strings, as ``--set`` takes them, and by ``values``, which win.

        Both at once, since fields are checked against each other.
        """
        fields: dict[str, Any] = {}
        mistakes = []
        for assignment in assignments:
            field, equals, value = assignment.partition("=")
            if equals:
                fields[field.strip().replace("-", "_")] = value.strip()
            else:
                mistakes.append(f"--set {assignment}: expected field=value")
        _raise_if_any(mistakes, "settings")
        return self.override(**{**fields, **values})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values (lists instead of tuples), fit for YAML, JSON and checkpoints."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def __str__(self) -> str:
        optimizer = f"SGD momentum {self.momentum:g}" if self.optimizer == "sgd" else f"AdamW betas {self.betas}"
        return (
            f"recipe {self.name}: {self.epochs} epochs of {self.iterations_per_epoch} steps\n"
            f"  {optimizer}, learning rate {self.learning_rate:g} after {self.warmup_epochs} warm-up epochs, "
            f"weight decay {self.weight_decay:g}, gradients clipped at {self.gradient_clip:g}\n"
            f"  augmentation {self.augmentation}, mirroring {list(self.mirror_axes)}, precision {self.precision}"
        )


TRAINER_ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "PretrainedTrainer": ("default", {}),
    "PretrainedTrainer_150ep": ("short", {}),
    "PretrainedTrainer_Primus": ("primus", {}),
    "PretrainedTrainer_Primus_150ep": (
        "primus",
        {"epochs": 150, "warmup_epochs": 15, "trainer_name": "PretrainedTrainer_Primus_150ep"},
    ),
    "PretrainedTrainer_from_scratch": ("from_scratch", {}),
    # From scratch under our own name: nnU-Net's own run of that name must not find our files in its folder.
    "nnUNetTrainer": ("from_scratch", {}),
}
"""Trainer names that nnU-Net's users type after ``-tr``, and the recipe (with changed fields) that each stands for."""


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
        f"no recipe {str(source)!r}{_did_you_mean(str(source), names)}: give a YAML file or one of {', '.join(names)}"
    )


# -- reading and checking values -----------------------------------------------------------------------------------------


def _make(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe of ``base`` with ``changes``, collecting unknown names, wrong types and wrong ranges together."""
    types_of_fields = get_type_hints(Recipe)
    fields: dict[str, Any] = {}
    mistakes = []
    for name, value in {**base, **changes}.items():
        if name not in types_of_fields:
            mistakes.append(f"unknown field {name!r}{_did_you_mean(str(name), types_of_fields)}")
            continue
        try:
            fields[name] = _convert(value, types_of_fields[name])
        except ValueError:
            mistakes.append(f"{name}: expected {_describe(types_of_fields[name])}, got {value!r}")
    try:
        recipe = Recipe(**fields)
    except ConfigurationError as error:
        mistakes.extend(getattr(error, "mistakes", [str(error)]))
    _raise_if_any(mistakes, where)
    return recipe


def _convert(value: Any, wanted: Any) -> Any:
    """Bring ``value`` (from YAML, JSON or a command line) to the type of a field; ValueError when it can't be."""
    if get_origin(wanted) in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return _convert(value, next(kind for kind in get_args(wanted) if kind is not type(None)))
    if get_origin(wanted) is tuple:
        return _convert_tuple(value, get_args(wanted))
    if wanted is bool:
        if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off"):
            return value.lower() in ("true", "yes", "on")
        if not isinstance(value, bool):
            raise ValueError
        return value
    if wanted is str:
        if not isinstance(value, str):
            raise ValueError
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    number = float(value)  # YAML 1.1 reads 1e-3, without a dot, as text
    if wanted is int:
        if not number.is_integer():
            raise ValueError
        return int(value) if isinstance(value, int) else int(number)
    return number


def _convert_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part for part in re.split(r"[\s,x×]+", value.strip("()[] ")) if part]
    if not isinstance(value, (list, tuple)):
        raise ValueError
    if kinds[-1] is Ellipsis:
        return tuple(_convert(item, kinds[0]) for item in value)
    if len(value) != len(kinds):
        raise ValueError
    return tuple(_convert(item, kind) for item, kind in zip(value, kinds, strict=True))


def _describe(wanted: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if get_origin(wanted) in (Union, types.UnionType):
        return f"{_describe(next(k for k in get_args(wanted) if k is not type(None)))} or none"
    if get_origin(wanted) is tuple:
        kinds = get_args(wanted)
        count = "any number" if kinds[-1] is Ellipsis else str(len(kinds))
        return f"{count} of: {names[kinds[0]]}"
    return names[wanted]


def _type_mistakes(recipe: Recipe) -> Iterable[str]:
    for name, wanted in get_type_hints(Recipe).items():
        value = getattr(recipe, name)
        try:
            converted = _convert(value, wanted)
        except (ValueError, OverflowError):
            yield f"{name}: expected {_describe(wanted)}, got {value!r}"
            continue
        if type(converted) is not type(
            value
        ):  # Recipe(learning_rate="1e-3") or Recipe(patch_size=[…]): settle the type
            object.__setattr__(recipe, name, converted)


def _range_mistakes(recipe: Recipe) -> Iterable[str]:
    choices = {"optimizer": OPTIMIZERS, "precision": PRECISIONS, "augmentation": AUGMENTATIONS}
    for name, allowed in choices.items():
        value = getattr(recipe, name)
        if value not in allowed:
            yield f"{name}: expected one of {', '.join(allowed)}, got {value!r}{_did_you_mean(value, allowed)}"
    for name in ("epochs", "iterations_per_epoch", "validation_iterations", "checkpoint_every", "non_finite_limit"):
        if getattr(recipe, name) < 1:
            yield f"{name}: expected at least 1, got {getattr(recipe, name)}"
    for name in ("learning_rate", "gradient_clip", "checkpoint_minutes"):
        if not 0 < getattr(recipe, name) < math.inf:
            yield f"{name}: expected a number above 0, got {getattr(recipe, name)}"
    for name in ("weight_decay", "poly_exponent"):
        if not 0 <= getattr(recipe, name) < math.inf:
            yield f"{name}: expected 0 or more, got {getattr(recipe, name)}"
    if not 0 <= recipe.momentum < 1:
        yield f"momentum: expected 0 or more and less than 1, got {recipe.momentum}"
    elif recipe.optimizer == "sgd" and recipe.momentum == 0:
        yield "momentum: Nesterov's SGD needs one above 0, got 0"
    if not all(0 <= beta < 1 for beta in recipe.betas):
        yield f"betas: expected two numbers of 0 or more and less than 1, got {recipe.betas}"
    if not 0 <= recipe.warmup_epochs < max(1, recipe.epochs):
        yield (
            f"warmup_epochs: expected 0 or more and fewer than epochs ({recipe.epochs}), got {recipe.warmup_epochs} "
            "(change it with --warmup)"
        )
    if not 0 <= recipe.foreground_fraction <= 1:
        yield f"foreground_fraction: expected 0 to 1, got {recipe.foreground_fraction}"
    if recipe.batch_size is not None and recipe.batch_size < 1:
        yield f"batch_size: expected at least 1, got {recipe.batch_size}"
    if recipe.patch_size is not None and min(recipe.patch_size) < 1:
        yield f"patch_size: expected three numbers of at least 1, got {recipe.patch_size}"
    if len(set(recipe.mirror_axes)) != len(recipe.mirror_axes) or not set(recipe.mirror_axes) <= {0, 1, 2}:
        yield f"mirror_axes: expected some of 0, 1, 2, each once, got {recipe.mirror_axes}"
    if not 0 <= recipe.seed < 2**32:
        yield f"seed: expected 0 to 4294967295, got {recipe.seed}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", recipe.trainer_name) or "__" in recipe.trainer_name:
        yield (
            f"trainer_name: {recipe.trainer_name!r} names a folder; use letters, digits, '-', '.' and single '_' "
            "('__' separates it from the plan's name)"
        )


def _raise_if_any(mistakes: list[str], where: str) -> None:
    if not mistakes:
        return
    if len(mistakes) == 1:
        error = ConfigurationError(f"{where}: {mistakes[0]}")
    else:
        error = ConfigurationError(f"{where} has {len(mistakes)} mistakes: {'; '.join(mistakes)}")
    error.mistakes = mistakes  # type: ignore[attr-defined]
    raise error


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
