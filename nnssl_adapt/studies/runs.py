"""The runs of a study: what each is made of, where it lies, and the commands that make it.

A run is identified by what it was made of. Its folder is named by a digest of that, and lies beside those of other studies
of the dataset, so that a run that exists is used and never repeated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnssl_adapt.data.splits import Split
from nnssl_adapt.paths import preprocessed_folder, results_folder
from nnssl_adapt.planning.plan import CASCADE, CONFIGURATION, LOW_RESOLUTION
from nnssl_adapt.studies.spec import Arm, StudySpec
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import FINAL
from nnssl_adapt.training.setup import without_pretraining

_TRAINER = "Study"
"""Trainer name of all runs, whatever their recipe: a run's folder must be known before its network is."""

_TRAINING = Recipe(trainer_name=_TRAINER)

_STAGES = (LOW_RESOLUTION, CASCADE)
"""Planned together and trained in one results folder, where the second finds what the first left for it."""


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
        configuration: of the plan, that is trained.
        trainer_name: first part of the model folder's name.
        results: its own results folder.
        words: of ``nnssl-adapt train``.
        for_cascade: it is only trained as the first stage of the arm's cascade, and not compared.
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
    configuration: str = CONFIGURATION
    for_cascade: bool = False

    @property
    def key(self) -> str:
        stage = f"__{self.configuration}" if self.for_cascade else ""
        return f"{self.arm}__{self.fraction:g}__fold{self.fold}__seed{self.seed}{stage}"

    @property
    def fold_folder(self) -> Path:
        """Where the training writes."""
        model = f"{self.trainer_name}__{self.plans_name}__{self.configuration}"
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
    words = ["-d", dataset_name, *(() if arm.network is None else ("-pc", arm.network)), "-am", arm.spacing_mode]
    if arm.spacing is not None:
        words += ["-os", *(f"{mm:g}" for mm in arm.spacing)]
    if arm.normalization is not None:
        words += ["--normalization", arm.normalization]
    if arm.configuration != CONFIGURATION:
        words += ["-c", *(_STAGES if arm.configuration in _STAGES else (arm.configuration,))]
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
    for fraction in study.fractions:
        for arm in study.arms:
            for fold in study.folds:
                for seed in study.seeds:
                    yield _run_of(study, arm, dataset_name, fraction, fold, seed, splits[fraction], files[fraction])


def first_stages_of(
    study: StudySpec,
    runs: Sequence[StudyRun],
    splits: Mapping[float, Sequence[Split]],
    files: Mapping[float, Path],
) -> Iterator[StudyRun]:
    """What must be trained before the cascades among the runs, and is none of the runs itself; arguments as of :func:`runs_of`.

    Of a cascade's fold these are the folds of the first stage that validate one of its cases.
    """
    known = {run.fold_folder for run in runs}
    for run in runs:
        if run.configuration != CASCADE:
            continue
        arm = replace(study.arm(run.arm), configuration=LOW_RESOLUTION)
        of_fraction = splits[run.fraction]
        cases = {*of_fraction[run.fold]["train"], *of_fraction[run.fold]["val"]}
        for fold in (number for number, split in enumerate(of_fraction) if cases.intersection(split["val"])):
            first = _run_of(
                study, arm, run.dataset_name, run.fraction, fold, run.seed, of_fraction, files[run.fraction]
            )
            if first.fold_folder not in known:
                known.add(first.fold_folder)
                yield replace(first, for_cascade=True)


def _run_of(
    study: StudySpec,
    arm: Arm,
    dataset_name: str,
    fraction: float,
    fold: int,
    seed: int,
    splits: Sequence[Split],
    file: Path,
) -> StudyRun:
    plans_name = preparation_of(arm, dataset_name).plans_name
    words = _training_words(arm, plans_name, dataset_name, fold, seed)
    made_of: list[Any] = [words, splits[fold]["train"], splits[fold]["val"]]
    if arm.configuration in _STAGES:  # all folds of both stages lie together
        first = replace(arm, configuration=LOW_RESOLUTION)
        made_of = [_training_words(first, plans_name, dataset_name, None, seed), splits]
    results = results_folder() / dataset_name / "studies" / "runs" / _digest(made_of)
    placed = ("--splits", str(file), "--results", str(results), "-device", study.device)
    return StudyRun(
        arm=arm.name,
        fraction=fraction,
        fold=fold,
        seed=seed,
        plans_name=plans_name,
        dataset_name=dataset_name,
        trainer_name=without_pretraining(_TRAINING).trainer_name if arm.from_scratch else _TRAINER,
        results=results,
        words=(*words, *placed),
        configuration=arm.configuration,
    )


def _training_words(arm: Arm, plans_name: str, dataset_name: str, fold: int | None, seed: int) -> list[str]:
    """``fold``: None where what all folds have in common is meant."""
    words = [
        "-d",
        dataset_name,
        "-c",
        arm.configuration,
        *(() if fold is None else ("-f", str(fold))),
        "-p",
        plans_name,
    ]
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
