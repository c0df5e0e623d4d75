"""Pairs for tests of a transfer: a tiny network with the checkpoint that would be saved of it, and another network."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from support.nnssl_files import PLAINCONV, PRIMUS, RESENC, plan

from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.sources.resolved import Origin

PATCH = (8, 12, 16)
GRID_PATCH = (4, 12, 16)
"""A grid of 2×3×4 tokens of the tiny Primus."""
RES, PLAIN = "ResidualEncoderUNet", "PlainConvUNet"
BASE = {RES: RESENC, PLAIN: PLAINCONV, "Primus": PRIMUS}
BLOCKS = {RES: "n_blocks_per_stage", PLAIN: "n_conv_per_stage"}


def randomised(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def pretrained(class_name=RES, channels=1, patch=PATCH, change=lambda tensors: tensors, **changes):
    """A network and the checkpoint that would be saved of it."""
    architecture = Architecture(class_name, {**BASE[class_name], **changes})
    network = randomised(build_network(architecture, channels, 1, patch))
    content = plan(class_name, patch, channels=channels, recommended_downstream_patchsize=None)
    parsed = AdaptationPlan.parse(content, "plan").model_copy(update={"architecture": architecture})
    origin = Origin("made up", "file", None, None, "checkpoint_final.pth", "0" * 64)
    tensors = change({name: tensor.detach().clone() for name, tensor in network.state_dict().items()})
    return SimpleNamespace(network=network, checkpoint=Checkpoint(tensors, parsed, origin, "SimMIMEvaTrainer"))


def target(class_name=RES, patch=PATCH, channels=1, **changes):
    return randomised(
        build_network(Architecture(class_name, {**BASE[class_name], **changes}), channels, 2, patch), seed=9
    )


def image(shape=PATCH, seed=1):
    return torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
