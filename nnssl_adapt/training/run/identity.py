"""What a run is made of: its cases, its network, its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.data.splits import load_or_make_splits, load_splits, split_for_fold
from nnssl_adapt.data.store import CaseStore
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.inference.trainer_class import trainer_for_nnunet
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.weights.network.architectures import Architecture


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint belongs to; a run only goes on from a checkpoint of its own.

    Attributes:
        configuration: of the plan, ``3d_fullres``.
        fold: number or ``all``.
        architecture: of the network.
        patch_size: voxels (Z, Y, X).
        num_channels: of the images.
        num_heads: output channels.
        recipe: of the run.
        version: of this package.
        citations: of the weights it started from.
    """

    configuration: str
    fold: int | str
    architecture: Architecture
    patch_size: tuple[int, int, int]
    num_channels: int
    num_heads: int
    recipe: Recipe
    version: str
    citations: tuple[dict[str, Any], ...] = ()

    @property
    def network(self) -> dict[str, Any]:
        """The network as plain values; equal for equal networks."""
        plans = self.architecture.to_plans_dict(self.patch_size)
        return {"architecture": plans, "num_channels": self.num_channels, "num_heads": self.num_heads}

    @property
    def stock_trainer(self) -> str:
        """The trainer class with which released nnU-Net builds this network."""
        return trainer_for_nnunet(self.architecture)


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
    references = plan.dataset_folder / "gt_segmentations"
    known = sorted(p.name.removesuffix(file_ending) for p in references.glob(f"*{file_ending}")) or stored
    splits = (
        load_or_make_splits(plan.dataset_folder, known)
        if splits_file is None
        else load_splits(Path(splits_file), known)
    )
    fold = _checked_fold(fold, len(splits))
    training, validation = split_for_fold(splits, fold, stored)
    if not training or not validation:
        raise ConfigurationError(f"fold {fold} has {len(training)} training and {len(validation)} validation cases")
    store.require([*training, *validation])
    return fold, training, validation


def _checked_fold(fold: int | str, folds: int) -> int | str:
    if fold == "all":
        return fold
    if str(fold).isdigit() and int(fold) < folds:
        return int(fold)
    known = [str(number) for number in range(folds)]
    raise ConfigurationError(f"fold {fold} does not exist: the dataset's folds are {', '.join([*known, 'all'])}")
