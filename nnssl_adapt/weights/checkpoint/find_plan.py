"""Which plan a checkpoint was trained with: nnssl's, nnU-Net's, or what the tensors tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.errors import AdaptationPlanError, ModelFolderError
from nnssl_adapt.text import read_json
from nnssl_adapt.weights.checkpoint.adaptation_plan import EMBEDDED_KEY, AdaptationPlan
from nnssl_adapt.weights.checkpoint.plain_pickle import read_plain_pickle
from nnssl_adapt.weights.checkpoint.plan_check import reconcile_best
from nnssl_adapt.weights.checkpoint.supervised import configuration_of_folder, plan_from_nnunet, plan_from_tensors
from nnssl_adapt.weights.checkpoint.weight_file import PLAN_KEYS
from nnssl_adapt.weights.families.family import Family
from nnssl_adapt.weights.families.nnunet import trained_by_nnunet
from nnssl_adapt.weights.network.network_parts import Tensors
from nnssl_adapt.weights.sources.listing import COMPANION_SUFFIX, SIDECAR_NAME
from nnssl_adapt.weights.sources.resolved import ResolvedSource


@dataclass(frozen=True)
class FoundPlan:
    """A plan that fits the tensors.

    Attributes:
        plan: with the keys, patch and channels that the tensors have.
        notes: what was corrected in it.
        axes: order of the image axes that the tensors were trained on, where the plan does not say it in another way.
    """

    plan: AdaptationPlan
    notes: tuple[str, ...] = ()
    axes: str = "zyx"


def find_plan(
    content: Mapping[str, Any],
    resolved: ResolvedSource,
    tensors: Tensors,
    family: Family | None = None,
    is_lightning: bool = False,
    told: Mapping[str, Any] | None = None,
) -> FoundPlan:
    """Find the plan: nnssl's in the file or beside it, else nnU-Net's of the model folder or in the file, else the tensors.

    Args:
        content: of the weight file.
        resolved: where it lies, and what lies beside it.
        tensors: its tensors, under the names that our networks have.
        family: told by the names in the file, if any.
        is_lightning: whether Lightning wrote the file.
        told: arguments of the network that the user said, for what the tensors of a file without a plan don't tell.

    Raises AdaptationPlanError when there is no plan, or none that fits; ModelFolderError or DatasetJsonError for the model
    folder's files.
    """
    where = str(resolved.weights)
    notes: list[str] = []
    axes = "zyx"
    candidates, errors = _nnssl_plans(content, resolved)
    if not candidates and errors:
        raise errors[0]
    if not candidates and (nnunet := _nnunet_plan(content, resolved)) is not None:
        candidates = {"of nnU-Net": nnunet}
    if not candidates:
        plan, axes, notes = _plan_of_tensors(content, resolved, tensors, family, told or {})
        axes = "xyz" if is_lightning and family is None else axes
        candidates = {"of the tensors": plan}
    _, plan, corrected, others = reconcile_best(candidates, tensors, where)
    return FoundPlan(plan, (*notes, *map(str, [*errors, *others]), *corrected), axes)


def _nnssl_plans(
    content: Mapping[str, Any], resolved: ResolvedSource
) -> tuple[dict[str, AdaptationPlan], list[AdaptationPlanError]]:
    """Where nnssl's plans were found → the plans; and why others can't be read."""
    found: dict[str, AdaptationPlan] = {}
    errors: list[AdaptationPlanError] = []
    embedded = next((content[key] for key in PLAN_KEYS if content.get(key) is not None), None)
    try:
        if embedded is not None:
            found["in the file"] = AdaptationPlan.parse(embedded, str(resolved.weights))
    except AdaptationPlanError as error:
        errors.append(error)
    try:
        if resolved.sidecar is not None:
            found[f"in {SIDECAR_NAME}"] = AdaptationPlan.load(resolved.sidecar)
    except AdaptationPlanError as error:
        errors.append(error)
    return found, errors


def _plan_of_tensors(
    content: Mapping[str, Any],
    resolved: ResolvedSource,
    tensors: Tensors,
    family: Family | None,
    told: Mapping[str, Any],
) -> tuple[AdaptationPlan, str, list[str]]:
    trainer = content.get("trainer_name")
    if isinstance(trainer, str) and not trained_by_nnunet(trainer):
        raise _no_plan(resolved)  # nnssl writes one beside every file: it was left behind, and is worth fetching
    beside = _beside(resolved.weights, family)
    try:
        return plan_from_tensors(tensors, str(resolved.weights), trainer, family, beside, told)
    except AdaptationPlanError as error:
        if family is not None:
            raise AdaptationPlanError(
                f"{resolved.weights} is {family.name}, and can't be used as it is: {error.__cause__}"
            ) from error
        raise _no_plan(resolved, f", and {error.__cause__ or error}") from error


def _beside(weights: Path, family: Family | None) -> dict[str, Any] | None:
    """What the pickle beside the weights says of how they were trained, for families that write one; None without it."""
    path = weights.with_name(f"{weights.name}{COMPANION_SUFFIX}")
    if family is None or family.beside is None or not path.is_file():
        return None
    return family.beside(read_plain_pickle(path), str(path), str(weights))


def _no_plan(resolved: ResolvedSource, more: str = "") -> AdaptationPlanError:
    origin = resolved.origin
    beside = f"{SIDECAR_NAME} in the repository {origin}" if origin.repo_id else resolved.weights.parent / SIDECAR_NAME
    return AdaptationPlanError(
        f"{resolved.weights} has no adaptation plan: looked for '{EMBEDDED_KEY}' in it and for {beside}{more}. "
        f"Copy the {SIDECAR_NAME} that nnssl wrote during pre-training beside it"
    )


# -- nnU-Net's -------------------------------------------------------------------------------------------------------


def _nnunet_plan(content: Mapping[str, Any], resolved: ResolvedSource) -> AdaptationPlan | None:
    """From the model folder's files, else from the copies that nnU-Net's trainer keeps in the checkpoint; or None."""
    init_args = content.get("init_args")
    arguments: Mapping[str, Any] = init_args if isinstance(init_args, Mapping) else {}
    configuration, trainer = arguments.get("configuration"), content.get("trainer_name")
    folder = resolved.model_folder
    if folder is not None:
        named = configuration if isinstance(configuration, str) else configuration_of_folder(folder.name)
        path = folder / "dataset.json"
        dataset = read_json(path, ModelFolderError, "dataset.json") if path.is_file() else None
        plans = read_json(folder / "plans.json", ModelFolderError, "plans file")
        return plan_from_nnunet(plans, dataset, named, str(folder), trainer or folder.name.partition("__")[0])
    plans, dataset_json = arguments.get("plans"), arguments.get("dataset_json")
    # nnssl's trainers keep a plan there too, with another layout and without a description of the network.
    if not trained_by_nnunet(trainer) or not isinstance(plans, Mapping):
        return None
    named = configuration if isinstance(configuration, str) else None
    known = dataset_json if isinstance(dataset_json, Mapping) else None
    return plan_from_nnunet(plans, known, named, str(resolved.weights), trainer)
