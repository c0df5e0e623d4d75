"""Plan and tensors brought together: the plan checked against the tensors, which are right where the two disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nnssl_adapt.errors import AdaptationPlanError, ArchitectureError
from nnssl_adapt.text import and_more
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan, in_one_line
from nnssl_adapt.weights.checkpoint.positions import positions_grid, positions_name
from nnssl_adapt.weights.checkpoint.state_dict import unwrapped_name
from nnssl_adapt.weights.checkpoint.stems import is_other_stem
from nnssl_adapt.weights.network.architectures import Architecture, nearest_patch, outline
from nnssl_adapt.weights.network.network_parts import Location, NetworkParts, Tensors, locate
from nnssl_adapt.weights.network.topology import differing_arguments, read_topology


@dataclass(frozen=True)
class _Located:
    """A network of an architecture, and where its parts lie in the file (None: nowhere)."""

    architecture: Architecture
    parts: NetworkParts
    location: Location | None

    @property
    def is_complete(self) -> bool:
        return self.location is not None and self.location.is_complete


def reconcile_best(
    candidates: Mapping[str, AdaptationPlan], tensors: Tensors, where: str
) -> tuple[str, AdaptationPlan, list[str], list[AdaptationPlanError]]:
    """Of several plans for the same tensors take the one that fits best; of equals the first.

    Args:
        candidates: where a plan was found (``in the file``) → the plan; at least one.
        tensors: of the checkpoint.
        where: the weight file, for messages.

    Returns where the plan was found, the plan as of :func:`reconcile`, notes, and why others don't fit. Raises
    AdaptationPlanError when none does.
    """
    fits: dict[str, tuple[AdaptationPlan, list[str]]] = {}
    errors: list[AdaptationPlanError] = []
    for name, candidate in candidates.items():
        try:
            fits[name] = reconcile(candidate, tensors, where if len(candidates) == 1 else f"{where}, plan {name}")
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
    return best, plan, notes, errors


def reconcile(plan: AdaptationPlan, tensors: Tensors, where: str) -> tuple[AdaptationPlan, list[str]]:
    """Check a plan against the tensors; return it with what they really have, and what was wrong in it.

    Keys, patch, input channels and names of outputs are corrected; so is the architecture, where it does not fit and the
    tensors tell theirs. Raises AdaptationPlanError when nothing in the file fits the encoder that the plan names.
    """
    own = {name: tensor for name, tensor in tensors.items() if not is_other_stem(name)}
    notes: list[str] = []
    located, problem = None, None
    try:
        located = _locate(plan, plan.architecture, own, where)
    except AdaptationPlanError as error:
        problem = error  # a network that can't be built; the tensors may tell which it was
    if located is None or not located.is_complete:
        theirs = _locate_as_tensors_tell(plan, own, where)
        if theirs is not None:
            changes = "; ".join(differing_arguments(plan.architecture, theirs.architecture))
            notes.append(f"the plan's architecture contradicts the tensors, took theirs: {changes}")
            located = theirs
    if located is None or located.location is None:
        raise problem or AdaptationPlanError(
            f"{where}: no tensor fits the encoder of {plan.architecture}, which the adaptation plan names, and its stem; the "
            f"file has {and_more(sorted({name.split('.')[0] for name in tensors}), 12)}"
        )
    plan = plan.model_copy(update={"architecture": located.architecture})
    plan, of_keys = _with_keys(plan, located.location)
    plan, of_stem = _with_stem(plan, located.location, own, where)
    plan, of_positions = _with_positions(plan, located.parts, own, where)
    plan, of_heads = _with_heads(plan, own)
    return plan, notes + of_keys + of_stem + of_positions + of_heads


# -- architecture ----------------------------------------------------------------------------------------------------


def _locate(plan: AdaptationPlan, architecture: Architecture, tensors: Tensors, where: str) -> _Located:
    encoder, stem = (None if key is None else unwrapped_name(key) for key in (plan.key_to_encoder, plan.key_to_stem))
    try:
        patch = nearest_patch(architecture, plan.patch_size)
        parts = NetworkParts.of(outline(architecture, plan.num_input_channels, patch))
    except ArchitectureError as error:
        raise AdaptationPlanError(f"{where}: {in_one_line(error)}") from error
    return _Located(architecture, parts, locate(parts, tensors, encoder, stem, with_decoder=plan.supervised))


def _locate_as_tensors_tell(plan: AdaptationPlan, tensors: Tensors, where: str) -> _Located | None:
    """The network that the tensors tell, if it fits them completely; else None."""
    try:
        theirs = read_topology(tensors, plan.architecture.kwargs).architecture
    except ArchitectureError:
        return None
    if theirs.is_transformer != plan.architecture.is_transformer:
        return None  # the plan is for something else: no note could correct that
    located = _locate(plan, Architecture(theirs.class_name, theirs.kwargs), tensors, where)
    return located if located.is_complete else None


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
    if plan.names_keys and set(modules) - {unwrapped_name(name) for name in plan.keys_to_in_proj}:
        notes.append(f"the plan's keys_to_in_proj are {list(plan.keys_to_in_proj)}; the file has {list(modules)}")
    channels = int(tensors[names[0]].shape[1])
    if channels != plan.num_input_channels:
        notes.append(f"the plan says {plan.num_input_channels} input channel(s), the stem has {channels}")
    update: dict[str, object] = {"keys_to_in_proj": modules, "num_input_channels": channels}
    # What stands for other channels than the network has says nothing of those.
    update |= {key: () for key in ("channel_names", "intensity") if len(getattr(plan, key)) != channels}
    return plan.model_copy(update=update), notes


def _with_positions(
    plan: AdaptationPlan, parts: NetworkParts, tensors: Tensors, where: str
) -> tuple[AdaptationPlan, list[str]]:
    """Name and grid of a transformer's learned positions; the patch follows from the grid."""
    if parts.positions is None:
        return plan.model_copy(update={"key_to_lpe": None}), []
    name = positions_name(parts, tensors, plan)
    if name is None:
        return plan.model_copy(update={"key_to_lpe": None}), []
    notes: list[str] = []
    if plan.names_keys and (plan.key_to_lpe is None or unwrapped_name(plan.key_to_lpe) != name):
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
