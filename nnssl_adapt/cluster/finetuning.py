"""The graph of a fine-tuning: verify and fingerprint, preprocess in parts, train the folds, choose, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnssl_adapt.cluster.graph import Graph, Resources, Step
from nnssl_adapt.data.preprocess_cases import Shard
from nnssl_adapt.data.store import RECORDS_FOLDER
from nnssl_adapt.planning.plan import CONFIGURATION, FinetunePlan
from nnssl_adapt.planning.preprocess_dataset import part_record
from nnssl_adapt.training.run.checkpointing import FINAL
from nnssl_adapt.training.run.stopping import STOPPED
from nnssl_adapt.weights.transfer.settings import NEW_CHANNEL, TransferSettings

PREPARE, SHARDS, FOLDS, BEST, REPORT = "prepare", "preprocess", "train", "find-best", "report"
"""The groups, in order."""


@dataclass(frozen=True)
class Finetuning:
    """What the steps of a fine-tuning are told.

    Attributes:
        plan: as it will be; only its names and folders are used.
        source: the weights, as ``-pc`` takes them; None: random ones.
        name: short name of the pre-training.
        model: the model folder.
        trainer: name of the trainer, as the model folder has it.
        recipe: file of the recipe.
        planning: flags of ``preprocess`` about the plan.
        opening: flags about the weights.
        training: more flags of ``train``.
        device: ``cuda``, ``cpu`` or ``mps``.
        pretrained: whether training starts from the weights.
        configurations: that are trained; the plan's where none is named. A cascade's first stage is trained before it.
    """

    plan: FinetunePlan
    source: str | None
    name: str
    model: Path
    trainer: str
    recipe: Path
    planning: tuple[str, ...] = ()
    opening: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    device: str = "cuda"
    pretrained: bool = True
    configurations: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[str, ...]:
        """The configurations that are trained, a cascade after its first stage."""
        asked = self.configurations or (self.plan.configuration,)
        first = (stage for name in asked if (stage := self.plan.seen_through(name).previous_stage) is not None)
        return tuple(dict.fromkeys((*first, *asked)))

    def group_of(self, configuration: str) -> str:
        """The group of its trainings."""
        return FOLDS if len(self.trained) == 1 else f"{FOLDS}-{configuration}"

    def _model_of(self, configuration: str) -> Path:
        return self.model.with_name(f"{self.trainer}__{self.plan.plans_name}__{configuration}")

    def graph(
        self,
        folds: Sequence[int],
        shards: int,
        resources: Resources,
        throttle: int = 0,
        by_slurm: bool = True,
        all_folds: Sequence[int] = (),
    ) -> Graph:
        """The graph of so many folds and shards.

        Args:
            folds: numbers, in order.
            shards: parts that preprocessing is done in.
            resources: of each fold's training; the other steps get its cores and memory on one machine, and no GPU.
            throttle: most folds that train at the same time; 0: all.
            all_folds: of the dataset: a cascade needs its first stage trained on all of them.
            by_slurm: several ranks are Slurm's tasks; else the command starts them itself.
        """
        plain = replace(resources, gpus="0", nodes=1, tasks=1)
        every = list(all_folds or folds)
        firsts = {self.plan.seen_through(name).previous_stage for name in self.trained}
        groups = [self.group_of(name) for name in self.trained]
        return Graph(
            name=f"{self.name}-{self.plan.dataset_name[7:10]}",
            steps=(
                self._prepare(),
                *(self._shard(number, shards) for number in range(1, shards + 1)),
                *(
                    self._fold(name, fold, resources, by_slurm, every)
                    for name in self.trained
                    for fold in (every if name in firsts else folds)
                ),
                self._find_best(folds),
                self._report(folds),
            ),
            resources={
                **{PREPARE: plain, SHARDS: plain, BEST: plain, REPORT: plain},
                **dict.fromkeys(groups, resources),
            },
            at_once=dict.fromkeys(groups, throttle) if throttle else {},
        )

    def _preprocess(self, *more: str) -> tuple[str, ...]:
        weights = () if self.source is None else ("-pc", self.source)
        words = ("preprocess", "-d", self.plan.dataset_name, *weights, "-n", self.name)
        return (*words, *self.planning, *self.opening, *more)

    def _prepare(self) -> Step:
        folder = self.plan.dataset_folder
        return Step(
            PREPARE,
            PREPARE,
            self._preprocess("--prepare"),
            outputs=(folder / "dataset_fingerprint.json",),
            watch=(folder / ".nnssl_adapt_fingerprint",),
        )

    def _shard(self, number: int, total: int) -> Step:
        return Step(
            f"{SHARDS}_{number}",
            SHARDS,
            self._preprocess("--shard", f"{number}/{total}") if total > 1 else self._preprocess(),
            outputs=(part_record(self.plan, Shard(number, total)),) if total > 1 else (self.plan.plans_file,),
            inputs=self._prepare().outputs if total > 1 else (),
            after=(PREPARE,),
            watch=(self.plan.store_folder / RECORDS_FOLDER / "cases",),
        )

    def _fold(self, configuration: str, fold: int, resources: Resources, by_slurm: bool, before: Sequence[int]) -> Step:
        """``before``: folds of its previous stage, if it is a cascade."""
        first = self.plan.seen_through(configuration).previous_stage
        folder = self._model_of(configuration) / f"fold_{fold}"
        words: tuple[str, ...] = ("train", "-d", self.plan.dataset_name, "-c", configuration, "-f", str(fold))
        words += ("-p", self.plan.plans_name, "--recipe", str(self.recipe), "-device", self.device, "--c", "auto")
        words += ("-pc", self.source, *self.opening) if self.pretrained and self.source is not None else ()
        words += resources.rank_words(by_slurm)
        return Step(
            f"fold_{fold}" if len(self.trained) == 1 else f"{configuration}_fold_{fold}",
            self.group_of(configuration),
            (*words, *self.training),
            outputs=(folder / FINAL, folder / "validation" / "summary.json"),
            inputs=self._summaries(first, before) if first is not None else (),
            after=(SHARDS,) if first is None else (SHARDS, self.group_of(first)),
            watch=(folder / STOPPED, folder / "validation_done.json"),
            folder=folder,
        )

    def _summaries(self, configuration: str, folds: Sequence[int]) -> tuple[Path, ...]:
        model = self._model_of(configuration)
        return tuple(model / f"fold_{fold}" / "validation" / "summary.json" for fold in folds)

    def _find_best(self, folds: Sequence[int]) -> Step:
        ensembles = () if len(self.trained) > 1 and "--npz" in self.training else ("--no-ensembles",)
        words: tuple[str, ...] = (
            "find-best",
            "-d",
            self.plan.dataset_name,
            "-p",
            self.plan.plans_name,
            "-c",
            *self.trained,
        )
        words += ("-tr", self.trainer, *ensembles, "-f", *(str(fold) for fold in folds))
        gathered = self.model / f"crossval_results_folds_{'_'.join(str(fold) for fold in folds)}"
        return Step(
            BEST,
            BEST,
            words,
            outputs=(gathered / "summary.json", gathered / "postprocessing.json"),
            inputs=tuple(path for name in self.trained for path in self._summaries(name, folds)),
            after=tuple(self.group_of(name) for name in self.trained),
        )

    def _report(self, folds: Sequence[int]) -> Step:
        return Step(
            REPORT,
            REPORT,
            ("report", str(self.model)),
            outputs=(self.model / "report.html",),
            inputs=self._find_best(folds).outputs,
            after=(BEST,),
        )


def planning_words(options: Mapping[str, Any], plans_name: str | None = None) -> tuple[str, ...]:
    """Flags of ``preprocess`` that say what keywords of :func:`~nnssl_adapt.planning.make.make_plan` say.

    ``plans_name``: to be used instead of one that these would make up.
    """
    words: list[str] = []
    for flag, key in (
        ("-am", "mode"),
        ("-pl", "base_plans"),
        ("--normalization", "normalization"),
        ("--preset", "preset"),
        ("--fit-gpu", "fit_gpu"),
    ):
        if options.get(key) is not None:
            words += [flag, str(options[key])]
    if options.get("spacing") is not None:
        words += ["-os", *(str(number) for number in options["spacing"])]
    if tuple(options.get("configurations") or (CONFIGURATION,)) != (CONFIGURATION,):
        words += ["-c", *options["configurations"]]
    words += [flag for flag, key in _SWITCHES if options.get(key)]
    name = plans_name or options.get("plans_name")
    words += ["--plans_name", str(name)] if name else []
    return (*words, *_transfer_words(options.get("transfer") or TransferSettings()))


_SWITCHES = (("--keep-topology", "keep_topology"), ("--ignore-orientation", "ignore_orientation"))


def _transfer_words(settings: TransferSettings) -> list[str]:
    default = TransferSettings()
    words: list[str] = []
    if settings.scope != default.scope:
        words += ["--scope", settings.scope]
    if isinstance(settings.channels, tuple):
        taken = (NEW_CHANNEL if channel is None else str(channel) for channel in settings.channels)
        words += ["--channels", ",".join(f"{number}={channel}" for number, channel in enumerate(taken))]
    elif settings.channels != default.channels:
        words += ["--channels", settings.channels]
    if settings.token_order != default.token_order:
        words += ["--token-order", settings.token_order]
    return [*words, *(word for pattern in settings.waive for word in ("--waive", pattern))]


def source_words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Flags that say what keywords of :func:`~nnssl_adapt.weights.checkpoint.checkpoint.open_checkpoint` say."""
    flags = {
        "revision": "--revision",
        "filename": "--file",
        "fold": "--fold-of-source",
        "stem": "--stem",
        "axes": "--axes",
        "cache_dir": "--cache-dir",
    }
    words = [word for key, flag in flags.items() if options.get(key) is not None for word in (flag, str(options[key]))]
    return (*words, *(("--local-files-only",) if options.get("local_files_only") else ()))
