"""What a study compares: which arms, on which folds, seeds and fractions of the training cases."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nnssl_adapt.evaluation.measures import Judging
from nnssl_adapt.planning.plan import CONFIGURATION
from nnssl_adapt.training.recipe.recipe import Recipe

SCRATCH = "scratch"
"""What ``weights`` says of an arm that starts from random weights."""


@dataclass(frozen=True)
class Arm:
    """One way to train, compared with the others.

    Attributes:
        name: in tables and pictures.
        weights: source of the pre-trained weights, or ``scratch``.
        network: source whose network is trained; the weights' own unless they are ``scratch``. None: nnU-Net's own network for
            the dataset, which only ``2d`` is planned with.
        configuration: of nnU-Net's, that is trained. A cascade's first stage is trained before it.
        spacing_mode: as ``-am`` of ``preprocess``.
        spacing: mm (Z, Y, X), for mode ``fixed``.
        normalization: as ``--normalization`` of ``preprocess``; None for its default.
        recipe: name or file of a recipe; None for the one that suits the network.
        trainer: a trainer name instead of a recipe.
        settings: recipe fields that differ from the recipe, as ``--set`` takes them.
    """

    name: str
    weights: str
    network: str | None
    configuration: str = CONFIGURATION
    spacing_mode: str = "like_pretrained"
    spacing: tuple[float, float, float] | None = None
    normalization: str | None = None
    recipe: str | None = None
    trainer: str | None = None
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def from_scratch(self) -> bool:
        return self.weights == SCRATCH

    def resolved_recipe(self) -> Recipe:
        """The recipe with the arm's settings (that of CNNs where none is named). Raises ConfigurationError."""
        if self.trainer is not None:
            base = Recipe.for_trainer_name(self.trainer, pretrained=not self.from_scratch)
        else:
            base = Recipe.load(self.recipe or "default")
        return base.with_settings([f"{name}={value}" for name, value in self.settings])


@dataclass(frozen=True)
class StudySpec:
    """What a study compares. Every run is one arm, fraction, fold and seed.

    Attributes:
        name: of its folder.
        dataset: id or name, as ``-d`` takes it.
        arms: at least two.
        reference: name of the arm that the others are compared with.
        folds: of the dataset's splits.
        seeds: of the training; every arm gets the same.
        fractions: above 0 to 1, of a fold's training cases, ascending. Smaller subsets are parts of larger ones.
        metrics: what is compared; the first one is drawn.
        classes: names of the classes that are averaged; empty for all.
        judging: how predictions are measured.
        subject: regular expression that finds the subject in a case's name; a subject's cases stay together.
        device: that trains.
        file: where it was read from, if from a file.
    """

    name: str
    dataset: str
    arms: tuple[Arm, ...]
    reference: str
    folds: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    fractions: tuple[float, ...] = (1.0,)
    metrics: tuple[str, ...] = ("Dice",)
    classes: tuple[str, ...] = ()
    judging: Judging = field(default_factory=Judging)
    subject: str | None = None
    device: str = "cuda"
    file: Path | None = None

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)
