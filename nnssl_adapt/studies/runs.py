"""The runs of a study: what each is made of, where it lies, and the commands that make it.

A run is identified by what it was made of. Its folder is named by a digest of that, and lies beside those of other studies
of the dataset, so that a run that exists is used and never repeated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.data.splits import Split
from nnssl_adapt.paths import preprocessed_folder, results_folder
from nnssl_adapt.studies.spec import Arm, StudySpec
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import FINAL
from nnssl_adapt.training.setup import without_pretraining

CONFIGURATION = "3d_fullres"

_TRAINER = "Study"
"""Trainer name of all runs, whatever their recipe: a run's folder must be known before its network is."""

_TRAINING = Recipe(trainer_name=_TRAINER)


@dataclass(frozen=True)
class Preparation:
    """Planning and preprocessing, shared by all arms with the same settings.

    Attributes:
        plans_name: of the plan that it makes.
        dataset_name: ``Dataset041_Name``.
        words: of ``nnssl-adapt preprocess``.
    """

    plans_name: str
    dataset_name: str
    words: tuple[str, ...]

    @property
    def plans_file(self) -> Path:
        """Written when every case is preprocessed."""
        return preprocessed_folder() / self.dataset_name / f"{self.plans_name}.json"


@dataclass(frozen=True)
class StudyRun:
    """One training: an arm, a fraction, a fold and a seed.

    Attributes:
        arm, fraction, fold, seed: of the study.
        plans_name: that it is trained with.
        dataset_name: ``Dataset041_Name``.
        trainer_name: first part of the model folder's name.
        results: its own results folder.
        words: of ``nnssl-adapt train``.
    """

    arm: str
    fraction: float
    fold: int
    seed: int
    plans_name: str
    dataset_name: str
    trainer_name: str
    results: Path
    words: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.arm}__{self.fraction:g}__fold{self.fold}__seed{self.seed}"

    @property
    def fold_folder(self) -> Path:
        """Where the training writes."""
        model = f"{self.trainer_name}__{self.plans_name}__{CONFIGURATION}"
        return self.results / self.dataset_name / model / f"fold_{self.fold}"

    @property
    def summary(self) -> Path:
        """Written when the training is validated."""
        return self.fold_folder / "validation" / "summary.json"

    @property
    def outputs(self) -> tuple[Path, ...]:
        """What is there when the run is done."""
        return self.fold_folder / FINAL, self.summary

    @property
    def is_done(self) -> bool:
        """Trained and validated; files say so, never an exit code."""
        return all(path.is_file() for path in self.outputs)


def study_folder(dataset_name: str, name: str) -> Path:
    """``<nnUNet_results>/<dataset>/studies/<name>``."""
    return results_folder() / dataset_name / "studies" / name


def preparation_of(arm: Arm, dataset_name: str) -> Preparation:
    """What has to be preprocessed for an arm."""
    words = ["-d", dataset_name, "-pc", arm.network, "-am", arm.spacing_mode]
    if arm.spacing is not None:
        words += ["-os", *(f"{mm:g}" for mm in arm.spacing)]
    if arm.normalization is not None:
        words += ["--normalization", arm.normalization]
    plans_name = f"ptPlans_study_{_digest(words)}"
    return Preparation(plans_name, dataset_name, (*words, "-n", "study", "--plans_name", plans_name))


def runs_of(
    study: StudySpec, dataset_name: str, splits: Mapping[float, Sequence[Split]], files: Mapping[float, Path]
) -> Iterator[StudyRun]:
    """Every run of a study, small fractions first.

    Args:
        study: with everything.
        dataset_name: ``Dataset041_Name``.
        splits: of each fraction, which say what a run is trained on.
        files: where these are written.
    """
    pool = results_folder() / dataset_name / "studies" / "runs"
    for fraction in study.fractions:
        for arm in study.arms:
            plans_name = preparation_of(arm, dataset_name).plans_name
            for fold in study.folds:
                for seed in study.seeds:
                    words = _training_words(arm, plans_name, dataset_name, fold, seed)
                    split = splits[fraction][fold]
                    results = pool / _digest([words, split["train"], split["val"]])
                    placed = ("--splits", str(files[fraction]), "--results", str(results), "-device", study.device)
                    yield StudyRun(
                        arm=arm.name,
                        fraction=fraction,
                        fold=fold,
                        seed=seed,
                        plans_name=plans_name,
                        dataset_name=dataset_name,
                        trainer_name=without_pretraining(_TRAINING).trainer_name if arm.from_scratch else _TRAINER,
                        results=results,
                        words=(*words, *placed),
                    )


def _training_words(arm: Arm, plans_name: str, dataset_name: str, fold: int, seed: int) -> list[str]:
    words = ["-d", dataset_name, "-c", CONFIGURATION, "-f", str(fold), "-p", plans_name]
    if arm.trainer is not None:
        words += ["-tr", arm.trainer]
    elif arm.recipe is not None:
        words += ["--recipe", arm.recipe]
    for name, value in (*arm.settings, ("seed", str(seed)), ("trainer_name", _TRAINER)):
        words += ["--set", f"{name}={value}"]
    return [*words, "--from_scratch"] if arm.from_scratch else words


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
