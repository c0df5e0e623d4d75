"""In which order a transformer flattens its grid: what the network does, and what the file was trained with.

nnssl's masked-autoencoder networks (``EvaMAE``, under every Primus method but SimMIM) flatten (h w d). The Primus of
dynamic_network_architectures did so up to 0.4.2 and flattens (w h d) since 0.4.3. Positions in such a file then arrive
with their first two axes exchanged: nothing fails, but the encoder no longer computes what it was trained to (nnUNet
issue 2962). The network's order is probed, since versions can't be trusted; the file's is known by its family or by the day
of its training, and measured where it can be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.families.nnunet import architecture_of_trainer, token_order_by_date
from nnssl_adapt.weights.network.network_parts import Tensors, join_name
from nnssl_adapt.weights.network.tensor_ops import Grid
from nnssl_adapt.weights.transfer.token_order_measured import (
    Measurement,
    Smoothness,
    measure_order,
    measure_smoothness,
)

_PROBE_GRID = (2, 3, 4)

_SIMMIM = re.compile(r"simmim", re.IGNORECASE)
_EVA_MAE = re.compile(
    r"MAE|Eva|VoCo|SimCLR|SwinUNETR|VolumeFusion|Model(s)?Genesis|nnFoundationViT|-(MG|VF)$", re.IGNORECASE
)
"""Trainers and published repositories whose Primus is an EvaMAE. nnssl's trainers of it have Eva in their names."""

_PUBLISHED_FOLDER = re.compile(r"Primus[SBMLX]-OpenMind-[A-Za-z]+|nnFoundationViT")
"""What a copy of a published repository is called by most who make one."""


@dataclass(frozen=True)
class TokenOrder:
    """Token order of the file and of the network (``hwd`` or ``whd``), and how the file's was decided."""

    file: str
    network: str
    reason: str

    @property
    def differs(self) -> bool:
        return self.file != self.network

    def __str__(self) -> str:
        action = "exchanged exactly" if self.differs else "nothing to exchange"
        return f"token order: file {self.file} ({self.reason}), network {self.network}: {action}"


def flatten_as_before(network: nn.Module) -> None:
    """Let a Primus flatten its tokens (h w d), as dynamic_network_architectures did up to 0.4.2. Changes the network.

    Exact on any grid, rotary positions included, which went by the token's number. Tensors and their names stay.
    """
    eva: Any = network.get_submodule("eva")
    w, h, d = eva.rope.feat_shape
    index = torch.arange(w * h * d).reshape(w, h, d).transpose(0, 1).flatten()
    back = torch.argsort(index)
    eva.register_forward_pre_hook(lambda _module, inputs: (inputs[0][:, index.to(inputs[0].device)], *inputs[1:]))
    eva.register_forward_hook(lambda _module, _inputs, output: (output[0][:, back.to(output[0].device)], *output[1:]))


class _Probed(Exception):
    """Ends the probe's forward pass before it reaches the transformer."""


def network_order(network: nn.Module) -> str:
    """Token order of a Primus network, found by passing a tiny random image through its patch embedding."""
    tokenizer = getattr(network, "down_projection", None)
    weight = next(tokenizer.parameters(), None) if isinstance(tokenizer, nn.Module) else None
    if not isinstance(tokenizer, nn.Module) or weight is None or weight.ndim != 5:
        raise TransferError(f"{type(network).__name__} has no tokenizer: only Primus can take these weights")
    # The tokenizers of PrimusV2 and V3 make steps of 8 in several convolutions.
    steps = weight.shape[2:] if "proj.weight" in tokenizer.state_dict() else (8, 8, 8)
    size = [count * width for count, width in zip(_PROBE_GRID, steps, strict=True)]
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, weight.shape[1], *size, generator=generator).to(weight)
    seen: dict[str, Tensor] = {}

    def keep_embedding(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen["volume"] = output.detach()

    def keep_tokens(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["tokens"] = inputs[0].detach()
        raise _Probed

    hooks = [
        network.get_submodule("down_projection").register_forward_hook(keep_embedding),
        network.get_submodule("eva").register_forward_pre_hook(keep_tokens),
    ]
    try:
        with torch.no_grad():
            network(image)
    except _Probed:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return _recognise(seen["volume"], seen["tokens"])


def _recognise(volume: Tensor, tokens: Tensor) -> str:
    """Which flattening of (1, C, X, Y, Z) gave the tokens (1, [prefix +] N, C)."""
    places = volume[0].permute(1, 2, 3, 0)
    candidates = {"whd": places, "hwd": places.transpose(0, 1)}
    for order, candidate in candidates.items():
        flat = candidate.reshape(-1, candidate.shape[-1])
        if torch.equal(tokens[0, -flat.shape[0] :], flat):
            return order
    raise TransferError("the network flattens its tokens in an order that is neither (w h d) nor (h w d)")


def file_order(checkpoint: Checkpoint, asked: str) -> tuple[str, str]:
    """Token order that a checkpoint was trained with, and the reason.

    In this order: what is asked for; what is known of the repository or the trainer; what the tensors' names say; what the
    folder is called; of nnU-Net's models the day of their training. Where the file holds the whole masked autoencoder, its
    order is measured too, and a clear measurement has the last word: tables tell how networks of a kind were trained, it tells
    how this one was. Where nothing is certain, the smoothness of learned positions is looked at, which a grid tells that is
    not square in its first two axes.
    """
    if asked in ("hwd", "whd"):
        return asked, "as requested"
    if asked != "auto":
        raise TransferError(f"unknown token order {asked!r}: auto, hwd or whd")
    known, reason = _known_order(checkpoint)
    measured: Measurement | Smoothness | None = measure_order(checkpoint)
    if measured is None and reason.startswith(ASSUMED):
        positions = checkpoint.tensors.get(join_name(checkpoint.plan.key_to_encoder or "", "pos_embed"))
        measured = measure_smoothness(positions, checkpoint.plan.token_grid)
    if measured is None:
        return known, reason
    if measured.order is None:
        return known, f"{reason}; {measured}"
    if reason.startswith(ASSUMED):
        return measured.order, str(measured)
    if measured.order == known:
        return known, f"{reason}; {measured}"
    return measured.order, f"{measured}, which outweighs that {reason} and would be {known}"


BY_NNUNET = "nnU-Net trained it"
ASSUMED = "assumed"
"""What the reason begins with where nothing in the file or its name tells."""


def order_of_nnunet(ended: date | None, tensors: Tensors, grid: Grid | None) -> tuple[str, str]:
    """Token order of a Primus V1 of nnU-Net's, and the reason: by the day of its training, or by its learned positions.

    ``tensors`` under nnU-Net's names; ``grid``: tokens (Z, Y, X) of its patch.
    """
    order, reason, certain = token_order_by_date(ended)
    measured = None if certain else measure_smoothness(tensors.get("eva.pos_embed"), grid)
    if measured is not None and measured.order is not None:
        return measured.order, str(measured)
    return order, reason if certain else f"{ASSUMED}: {reason}"


def _known_order(checkpoint: Checkpoint) -> tuple[str, str]:
    if "nnssl_adapt" in (checkpoint.plan.raw.get("nnunet_plans") or {}):
        return "whd", "this package trained it"
    for name in filter(None, [checkpoint.origin.repo_id, checkpoint.trainer_name]):
        known = _order_of_name(name, checkpoint.trained_until)
        if known is not None:
            return known
    if any(name.startswith("decoder.blocks.") for name in checkpoint.tensors):
        return "hwd", "it has a masked autoencoder's second transformer"
    encoder = checkpoint.plan.key_to_encoder or ""
    if encoder.endswith(".eva"):
        return "hwd", f"its encoder lies under {encoder}, as in nnssl's VoCo, SimCLR and SwinUNETR"
    folder = _PUBLISHED_FOLDER.search(checkpoint.origin.source)
    known = _order_of_name(folder[0]) if folder is not None else None
    if known is not None:
        return known[0], f"by the name of its folder: {known[1]}"
    return "whd", f"{ASSUMED}: no trainer is named and its tensors look like SimMIM's; MG and VF would be hwd"


def _order_of_name(name: str, trained_until: date | None = None) -> tuple[str, str] | None:
    """Of a trainer or a repository."""
    known = architecture_of_trainer(name)
    if known is not None and known.class_name != "Primus":
        return "whd", f"{name} trains a {known.class_name}, which is younger than the other order"
    if known is not None:
        order, reason, certain = token_order_by_date(trained_until)
        return order, reason if certain else f"{ASSUMED}: {reason}"
    if _SIMMIM.search(name):
        return "whd", f"{name} is SimMIM"
    return ("hwd", f"{name} trains nnssl's EvaMAE") if _EVA_MAE.search(name) else None
