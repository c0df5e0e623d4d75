"""The adaptation plan checked against the tensors, which are right where the two disagree."""

from __future__ import annotations

import math

from nnssl_adapt.errors import AdaptationPlanError, ArchitectureError
from nnssl_adapt.weights.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.architectures import nearest_patch, outline
from nnssl_adapt.weights.layout import (
    NetworkParts,
    Tensors,
    find_prefix,
    find_source,
    positions_grid,
    positions_name,
)
from nnssl_adapt.weights.weight_file import drop_compiled


def reconcile(plan: AdaptationPlan, tensors: Tensors, where: str) -> tuple[AdaptationPlan, list[str]]:
    """Check a plan against the tensors; return it with the keys, patch and channels that they have, and what was wrong.

    Raises AdaptationPlanError when nothing in the file fits the encoder that the plan names.
    """
    parts = _parts(plan, where)
    notes: list[str] = []
    keys: dict[str, str] = {}
    for field, prefix in (("key_to_encoder", parts.encoder), ("key_to_stem", parts.stem)):
        named = getattr(plan, field)
        found, as_named = find_prefix(parts, prefix, tensors, None if named is None else drop_compiled(named))
        if found is None:
            raise AdaptationPlanError(
                f"{where}: no tensor fits the {field.removeprefix('key_to_')} of {plan.architecture}, which the adaptation "
                f"plan names; the file has {', '.join(sorted({name.split('.')[0] for name in tensors}))}"
            )
        if not as_named:
            notes.append(f"the plan's {field} is {named!r}; by name and shape the tensors lie under {found!r}")
        keys[field] = found
    plan = plan.model_copy(update=keys)
    plan, more = _reconcile_stem(plan, parts, tensors)
    plan, most = _reconcile_positions(plan, parts, tensors, where)
    return plan, notes + more + most


def _parts(plan: AdaptationPlan, where: str) -> NetworkParts:
    patch = nearest_patch(plan.architecture, plan.patch_size)
    try:
        return NetworkParts.of(outline(plan.architecture, plan.num_input_channels, patch))
    except ArchitectureError as error:
        raise AdaptationPlanError(f"{where}: {error}") from error


def _reconcile_stem(plan: AdaptationPlan, parts: NetworkParts, tensors: Tensors) -> tuple[AdaptationPlan, list[str]]:
    """Channels and names of the convolution that sees the image."""
    notes: list[str] = []
    in_proj = next((tensor for tensor in parts.tensors if parts.is_in_proj(tensor)), None)
    names = find_source(in_proj, parts.stem, plan.key_to_stem or "", tensors) if in_proj is not None else []
    if not names:
        return plan, notes
    modules = tuple(name.removesuffix(".weight") for name in names)
    if not set(map(drop_compiled, plan.keys_to_in_proj)) & set(modules):
        notes.append(f"the plan's keys_to_in_proj are {list(plan.keys_to_in_proj)}; the file has {list(modules)}")
    channels = int(tensors[names[0]].shape[1])
    if channels != plan.num_input_channels:
        notes.append(f"the plan says {plan.num_input_channels} input channel(s), the stem has {channels}")
    return plan.model_copy(update={"keys_to_in_proj": modules, "num_input_channels": channels}), notes


def _reconcile_positions(
    plan: AdaptationPlan, parts: NetworkParts, tensors: Tensors, where: str
) -> tuple[AdaptationPlan, list[str]]:
    """Name and grid of a transformer's learned positions; the patch follows from the grid."""
    name = positions_name(parts, tensors, plan)
    if name is None:
        return plan.model_copy(update={"key_to_lpe": None}), []
    notes = [] if plan.key_to_lpe == name else [f"the plan's key_to_lpe is {plan.key_to_lpe!r}; the file has {name!r}"]
    _, grid = positions_grid(tensors[name], tensors, plan)
    if grid is None:
        raise AdaptationPlanError(
            f"{where}: {name} has {tensors[name].shape[1]} positions, which fill neither the grid of the plan's patch "
            f"{list(plan.patch_size)} nor a cube"
        )
    patch = tuple(math.prod(pair) for pair in zip(grid, plan.architecture.total_stride, strict=True))
    if patch != plan.patch_size:
        notes.append(
            f"the plan's patch {list(plan.patch_size)} contradicts the {tensors[name].shape[1]} positions of {name}: "
            f"took {list(patch)}"
        )
    return plan.model_copy(update={"key_to_lpe": name, "patch_size": patch}), notes
