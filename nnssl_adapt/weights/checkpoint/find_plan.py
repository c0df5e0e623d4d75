"""Which plan a checkpoint was trained with: nnssl's, nnU-Net's, or what the tensors tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.errors import AdaptationPlanError, ModelFolderError
from nnssl_adapt.weights.checkpoint.plan_check import reconcile
from nnssl_adapt.weights.checkpoint.supervised import (
    configuration_of_folder,
    plan_from_nnunet,
    plan_from_tensors,
    trained_by_nnunet,
)
from nnssl_adapt.weights.checkpoint.weight_file import PLAN_KEYS
from nnssl_adapt.weights.network.adaptation_plan import EMBEDDED_KEY, AdaptationPlan
from nnssl_adapt.weights.network.network_parts import Tensors
from nnssl_adapt.weights.sources.file_names import SIDECAR_NAME
from nnssl_adapt.weights.sources.resolve import ResolvedSource


@dataclass(frozen=True)
class FoundPlan:
    """A plan that fits the tensors, what was mended in it, and whether there was none but the tensors."""

    plan: AdaptationPlan
    notes: tuple[str, ...] = ()
    from_tensors: bool = False


def find_plan(content: Mapping[str, Any], resolved: ResolvedSource, tensors: Tensors) -> FoundPlan:
    """Find the plan: nnssl's in the file or beside it, else nnU-Net's of the model folder or in the file, else the tensors.

    Raises AdaptationPlanError when there is none, or none that fits.
    """
    where = str(resolved.weights)
    if resolved.sidecar is not None or any(content.get(key) is not None for key in PLAN_KEYS):
        return FoundPlan(*_nnssl_plan(content, resolved, tensors))
    nnunet = _nnunet_plan(content, resolved)
    if nnunet is not None:
        mended, problems = reconcile(nnunet, tensors, where)
        mended, more = _check_heads(mended, tensors)
        return FoundPlan(mended, tuple(problems + more))
    trainer = content.get("trainer_name")
    if isinstance(trainer, str) and not trained_by_nnunet(trainer):
        raise _no_plan(resolved)  # nnssl writes one beside every file: it was left behind, and is worth fetching
    try:
        plan, notes = plan_from_tensors(tensors, where, trainer)
    except AdaptationPlanError as error:
        raise _no_plan(resolved, f", and {error.__cause__ or error}") from error
    plan, more = reconcile(plan, tensors, where)
    return FoundPlan(plan, tuple(notes + more), from_tensors=True)


# -- nnssl's ---------------------------------------------------------------------------------------------------------


def _nnssl_plan(
    content: Mapping[str, Any], resolved: ResolvedSource, tensors: Tensors
) -> tuple[AdaptationPlan, tuple[str, ...]]:
    """The plan that fits the tensors, of the one in the file and the one beside it; equal fits: the one in the file."""
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
    fits: dict[str, tuple[AdaptationPlan, list[str]]] = {}
    for name, candidate in found.items():
        try:
            fits[name] = reconcile(candidate, tensors, f"{resolved.weights}, plan {name}")
        except AdaptationPlanError as error:
            errors.append(error)
    if not fits:
        raise errors[-1] if found else errors[0]
    where = min(fits, key=lambda name: len(fits[name][1]))
    plan, notes = fits[where]
    notes = [*(str(error) for error in errors), *notes]
    for other in fits.keys() - {where}:
        differing = found[where].differences(found[other])
        if differing:
            better = "fits the tensors better" if len(fits[other][1]) > len(fits[where][1]) else "fits no worse"
            notes.append(
                f"the plans {where} and {other} disagree on {', '.join(differing)}: took that {where}, which {better}"
            )
        plan = plan.model_copy(
            update={
                "citations": plan.citations or found[other].citations,
                "trainer_name": plan.trainer_name or found[other].trainer_name,
            }
        )
    return plan, tuple(notes)


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
    configuration = arguments.get("configuration")
    folder = resolved.model_folder
    if folder is not None:
        named = configuration if isinstance(configuration, str) else configuration_of_folder(folder.name)
        dataset = folder / "dataset.json"
        content = _read_json(folder / "plans.json")
        return plan_from_nnunet(content, _read_json(dataset) if dataset.is_file() else None, named, str(folder))
    plans, dataset_json = arguments.get("plans"), arguments.get("dataset_json")
    # nnssl's trainers keep a plan there too, with another layout and without a description of the network.
    if not trained_by_nnunet(content.get("trainer_name")) or not isinstance(plans, Mapping):
        return None
    named = configuration if isinstance(configuration, str) else None
    known = dataset_json if isinstance(dataset_json, Mapping) else None
    return plan_from_nnunet(plans, known, named, str(resolved.weights))


def _read_json(path: Path) -> dict[str, Any]:
    """A model folder's file. Raises ModelFolderError naming it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFolderError(
            f"can't read {path}: {error.strerror or error}; copy the whole model folder again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not readable as JSON ({error}): copy the model folder again") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds a {type(content).__name__}, expected a mapping")
    return content


def _check_heads(plan: AdaptationPlan, tensors: Tensors) -> tuple[AdaptationPlan, list[str]]:
    """Names of the outputs count only if there are as many as the segmentation layers have."""
    heads = {
        tensor.shape[0] for name, tensor in tensors.items() if "seg_layers" in name.split(".") and tensor.ndim == 5
    }
    if not plan.head_names or not heads or heads == {len(plan.head_names)}:
        return plan, []
    counts = "/".join(str(count) for count in sorted(heads))
    note = f"dataset.json names {len(plan.head_names)} outputs, the network has {counts}: its heads can't be told apart"
    return plan.model_copy(update={"head_names": ()}), [note]
