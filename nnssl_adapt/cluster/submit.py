"""From a dataset and pre-trained weights to a cross-validated model, in one call: checked, written down, submitted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nnssl_adapt.cluster import slurm
from nnssl_adapt.cluster.checks import check_folds, check_memory, check_results_folder, check_setup, planned
from nnssl_adapt.cluster.finetuning import Finetuning, planning_words, source_words
from nnssl_adapt.cluster.graph import Graph, Resources
from nnssl_adapt.cluster.local import LocalRun, gpu_slots, gpus_here
from nnssl_adapt.cluster.scripts import SlurmSettings
from nnssl_adapt.cluster.status import SubmissionStatus, status_of
from nnssl_adapt.cluster.submission import CLUSTERS, FOLDER, LOCAL, SLURM, Submission, only_submitter, versions_here
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.files import write_text
from nnssl_adapt.planning.provenance import package_version
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.optimise.loss_choice import loss_mistakes
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.recipe.values import raise_if_any
from nnssl_adapt.training.run.deadline import is_unlimited, read_time_limit
from nnssl_adapt.training.run.folder import RunFolder
from nnssl_adapt.training.setup import adapted_plan, without_pretraining
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint, open_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submitted:
    """A submission that was made, or found. As text: what it consists of, and where it is.

    Attributes:
        submission: its record.
        new: names of the steps that this call submitted (or would, in a dry run).
    """

    submission: Submission
    new: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """With the scripts, the logs and ``jobs.json``."""
        return self.submission.folder

    @property
    def graph(self) -> Graph:
        return self.submission.graph

    def status(self) -> SubmissionStatus:
        """Where it stands now; as text, a table. Raises SlurmError where Slurm does not answer."""
        return status_of(self.submission)

    def cancel(self) -> int:
        """Cancel what waits or runs, so that nothing of it comes back; returns the number of jobs."""
        return self.submission.cancel()

    def __str__(self) -> str:
        done = len(self.graph.steps) - len(self.new)
        lines = [f"{self.graph.name}: {len(self.new)} steps submitted" + (f", {done} are done already" if done else "")]
        for group in self.graph.groups:
            names = [step.name for step in self.graph.of_group(group) if step.name in self.new]
            if names:
                numbers = {
                    self.submission.jobs[name].partition("_")[0] for name in names if name in self.submission.jobs
                }
                lines.append(
                    f"  {group}: {', '.join(names)}" + (f" (job {', '.join(sorted(numbers))})" if numbers else "")
                )
        return "\n".join([*lines, f"  in {self.folder}"])


def submit(
    dataset: int | str,
    checkpoint: str | Path | None,
    name: str = "pretrained",
    *,
    folds: Sequence[int] = (0, 1, 2, 3, 4),
    shards: int = 1,
    recipe: Recipe | None = None,
    device: str = "cuda",
    resources: Resources | None = None,
    throttle: int = 0,
    cluster: str = SLURM,
    settings: SlurmSettings | None = None,
    plan_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    training: Sequence[str] = (),
    dry_run: bool = False,
    command: Sequence[str] = (),
) -> Submitted:
    """Submit everything from the raw dataset to the report: verify and fingerprint, preprocess, train the folds, choose.

    What can be checked here is checked first: the dataset, the weights and their fit, the plan, the recipe, memory. Then
    scripts and ``jobs.json`` are written into ``submission`` in the model folder. Of an earlier submission only what is
    missing, by its files, is submitted. With ``cluster="local"`` everything runs on this machine before this returns.

    Args:
        dataset: id or name of a raw dataset.
        checkpoint: anything that :func:`open_checkpoint` takes; None, for ``2d`` only: random weights.
        name: short name of the pre-training.
        folds: numbers.
        shards: jobs that preprocess, each a part of the cases.
        recipe: None: ``default``, or ``primus`` for a transformer.
        device: ``cuda``, ``cpu`` or ``mps``.
        resources: of each fold's training; None: eight cores, one GPU.
        throttle: most folds that train at the same time; 0: all.
        cluster: ``slurm`` or ``local``.
        settings: of all Slurm jobs.
        plan_options: keywords of :func:`make_plan`.
        source_options: keywords of :func:`open_checkpoint`.
        training: more flags of ``nnUNetv2_train_pretrained``.
        dry_run: check everything, and write and submit nothing.
        command: that asked for it, for the record.

    Raises:
        ConfigurationError: there is no Slurm, something asked for makes no sense, or this is submitted already and jobs live.
        SlurmError: Slurm refused; it has its own words, and what was submitted is cancelled.
        DatasetError, SourceError, CheckpointError, TransferError, PlanError: what a step would fail of.
        StepFailed, TrainingStopped: of ``cluster="local"``.
    """
    resources, settings = resources or Resources(gpus="1" if device == "cuda" else "0"), settings or SlurmSettings()
    resources = resources.a_task_for_each_gpu
    _check_request(shards, resources, throttle, cluster, settings)
    if cluster == SLURM and not dry_run:
        slurm.require_slurm()
    raw = RawDataset.open(dataset)
    count = check_folds(raw, folds)
    check_results_folder(for_cluster=cluster == SLURM)
    check_setup(settings.setup)
    opened = None if checkpoint is None else open_checkpoint(checkpoint, **dict(source_options or {}))
    finetuning, recipe = _finetuning(
        raw,
        opened,
        None if checkpoint is None else str(checkpoint),
        name,
        recipe,
        device,
        dict(plan_options or {}),
        source_words(dict(source_options or {})),
        tuple(training),
    )
    Ranks(size=resources.nodes * resources.tasks).samples(adapted_plan(finetuning.plan, recipe).batch_size)
    check_memory(finetuning.plan, recipe, raw.labels, resources)
    graph = finetuning.graph(folds, shards, resources, throttle, by_slurm=cluster == SLURM, all_folds=range(count))
    submission = Submission(finetuning.model / FOLDER, graph, cluster, tuple(command), versions_here(package_version()))
    missing = tuple(step.name for step in graph.missing())
    if dry_run:
        return Submitted(submission, missing)
    slots = gpu_slots(gpus_here(), resources.num_gpus) if cluster == LOCAL else []
    with only_submitter(submission.folder):
        submission = submission.renewed(settings)
        write_text(finetuning.recipe, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
        if cluster == SLURM:
            return Submitted(submission.submit(), missing)
    LocalRun(submission, slots, settings.setup).run()
    return Submitted(submission, missing)


def _check_request(shards: int, resources: Resources, throttle: int, cluster: str, settings: SlurmSettings) -> None:
    mistakes = [
        f"{flag} {value}: expected {least} or more"
        for flag, value, least in (
            ("--shards", shards, 1),
            ("--cpus", resources.cpus, 1),
            ("--nodes", resources.nodes, 1),
            ("--throttle", throttle, 0),
        )
        if value < least
    ]
    if cluster not in CLUSTERS:
        mistakes.append(f"--cluster {cluster}: expected {' or '.join(CLUSTERS)}")
    if cluster == LOCAL and resources.nodes > 1:
        mistakes.append(f"--nodes {resources.nodes} with --cluster local: this is one machine")
    if mistakes:
        raise ConfigurationError("; ".join(mistakes), mistakes=mistakes)
    if resources.time and not is_unlimited(resources.time):
        read_time_limit(resources.time, "--time")


def _finetuning(
    raw: RawDataset,
    opened: Checkpoint | None,
    source: str | None,
    name: str,
    recipe: Recipe | None,
    device: str,
    options: dict[str, Any],
    opening: tuple[str, ...],
    training: tuple[str, ...],
) -> tuple[Finetuning, Recipe]:
    """What the steps will be told, and the recipe as it will be trained with."""
    plan, preliminary = planned(raw, opened, name, options)
    recipe = recipe or Recipe.load(plan.architecture.kind.recipe)
    recipe = without_pretraining(recipe) if recipe.from_scratch or opened is None else recipe
    recipe.check_against(plan.architecture, device)
    raise_if_any(list(loss_mistakes(recipe, raw.labels)), f"recipe {recipe.name!r} for {raw.name}")
    model = RunFolder.of(plan, recipe.trainer_name, 0).model
    if source is not None and Path(source).exists():
        source = str(Path(source).resolve())  # jobs start in another folder
    return (
        Finetuning(
            plan=plan,
            source=source,
            name=name,
            model=model,
            trainer=recipe.trainer_name,
            recipe=model / FOLDER / "recipe.yaml",
            planning=planning_words(options, plan.plans_name if preliminary else None),
            opening=opening,
            training=training,
            configurations=tuple(options.get("configurations") or ()),
            device=device,
            pretrained=not recipe.from_scratch,
        ),
        recipe,
    )
