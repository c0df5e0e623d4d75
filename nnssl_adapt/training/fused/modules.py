"""Lets a network's instance normalisations compute what follows them too, without changing its tensors or their names.

Modules stay where they are, with their parameters: only their class becomes one whose ``forward`` uses
:func:`~nnssl_adapt.training.fused.norm.norm_act`. So state dicts, copies, averages, hooks and freezing know no difference.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn

from nnssl_adapt.training.fused.norm import norm_act
from nnssl_adapt.weights.modules import stu_net

_NO_ACTIVATION = 1.0
"""Slope of negative values."""


class FusedNorm(nn.InstanceNorm3d):
    """Instance normalisation, then what ``slope`` says: 1 nothing, 0 ReLU, otherwise a leaky ReLU."""

    slope: float

    def forward(self, features: Tensor, residual: Tensor | None = None, slope: float | None = None) -> Tensor:
        """``residual`` is added before the activation; ``slope`` is used instead of its own."""
        self._check_input_dim(features)
        if math.prod(features.shape[2:]) == 1:
            return super().forward(features)  # which says that one voxel has no variance
        return norm_act(
            features, self.weight, self.bias, residual, self.slope if slope is None else slope, float(self.eps)
        )


class LeakyReLUInNorm(nn.LeakyReLU):
    """Has nothing left to do."""

    def forward(self, features: Tensor) -> Tensor:
        return features


class ReLUInNorm(nn.ReLU):
    """Has nothing left to do."""

    def forward(self, features: Tensor) -> Tensor:
        return features


class FusedBasicBlock(BasicBlockD):  # type: ignore[misc]
    """The second normalisation adds what passes the block by, and activates."""

    def forward(self, x: Tensor) -> Tensor:
        return _added(self.conv2, self.conv1(x), self.skip(x), self.nonlin2)


class FusedBottleneck(BottleneckD):  # type: ignore[misc]
    """The third normalisation adds what passes the block by, and activates."""

    def forward(self, x: Tensor) -> Tensor:
        return _added(self.conv3, self.conv2(self.conv1(x)), self.skip(x), self.nonlin3)


class FusedStuNetBlock(stu_net.Block):
    """Both normalisations activate, and the second one adds what passes the block by."""

    def forward(self, features: Tensor) -> Tensor:
        norm1, norm2 = self.norm1, self.norm2
        assert isinstance(norm1, FusedNorm) and isinstance(norm2, FusedNorm)
        passed = self.conv3(features) if hasattr(self, "conv3") else features
        inner = norm1(self.conv1(features), slope=0.01)
        found: Tensor = norm2(self.conv2(inner), residual=passed, slope=0.01)
        return found


def _added(last: Any, inner: Tensor, passed: Tensor, activation: nn.Module) -> Tensor:
    """The last convolution of a block with its normalisation, what passes it by, and the activation."""
    *before, norm = last.all_modules
    for module in before:
        inner = module(inner)
    found: Tensor = norm(inner, residual=passed, slope=_slope(activation))
    return found


def fuse_norms(network: nn.Module) -> int:
    """Let instance normalisations do what follows them. Changes the network; returns how many normalisations it concerns.

    Followed are: a (leaky) ReLU that stands behind a normalisation in a row of modules, and the sum and activation at the
    end of residual blocks without dropped paths or channel attention. Other instance normalisations only get the faster way
    to compute themselves. To be called before blocks are wrapped (activation checkpointing).
    """
    norms = 0
    for module in network.modules():
        if type(module) is nn.InstanceNorm3d and not module.track_running_stats:
            module.__class__ = FusedNorm
            module.slope = _NO_ACTIVATION  # type: ignore[assignment]
            norms += 1
    uses = _uses(network)
    for module in network.modules():
        if type(module) is nn.Sequential:
            _fuse_row(module, uses)
        elif type(module) in (BasicBlockD, BottleneckD) and _is_plain(module):
            module.__class__ = FusedBasicBlock if type(module) is BasicBlockD else FusedBottleneck
        elif type(module) is stu_net.Block:
            module.__class__ = FusedStuNetBlock
    return norms


def _uses(network: nn.Module) -> Counter[int]:
    """In how many places each module stands. ConvDropoutNormReLU only names again what stands in its row."""
    holders = (module for module in network.modules() if not isinstance(module, ConvDropoutNormReLU))
    return Counter(id(child) for holder in holders for child in holder._modules.values())


def _fuse_row(row: nn.Sequential, uses: Counter[int]) -> None:
    modules = list(row)
    for norm, activation in itertools.pairwise(modules):
        slope = _slope(activation)
        alone = uses[id(norm)] == uses[id(activation)] == 1
        if isinstance(norm, FusedNorm) and slope is not None and alone:
            norm.slope = slope
            activation.__class__ = LeakyReLUInNorm if type(activation) is nn.LeakyReLU else ReLUInNorm


def _slope(activation: Any) -> float | None:
    """The slope of negative values; None: it is another activation, or one that turns them round."""
    if type(activation) is nn.ReLU:
        return 0.0
    if type(activation) is nn.LeakyReLU and activation.negative_slope >= 0:
        return float(activation.negative_slope)
    return None


def _is_plain(block: Any) -> bool:
    """Whether a residual block ends as convolution, normalisation, sum, (leaky) ReLU."""
    last = block.conv2 if type(block) is BasicBlockD else block.conv3
    activation = block.nonlin2 if type(block) is BasicBlockD else block.nonlin3
    return (
        isinstance(last, ConvDropoutNormReLU)
        and isinstance(last.all_modules[-1], FusedNorm)
        and not block.apply_stochastic_depth
        and not block.apply_se
        and _slope(activation) is not None
    )
