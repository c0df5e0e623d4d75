"""Run by test_kernels.py in a process where Triton interprets: kernels against torch's operations, in float64."""

import sys

import torch
from torch.nn import functional

from nnssl_adapt.training.fused import norm
from nnssl_adapt.training.fused.norm import norm_act

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

CASES = [  # batch, channels, voxels, affine, residual, slope, type
    (2, 1, (3, 5, 7), True, False, 0.01, torch.float32),
    (1, 1, (25, 26, 27), False, False, 0.01, torch.float64),  # several chunks
    (2, 3, (2, 3, 5), False, True, 0.0, torch.float64),
    (2, 7, (15, 16, 17), True, True, 0.01, torch.float32),
    (1, 30, (3, 4, 5), True, False, 1.0, torch.bfloat16),
    (2, 32, (5, 6, 7), True, True, 0.01, torch.bfloat16),
    (1, 64, (9, 10, 11), True, True, 0.01, torch.float64),
    (1, 65, (5, 7, 9), False, True, 0.01, torch.float32),
    (2, 130, (1, 3, 2), True, False, 0.0, torch.float16),
    (1, 320, (2, 3, 3), True, True, 0.01, torch.float32),
    (2, 320, (5, 5, 4), True, False, 0.01, torch.bfloat16),
]


def check(batch, channels, voxels, affine, residual, slope, kind):
    torch.manual_seed(channels)
    shape = (batch, channels, *voxels)
    means = torch.linspace(-30, 30, channels, dtype=torch.float64).view(1, -1, 1, 1, 1)
    inputs = [(2 * torch.randn(shape, dtype=torch.float64) + means).to(kind)]
    of_weights = kind if kind == torch.float64 else torch.float32  # as autocast leaves them
    inputs += [(torch.randn(channels, dtype=torch.float64) + 1).to(of_weights) for _ in range(2 * affine)]
    inputs += [torch.randn(shape, dtype=torch.float64).to(kind)] * residual
    gradient = torch.randn(shape, dtype=torch.float64).to(kind)

    def arguments(tensors):
        tensors = list(tensors)
        x = tensors.pop(0)
        weight, bias = (tensors.pop(0), tensors.pop(0)) if affine else (None, None)
        return x, weight, bias, tensors.pop() if residual else None

    ours = [each.clone().requires_grad_() for each in inputs]
    found = norm_act(*arguments(ours), slope)
    assert found.dtype == kind and found.movedim(1, -1).is_contiguous()
    exact = [each.double().requires_grad_() for each in inputs]
    x, weight, bias, added = arguments(exact)
    expected = functional.instance_norm(x, weight=weight, bias=bias)
    expected = functional.leaky_relu(expected if added is None else expected + added, slope)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, ours, gradient), torch.autograd.grad(expected, exact, gradient.double()), strict=True
    )
    for number, (one, other) in enumerate(pairs):
        assert one.shape == other.shape
        off = (one.double() - other).abs() > TOLERANCE[kind] * (1 + other.abs())
        # A value that rounds to the other side of 0 has the other slope.
        allowed = 0.0 if kind in (torch.float64, torch.float32) else 0.01
        assert off.double().mean() <= allowed, (
            number,
            batch,
            channels,
            voxels,
            kind,
            (one.double() - other).abs().max(),
        )


if __name__ == "__main__":
    used = []
    from nnssl_adapt.training.fused import norm_kernels

    forward, backward = norm_kernels.forward, norm_kernels.backward
    norm_kernels.forward = lambda *values: used.append("forward") or forward(*values)
    norm_kernels.backward = lambda *values: used.append("backward") or backward(*values)
    assert norm.has_kernels()
    for case in CASES:
        check(*case)
    assert used == ["forward", "backward"] * len(CASES), used
    sys.stdout.write(f"{len(CASES)} cases agree\n")
