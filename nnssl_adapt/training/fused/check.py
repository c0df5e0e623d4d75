"""What is computed in one go, against float64 on the CPU: for a user's self-test of a card."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnssl_adapt.training.fused.norm import norm_act

_SHAPE, _SLOPE = (2, 30, 9, 20, 31), 0.01


def norm_error(device: torch.device, kind: torch.dtype) -> float:
    """Size of the error of :func:`~nnssl_adapt.training.fused.norm.norm_act` and of its gradients, the largest of them.

    Of an odd shape with weights and something added, in type ``kind``; as a part of what is right.
    """
    random = torch.Generator().manual_seed(0)
    x, added, gradient = (torch.randn(_SHAPE, generator=random).to(kind) for _ in range(3))
    weight, bias = (torch.randn(_SHAPE[1], generator=random) for _ in range(2))
    ours = [each.to(device).requires_grad_() for each in (x, weight, bias, added)]
    found = norm_act(ours[0], ours[1], ours[2], ours[3], _SLOPE)
    exact = [each.double().requires_grad_() for each in (x, weight, bias, added)]
    normed = functional.instance_norm(exact[0], weight=exact[1], bias=exact[2])
    expected = functional.leaky_relu(normed + exact[3], _SLOPE)
    pairs = [(found, expected)]
    gradients = torch.autograd.grad(found, ours, gradient.to(device))
    pairs += zip(gradients, torch.autograd.grad(expected, exact, gradient.double()), strict=True)
    return max(_relative(one.detach().double().cpu(), other.detach()) for one, other in pairs)


def _relative(found: Tensor, expected: Tensor) -> float:
    error = float((found - expected).norm() / expected.norm())
    return error if error == error else float("inf")
