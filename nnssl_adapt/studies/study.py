"""A study as a whole: ``Study.load("study.yaml").run()``, then ``.table()``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nnssl_adapt.cluster import slurm
from nnssl_adapt.cluster.graph import Resources
from nnssl_adapt.cluster.local import LocalRun, gpu_slots, gpus_here
from nnssl_adapt.cluster.scripts import SlurmSettings
from nnssl_adapt.cluster.status import status_of
from nnssl_adapt.cluster.submission import FOLDER, LOCAL, SLURM, Submission, only_submitter, versions_here
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.splits import load_or_make_splits
from nnssl_adapt.data.verifying.together import owner_function
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.evaluation.tables import text_table
from nnssl_adapt.files import write_text
from nnssl_adapt.paths import preprocessed_folder
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.provenance import package_version
from nnssl_adapt.studies.answers import Cell, answers, hours_of, save_cells
from nnssl_adapt.studies.graph import study_graph
from nnssl_adapt.studies.page import study_page
from nnssl_adapt.studies.runs import (
    Preparation,
    StudyRun,
    first_stages_of,
    preparation_of,
    runs_of,
    study_folder,
)
from nnssl_adapt.studies.spec import Arm, StudySpec
from nnssl_adapt.studies.study_file import read_study_file, study_from
from nnssl_adapt.studies.subsets import nested_subsets, write_subsets
from nnssl_adapt.studies.words import study_table
from nnssl_adapt.training.optimise.loss_choice import loss_mistakes
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """Many trainings that together answer one question.

    Attributes:
        spec: what is compared.
        dataset_name: ``Dataset041_Name``.
        preparations: what has to be preprocessed.
        runs: all trainings that are compared, small fractions first.
        first_stages: those that cascades among them need before, and that are not compared.
        training_cases: mean number of a fold's training cases, by fraction.
        file: that it can be read from again, as it is.
    """

    spec: StudySpec
    dataset_name: str
    preparations: tuple[Preparation, ...]
    runs: tuple[StudyRun, ...]
    first_stages: tuple[StudyRun, ...]
    training_cases: Mapping[float, float]
    file: Path

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
        mistakes += _impossible_losses(spec, dataset.labels)
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
        runs = tuple(runs_of(spec, dataset.name, subsets, files))
        stages = tuple(first_stages_of(spec, runs, subsets, files))
        kept = _kept_file(spec, source, changes, folder)
        return cls(spec, dataset.name, tuple(preparations), runs, stages, counts, kept)

    @property
    def trainings(self) -> tuple[StudyRun, ...]:
        """Everything that is trained, first stages of cascades before the others."""
        return (*self.first_stages, *self.runs)

    @property
    def folder(self) -> Path:
        """``<nnUNet_results>/<dataset>/studies/<name>``, with the subsets, the tables and the page."""
        return study_folder(self.dataset_name, self.spec.name)

    def run(
        self,
        cluster: str = LOCAL,
        resources: Resources | None = None,
        throttle: int = 0,
        settings: SlurmSettings | None = None,
        command: Sequence[str] = (),
        training: Sequence[str] = (),
    ) -> Submission:
        """Do what is missing, and write the results. Call it again to go on: files say what is done.

        Args:
            cluster: ``local``: on this machine, one run after another (or as many as there are GPUs), before this returns.
                ``slurm``: as jobs, which are submitted; the last one writes the results.
            resources: of each training; None: eight cores, one GPU where the study's device is CUDA.
            throttle: most trainings of a plan at the same time; 0: all.
            settings: of all Slurm jobs.
            command: that asked for it, for the record.
            training: more flags of every training.

        Raises:
            ConfigurationError: the study is running already, or there is no Slurm; SlurmError: Slurm refused.
            SourceError: weights can't be fetched, which jobs without internet need.
            TrainingStopped: of ``local``: a signal asked for it; what is done is kept.
            StepFailed: of ``local``: a run failed (the others were done); its output is in the study's folder.
        """
        resources = resources or Resources(gpus="1" if self.spec.device.startswith("cuda") else "0")
        resources = resources.a_task_for_each_gpu
        more = (*resources.rank_words(cluster == SLURM), *training)
        answer = ("study", str(self.file), "--table")
        page = self.folder / "study.html"
        graph = study_graph(
            f"study-{self.spec.name}", self.preparations, self.trainings, answer, page, resources, throttle, more
        )
        submission = Submission(self.folder / FOLDER, graph, cluster, tuple(command), versions_here(package_version()))
        if cluster == SLURM:
            slurm.require_slurm()
            for source in dict.fromkeys(source for arm in self.spec.arms for source in _sources_of(arm)):
                open_checkpoint(source)
            with only_submitter(submission.folder):
                return submission.renewed(settings or SlurmSettings()).submit()
        slots = gpu_slots(gpus_here(), resources.num_gpus)
        with only_submitter(submission.folder):
            submission = submission.renewed(settings or SlurmSettings())
        try:
            LocalRun(submission, slots, settings.setup if settings else None).run()
        finally:
            self.save()
        return submission

    def cancel(self) -> int:
        """Cancel what waits or runs; returns the number of jobs. Raises ConfigurationError where nothing was submitted."""
        return Submission.load(self.folder / FOLDER).cancel()

    def status(self) -> str:
        """The matrix of runs: how many are finished, and how far the others are."""
        header = ("arm", "fraction", "fold", "seed", "state", "epochs", "hours", "node", "last words")
        submitted = Submission.exists(self.folder / FOLDER)
        steps = {s.step: s for s in status_of(Submission.load(self.folder / FOLDER)).steps} if submitted else {}
        rows = [
            (
                *(_shown_arm(run), f"{run.fraction:g}", str(run.fold), str(run.seed)),
                *(steps[run.key].state if run.key in steps and not run.is_done else _state(run), str(_epochs(run))),
                *(f"{hours_of(run):.2f}", steps[run.key].node if run.key in steps else ""),
                steps[run.key].detail or steps[run.key].last_line if run.key in steps else "",
            )
            for run in self.trainings
        ]
        prepared = sum(preparation.plans_file.is_file() for preparation in self.preparations)
        done = sum(run.is_done for run in self.trainings)
        return (
            f"study {self.spec.name}: {prepared} of {len(self.preparations)} plans preprocessed, {done} of "
            f"{len(self.trainings)} runs finished\n{text_table(header, rows)}"
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
        page = study_page(self.spec, cells, self.runs, self.preparations, self._citations(), facts, self.first_stages)
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
            plan = FinetunePlan.load(preparation.plans_file, arm.configuration)
            entries = plan.pretrain_info.get("citations") or ()
            texts = [t for entry in entries if isinstance(entry, dict) for t in entry.get("apa_citations") or ()]
            found[arm.weights] = texts
        return found


def _impossible_losses(spec: StudySpec, labels: LabelScheme) -> list[str]:
    """What each arm's loss can't have with these labels, such as weights of classes that are not there."""
    return [
        f"arm {arm.name}: {mistake}" for arm in spec.arms for mistake in loss_mistakes(arm.resolved_recipe(), labels)
    ]


def _kept_file(
    spec: StudySpec, source: str | Path | Mapping[str, Any], changes: Mapping[str, Any], folder: Path
) -> Path:
    """The study's own file; where entries were changed, or there is none, one in its folder that has all of it."""
    if spec.file is not None and not changes:
        return spec.file.resolve()
    content = (
        source if isinstance(source, Mapping) else yaml.safe_load(Path(str(spec.file)).read_text(encoding="utf-8"))
    )
    path = folder / f"{spec.name}.yaml"
    write_text(path, yaml.safe_dump({**content, "name": spec.name, **changes}, sort_keys=False, allow_unicode=True))
    return path


def _sources_of(arm: Arm) -> tuple[str, ...]:
    network = () if arm.network is None else (arm.network,)
    return network if arm.from_scratch else (*network, arm.weights)


def _shown_arm(run: StudyRun) -> str:
    return f"{run.arm} ({run.configuration} for it)" if run.for_cascade else run.arm


def _state(run: StudyRun) -> str:
    if run.is_done:
        return "finished"
    return "begun" if run.fold_folder.is_dir() else "waiting"


def _epochs(run: StudyRun) -> int:
    path = run.fold_folder / "metrics.jsonl"
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line) if path.is_file() else 0
