"""Moving pre-trained weights into a new network, with an account of every tensor on both sides.

Each tensor of the network ends as exactly one of copied, adapted (and how) or fresh (and why); each tensor of the
checkpoint as used or dropped (and why). What belongs to the encoder and finds no place is an error: a network that
looks pre-trained and is not costs days.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights import surgery
from nnssl_adapt.weights.checkpoint import Checkpoint
from nnssl_adapt.weights.layout import (
    NetworkParts,
    TargetTensor,
    below,
    find_source,
    is_special_token,
    positions_grid,
    positions_name,
)
from nnssl_adapt.weights.settings import TransferSettings
from nnssl_adapt.weights.token_order import TokenOrder, file_order, network_order
from nnssl_adapt.weights.transfer_report import (
    ADAPTED,
    COPIED,
    DROPPED,
    FRESH,
    USED,
    SourceRow,
    TargetRow,
    TransferReport,
)

logger = logging.getLogger(__name__)


def transfer_weights(
    checkpoint: Checkpoint,
    network: nn.Module,
    *,
    scope: str = "auto",
    channels: str | Sequence[int | None] = "repeat",
    token_order: str = "auto",
    waive: Sequence[str] = (),
    head_names: Sequence[str] = (),
) -> TransferReport:
    """Load pre-trained encoder and stem into ``network``, whose tensors it CHANGES in place, and account for everything.

    Other input channels, another patch (positions of a transformer are interpolated), another precision and nnssl's
    token order are adapted to; the decoder and the segmentation heads stay as they were initialised.

    Args:
        checkpoint: from :func:`~nnssl_adapt.weights.checkpoint.open_checkpoint`; never changed.
        network: from :func:`~nnssl_adapt.weights.architectures.build_network`, on any device, in any floating dtype.
        scope, channels, token_order, waive: see :class:`~nnssl_adapt.weights.settings.TransferSettings`.
        head_names: what the network's outputs stand for, in order (:attr:`LabelScheme.head_names`); heads of a
            supervised network are taken over where names agree.

    Returns a :class:`TransferReport`.

    Raises:
        TransferError: a tensor of the encoder would stay fresh, or one of the checkpoint's encoder has no place, and no
            rule says so. The message has the table; the network is left as it was.
    """
    settings = TransferSettings(
        scope, channels if isinstance(channels, str) else tuple(channels), token_order, tuple(waive)
    )
    network = _unwrap(network)
    transfer = _Transfer(checkpoint, network, settings.token_order)
    report = transfer.plan()
    transfer.apply()
    for note in report.notes:
        logger.info("%s: %s", checkpoint.origin, note)
    return report


def scratch_report(network: nn.Module) -> TransferReport:
    """The same account for training from scratch: every tensor of the network is fresh, and nothing is changed."""
    parts = NetworkParts.of(_unwrap(network))
    rows = [row for target in parts.tensors for row in _rows(parts, target, FRESH, "training from scratch")]
    return TransferReport(tuple(rows), title="From scratch: nothing is pre-trained")


def _unwrap(network: nn.Module) -> nn.Module:
    """The network inside DataParallel and torch.compile, in any order."""
    for _ in range(2):
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        network = inner if isinstance(inner, nn.Module) else network
    return network


def _rows(
    parts: NetworkParts,
    target: TargetTensor,
    fate: str,
    reason: str,
    source: str | None = None,
    source_shape: tuple[int, ...] | None = None,
) -> list[TargetRow]:
    part = parts.part_of(target) or "rest"
    shape = tuple(target.tensor.shape)
    first = target.names[0]
    return [
        TargetRow(name, fate, reason, source, source_shape, shape, part, None if name == first else first)
        for name in target.names
    ]


class _Transfer:
    """One transfer: decides the fate of all tensors first, then writes, so that an error leaves the network as it was."""

    def __init__(self, checkpoint: Checkpoint, network: nn.Module, token_order: str) -> None:
        self.checkpoint = checkpoint
        self.source = checkpoint.tensors
        self.parts = NetworkParts.of(network)
        self.notes = list(checkpoint.notes)
        self.rows: list[TargetRow] = []
        self.problems: list[str] = []
        self.used: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.writes: list[tuple[Tensor, Tensor]] = []
        self.order: TokenOrder | None = None
        self.heads = 0
        if self.parts.positions is not None:
            self._prepare_transformer(network, token_order)

    def _prepare_transformer(self, network: nn.Module, asked: str) -> None:
        file, reason = file_order(self.checkpoint, asked)
        self.order = TokenOrder(file, network_order(network), reason)
        self.notes.append(str(self.order))
        eva: Any = network.get_submodule(self.parts.encoder)
        self.rotary = getattr(eva, "rope", None) is not None
        self.heads = int(eva.blocks[0].attn.num_heads)
        trained = self.checkpoint.architecture.kwargs.get("eva_numheads", self.heads)
        if trained != self.heads:  # every shape would fit, and every head would be another
            self.problems.append(f"the network has {self.heads} attention heads, the checkpoint {trained}")
        self.grid = tuple(eva.rope.feat_shape) if self.rotary and eva.rope.feat_shape else None

    # -- deciding ----------------------------------------------------------------------------------------------------

    def plan(self) -> TransferReport:
        """Decide everything, and raise TransferError if something of the encoder is left over on either side."""
        for target in self.parts.tensors:
            self._decide(target)
        source_rows = [self._source_row(name, tensor) for name, tensor in self.source.items()]
        report = TransferReport(
            rows=tuple(self.rows),
            source_rows=tuple(source_rows),
            notes=tuple(self.notes),
            origin=self.checkpoint.origin.to_dict(),
            title=f"{self.checkpoint.architecture} from {self.checkpoint.origin}",
        )
        if self.problems:
            shown = "; ".join(self.problems[:3])
            more = f"; and {len(self.problems) - 3} more" if len(self.problems) > 3 else ""
            raise TransferError(
                f"the weights of {self.checkpoint.origin} don't fit the network: {shown}{more}. "
                f"Build the network from the checkpoint's own architecture ({self.checkpoint.architecture})\n{report}"
            )
        if report.coverage == 0:
            raise TransferError(f"nothing of {self.checkpoint.origin} was loaded\n{report}")
        return report

    def _decide(self, target: TargetTensor) -> None:
        part = self.parts.part_of(target)
        if part is None:
            self.rows += _rows(self.parts, target, FRESH, _why_fresh(target.names[0]))
            return
        plan = self.checkpoint.plan
        prefixes = (self.parts.stem, plan.key_to_stem) if part == "stem" else (self.parts.encoder, plan.key_to_encoder)
        names = find_source(target, prefixes[0], prefixes[1] or "", self.source)
        if self.parts.is_positions(target):
            name = positions_name(self.parts, self.source, plan)
            names = [name] if name else []
        if not names:
            self._fail(target, f"{target.names[0]} is not in the checkpoint")
            return
        self._account_for_aliases(names)
        self._fit(target, names[0])

    def _fit(self, target: TargetTensor, name: str) -> None:
        """Make the checkpoint's tensor fit the network's, or record the problem."""
        value, rules = self.source[name], []
        shape = tuple(target.tensor.shape)
        if self.parts.is_in_proj(target) and value.ndim == len(shape) and value.shape[1] != shape[1]:
            rules.append(f"input channels {value.shape[1]} → {shape[1]}")
            value = surgery.adapt_input_channels(value, shape[1])
        if self.parts.is_positions(target):
            value, more = self._fit_positions(value, target)
            rules += more
        elif self._is_rotated(target) and tuple(value.shape) == shape:
            value = surgery.swap_rotary_axes(value, self.heads)
            rules.append("rotary axes exchanged (token order)")
        if tuple(value.shape) != shape:
            self._fail(
                target, f"{target.names[0]} is {_shape(shape)} but {name} is {_shape(self.source[name].shape)}", name
            )
            return
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            self._fail(
                target, f"{name} has NaN or infinite values: the pre-training diverged or the file is damaged", name
            )
            return
        self.writes.append((target.tensor, value))
        self.used[name] = f"as {target.names[0]}"
        fate, reason = (ADAPTED, ", ".join(rules)) if rules else (COPIED, "")
        self.rows += _rows(self.parts, target, fate, reason, name, tuple(self.source[name].shape))

    def _fail(self, target: TargetTensor, problem: str, name: str | None = None) -> None:
        self.problems.append(problem)
        if name is not None:
            self.used.setdefault(name, "does not fit")
        self.rows += _rows(self.parts, target, FRESH, "PROBLEM: not loaded", name)

    def _account_for_aliases(self, names: list[str]) -> None:
        """Other names of the tensor in the checkpoint: the same tensor again, or an untrained twin (Spark)."""
        truth = self.source[names[0]]
        for other in names[1:]:
            if surgery.same_values([truth, self.source[other]]):
                self.used[other] = "second name of a used tensor"
            else:
                self.dropped[other] = "untrained second name; all_modules is what was trained"

    # -- transformers ------------------------------------------------------------------------------------------------

    def _is_rotated(self, target: TargetTensor) -> bool:
        """Whether it makes queries or keys, whose rows are rotated by position, and the axes must be exchanged."""
        if self.order is None or not self.order.differs or not self.rotary:
            return False
        return any(name.endswith(_ROTATED) for name in target.below(self.parts.encoder))

    def _fit_positions(self, value: Tensor, target: TargetTensor) -> tuple[Tensor, list[str]]:
        """Learned positions on the network's grid and in its order, and the rules that took; or a recorded problem."""
        order = self.order
        leading, grid = positions_grid(value, self.source, self.checkpoint.plan)
        target_grid = self._target_grid(target.tensor.shape[1])
        if order is None or grid is None or target_grid is None:
            self.problems.append(f"the grid of {value.shape[1]} → {target.tensor.shape[1]} positions can't be told")
            return value, []
        rules = []
        if leading:
            rules.append(f"{leading} class or register positions dropped")
        if order.differs:
            rules.append("token order")
            if self.rotary and grid[0] != grid[1]:
                self.notes.append(
                    f"the pre-training grid {_shape(grid)} is not square in its first two axes: learned positions are "
                    "exact, rotary ones can't be (nnssl's own were distorted on such a grid)"
                )
        if grid != target_grid:
            rules.append(f"positions {_shape(grid)} → {_shape(target_grid)}")
        value = surgery.drop_prefix_tokens(value, leading)
        return surgery.resample_positions(value, grid, target_grid, order.file, order.network), rules

    def _target_grid(self, tokens: int) -> surgery.Grid | None:
        if self.grid is not None and math.prod(self.grid) == tokens:
            z, y, x = self.grid
            return z, y, x
        return surgery.find_token_grid(tokens, [])

    # -- the checkpoint's side ---------------------------------------------------------------------------------------

    def _source_row(self, name: str, tensor: Tensor) -> SourceRow:
        shape = tuple(tensor.shape)
        if name in self.used:
            return SourceRow(name, USED, "" if self.used[name].startswith("as ") else self.used[name], shape)
        if name in self.dropped:
            return SourceRow(name, DROPPED, self.dropped[name], shape)
        reason = self._why_dropped(name)
        if reason is None:
            self.problems.append(f"{name} belongs to the checkpoint's encoder and the network has no place for it")
            reason = "PROBLEM: no place in the network"
        return SourceRow(name, DROPPED, reason, shape)

    def _why_dropped(self, name: str) -> str | None:
        """Why a tensor that nothing asked for may be left behind; None when nothing says so."""
        plan = self.checkpoint.plan
        if is_special_token(name):
            return "class or register token"
        if "rope" in name.split("."):
            return "rotary table, computed anew"
        in_encoder = below(name, plan.key_to_encoder or "") is not None
        in_stem = below(name, plan.key_to_stem or "") is not None
        if in_encoder or in_stem:
            return None
        twin = name.removeprefix("decoder.")
        if twin != name and (twin in self.used or twin in self.dropped):
            return "the encoder again, under the decoder"
        return _pretraining_part(name)

    # -- writing -----------------------------------------------------------------------------------------------------

    def apply(self) -> None:
        """Write the decided values into the network, in its own dtype and on its own device."""
        with torch.no_grad():
            for target, value in self.writes:
                target.copy_(value)


_ROTATED = ("attn.q_proj.weight", "attn.q_proj.bias", "attn.k_proj.weight", "attn.k_proj.bias")

_PRETRAINING_PARTS = (
    (("mask_token", "mask_tokens"), "mask token"),
    (("teacher", "ema", "momentum_encoder", "target_encoder"), "teacher"),
    (("projector", "projection_head", "predictor", "proj_head", "projection"), "projector"),
    (("decoder", "up_projection"), "pre-training decoder"),
)
"""Words in names, the first that fits, and what they say."""


def _pretraining_part(name: str) -> str:
    words = name.split(".")
    if "stem" in words:
        return "another dataset's stem"
    for markers, reason in _PRETRAINING_PARTS:
        if any(word in markers for word in words):
            return reason
    return f"pre-training head {words[0]!r}"


def _why_fresh(name: str) -> str:
    if "seg_layers" in name.split("."):
        return "segmentation head"
    if name == "mask_token":
        return "not used without patch dropping"
    return "decoder, not pre-trained for segmentation"


def _shape(numbers: Iterable[int]) -> str:
    return "×".join(str(number) for number in numbers)
