"""The decoder of a checkpoint, tensor by tensor, for the decoder of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.network_parts import NetworkParts, TargetTensor, below, join_name
from nnssl_adapt.weights.transfer.by_name import HeadsDiffer, fit_heads
from nnssl_adapt.weights.transfer.correspondence import (
    Encoder,
    decoder_stages,
    different_blocks,
    same_resolution,
    why_dropped,
    why_fresh,
)
from nnssl_adapt.weights.transfer.rules import DoesNotFit, Fitted, Role, TensorFate, fit, in_full_precision, times

UNET, PRIMUS = "decoder", "up_projection"


class DecoderFit:
    """Decides about a network's decoder, if a checkpoint has one that is meant to be taken over.

    It lies beside the encoder on both sides: ``net.encoder.stages`` has a ``net.decoder``.
    """

    def __init__(self, checkpoint: Checkpoint, parts: NetworkParts, head_names: Sequence[str]) -> None:
        self.checkpoint = checkpoint
        self.names_here = tuple(head_names)
        self.prefix = PRIMUS if parts.positions is not None else UNET
        encoder = checkpoint.plan.key_to_encoder or ""
        root = encoder.removesuffix(parts.encoder).removesuffix(".") if encoder.endswith(parts.encoder) else ""
        self.source_prefix = join_name(root, self.prefix)
        self.there = self._inside(checkpoint.tensors)
        here = [
            name for target in parts.tensors for name in target.below(self.prefix) if below(name, "encoder") is None
        ]
        self.stages_here, self.stages_there = decoder_stages(here), decoder_stages(self.there)
        self.blocks_here, self.blocks_there = _stages(here), _stages(self.there)
        self.layers_here, self.layers_there = _decode_layers(here), _decode_layers(self.there)
        self.has_upsampling_bias = any(map(_is_upsampling_bias, here))
        self.is_there = bool(self.there)

    def _inside(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Name below the decoder → name in the file; without the encoder, which U-Nets' decoders repeat."""
        relative = {below(name, self.source_prefix): name for name in tensors}
        return {rest: name for rest, name in relative.items() if rest is not None and below(rest, "encoder") is None}

    def owns(self, target: TargetTensor) -> bool:
        return bool(target.below(self.prefix))

    def _is_head(self, relative: str, layers: int) -> bool:
        """Whether it makes the outputs; a Primus's decoder does so in the last of its ``layers``."""
        return relative.startswith(("seg_layers.", f"decode.{layers - 1}."))

    def decide(self, target: TargetTensor) -> TensorFate:
        relatives = target.below(self.prefix)
        if not self.is_there:
            return TensorFate.fresh("the checkpoint has no decoder")
        if self.layers_here != self.layers_there:
            counted = f"{self.layers_there} up-sampling layer(s) in the checkpoint, {self.layers_here} here"
            return TensorFate.fresh(f"{counted}: another decoder")
        if self.prefix == PRIMUS:
            counterparts: list[str | None] = list(relatives)
        else:
            counterparts = [same_resolution(name, self.stages_here, self.stages_there) for name in relatives]
        known = [name for name in counterparts if name is not None]
        if not known:
            return TensorFate.fresh(
                f"no decoder stage of its resolution in the checkpoint ({self.stages_there} stages)"
            )
        names = [self.there[name] for name in known if name in self.there]
        if self._is_head(relatives[0], self.layers_here):
            return self._head(target, names)
        if not names and _is_upsampling_bias(relatives[0]) and not any(map(_is_upsampling_bias, self.there)):
            zeros = torch.zeros(target.tensor.shape)
            return TensorFate(Fitted(zeros, ("0, as the checkpoint's up-sampling has no bias",)))
        if not names:
            inside = known[0].removeprefix("stages.")
            reason = why_fresh(inside, self.blocks_there)
            if reason is None:
                why = different_blocks(inside, self.blocks_there)
                text = f"{join_name(self.source_prefix, known[0])} is not in the checkpoint" + (
                    f" ({why})" if why else ""
                )
                return TensorFate.problem(text)
            return TensorFate.fresh(f"decoder: {reason}")
        return self._fit(target, relatives[0], names)

    def _fit(self, target: TargetTensor, relative: str, names: list[str]) -> TensorFate:
        value = self.checkpoint.tensors[names[0]]
        if self.prefix == PRIMUS and value.shape != target.tensor.shape:
            shapes = f"{times(value.shape)} in the checkpoint, {times(target.tensor.shape)} here"
            return TensorFate.fresh(f"{shapes}: this decoder's widths follow the number of outputs", names)
        is_upsampling = relative.startswith(("transpconvs.", "decode.")) and value.ndim in (4, 5)
        first = relative.startswith("stages.") and ".convs.0." in relative and value.ndim in (4, 5)
        role = Role("up-sampling", features=1) if is_upsampling else Role(joined=2 if first else 1)
        try:
            return TensorFate(fit(in_full_precision(value), target.tensor, role), names=tuple(names))
        except DoesNotFit as error:
            return TensorFate.problem(f"{names[0]} does not fit: {error}", names)

    def _head(self, target: TargetTensor, names: list[str]) -> TensorFate:
        plan = self.checkpoint.plan
        if not plan.supervised:
            return TensorFate.fresh("segmentation head (the checkpoint's reconstructs images)")
        if not names:
            return TensorFate.fresh("segmentation head, not in the checkpoint")
        value, into = self.checkpoint.tensors[names[0]], target.tensor
        axis, in_axis = (0, None) if value.ndim < 2 else (1, 0) if self.prefix == PRIMUS else (0, 1)
        try:
            return TensorFate(
                fit_heads(value, into, plan.head_names, self.names_here, axis, in_axis), names=tuple(names)
            )
        except HeadsDiffer as error:
            return TensorFate.fresh(f"segmentation head: {error}", names)

    def why_dropped(self, name: str) -> str | None:
        """Why one of the checkpoint's decoder's tensors is left behind.

        None: it is no part of the decoder, or should have had a place (:meth:`is_part` tells).
        """
        relative = below(name, self.source_prefix)
        if relative is None:
            return None
        if self._is_head(relative, self.layers_there) and not self.checkpoint.plan.supervised:
            return "reconstruction head"
        if self.prefix == PRIMUS:
            return None
        there = same_resolution(relative, self.stages_there, self.stages_here)
        if there is None:
            return f"decoder stage of a resolution that the network does not have ({self.stages_here} decoder stages)"
        if _is_upsampling_bias(relative) and not self.has_upsampling_bias:
            return "the network's up-sampling has no bias (most of it is taken away by the normalisation that follows)"
        reason = why_dropped(there.removeprefix("stages."), self.blocks_here)
        return f"decoder: {reason}" if reason else None

    def is_part(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is one of a decoder's stages or up-samplings, which are all wanted."""
        relative = below(name, self.source_prefix) or ""
        return self.prefix == UNET and relative.startswith(("stages.", "transpconvs."))


def _decode_layers(names: Iterable[str]) -> int:
    """Number of layers in a Primus's decoder; 0 in a U-Net's."""
    return max((int(name.split(".")[1]) + 1 for name in names if name.startswith("decode.")), default=0)


def _is_upsampling_bias(relative: str) -> bool:
    return relative.startswith("transpconvs.") and relative.endswith(".bias")


def _stages(names: Sequence[str] | Mapping[str, str]) -> Encoder:
    return Encoder.of(name.removeprefix("stages.") for name in names if name.startswith("stages."))
