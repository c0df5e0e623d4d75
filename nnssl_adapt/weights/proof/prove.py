"""Proof by doing: the encoder after a transfer computes what the pre-trained one computes.

Both get the same image. The pre-trained encoder is built again from the checkpoint's own description and gets the file's
tensors by name, one by one and untouched; tokens of a transformer are put into the order that they were trained in. None
of the rules by which the transfer adapts weights is used on that side, so that a wrong rule shows as a difference.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.architectures import Shape, build_network, nearest_patch
from nnssl_adapt.weights.network.network_parts import NetworkParts
from nnssl_adapt.weights.proof.reference_encoder import (
    DECODER,
    Features,
    lacking_names,
    pretrained_network,
    pretrained_token_features,
    watch_transformer,
)
from nnssl_adapt.weights.transfer.settings import TransferSettings
from nnssl_adapt.weights.transfer.token_order import file_order, network_order
from nnssl_adapt.weights.transfer.transfer import transfer_weights

TOLERANCE = 1e-4
"""Largest relative difference that counts as none. Sums of float32 in another order differ by 1e-7 to 1e-5 after dozens
of layers; one wrong tensor, or two exchanged axes, by 1e-2 and more."""


@dataclass(frozen=True)
class StageDifference:
    """One stage of the encoder in both networks.

    Attributes:
        name: of the stage.
        difference: largest absolute difference, divided by the largest absolute value of the pre-trained features.
        shape: of the features compared, (C, Z, Y, X).
    """

    name: str
    difference: float
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Proof:
    """What was compared and how far it agrees. ``print`` it for a table.

    Attributes:
        stages: in the order in which the encoder computes them.
        passed: whether at least one stage was compared and every one agrees within the tolerance.
        tolerance: see :data:`TOLERANCE`.
        notes: how the comparison was made, and what could not be compared.
        assumption: what nothing in the file says and had to be taken for granted, empty where all is known.
    """

    stages: tuple[StageDifference, ...]
    passed: bool
    tolerance: float
    notes: tuple[str, ...] = ()
    assumption: str = ""

    def __str__(self) -> str:
        rows = _folded(self.stages, self.tolerance)
        width = max([len(row.name) for row in rows], default=0)
        lines = [
            f"  {row.name.ljust(width)}  {row.difference:8.1e}  {'×'.join(map(str, row.shape))}"
            + ("" if row.difference <= self.tolerance else "  DIFFERS")
            for row in rows
        ]
        lines += [f"  note: {note}" for note in self.notes]
        decoder_too = any(stage.name.startswith("decoder") for stage in self.stages)
        does = "encoder and decoder compute" if decoder_too else "the encoder computes"
        if self.passed:
            given = f", given the {self.assumption}" if self.assumption else ""
            then = "they did" if decoder_too else "it did"
            verdict = f"PROVEN: {does} what {then} in pre-training{given} (within {self.tolerance:g})"
        elif self.stages:
            verdict = f"NOT PROVEN: {does} something else (differences above {self.tolerance:g})"
        else:
            verdict = "NOT PROVEN: no stage of the two encoders can be compared"
        return "\n".join(["largest relative difference to the pre-trained encoder:", *lines, verdict])

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON."""
        stages = [{"name": s.name, "difference": s.difference, "shape": list(s.shape)} for s in self.stages]
        return {
            "passed": self.passed,
            "tolerance": self.tolerance,
            "stages": stages,
            "notes": list(self.notes),
            "assumption": self.assumption,
        }


def _folded(stages: Sequence[StageDifference], tolerance: float) -> list[StageDifference]:
    """Rows of a table: more than two blocks in a row that agree are one, with the largest difference of them."""
    rows: list[StageDifference] = []
    is_agreeing_block = [s.name.startswith("block ") and s.difference <= tolerance for s in stages]
    for agreeing, group in itertools.groupby(zip(is_agreeing_block, stages, strict=True), key=lambda pair: pair[0]):
        members = [stage for _, stage in group]
        if not agreeing or len(members) < 3:
            rows += members
            continue
        name = f"{members[0].name} to {members[-1].name.removeprefix('block ')}"
        rows.append(StageDifference(name, max(stage.difference for stage in members), members[0].shape))
    return rows


def prove_transfer(
    checkpoint: Checkpoint,
    network: nn.Module | None = None,
    *,
    scope: str = "auto",
    channels: str | Sequence[int | str | None] = "auto",
    token_order: str = "auto",
    waive: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    silent: int = 0,
) -> Proof:
    """Compare what the encoder computes after a transfer with what it computed in pre-training, stage by stage.

    Args:
        checkpoint: the source.
        network: a network that :func:`~nnssl_adapt.weights.transfer.transfer.transfer_weights` has filled, unchanged since; it
            stays as it is. Without one, the checkpoint's own architecture is built with its own channels and filled here.
        scope: what was filled; where that is ``encoder+decoder`` (or ``auto``, of supervised weights) the decoder is compared
            too, up to the segmentation heads.
        channels: the rule by which its stem was filled, which says what images to compare on.
        token_order: for the transfer done here. What the pre-trained network did is always taken from the file.
        waive: patterns of tensors that may be left behind in the transfer done here.
        tolerance: largest relative difference that counts as none.
        silent: of the network's input channels the last so many are of a cascade's previous stage: they are filled, and must
            not matter.

    A CNN is compared on a small image, a transformer on the network's own patch: seconds for the one, minutes on a CPU
    for the other at its published size. Features that a wider network adds are left out, as are stages that follow one
    of another topology; the notes say so.

    Raises TransferError when the file's tensors don't fill the encoder that its plan describes, or the transfer fails.
    """
    settings = TransferSettings(
        scope, channels if isinstance(channels, str) else tuple(channels), token_order, tuple(waive)
    )
    if network is None:
        plan = checkpoint.plan
        patch = nearest_patch(checkpoint.architecture, plan.patch_size)
        network = build_network(checkpoint.architecture, plan.num_input_channels, 2, patch)
        transfer_weights(
            checkpoint,
            network,
            scope=settings.scope,
            channels=settings.channels,
            token_order=settings.token_order,
            waive=settings.waive,
        )
    network = _unwrap(network)
    notes: list[str] = []
    if next(network.parameters()).dtype != torch.float32 or next(network.parameters()).device.type != "cpu":
        network = copy.deepcopy(network).float().cpu()
        notes.append("compared in float32 on the CPU")
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            if checkpoint.architecture.is_transformer:
                truth, found = _transformers(checkpoint, network, settings, notes, silent)
            else:
                truth, found = _cnns(checkpoint, network, settings, notes, silent)
    finally:
        network.train(was_training)
    stages = tuple(_compared(name, features, found[name]) for name, features in truth.items())
    passed = bool(stages) and all(stage.difference <= tolerance for stage in stages)
    order_assumed = any("order: assumed" in note for note in notes)
    return Proof(stages, passed, tolerance, tuple(notes), "token order that was assumed" if order_assumed else "")


def _unwrap(network: nn.Module) -> nn.Module:
    for _ in range(2):
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        network = inner if isinstance(inner, nn.Module) else network
    return network


def _compared(name: str, truth: Tensor, found: Tensor) -> StageDifference:
    """Features (1, C, …) of both; of a wider network the leading ones."""
    found = found[:, : truth.shape[1]]
    if not bool(torch.isfinite(truth).all() and torch.isfinite(found).all()):
        return StageDifference(name, math.inf, tuple(truth.shape[1:]))
    scale = float(truth.abs().max())
    difference = float((found - truth).abs().max())
    return StageDifference(name, difference / scale if scale else difference, tuple(truth.shape[1:]))


# -- the image -------------------------------------------------------------------------------------------------------


def _structured(channels: int, shape: Sequence[int], seed: int) -> Tensor:
    """An image (1, channels, Z, Y, X) with slopes, waves and noise, another one along every axis and in every channel."""
    axes = [torch.linspace(-1, 1, n) for n in shape]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    generator = torch.Generator().manual_seed(seed)
    volumes = [
        z - 0.5 * y * x + torch.sin((5 + c) * y) + torch.cos((9 - c) * x + z) for c in range(seed, seed + channels)
    ]
    image = torch.stack(volumes)[None]
    return image + 0.3 * torch.randn(image.shape, generator=generator)


def _images(rule: str | tuple[int | None, ...], old: int, new: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, str]:
    """Images on which the two stems must do the same, (1, old, …) and (1, new, …), and a word on how they are made."""
    image = _structured(old, shape, seed=1)
    if not isinstance(rule, str):
        chosen = [image[:, [c]] if c is not None else torch.zeros_like(image[:, :1]) for c in rule]
        unused = [c for c in range(old) if c not in rule]
        image[:, unused] = 0
        return image, torch.cat(chosen, dim=1), "channels as the map says, new ones empty"
    if old == new and rule != "mean":
        return image, image, ""
    if rule == "zero":
        extra = _structured(max(new - old, 1), shape, seed=99)
        image[:, new:] = 0
        how = (
            "further channels hold another image, which must not matter" if new > old else "further channels left empty"
        )
        return image, torch.cat([image, extra], dim=1)[:, :new], how
    if rule == "repeat" and new > old:
        return image, image[:, [c % old for c in range(new)]], f"{old} channel(s) repeated to {new}"
    one = image[:, :1]
    return one.repeat(1, old, 1, 1, 1), one.repeat(1, new, 1, 1, 1), "one image in every channel"


def _with_previous_stage(image: Tensor, channels: int) -> Tensor:
    """The image with labels of a previous stage, which must not matter yet."""
    if not channels:
        return image
    labels = _structured(channels, image.shape[2:], seed=77) > 0
    return torch.cat([image, labels.to(image)], dim=1)


def _input_channels(network: nn.Module) -> int:
    keys: Any = network.keys_to_in_proj
    return int(network.get_parameter(f"{keys[0]}.weight").shape[1])


# -- convolutions ----------------------------------------------------------------------------------------------------


def _cnns(
    checkpoint: Checkpoint, network: nn.Module, settings: TransferSettings, notes: list[str], silent: int
) -> tuple[Features, Features]:
    """Skips of both encoders, as far as they are meant to agree."""
    target: Any = network
    # Two voxels at the bottom along every axis: normalising one would hide everything.
    axes = len(target.encoder.strides[0])
    deepest = [math.prod(step[axis] for step in target.encoder.strides) for axis in range(axes)]
    sides = [2 * max(a, b) for a, b in zip(checkpoint.architecture.total_stride[-axes:], deepest, strict=True)]
    shape = (*(1,) * (3 - axes), *sides)  # one slice for a 2D network
    decoder = settings.scope == "encoder+decoder" or (settings.scope == "auto" and checkpoint.plan.supervised)
    source: Any = pretrained_network(checkpoint, (shape[0], shape[1], shape[2]), decoder=decoder, beside=network)
    old, new = checkpoint.plan.num_input_channels, _input_channels(network) - silent
    before, after, how = _images(settings.channel_numbers, old, new, shape)
    after = _with_previous_stage(after, silent)
    notes += [how] if how else []
    if axes == 2:
        before, after = before[:, :, 0], after[:, :, 0]
    skips, others = source.encoder(before), target.encoder(after)
    beside = lacking_names(checkpoint, NetworkParts.of(source))
    if beside:
        notes.append("the file has only a part of the encoder; the rest is the network's own in both")
    truth: Features = {}
    found: Features = {}
    for index in range(min(len(skips), len(others))):
        if any(
            f"{key}.weight" in beside and key.startswith(f"encoder.stages.{index}.") for key in source.keys_to_in_proj
        ):
            continue  # nothing of it is the file's
        why = _stage_problem(source, target, index)
        if why:
            notes.append(f"stage {index} and what follows can't be compared: {why}")
            break
        truth[f"stage {index}"], found[f"stage {index}"] = skips[index], others[index]
    if len(skips) != len(others) and len(truth) == min(len(skips), len(others)):
        notes.append(f"{len(truth)} of {len(skips)} pre-trained stages compared; the network has {len(others)}")
    if any(found[name].shape[1] > features.shape[1] for name, features in truth.items()):
        notes.append("the network is wider: its leading features are compared, the others are new")
    if decoder and len(truth) == len(skips) == len(others):
        if _shapes(source, DECODER) == _shapes(target, DECODER):
            truth |= _decoded(source, skips)
            found |= _decoded(target, others)
        else:
            notes.append("the decoder differs and can't be compared")
    return truth, found


def _decoded(network: Any, skips: list[Tensor]) -> Features:
    """What the decoder's stages compute, deepest first."""
    seen: Features = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: seen.update({name: output})

    hooks = [stage.register_forward_hook(keep(f"decoder {i}")) for i, stage in enumerate(network.decoder.stages)]
    try:
        network.decoder(skips)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _stage_problem(source: Any, target: Any, index: int) -> str | None:
    """Why a stage (and the stem, with the first) can't compute the same in both, None when it can."""
    if list(source.encoder.strides[index]) != list(target.encoder.strides[index]):
        return f"strides {list(source.encoder.strides[index])} and {list(target.encoder.strides[index])}"
    parts = [f"encoder.stages.{index}"] + (["encoder.stem"] if index == 0 else [])
    shapes, others = _shapes(source, parts), _shapes(target, parts)
    if shapes.keys() != others.keys():
        return "other blocks"
    for name, shape in shapes.items():
        there = others[name]
        ignored = 1 if any(name == f"{key}.weight" for key in source.keys_to_in_proj) else None
        if any(b < a for axis, (a, b) in enumerate(zip(shape, there, strict=True)) if axis != ignored):
            what = "smaller kernels" if any(b < a for a, b in zip(shape[2:], there[2:], strict=True)) else "narrower"
            return f"{what} ({name} is {list(there)}, was {list(shape)})"
    return None


def _shapes(network: nn.Module, prefixes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes below some modules, every tensor under its first name."""
    below = tuple(f"{prefix}." for prefix in prefixes)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if name.startswith(below)}
    return {name: shape for name, shape in shapes.items() if ".all_modules." not in name}


# -- transformers ----------------------------------------------------------------------------------------------------


def _transformers(
    checkpoint: Checkpoint, network: nn.Module, settings: TransferSettings, notes: list[str], silent: int
) -> tuple[Features, Features]:
    """Patch embedding, positions and blocks of both, everything in its place in space (1, C, Z, Y, X)."""
    target: Any = network
    kernel = _steps(target)
    if kernel != checkpoint.architecture.total_stride:
        notes.append(f"the patch embedding is {list(kernel)}, was {list(checkpoint.architecture.total_stride)}")
        return {}, {}
    if target.embed_dim != checkpoint.architecture.kwargs["embed_dim"]:
        notes.append(f"the network is {target.embed_dim} wide, was {checkpoint.architecture.kwargs['embed_dim']}")
        return {}, {}
    order, reason = file_order(checkpoint, "auto")
    notes.append(f"the pre-trained encoder is run on tokens in {order} order: {reason}")
    grid = _grid_of(target, settings)
    patch = [n * k for n, k in zip(grid, kernel, strict=True)]
    old, new = checkpoint.plan.num_input_channels, _input_channels(network) - silent
    before, after, how = _images(settings.channel_numbers, old, new, patch)
    after = _with_previous_stage(after, silent)
    notes += [how] if how else []
    found = watch_transformer(target, after, grid, network_order(network))
    truth = pretrained_token_features(checkpoint, before, grid, order, notes)
    common = [name for name in truth if name in found]
    depth, there = checkpoint.architecture.kwargs["eva_depth"], len(target.eva.blocks)
    if depth != there:
        notes.append(f"{min(depth, there)} blocks compared: the pre-trained encoder has {depth}, the network {there}")
        common = [name for name in common if name != "last norm"]
    return {name: truth[name] for name in common}, {name: found[name] for name in common}


def _steps(network: Any) -> Shape:
    """Voxels (Z, Y, X) that one token stands for."""
    proj = getattr(network.down_projection, "proj", None)  # PrimusV2 and V3 have several convolutions instead
    z, y, x = (8, 8, 8) if proj is None else (int(n) for n in proj.weight.shape[2:])
    return z, y, x


def _grid_of(network: Any, settings: TransferSettings) -> Shape:
    """Tokens per axis (Z, Y, X) of a Primus."""
    shape = network.eva.rope.feat_shape if network.eva.rope is not None else None
    if shape is None:
        side = round(network.eva.pos_embed.shape[1] ** (1 / 3))
        shape = (side, side, side)
    z, y, x = (int(n) for n in shape)
    return z, y, x
