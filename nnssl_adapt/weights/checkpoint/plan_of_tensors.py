"""The plan of a network whose file has none: what its tensors tell, and what is known of its family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nnssl_adapt.errors import AdaptationPlanError, ArchitectureError
from nnssl_adapt.weights.checkpoint.adaptation_plan import EMBEDDED_KEY, AdaptationPlan, first_problem
from nnssl_adapt.weights.checkpoint.plain_pickle import read_plain_pickle
from nnssl_adapt.weights.families.family import Facts, Family
from nnssl_adapt.weights.families.nnunet import trained_by_nnunet
from nnssl_adapt.weights.families.registry import family_of_size
from nnssl_adapt.weights.network.network_parts import Tensors
from nnssl_adapt.weights.network.topology import read_topology
from nnssl_adapt.weights.sources.listing import COMPANION_SUFFIX, SIDECAR_NAME
from nnssl_adapt.weights.sources.resolved import ResolvedSource


def plan_of_tensors(
    content: Mapping[str, Any],
    resolved: ResolvedSource,
    tensors: Tensors,
    family: Family | None,
    told: Mapping[str, Any],
) -> tuple[AdaptationPlan, str, list[str]]:
    """The plan that the tensors tell, the order of its image axes (``zyx`` or ``xyz``), and notes.

    Args:
        content: of the weight file.
        resolved: where it lies.
        tensors: its tensors, under the names that our networks have.
        family: told by the names in the file, if any.
        told: arguments of the network that the user said.

    Raises AdaptationPlanError, saying which file is missing, for weights that nnssl trained and for unknown networks.
    """
    weights, origin, trainer = resolved.weights, resolved.origin, content.get("trainer_name")
    sidecar = f"{SIDECAR_NAME} in the repository {origin}" if origin.repo_id else weights.parent / SIDECAR_NAME
    missing = f"{weights} has no adaptation plan: looked for '{EMBEDDED_KEY}' in it and for {sidecar}"
    advice = f"Copy the {SIDECAR_NAME} that nnssl wrote during pre-training beside it"
    if isinstance(trainer, str) and not trained_by_nnunet(trainer):
        raise AdaptationPlanError(f"{missing}. {advice}")  # nnssl writes one beside every file: it was left behind
    beside = _beside(weights, family)
    try:
        return plan_from_tensors(tensors, str(weights), trainer, family, beside, told)
    except AdaptationPlanError as error:
        if family is None:
            raise AdaptationPlanError(f"{missing}, and {error.__cause__ or error}. {advice}") from error
        raise AdaptationPlanError(
            f"{weights} is {family.name}, and can't be used as it is: {error.__cause__}"
        ) from error


def _beside(weights: Path, family: Family | None) -> dict[str, Any] | None:
    """What the pickle beside the weights says of how they were trained, for families that write one; None without it."""
    path = weights.with_name(f"{weights.name}{COMPANION_SUFFIX}")
    if family is None or family.beside is None or not path.is_file():
        return None
    return family.beside(read_plain_pickle(path), str(path), str(weights))


def plan_from_tensors(
    tensors: Tensors,
    where: str,
    trainer_name: str | None = None,
    family: Family | None = None,
    beside: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[AdaptationPlan, str, list[str]]:
    """The plan of a U-Net without any plan, as far as its tensors tell, what is known of its family, and notes on the rest.

    ``family`` is the one that its names told; else it is looked for by the network's size. ``beside`` are entries of the plan
    that a file beside the weights tells, ``arguments`` what the user says of the network where its tensors don't. Returns the
    plan, the order of its image axes (``zyx`` or ``xyz``) and notes. Raises AdaptationPlanError when it is no network that is
    known, or an entry makes no sense.
    """
    told_beside = dict(beside or {})
    hints = {**(family.arguments if family else {}), **told_beside.pop("arguments", {})}
    try:
        topology = read_topology(tensors, {**hints, **(arguments or {})})
    except ArchitectureError as error:
        raise AdaptationPlanError(f"{where} has no plan, and none can be read off its tensors: {error}") from error
    architecture = topology.architecture
    cube = topology.patch_size
    if architecture.is_transformer and cube is None:
        raise AdaptationPlanError(
            f"{where} has no plan, and a Primus's tensors don't show its patch: copy its adaptation_plan.json beside it"
        )
    family = family or family_of_size(topology, Path(where).name)
    facts = Facts() if family is None else family.facts
    told = facts.supervised
    supervised = trained_by_nnunet(trainer_name) or (topology.heads or 0) > 1 if told is None else told
    z, y, x = cube or [4 * step for step in architecture.total_stride]  # nnU-Net stops pooling at four voxels
    z = 1 if architecture.is_planar else z
    plan = AdaptationPlan(
        architecture=architecture,
        spacing=facts.spacing,
        patch_size=facts.patch_size or (z, y, x),
        recommended_patch_size=facts.patch_size,
        num_input_channels=topology.channels,
        normalization_schemes=(facts.normalization,) * topology.channels,
        use_mask_for_norm=(False,) * topology.channels,
        intensity=(facts.window.statistics(),) * topology.channels if facts.window else (),
        supervised=supervised,
        head_names=facts.labels if supervised and topology.heads == len(facts.labels) else (),
        orientation=facts.orientation,
        citations=tuple(dict(entry) for entry in facts.citations),
    )
    notes = [f"no plan in the file or beside it: the architecture was read off the tensors ({architecture})"]
    if beside:
        try:
            plan = AdaptationPlan.model_validate({**dict(plan), **told_beside})
        except ValidationError as error:
            raise AdaptationPlanError(f"beside {where}: wrong at {first_problem(error)}") from error
        return plan, facts.axes, notes
    notes += facts.notes()
    if not facts.told and facts.spacing is None:
        how = "the cube that its positions fill" if cube else "four times the network's stride"
        notes.append(
            f"its spacing and patch are not in the file: choose -am median or fixed; the patch {[z, y, x]} is {how}"
        )
    if topology.guessed:
        notes.append(f"assumed, since the tensors don't show it: {', '.join(topology.guessed)}")
    if not supervised and told is None:
        notes.append(
            "it is not known whether it was trained to segment: only its encoder is used, or say --scope encoder+decoder"
        )
    return plan, facts.axes, notes
