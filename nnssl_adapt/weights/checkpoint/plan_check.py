"""The adaptation plan checked against the tensors, which are right where the two disagree."""

from __future__ import annotations

import math

from nnssl_adapt.errors import AdaptationPlanError, ArchitectureError
from nnssl_adapt.weights.checkpoint.state_dict import unwrapped_name
from nnssl_adapt.weights.network.adaptation_plan import AdaptationPlan, in_one_line
from nnssl_adapt.weights.network.architectures import Architecture, nearest_patch, outline
from nnssl_adapt.weights.network.network_parts import (
    NetworkParts,
    TargetTensor,
    Tensors,
    below,
    find_prefix,
    find_source,
    fits,
    is_special_token,
    join,
    positions_grid,
    positions_name,
)
from nnssl_adapt.weights.network.stems import is_other_stem
from nnssl_adapt.weights.network.topology import differing_arguments, read_topology

Found = dict[str, tuple[str, bool]]
"""``key_to_encoder`` and ``key_to_stem`` → the prefix in the file, and whether it is the one that the plan names."""


def reconcile(plan: AdaptationPlan, tensors: Tensors, where: str) -> tuple[AdaptationPlan, list[str]]:
    """Check a plan against the tensors; return it with what they really have, and what was wrong.

    Keys, patch and input channels are mended; so is the architecture, where it does not fit and the tensors tell theirs.
    Raises AdaptationPlanError when nothing in the file fits the encoder that the plan names.
    """
    notes: list[str] = []
    problem, found = None, None
    try:
        parts = _parts(plan, where)
        found = _find(plan, parts, tensors)
    except AdaptationPlanError as error:
        problem = error  # a network that can't be built; the tensors may tell which it was
    if found is None or not _is_complete(plan, parts, found, tensors):
        mended = _with_their_architecture(plan, tensors, where)
        if mended is not None:
            before = plan.architecture
            plan, parts, found = mended
            changes = "; ".join(differing_arguments(before, plan.architecture))
            notes.append(f"the plan's architecture contradicts the tensors, took theirs: {changes}")
    if found is None:
        raise problem or AdaptationPlanError(
            f"{where}: no tensor fits the encoder of {plan.architecture}, which the adaptation plan names, and its stem; the "
            f"file has {_first_words(tensors)}"
        )
    for key, (prefix, as_named) in found.items():
        if not as_named:
            notes.append(
                f"the plan's {key} is {getattr(plan, key)!r}; by name and shape the tensors lie under {prefix!r}"
            )
    plan = plan.model_copy(update={key: prefix for key, (prefix, _) in found.items()})
    plan, more = _reconcile_stem(plan, parts, tensors, where)
    plan, most = _reconcile_positions(plan, parts, tensors, where)
    return plan, notes + more + most


def _first_words(tensors: Tensors) -> str:
    words = sorted({name.split(".")[0] for name in tensors})
    return ", ".join(words[:12]) + (f", … ({len(words)} in all)" if len(words) > 12 else "")


def _parts(plan: AdaptationPlan, where: str) -> NetworkParts:
    patch = nearest_patch(plan.architecture, plan.patch_size)
    try:
        return NetworkParts.of(outline(plan.architecture, plan.num_input_channels, patch))
    except ArchitectureError as error:
        raise AdaptationPlanError(f"{where}: {in_one_line(error)}") from error


# -- architecture ----------------------------------------------------------------------------------------------------


def _find(plan: AdaptationPlan, parts: NetworkParts, tensors: Tensors) -> Found | None:
    """Where encoder and stem lie; None when one of them is nowhere."""
    encoder, as_named = find_prefix(parts, parts.encoder, tensors, _unwrapped(plan.key_to_encoder))
    if encoder is None:
        return None
    stem = _find_stem(parts, tensors, encoder, _unwrapped(plan.key_to_stem))
    return {"key_to_encoder": (encoder, as_named), "key_to_stem": stem} if stem is not None else None


def _find_stem(parts: NetworkParts, tensors: Tensors, encoder: str, named: str | None) -> tuple[str, bool] | None:
    """Where the stem lies: as named, or where the network has it beside its encoder.

    Nowhere else: it is one layer, and a decoder's last stage may have the same names and shapes.
    """
    rest = below(parts.stem, parts.encoder.rpartition(".")[0])
    beside = join(encoder.rpartition(".")[0], rest if rest is not None else parts.stem)
    members = parts.members(parts.stem)

    def fitting(prefix: str) -> int:
        return sum(fits(parts, t, find_source(t, parts.stem, prefix, tensors), tensors) for t in members)

    candidates = [prefix for prefix in (named, beside) if prefix is not None]
    best = max(candidates, key=fitting)  # the named one of equals
    return (best, best == named) if fitting(best) else None


def _unwrapped(name: str | None) -> str | None:
    return None if name is None else unwrapped_name(name)


def _is_complete(plan: AdaptationPlan, parts: NetworkParts, found: Found, tensors: Tensors) -> bool:
    """Whether every tensor of the network's encoder is in the file in its shape, and none is left over there.

    Of a supervised network the decoder counts too; its heads don't, whose number is the dataset's.
    """
    places = [(parts.encoder, found["key_to_encoder"][0]), (parts.stem, found["key_to_stem"][0])]
    if plan.supervised and any(name.startswith("decoder.") for name in tensors):
        places.append(("decoder", "decoder"))
    known: set[str] = set()
    for target, source in places:
        for tensor in parts.members(target):
            if source == "decoder" and parts.part_of(tensor):
                continue  # the encoder again, under the decoder; safetensors keep one of two names
            names = find_source(tensor, target, source, tensors)
            if not fits(parts, tensor, names, tensors) and not _is_head(tensor):
                return False
            known.update(names)
    return not any(_is_left_over(name, source) for _, source in places for name in tensors.keys() - known)


def _is_head(tensor: TargetTensor) -> bool:
    return "seg_layers" in tensor.names[0].split(".")


def _is_left_over(name: str, prefix: str) -> bool:
    rest = below(name, prefix)
    if rest is None or is_special_token(name) or is_other_stem(name):
        return False
    words = rest.split(".")
    return not {"rope", "seg_layers", "encoder"} & set(words)


def _with_their_architecture(
    plan: AdaptationPlan, tensors: Tensors, where: str
) -> tuple[AdaptationPlan, NetworkParts, Found] | None:
    """The plan with the architecture that the tensors tell, if that fits them completely; else None."""
    try:
        theirs = read_topology(tensors, plan.architecture.kwargs).architecture
    except ArchitectureError:
        return None
    if theirs.is_transformer != plan.architecture.is_transformer:
        return None  # the plan is for something else: no note could mend that
    changed = plan.model_copy(update={"architecture": Architecture(theirs.class_name, theirs.kwargs)})
    parts = _parts(changed, where)
    found = _find(changed, parts, tensors)
    return (changed, parts, found) if found is not None and _is_complete(changed, parts, found, tensors) else None


# -- what belongs to the image ---------------------------------------------------------------------------------------


def _reconcile_stem(
    plan: AdaptationPlan, parts: NetworkParts, tensors: Tensors, where: str
) -> tuple[AdaptationPlan, list[str]]:
    """Channels and names of the convolution that sees the image."""
    notes: list[str] = []
    in_proj = next((tensor for tensor in parts.tensors if parts.is_in_proj(tensor)), None)
    names = find_source(in_proj, parts.stem, plan.key_to_stem or "", tensors) if in_proj is not None else []
    if not names:
        return plan, notes
    if tensors[names[0]].ndim != 5:
        raise AdaptationPlanError(
            f"{where}: {names[0]} has {tensors[names[0]].ndim} axes, expected 5 (a 3D convolution's out, in, Z, Y, X)"
        )
    modules = tuple(name.removesuffix(".weight") for name in names)
    if set(modules) - {unwrapped_name(name) for name in plan.keys_to_in_proj}:
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
    notes = (
        []
        if _unwrapped(plan.key_to_lpe) == name
        else [f"the plan's key_to_lpe is {plan.key_to_lpe!r}; the file has {name!r}"]
    )
    positions = tensors[name]
    if positions.ndim != 3:
        raise AdaptationPlanError(f"{where}: {name} has {positions.ndim} axes, expected 3 (1, positions, width)")
    _, grid = positions_grid(positions, tensors, plan)
    if grid is None:
        raise AdaptationPlanError(
            f"{where}: {name} has {positions.shape[1]} positions, which fill neither the grid of the plan's patch "
            f"{list(plan.patch_size)} nor a cube"
        )
    patch = tuple(math.prod(pair) for pair in zip(grid, plan.architecture.total_stride, strict=True))
    if patch != plan.patch_size:
        notes.append(
            f"the plan's patch {list(plan.patch_size)} contradicts the {positions.shape[1]} positions of {name}: "
            f"took {list(patch)}"
        )
    return plan.model_copy(update={"key_to_lpe": name, "patch_size": patch}), notes


def own_keys(plan: AdaptationPlan, where: str, prefix: str = "") -> AdaptationPlan:
    """The plan with the keys that its network itself has, ``prefix`` before them; for files that say none."""
    parts = _parts(plan, where)
    keys = {
        "key_to_encoder": join(prefix, parts.encoder),
        "key_to_stem": join(prefix, parts.stem),
        "keys_to_in_proj": tuple(join(prefix, module) for module in parts.in_proj),
        "key_to_lpe": None if parts.positions is None else join(prefix, parts.positions),
    }
    return plan.model_copy(update=keys)
