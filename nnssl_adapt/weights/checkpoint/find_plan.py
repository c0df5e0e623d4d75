"""Which plan a checkpoint was trained with: nnssl's, nnU-Net's, or what the tensors tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnssl_adapt.errors import AdaptationPlanError, ConfigurationError, ModelFolderError
from nnssl_adapt.text import read_json
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.nnunet_plan import plan_of_nnunet
from nnssl_adapt.weights.checkpoint.plan_check import reconcile_best
from nnssl_adapt.weights.checkpoint.plan_of_tensors import plan_of_tensors
from nnssl_adapt.weights.checkpoint.weight_file import PLAN_KEYS
from nnssl_adapt.weights.families.family import Family
from nnssl_adapt.weights.network.network_parts import Tensors
from nnssl_adapt.weights.sources.listing import SIDECAR_NAME
from nnssl_adapt.weights.sources.resolved import ResolvedSource


@dataclass(frozen=True)
class FoundPlan:
    """A plan that fits the tensors.

    Attributes:
        plan: with the keys, patch and channels that the tensors have.
        notes: what was corrected in it.
        axes: order of the image axes that the tensors were trained on, where the plan does not say it in another way.
        axes_reason: what tells that order, where it is not ours (z, y, x).
        citations: what the file itself says to cite, None where it says nothing.
    """

    plan: AdaptationPlan
    notes: tuple[str, ...] = ()
    axes: str = "zyx"
    axes_reason: str = ""
    citations: tuple[dict[str, Any], ...] | None = None


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
    folder's files; ConfigurationError for an argument that such a network does not have.
    """
    where = str(resolved.weights)
    told = told or {}
    citations, of_citations = _citations(content.get("citations"))
    candidates, errors = _written_plans(content, resolved)
    if not candidates and errors:
        raise errors[0]
    axes, notes = "zyx", list[str]()
    if not candidates:
        plan, axes, notes = plan_of_tensors(content, resolved, tensors, family, told)
        axes = "xyz" if is_lightning and family is None else axes
        candidates = {"of the tensors": plan}
    plan, corrected, others = reconcile_best(candidates, tensors, where)
    if family is not None:  # nnU-Net's plans say nothing of who trained with its trainers
        cited = {entry.get("name") for entry in plan.citations}
        more = (dict(entry) for entry in family.facts.citations if entry.get("name") not in cited)
        plan = plan.model_copy(update={"citations": (*plan.citations, *more)})
    for name, value in told.items():
        if plan.architecture.kwargs.get(name) != value:
            raise ConfigurationError(
                f"{where} is a {plan.architecture}: --{name.replace('_', '-')} {value} is for Swin UNETRs whose origin is not "
                "known; leave it out"
            )
    reason = "Lightning and MONAI files are" if is_lightning else "networks of its family were"
    notes = [*notes, *map(str, [*errors, *others]), *corrected, *of_citations]
    return FoundPlan(plan, tuple(notes), axes, reason, citations)


def _citations(stated: Any) -> tuple[tuple[dict[str, Any], ...] | None, list[str]]:
    """The file's own citations, None where it has none; what is not ``{type, name, …}`` is left out and noted."""
    entries = stated if isinstance(stated, (list, tuple)) else [stated] if stated is not None else []
    if not entries or stated == {}:
        return None, []
    good = tuple(dict(entry) for entry in entries if isinstance(entry, Mapping))
    bad = len(entries) - len(good)
    return good, [f"{bad} of its citations can't be read"] if bad else []


def _written_plans(
    content: Mapping[str, Any], resolved: ResolvedSource
) -> tuple[dict[str, AdaptationPlan], list[AdaptationPlanError]]:
    """Where plans are written → the plans: nnssl's, or where there is none, nnU-Net's; and why others can't be read."""
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
    if found or errors:
        return found, errors
    folder, plans, dataset = resolved.model_folder, None, None
    if folder is not None:
        path = folder / "dataset.json"
        dataset = read_json(path, ModelFolderError, "dataset.json") if path.is_file() else None
        plans = read_json(folder / "plans.json", ModelFolderError, "plans file")
    plan = plan_of_nnunet(content, resolved.weights, folder, plans, dataset)
    return {} if plan is None else {"of nnU-Net": plan}, []
