"""A study as a whole: ``Study.load("study.yaml").run()``, then ``.table()``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.splits import load_or_make_splits
from nnssl_adapt.data.verifying.together import owner_function
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.evaluation.tables import text_table
from nnssl_adapt.files import write_text
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.provenance import package_version
from nnssl_adapt.studies.answers import Cell, answers, hours_of, save_cells
from nnssl_adapt.studies.execute import run_here
from nnssl_adapt.studies.page import study_page
from nnssl_adapt.studies.runs import Preparation, StudyRun, preparation_of, runs_of, study_folder
from nnssl_adapt.studies.spec import StudySpec
from nnssl_adapt.studies.study_file import read_study_file, study_from
from nnssl_adapt.studies.subsets import nested_subsets, write_subsets
from nnssl_adapt.studies.words import study_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """Many trainings that together answer one question.

    Attributes:
        spec: what is compared.
        dataset_name: ``Dataset041_Name``.
        preparations: what has to be preprocessed.
        runs: all trainings, small fractions first.
        training_cases: mean number of a fold's training cases, by fraction.
    """

    spec: StudySpec
    dataset_name: str
    preparations: tuple[Preparation, ...]
    runs: tuple[StudyRun, ...]
    training_cases: Mapping[float, float]

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any], **changes: Any) -> Study:
        """Make a study of a YAML file, of one that comes with the package (its name), or of the same content as a dict.

        ``changes`` replace entries of the file. The dataset must be there, since it says which cases there are; the subsets
        are drawn and written down.

        Raises:
            ConfigurationError: every mistake at once (``.mistakes``).
            DatasetError: the dataset or its splits are missing or wrong.
            OutputError: the subsets can't be written.
        """
        spec = study_from(source, **changes) if isinstance(source, Mapping) else read_study_file(source, **changes)
        dataset = RawDataset.open(spec.dataset)
        identifiers = [case.identifier for case in dataset.cases]
        splits = load_or_make_splits(preprocessed_folder() / dataset.name, identifiers, dataset.folder)
        missing = [fold for fold in spec.folds if fold >= len(splits)]
        mistakes = [f"folds: the dataset has {len(splits)}, so no fold {fold}" for fold in missing]
        unknown = [name for name in spec.classes if name not in dataset.labels.class_names]
        mistakes += [f"classes: no {name}: expected {', '.join(dataset.labels.class_names)}" for name in unknown]
        owner = owner_function(spec.subject)
        subsets = nested_subsets(splits, spec.fractions, owner)
        sizes = {fraction: [len(split["train"]) for split in subset] for fraction, subset in subsets.items()}
        for smaller, larger in zip(spec.fractions, spec.fractions[1:], strict=False):
            if sizes[smaller] == sizes[larger]:
                mistakes.append(
                    f"fractions: {smaller:g} and {larger:g} leave the same cases, {sizes[larger][0]} in fold 0"
                )
        if mistakes:
            where = spec.file or "study"
            lines = "".join(f"\n  {mistake}" for mistake in mistakes)
            raise ConfigurationError(f"{where}: {len(mistakes)} mistake(s){lines}", path=spec.file, mistakes=mistakes)
        folder = study_folder(dataset.name, spec.name)
        files = write_subsets(folder, splits, spec.fractions, owner)
        preparations = dict.fromkeys(preparation_of(arm, dataset.name) for arm in spec.arms)
        counts = {f: sum(sizes[f][fold] for fold in spec.folds) / len(spec.folds) for f in spec.fractions}
        return cls(spec, dataset.name, tuple(preparations), tuple(runs_of(spec, dataset.name, subsets, files)), counts)

    @property
    def folder(self) -> Path:
        """``<nnUNet_results>/<dataset>/studies/<name>``, with the subsets, the tables and the page."""
        return study_folder(self.dataset_name, self.spec.name)

    def run(self) -> Study:
        """Do what is missing, here and one after another, then write the results. Call it again to go on.

        Raises:
            TrainingStopped: a signal asked for it; what is done is kept.
            TrainingError: a run failed (the others were done); its output is in the study's folder.
        """
        try:
            run_here(self.preparations, self.runs, self.folder)
        finally:
            self.save()
        return self

    def status(self) -> str:
        """The matrix of runs: how many are finished, and how far the others are."""
        header = ("arm", "fraction", "fold", "seed", "state", "epochs", "hours")
        rows = [
            (run.arm, f"{run.fraction:g}", str(run.fold), str(run.seed), *_state(run), f"{hours_of(run):.2f}")
            for run in self.runs
        ]
        prepared = sum(preparation.plans_file.is_file() for preparation in self.preparations)
        done = sum(run.is_done for run in self.runs)
        return (
            f"study {self.spec.name}: {prepared} of {len(self.preparations)} plans preprocessed, {done} of "
            f"{len(self.runs)} runs finished\n{text_table(header, rows)}"
        )

    def cells(self) -> list[Cell]:
        """The results so far: a cell for each metric, fraction and arm."""
        return answers(self.spec, self.runs, self.training_cases)

    def table(self) -> Any:
        """The results so far as a pandas DataFrame where pandas is installed, else as a list of dicts."""
        rows = [cell.row() for cell in self.cells()]
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows)

    def save(self) -> Path:
        """Write ``study.html``, ``study.csv`` and ``study.json`` with the results so far; returns the page's path."""
        import torch

        cells = self.cells()
        save_cells(cells, self.folder)
        facts = {"dataset": self.dataset_name, "version": package_version(), "torch": torch.__version__}
        page = study_page(self.spec, cells, self.runs, self.preparations, self._citations(), facts)
        path = self.folder / "study.html"
        write_text(path, page)
        return path

    def __str__(self) -> str:
        return study_table(self.spec, self.cells())

    def _citations(self) -> dict[str, Sequence[str]]:
        """Of every checkpoint whose plan is made, by its source."""
        found: dict[str, Sequence[str]] = {}
        for arm in self.spec.arms:
            preparation = preparation_of(arm, self.dataset_name)
            if arm.from_scratch or not preparation.plans_file.is_file():
                continue
            entries = FinetunePlan.load(preparation.plans_file).pretrain_info.get("citations") or ()
            texts = [t for entry in entries if isinstance(entry, dict) for t in entry.get("apa_citations") or ()]
            found[arm.weights] = texts
        return found


def _state(run: StudyRun) -> tuple[str, str]:
    if run.fold_folder is None:
        return "waiting", "0"
    path = run.fold_folder / "metrics.jsonl"
    epochs = sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line) if path.is_file() else 0
    return ("finished" if run.is_done else "begun"), str(epochs)
