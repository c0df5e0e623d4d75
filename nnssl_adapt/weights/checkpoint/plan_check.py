"""Plan and tensors brought together: the plan checked against the tensors, which are right where the two disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from nnssl_adapt.errors import AdaptationPlanError, ArchitectureError
from nnssl_adapt.text import and_more
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan, in_one_line
from nnssl_adapt.weights.checkpoint.stems import is_other_stem
from nnssl_adapt.weights.network.architectures import Architecture, nearest_patch, outline
from nnssl_adapt.weights.network.network_parts import Location, NetworkParts, Tensors, is_special_token, locate
from nnssl_adapt.weights.network.tensor_ops import Grid
from nnssl_adapt.weights.network.topology import read_topology


def reconcile_best(
    candidates: Mapping[str, AdaptationPlan], tensors: Tensors, where: str
) -> tuple[AdaptationPlan, list[str], list[AdaptationPlanError]]:
    """Of several plans for the same tensors take the one that fits best; of equals the first.

    Args:
        candidates: where a plan was found (``in the file``) → the plan; at least one.
        tensors: of the checkpoint.
        where: the weight file, for messages.

    Returns the plan as of :func:`reconcile`, notes, and why others don't fit. Raises AdaptationPlanError when none does.
    """
    fits: dict[str, tuple[AdaptationPlan, list[str]]] = {}
    errors: list[AdaptationPlanError] = []
    for name, candidate in candidates.items():
        same = next((found for found in fits if candidates[found].training == candidate.training), None)
        try:
            at = where if len(candidates) == 1 else f"{where}, plan {name}"
            fits[name] = fits[same] if same else reconcile(candidate, tensors, at)
        except AdaptationPlanError as error:
            errors.append(error)
    if not fits:
        raise errors[-1]
    best = min(fits, key=lambda name: len(fits[name][1]))
    plan, notes = fits[best]
    for other in fits.keys() - {best}:
        differing = candidates[best].differences(candidates[other])
        if differing:
            better = "fits the tensors better" if len(fits[other][1]) > len(notes) else "fits no worse"
            notes = [
                *notes,
                f"the plans {best} and {other} disagree on {', '.join(differing)}: took that {best}, which {better}",
            ]
        update = {
            "citations": plan.citations or candidates[other].citations,
            "trainer_name": plan.trainer_name or candidates[other].trainer_name,
        }
        plan = plan.model_copy(update=update)
    return plan, notes, errors


def reconcile(plan: AdaptationPlan, tensors: Tensors, where: str) -> tuple[AdaptationPlan, list[str]]:
    """Check a plan against the tensors; return it with what they really have, and what was wrong in it.

    Keys, patch, input channels and names of outputs are corrected; so is the architecture, where it does not fit and the
    tensors tell theirs. Raises AdaptationPlanError when nothing in the file fits the encoder that the plan names.
    """
    own = {name: tensor for name, tensor in tensors.items() if not is_other_stem(name)}
    architecture, location = _locate(plan, own, where)
    if location is None:
        raise AdaptationPlanError(
            f"{where}: no tensor fits the encoder of {plan.architecture}, which the adaptation plan names, and its stem; the "
            f"file has {and_more(sorted({name.split('.')[0] for name in tensors}), 12)}"
        )
    notes: list[str] = []
    if architecture is not plan.architecture:
        changes = "; ".join(_differing_arguments(plan.architecture, architecture))
        notes.append(f"the plan's architecture contradicts the tensors, took theirs: {changes}")
        plan = plan.model_copy(update={"architecture": architecture})
    plan, of_keys = _with_keys(plan, location)
    plan, of_stem = _with_stem(plan, location, own, where)
    plan, of_heads = _with_heads(plan, own)
    plan, of_positions = _with_positions(plan, location, own, where)
    return plan, notes + of_keys + of_stem + of_positions + of_heads


# -- architecture ----------------------------------------------------------------------------------------------------


def _locate(plan: AdaptationPlan, tensors: Tensors, where: str) -> tuple[Architecture, Location | None]:
    """The plan's architecture and where its parts lie (None: nowhere); the tensors' own, where only that fits completely."""
    own: Location | None = None
    problem: ArchitectureError | None = None
    for architecture in _architectures(plan, tensors):
        try:
            network = outline(architecture, plan.num_input_channels, nearest_patch(architecture, plan.patch_size))
        except ArchitectureError as error:
            problem = error  # it can't be built; the tensors may tell which it was
            continue
        keys = plan.key_to_encoder, plan.key_to_stem, plan.key_to_lpe
        location = locate(NetworkParts.of(network), tensors, *keys, with_decoder=plan.supervised)
        if location is not None and location.is_complete:
            return architecture, location
        own = location if architecture is plan.architecture else own
    if problem is not None:
        raise AdaptationPlanError(f"{where}: {in_one_line(problem)}") from problem
    return plan.architecture, own


def _architectures(plan: AdaptationPlan, tensors: Tensors) -> Iterator[Architecture]:
    """The plan's, then the one that the tensors tell, where it is of the same kind."""
    yield plan.architecture
    try:
        theirs = read_topology(tensors, plan.architecture.kwargs).architecture
    except ArchitectureError:
        return
    if theirs.is_transformer == plan.architecture.is_transformer:  # else no note could correct the plan
        yield Architecture(theirs.class_name, theirs.kwargs)


def _differing_arguments(one: Architecture, other: Architecture) -> list[str]:
    """``argument: value → value`` for what differs between two architectures."""
    names: Sequence[str] = [
        name for name in {**one.kwargs, **other.kwargs} if one.kwargs.get(name) != other.kwargs.get(name)
    ]
    listed = [f"{name} {_short(one.kwargs.get(name))} → {_short(other.kwargs.get(name))}" for name in names]
    return [f"{one.class_name} → {other.class_name}", *listed] if one.class_name != other.class_name else listed


def _short(value: Any) -> str:
    text = (
        "-".join(map(str, value)) if isinstance(value, list) and all(isinstance(v, int) for v in value) else str(value)
    )
    return text if len(text) <= 60 else f"{text[:60]}…"


# -- what the tensors say about the plan's entries -------------------------------------------------------------------


def _with_keys(plan: AdaptationPlan, location: Location) -> tuple[AdaptationPlan, list[str]]:
    """The prefixes under which encoder and stem lie. Only nnssl's plans name any, so that only they can be wrong."""
    found = {
        "key_to_encoder": (location.encoder, location.encoder_as_named),
        "key_to_stem": (location.stem, location.stem_as_named),
    }
    notes = [
        f"the plan's {key} is {getattr(plan, key)!r}; by name and shape the tensors lie under {prefix!r}"
        for key, (prefix, as_named) in found.items()
        if plan.names_keys and not as_named
    ]
    return plan.model_copy(update={key: prefix for key, (prefix, _) in found.items()}), notes


def _with_stem(
    plan: AdaptationPlan, location: Location, tensors: Tensors, where: str
) -> tuple[AdaptationPlan, list[str]]:
    """Channels and names of the convolution that sees the image."""
    names = location.in_proj
    if not names:
        return plan, []
    notes: list[str] = []
    axes = 4 if plan.architecture.is_planar else 5
    if tensors[names[0]].ndim != axes:
        raise AdaptationPlanError(
            f"{where}: {names[0]} has {tensors[names[0]].ndim} axes, expected {axes} (a convolution's out, in, and the image's)"
        )
    modules = tuple(name.removesuffix(".weight") for name in names)
    if plan.names_keys and set(modules) - set(plan.keys_to_in_proj):
        notes.append(f"the plan's keys_to_in_proj are {list(plan.keys_to_in_proj)}; the file has {list(modules)}")
    channels = int(tensors[names[0]].shape[1])
    if channels != plan.num_input_channels:
        notes.append(f"the plan says {plan.num_input_channels} input channel(s), the stem has {channels}")
    update: dict[str, object] = {"keys_to_in_proj": modules, "num_input_channels": channels}
    # What stands for other channels than the network has says nothing of those.
    update |= {key: () for key in ("channel_names", "intensity") if len(getattr(plan, key)) != channels}
    return plan.model_copy(update=update), notes


def _with_positions(
    plan: AdaptationPlan, location: Location, tensors: Tensors, where: str
) -> tuple[AdaptationPlan, list[str]]:
    """Name and grid of a transformer's learned positions; the patch follows from the grid."""
    name = location.positions
    if name is None:
        return plan.model_copy(update={"key_to_lpe": None}), []
    notes: list[str] = []
    if plan.names_keys and plan.key_to_lpe != name:
        notes.append(f"the plan's key_to_lpe is {plan.key_to_lpe!r}; the file has {name!r}")
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


def _with_heads(plan: AdaptationPlan, tensors: Tensors) -> tuple[AdaptationPlan, list[str]]:
    """Names of the outputs count only if there are as many as the segmentation layers have."""
    heads = {
        tensor.shape[0] for name, tensor in tensors.items() if "seg_layers" in name.split(".") and tensor.ndim in (4, 5)
    }
    if not plan.head_names or not heads or heads == {len(plan.head_names)}:
        return plan, []
    counts = "/".join(str(count) for count in sorted(heads))
    note = f"dataset.json names {len(plan.head_names)} outputs, the network has {counts}: the names are not used"
    return plan.model_copy(update={"head_names": ()}), [note]


def positions_grid(positions: Tensor, source: Tensors, plan: AdaptationPlan) -> tuple[int, Grid | None]:
    """(leading class and register tokens, grid (Z, Y, X)) of learned positions (1, N, C) in a checkpoint.

    The grid comes from the number of tokens; the plan's patch, then its recommended patch, say how it is cut, and without
    either it is a cube. None: no grid fits.
    """
    if positions.ndim != 3:
        return 0, None
    special = sum(tensor.shape[1] for name, tensor in source.items() if is_special_token(name) and tensor.ndim == 3)
    for leading in dict.fromkeys((special, 0)):
        grid = find_token_grid(positions.shape[1] - leading, plan.token_grids)
        if grid is not None:
            return leading, grid
    return 0, None


def find_token_grid(tokens: int, candidates: Iterable[Grid | None]) -> Grid | None:
    """The grid that a number of tokens fills: the first candidate that fits, else a cube, else None."""
    for grid in candidates:
        if grid is not None and math.prod(grid) == tokens:
            return grid
    side = round(tokens ** (1 / 3))
    return (side, side, side) if side**3 == tokens else None
