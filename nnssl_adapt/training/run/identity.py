"""What a run is made of: its cases and their data, labels, channels, network, recipe and starting weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl_adapt.data.dataset import DatasetJson
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.splits import SPLITS_FILE, Split, load_or_make_splits, load_splits, split_for_fold
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.inference.trainer_class import trainer_for_nnunet
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training.recipe.recipe import Recipe


@dataclass(frozen=True)
class RunIdentity:
    """What a run is made of. A run only goes on from a checkpoint that was made of the same.

    Attributes:
        plan: of the run, with the recipe's patch and batch.
        dataset: its labels and channels.
        fold: number or ``all``.
        training_cases: identifiers.
        validation_cases: identifiers.
        recipe: of the run.
        version: of this package.
        stored: digest of each case's stored voxels.
        previous: of a cascade, what predicted each case's labels of the previous stage.
        seen_before: cases that it was trained on before the splits were changed.
        weights: what the weights that it started from are, as :class:`~nnssl_adapt.weights.sources.resolved.Origin`; None for
            random ones.
        citations: of those weights.
    """

    plan: FinetunePlan
    dataset: DatasetJson
    fold: int | str
    training_cases: tuple[str, ...]
    validation_cases: tuple[str, ...]
    recipe: Recipe
    version: str
    stored: Mapping[str, str] = field(default_factory=dict)
    previous: Mapping[str, str] = field(default_factory=dict)
    seen_before: tuple[str, ...] = ()
    weights: Mapping[str, Any] | None = None
    citations: tuple[dict[str, Any], ...] = ()

    @property
    def network(self) -> dict[str, Any]:
        """The network as plain values; equal for equal networks. A CNN's don't depend on the patch."""
        labels = LabelScheme.from_dataset_json(self.dataset.raw)
        return {
            "architecture": self.plan.architecture.to_plans_dict(self.plan.patch_size),
            "num_channels": self.plan.num_channels + len(self.plan.stage_channels(labels)),
            "num_heads": labels.num_heads,
        }

    @property
    def stock_trainer(self) -> str:
        """The trainer class with which released nnU-Net builds this network."""
        return trainer_for_nnunet(self.plan.architecture)

    def to_dict(self) -> dict[str, Any]:
        """What decides which model comes out, beside network and recipe, as plain values for a checkpoint or JSON."""
        return {
            "training_cases": list(self.training_cases),
            "validation_cases": list(self.validation_cases),
            "seen_before": list(self.seen_before),
            "preprocessing": self.plan.settings.to_dict(),
            "stored": dict(self.stored),
            "previous_stage": dict(self.previous),
            **described_dataset(self.dataset),
            "weights": None if self.weights is None else dict(self.weights),
        }


def described_dataset(dataset: DatasetJson) -> dict[str, Any]:
    """Label names and values, their order where they are regions, and channel names."""
    return {
        "labels": dict(dataset.labels),
        "regions_class_order": dataset.regions_class_order,
        "channels": [name for _, name in sorted(dataset.channel_names.items(), key=lambda item: int(item[0]))],
    }


def cases_of_fold(
    plan: FinetunePlan, store: CaseStore, fold: int | str, file_ending: str, splits_file: str | Path | None = None
) -> tuple[int | str, list[str], list[str]]:
    """The fold in its plain form, its training and its validation cases, all of them preprocessed.

    ``splits_file`` is used instead of the dataset's own splits.
    """
    stored = store.identifiers
    if not stored:
        raise ConfigurationError(
            f"{store.folder} has no preprocessed cases: run nnUNetv2_preprocess_like_nnssl (or, for nnU-Net's plans, "
            "nnUNetv2_preprocess) first"
        )
    splits = splits_of(plan, stored, file_ending, splits_file)
    used = plan.dataset_folder / SPLITS_FILE if splits_file is None else Path(splits_file)
    training, validation = split_for_fold(splits, fold, stored, used)
    fold = fold if fold == "all" else int(fold)
    if not training or not validation:
        raise ConfigurationError(f"fold {fold} has {len(training)} training and {len(validation)} validation cases")
    store.require([*training, *validation])
    return fold, training, validation


def splits_of(
    plan: FinetunePlan, stored: Sequence[str], file_ending: str, splits_file: str | Path | None = None
) -> list[Split]:
    """The dataset's splits, or those of a file. ``stored``: identifiers of the preprocessed cases."""
    references = plan.dataset_folder / "gt_segmentations"
    known = sorted(p.name.removesuffix(file_ending) for p in references.glob(f"*{file_ending}")) or list(stored)
    if splits_file is not None:
        return load_splits(Path(splits_file), known)
    return load_or_make_splits(plan.dataset_folder, known)
