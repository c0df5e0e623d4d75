"""Moving pre-trained weights into a new network, with an account of every tensor on both sides.

Each tensor of the network ends as exactly one of copied, adapted (and how) or fresh (and why); each tensor of the
checkpoint as used or dropped (and why). What belongs to the encoder and finds no place is an error, unless a rule or the
user says so: a network that looks pre-trained and is not costs days.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.checkpoint.stems import is_other_stem
from nnssl_adapt.weights.network import tensor_ops
from nnssl_adapt.weights.network.network_parts import NetworkParts, TargetTensor, below, is_special_token
from nnssl_adapt.weights.transfer.by_name import pair_by_name
from nnssl_adapt.weights.transfer.decoder_fit import DecoderFit
from nnssl_adapt.weights.transfer.encoder_fit import EncoderFit
from nnssl_adapt.weights.transfer.report import TransferReport
from nnssl_adapt.weights.transfer.rows import ADAPTED, COPIED, DROPPED, FRESH, USED, SourceRow, TargetRow, percent
from nnssl_adapt.weights.transfer.rules import TensorFate
from nnssl_adapt.weights.transfer.settings import TransferSettings

logger = logging.getLogger(__name__)

LITTLE = 0.5
"""Below this fraction of the encoder, a transfer is told loudly to be a small one."""


def transfer_weights(
    checkpoint: Checkpoint,
    network: nn.Module,
    *,
    scope: str = "auto",
    channels: str | Sequence[int | str | None] = "auto",
    token_order: str = "auto",
    waive: Sequence[str] = (),
    head_names: Sequence[str] = (),
    channel_names: Sequence[str] = (),
    silent: int = 0,
) -> TransferReport:
    """Load pre-trained weights into ``network``, whose tensors it CHANGES in place, and account for everything.

    Other input channels, another patch (positions of a transformer are interpolated), other kernels, widths, numbers of
    stages and blocks, another precision and nnssl's token order are adapted to by fixed rules; the report says which.

    Args:
        checkpoint: from :func:`~nnssl_adapt.weights.checkpoint.checkpoint.open_checkpoint`; never changed.
        network: from :func:`~nnssl_adapt.weights.network.architectures.build_network`, on any device, in any floating dtype.
        scope: this and the next three: see :class:`~nnssl_adapt.weights.transfer.settings.TransferSettings`.
        channels: how the stem's input channels are paired.
        token_order: of a Primus.
        waive: patterns of tensors that may be left behind.
        head_names: what the network's outputs stand for, in order (:attr:`LabelScheme.head_names`); heads of a
            supervised network are taken over where names agree.
        channel_names: of the network's image channels, in order; with ``channels`` at ``auto`` each takes the kernel of the
            pre-training channel of its name.
        silent: of the network's input channels the last so many hold no image, but the segmentation of a cascade's previous
            stage: their kernels become 0, so that the network starts as one without them.

    Returns a :class:`TransferReport`.

    Raises:
        TransferError: a tensor that both sides should have is missing, or has no place, and no rule says so; or the
            channel map or a waiver fits nothing. The first line says it all, the table follows; the network is left as
            it was.
    """
    settings = TransferSettings(
        scope, channels if isinstance(channels, str) else tuple(channels), token_order, tuple(waive)
    )
    network = _unwrap(network)
    if settings.scope == "none":
        return _nothing_wanted(checkpoint, network)
    plan = checkpoint.plan
    pairing = pair_by_name(settings.channels, channel_names, plan.channel_names, plan.num_input_channels)
    settings = replace(settings, channels=pairing.rule)
    transfer = _Transfer(checkpoint, network, settings, head_names, silent)
    transfer.notes += pairing.notes
    transfer.warnings += pairing.warnings
    report = transfer.plan()
    transfer.apply()
    for warning in report.warnings:
        logger.warning("%s: %s", checkpoint.origin, warning)
    return report


def scratch_report(network: nn.Module, reason: str = "training from scratch") -> TransferReport:
    """The same account for training from scratch: every tensor of the network is fresh, and nothing is changed."""
    parts = NetworkParts.of(_unwrap(network))
    rows = [row for target in parts.tensors for row in _rows(parts, target, TensorFate.fresh(reason), {})]
    return TransferReport(tuple(rows), title="From scratch: nothing is pre-trained")


def _nothing_wanted(checkpoint: Checkpoint, network: nn.Module) -> TransferReport:
    reason = "not requested (scope none)"
    sources = (SourceRow(name, DROPPED, reason, tuple(value.shape)) for name, value in checkpoint.tensors.items())
    return TransferReport(
        rows=scratch_report(network, reason).rows,
        source_rows=tuple(sources),
        notes=checkpoint.notes,
        origin=checkpoint.origin.to_dict(),
        title=f"Nothing of {checkpoint.origin}: scope none",
    )


def _unwrap(network: nn.Module) -> nn.Module:
    """The network inside DataParallel and torch.compile, in any order."""
    for _ in range(2):
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        network = inner if isinstance(inner, nn.Module) else network
    return network


def _rows(
    parts: NetworkParts,
    target: TargetTensor,
    decision: TensorFate,
    source: dict[str, Tensor],
    reason: str | None = None,
) -> list[TargetRow]:
    """One row for every name of a tensor."""
    fitted, shape = decision.fitted, tuple(target.tensor.shape)
    fate = FRESH if fitted is None else ADAPTED if fitted.rules else COPIED
    why = reason if reason is not None else ", ".join(fitted.rules) if fitted is not None else decision.reason
    origin = decision.names[0] if decision.names else None
    first = target.names[0]
    return [
        TargetRow(
            name,
            fate,
            why,
            origin,
            tuple(source[origin].shape) if origin is not None else None,
            shape,
            parts.part_of(target) or "rest",
            None if name == first else first,
            0 if fitted is None else fitted.fresh_numbers,
        )
        for name in target.names
    ]


class _Transfer:
    """One transfer: decides the fate of all tensors first, then writes, so that an error leaves the network as it was."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        network: nn.Module,
        settings: TransferSettings,
        head_names: Sequence[str],
        silent: int,
    ) -> None:
        self.checkpoint = checkpoint
        self.source = checkpoint.tensors
        self.settings = settings
        self.parts = NetworkParts.of(network)
        self.notes = list(checkpoint.notes)
        self.warnings: list[str] = []
        self.problems: list[str] = []
        self.rows: list[TargetRow] = []
        self.used: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.writes: list[tuple[Tensor, Tensor]] = []
        self._check_waivers()
        self.encoder = EncoderFit(checkpoint, network, self.parts, settings, silent)
        self.decoder: DecoderFit | None = None
        wanted = settings.scope == "encoder+decoder" or (settings.scope == "auto" and checkpoint.plan.supervised)
        if wanted:
            self.decoder = DecoderFit(checkpoint, self.parts, head_names)
            if not self.decoder.is_there:
                self.warnings.append("the decoder was requested and the checkpoint has none: it stays fresh")

    # -- deciding ----------------------------------------------------------------------------------------------------

    def plan(self) -> TransferReport:
        """Decide everything, and raise TransferError if something is left over on either side that should not be."""
        for target in self.parts.tensors:
            self._record(target, self._decide(target))
        source_rows = tuple(self._source_row(name, tensor) for name, tensor in self.source.items())
        report = self._report(source_rows)
        problems = self.encoder.problems or self.problems
        if problems:
            shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
            raise TransferError(
                f"the weights of {self.checkpoint.origin} don't fit the network: {shown}. Build the network from the "
                f"checkpoint's own architecture ({self.checkpoint.architecture}), or waive tensors by name (--waive)\n{report}"
            )
        if report.coverage == 0:
            raise TransferError(f"nothing of {self.checkpoint.origin} was loaded\n{report}")
        return report

    def _report(self, source_rows: tuple[SourceRow, ...]) -> TransferReport:
        report = TransferReport(tuple(self.rows), source_rows)
        if report.coverage < LITTLE:
            self.warnings.append(
                f"ONLY {percent(report.coverage, 0)} OF THE ENCODER'S NUMBERS ARE PRE-TRAINED: "
                "this is closer to training from scratch"
            )
        return TransferReport(
            rows=report.rows,
            source_rows=source_rows,
            notes=(*self.notes, *self.encoder.notes),
            origin=self.checkpoint.origin.to_dict(),
            title=f"{self.checkpoint.architecture} from {self.checkpoint.origin}",
            warnings=(*self.encoder.warnings, *self.warnings),
        )

    def _decide(self, target: TargetTensor) -> TensorFate:
        if self.parts.part_of(target) is not None:
            return self.encoder.decide(target)
        if self.decoder is not None and self.decoder.owns(target):
            return self.decoder.decide(target)
        return TensorFate.fresh(_why_fresh(target.names[0], self.checkpoint.plan.supervised))

    def _record(self, target: TargetTensor, decision: TensorFate) -> None:
        """Note a decision on both sides. Values that are not finite are a problem whatever they fit."""
        if decision.fitted is not None and not _is_finite(self.source[decision.names[0]] if decision.names else None):
            text = f"{decision.names[0]} has NaN or infinite values: the pre-training diverged or the file is damaged"
            decision = TensorFate.problem(text, decision.names)
        reason = None
        if decision.is_problem:
            waiver = self._waiver(*target.names, *decision.names)
            reason = f"waived by {waiver!r}" if waiver else "PROBLEM: not loaded"
            if not waiver:
                self.problems.append(decision.reason)
        self.rows += _rows(self.parts, target, decision, self.source, reason)
        if decision.names:
            self._account_for_names(target, decision, reason)
        if decision.fitted is not None:
            self.writes.append((target.tensor, decision.fitted.value))

    def _account_for_names(self, target: TargetTensor, decision: TensorFate, reason: str | None) -> None:
        """The checkpoint's tensor under all its names: one tensor again, or an untrained copy (Spark)."""
        first, *others = decision.names
        if decision.fitted is None:
            self.dropped.update(dict.fromkeys(decision.names, reason or decision.reason))
            return
        self.used[first] = f"as {target.names[0]}"
        for other in others:
            if tensor_ops.same_values([self.source[first], self.source[other]]):
                self.used[other] = "second name of a used tensor"
            else:
                self.dropped[other] = "untrained second name; all_modules is what was trained"

    # -- the checkpoint's side ---------------------------------------------------------------------------------------

    def _source_row(self, name: str, tensor: Tensor) -> SourceRow:
        shape = tuple(tensor.shape)
        if name in self.used:
            return SourceRow(name, USED, "" if self.used[name].startswith("as ") else self.used[name], shape)
        reason = self.dropped.get(name) or self._why_dropped(name)
        if reason is None:
            waiver = self._waiver(name)
            reason = f"waived by {waiver!r}" if waiver else "PROBLEM: no place in the network"
            if not waiver:
                self.problems.append(self.encoder.without_a_place(name))
        return SourceRow(name, DROPPED, reason, shape)

    def _why_dropped(self, name: str) -> str | None:
        """Why a tensor that nothing asked for may be left behind; None when nothing says so."""
        plan = self.checkpoint.plan
        if is_special_token(name):
            return "class or register token"
        if "rope" in name.split("."):
            return "rotary table, computed again"
        if is_other_stem(name):
            return "another dataset's stem"
        if below(name, plan.key_to_encoder or "") is not None or below(name, plan.key_to_stem or "") is not None:
            return self.encoder.why_dropped(name)
        if self._repeats_the_encoder(name):
            return "the encoder again, under the decoder"
        if self.decoder is not None:
            reason = self.decoder.why_dropped(name)
            if reason is not None or self.decoder.is_part(name):
                return reason
        return _pretraining_part(name, plan.supervised)

    def _repeats_the_encoder(self, name: str) -> bool:
        """Whether it is a tensor of the encoder under the decoder, which U-Nets of dynamic_network_architectures hold."""
        before, decoder, rest = name.rpartition("decoder.")
        if not decoder or (before and not before.endswith(".")):
            return False
        keys = (self.checkpoint.plan.key_to_encoder, self.checkpoint.plan.key_to_stem)
        return any(key and below(before + rest, key) is not None for key in keys)

    # -- waivers -----------------------------------------------------------------------------------------------------

    def _check_waivers(self) -> None:
        everything = [*self.source, *(name for target in self.parts.tensors for name in target.names)]
        for pattern in self.settings.waive:
            if not fnmatch.filter(everything, pattern):
                raise TransferError(
                    f"the waiver {pattern!r} fits no tensor of the network or of {self.checkpoint.origin}: correct its "
                    "spelling, or leave it out"
                )

    def _waiver(self, *names: str) -> str | None:
        fitting = (p for p in self.settings.waive if any(fnmatch.fnmatchcase(name, p) for name in names))
        return next(fitting, None)

    # -- writing -----------------------------------------------------------------------------------------------------

    def apply(self) -> None:
        """Write the decided values into the network, in its own dtype and on its own device."""
        with torch.no_grad():
            for target, value in self.writes:
                target.copy_(value)


def _is_finite(value: Tensor | None) -> bool:
    return value is None or not value.is_floating_point() or bool(torch.isfinite(value).all())


# -- reasons ---------------------------------------------------------------------------------------------------------

_PRETRAINING_PARTS = (
    (("mask_token", "mask_tokens"), "mask token"),
    (("teacher", "ema", "momentum_encoder", "target_encoder"), "teacher"),
    (("projector", "projection_head", "predictor", "proj_head", "projection"), "projector"),
    (("decoder", "up_projection"), "pre-training decoder"),
)
"""Words in names, the first that fits, and what they say."""


def _pretraining_part(name: str, supervised: bool) -> str:
    words = name.split(".")
    if words[-1] in ("running_mean", "running_var", "num_batches_tracked"):
        return "statistics that its normalisation does not use"
    for markers, reason in _PRETRAINING_PARTS:
        if any(word in markers for word in words):
            return "decoder (the scope is the encoder)" if supervised and reason == "pre-training decoder" else reason
    return f"pre-training head {words[0]!r}"


def _why_fresh(name: str, supervised: bool) -> str:
    if "seg_layers" in name.split("."):
        return "segmentation head"
    if name == "mask_token":
        return "not used without patch dropping"
    return "decoder (the scope is the encoder)" if supervised else "decoder, not pre-trained for segmentation"
