"""The encoder and stem of a checkpoint, tensor by tensor, for those of a network."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.checkpoint.plan_check import find_token_grid, positions_grid
from nnssl_adapt.weights.network import tensor_ops
from nnssl_adapt.weights.network.architectures import KINDS
from nnssl_adapt.weights.network.network_parts import NetworkParts, TargetTensor, below, join_name
from nnssl_adapt.weights.transfer.correspondence import (
    Encoder,
    different_blocks,
    does_nothing_as_one,
    other_names,
    why_dropped,
    why_fresh,
)
from nnssl_adapt.weights.transfer.rules import (
    DoesNotFit,
    Fitted,
    Role,
    TensorFate,
    check_channel_map,
    fit,
    in_full_precision,
    times,
    unused_channels,
)
from nnssl_adapt.weights.transfer.settings import TransferSettings
from nnssl_adapt.weights.transfer.token_order import ASSUMED, BY_NNUNET, TokenOrder, file_order, network_order

_ROTATED = ("attn.q_proj.weight", "attn.q_proj.bias", "attn.k_proj.weight", "attn.k_proj.bias")


class EncoderFit:
    """Decides about a network's encoder and stem.

    Attributes:
        notes, warnings: what was decided on the way, for the report.
        problems: why the two encoders have nothing in common; single tensors don't matter then.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        network: nn.Module,
        parts: NetworkParts,
        settings: TransferSettings,
        silent: int = 0,
    ) -> None:
        self.checkpoint, self.parts, self.settings, self.silent = checkpoint, parts, settings, silent
        self.source, self.keys = checkpoint.tensors, checkpoint.plan
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.problems: list[str] = []
        self.order: TokenOrder | None = None
        there = (below(name, self.keys.key_to_encoder or "") for name in self.source)
        self.there = Encoder.of((name for name in there if name is not None), checkpoint.architecture)
        self.here = Encoder.of(name for target in parts.tensors for name in target.below(parts.encoder))
        is_transformer = parts.positions is not None
        if is_transformer:
            self._prepare_transformer(network)
        other_kind = self._is_other_kind(network) or self._has_other_tokenizer(network)
        if other_kind or not self._has_anything():
            self.problems.append(
                f"it is a {type(network).__name__}, the checkpoint a {checkpoint.architecture.class_name}"
            )
            return
        self._check_untold(network)
        self._check_channels()
        self._compare_strides(network)

    def _is_other_kind(self, network: nn.Module) -> bool:
        """Whether the weights are of another class of networks, and not only of the other of two U-Nets or tokenizers."""
        here, there = KINDS.get(type(network).__name__), self.checkpoint.architecture.kind
        if (self.parts.positions is not None) != self.checkpoint.architecture.is_transformer:
            return True
        return here is not None and here is not there and not (here.is_resizable and there.is_resizable)

    def _check_untold(self, network: nn.Module) -> None:
        """Arguments that change what weights compute, and fit in every shape."""
        theirs = self.checkpoint.architecture
        for name in theirs.kind.untold:
            mine = getattr(network, "untold", {}).get(name)
            if mine != theirs.kwargs[name]:
                self.problems.append(f"its {name} is {mine}, the checkpoint's {theirs.kwargs[name]}")

    def _has_other_tokenizer(self, network: nn.Module) -> bool:
        """Whether of two transformers one makes its tokens by one convolution, the other (PrimusV2, V3) by several."""
        names = {type(network).__name__, self.checkpoint.architecture.class_name}
        return self.parts.positions is not None and len({name[:8] for name in names if name.startswith("Primus")}) > 1

    def _has_anything(self) -> bool:
        inside = [target for target in self.parts.tensors if target.below(self.parts.encoder)]
        return any(self._names(target) for target in inside)

    # -- what holds for the whole ------------------------------------------------------------------------------------

    def _prepare_transformer(self, network: nn.Module) -> None:
        file, reason = file_order(self.checkpoint, self.settings.token_order)
        self.order = TokenOrder(file, network_order(network), reason)
        self.notes.append(str(self.order))
        if reason.startswith(ASSUMED) and BY_NNUNET in reason:
            other = "hwd" if file == "whd" else "whd"
            self.warnings.append(
                "nnU-Net's Primus flattens its tokens in hwd order with dynamic-network-architectures up to 0.4.2, in whd order "
                f"since 0.4.3 (January 2026): {file} is taken. If it was trained with the other, say --token-order {other}"
            )
        elif reason.startswith(ASSUMED):
            self.warnings.append(
                "nothing says how this transformer was pre-trained, and its tokens are taken to be in whd order: if it was by "
                "Models Genesis or Volume Fusion, say --token-order hwd, or its positions arrive with two axes exchanged"
            )
        eva: Any = network.get_submodule(self.parts.encoder)
        self.rotary = getattr(eva, "rope", None) is not None
        self.grid = tuple(eva.rope.feat_shape) if self.rotary and eva.rope.feat_shape else None
        kwargs = self.checkpoint.architecture.kwargs
        heads, width = int(eva.blocks[0].attn.num_heads), int(eva.blocks[0].norm1.weight.shape[0])
        self.heads = int(kwargs.get("eva_numheads", heads))
        trained = int(kwargs.get("embed_dim", width))
        if width == trained and heads != self.heads:  # every shape would fit, and every head would be another
            self.problems.append(f"the network has {heads} attention heads, the checkpoint {self.heads}")
        elif width * self.heads != trained * heads:
            self.problems.append(
                f"the network's attention heads are {width // heads} wide, the checkpoint's {trained // self.heads}: "
                f"other widths are possible with heads of the same width ({width // (trained // self.heads)} heads here)"
            )

    def _check_channels(self) -> None:
        """Only a map can be wrong here; any rule fits any pair of numbers."""
        target = next((tensor for tensor in self.parts.tensors if self.parts.is_in_proj(tensor)), None)
        names = self._names(target) if target is not None else []
        if target is None or not names or self.source[names[0]].ndim < 2:
            return
        trained, channels = self.source[names[0]].shape[1], target.tensor.shape[1] - self.silent
        wrong = check_channel_map(self.settings.channel_numbers, trained, channels)
        if wrong:
            raise TransferError(f"{self.checkpoint.origin}: {wrong}")
        unused = unused_channels(self.settings.channel_numbers, trained, channels)
        if unused:
            self.notes.append(f"pre-training channel(s) {', '.join(map(str, unused))} not used")

    def _compare_strides(self, network: Any) -> None:
        if self.checkpoint.architecture.is_transformer or not hasattr(network, "encoder"):
            return
        for stage, (old, new) in enumerate(
            zip(self.checkpoint.architecture.strides, network.encoder.strides, strict=False)
        ):
            if tuple(old)[-len(new) :] != tuple(new):  # a 2D network names two
                self.warnings.append(
                    f"stage {stage} has strides {times(new)}, was {times(old)}: from there on, what was learned is used at "
                    "another resolution"
                )
                return

    # -- one tensor --------------------------------------------------------------------------------------------------

    def decide(self, target: TargetTensor) -> TensorFate:
        names = self._names(target)
        if not names:
            return self._decide_missing(target)
        try:
            return TensorFate(self._fit(target, self.source[names[0]]), names=tuple(names))
        except DoesNotFit as error:
            return TensorFate.problem(f"{target.names[0]} can't be made from {names[0]}: {error}", names)

    def _names(self, target: TargetTensor) -> list[str]:
        """Names in the checkpoint, the trained alias first; empty when it is not there."""
        if self.parts.is_positions(target):
            name = self.keys.key_to_lpe
            return [name] if name in self.source else []
        is_stem = self.parts.part_of(target) == "stem"
        prefix = self.parts.stem if is_stem else self.parts.encoder
        source_prefix = (self.keys.key_to_stem if is_stem else self.keys.key_to_encoder) or ""
        relatives = target.below(prefix)
        names = (join_name(source_prefix, other) for name in relatives for other in other_names(name))
        return [name for name in dict.fromkeys(names) if name in self.source]

    def _decide_missing(self, target: TargetTensor) -> TensorFate:
        relatives = target.below(self.parts.encoder) or tuple(_in_stem(name) for name in target.below(self.parts.stem))
        reason = why_fresh(relatives[0], self.there) or self._why_lacking(relatives[0])
        if reason is not None:
            return TensorFate.fresh(reason)
        if does_nothing_as_one(relatives[0], self.there):
            ones = torch.ones(target.tensor.shape)
            return TensorFate(Fitted(ones, ("1, as the checkpoint's blocks are not scaled",)))
        why = different_blocks(relatives[0], self.there)
        return TensorFate.problem(f"{target.names[0]} is not in the checkpoint" + (f" ({why})" if why else ""))

    def _why_lacking(self, relative: str) -> str | None:
        """Why a tensor of a part that a file may lack as a whole is not there; None: it should be."""
        inside = [rest for name in self.source if (rest := below(name, self.keys.key_to_encoder or "")) is not None]
        for pattern, reason in self.checkpoint.architecture.kind.may_lack:
            part = re.compile(pattern)
            if part.fullmatch(relative) and not any(map(part.fullmatch, inside)):
                return reason
        return None

    def _fit(self, target: TargetTensor, value: Tensor) -> Fitted:
        if not self.checkpoint.architecture.kind.is_resizable:
            self._require_same_size(target, value)
        before: tuple[str, ...] = ()
        role = Role()
        value = in_full_precision(value)
        if self.parts.is_positions(target):
            value, before = self._fit_positions(value, target.tensor.shape[1])
            role = Role(features=2)
        elif self._is_rotated(target):
            value, before = tensor_ops.swap_rotary_axes(value, self.heads), ("rotary axes exchanged (token order)",)
        elif self.parts.is_in_proj(target):
            is_patch = "down_projection.proj.weight" in target.names
            role = Role("patch embedding" if is_patch else "convolution", channels=self.settings.channel_numbers)
        silent = self.silent if role.channels is not None and value.ndim > 1 else 0
        fitted = fit(value, target.tensor[:, : target.tensor.shape[1] - silent] if silent else target.tensor, role)
        fitted = _with_silent_channels(fitted, silent) if silent else fitted
        if self.order is not None and role.features == 0 and _has_other_width(value, target.tensor):
            self._warn_of_widths()
        return replace(fitted, rules=(*before, *fitted.rules))

    def _require_same_size(self, target: TargetTensor, value: Tensor) -> None:
        here, there = list(target.tensor.shape), list(value.shape)
        if self.parts.is_in_proj(target) and len(here) == len(there):
            here[1] = there[1]
        if here != there:
            raise DoesNotFit(
                f"{times(there)} in the checkpoint, {times(here)} in the network, and no rule changes a network of this kind"
            )

    def _warn_of_widths(self) -> None:
        warning = (
            "the transformer has other widths: leading features and heads are taken over, but its layer normalisation looks "
            "at all features, so that it starts from the trained weights without computing the same"
        )
        if warning not in self.warnings:
            self.warnings.append(warning)

    def without_a_place(self, name: str) -> str:
        """What to say of a tensor of the checkpoint that the network has no place for."""
        relative = self._relative(name)
        if relative is None:
            return f"{name} belongs to the checkpoint's decoder and the network has no place for it"
        why = different_blocks(relative, self.here)
        return f"{name} belongs to the checkpoint's encoder and the network has no place for it" + (
            f" ({why})" if why else ""
        )

    def why_dropped(self, name: str) -> str | None:
        relative = self._relative(name)
        return why_dropped(relative, self.here) if relative is not None else None

    def _relative(self, name: str) -> str | None:
        """A name in the file below the encoder; None outside of encoder and stem."""
        relative = below(name, self.keys.key_to_encoder or "")
        if relative is not None:
            return relative
        inside = below(name, self.keys.key_to_stem or "")
        return _in_stem(inside) if inside is not None else None

    # -- transformers ------------------------------------------------------------------------------------------------

    def _is_rotated(self, target: TargetTensor) -> bool:
        """Whether it makes queries or keys, whose rows are rotated by position, and the axes must be exchanged."""
        if self.order is None or not self.order.differs or not self.rotary:
            return False
        return any(name.endswith(_ROTATED) for name in target.below(self.parts.encoder))

    def _fit_positions(self, value: Tensor, count: int) -> tuple[Tensor, tuple[str, ...]]:
        """Learned positions on the network's grid and in its order, and the rules that took."""
        order = self.order
        leading, grid = positions_grid(value, self.source, self.keys)
        target_grid = self._target_grid(count)
        if order is None or grid is None or target_grid is None:
            raise DoesNotFit(f"the grid of {value.shape[1]} → {count} positions is not known")
        rules = []
        if leading:
            rules.append(f"{leading} class or register positions dropped")
        if order.differs:
            rules.append("token order")
            if self.rotary and grid[0] != grid[1]:
                self.notes.append(
                    f"the pre-training grid {times(grid)} is not square in its first two axes: learned positions are "
                    "exact, rotary ones can't be (nnssl's own were distorted on such a grid)"
                )
        if grid != target_grid:
            rules.append(f"positions {times(grid)} → {times(target_grid)}")
        value = tensor_ops.drop_prefix_tokens(value, leading)
        return tensor_ops.resample_positions(value, grid, target_grid, order.file, order.network), tuple(rules)

    def _target_grid(self, tokens: int) -> tensor_ops.Grid | None:
        if self.grid is not None and math.prod(self.grid) == tokens:
            z, y, x = self.grid
            return z, y, x
        return find_token_grid(tokens, [])


def _with_silent_channels(fitted: Fitted, silent: int) -> Fitted:
    """A kernel that does not see so many further channels."""
    kernel = fitted.value
    zeros = kernel.new_zeros((len(kernel), silent, *kernel.shape[2:]))
    rule = f"{silent} channel(s) of the previous stage silent (zeros)"
    return replace(fitted, value=torch.cat([kernel, zeros], dim=1), rules=(*fitted.rules, rule))


def _has_other_width(value: Tensor, into: Tensor) -> bool:
    return value.shape[:1] != into.shape[:1]


def _in_stem(relative: str) -> str:
    """A name below the stem, as if it were part of the first stage: what blocks have there, the stem has too."""
    return f"0.{relative}"
