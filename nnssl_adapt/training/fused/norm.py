"""Instance normalisation, what is added to it and the activation as one operation, for torch.compile as well.

torch has one operation after the other, and in channels-last memory ``instance_norm`` copies every activation besides. On a
GPU with Triton the kernels of :mod:`~nnssl_adapt.training.fused.norm_kernels` read and write each number as rarely as can be;
elsewhere the same is computed with torch's operations.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_NAME = "nnssl_adapt::norm_act"


def norm_act(
    features: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    slope: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """``leaky_relu(instance_norm(features) * weight + bias + residual, slope)``, with channels last in memory.

    Args:
        features: (B, C, Z, Y, X) of any memory layout, or with other spatial axes; more than one voxel.
        weight, bias: (C,), both or none.
        residual: of the features' shape, or None.
        slope: of negative values, 0 or more: 0 for ReLU, 1 for no activation.
        eps: added to the variance.

    Returns the result in the features' type. Sums are made in float32 (float64 for float64).
    """
    result: Tensor = _norm_act(features, weight, bias, residual, slope, eps)[0]
    return result


@functools.cache
def has_kernels() -> bool:
    """Whether Triton is installed, and this torch has a device for it (or Triton interprets: ``TRITON_INTERPRET=1``)."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or interprets()


def interprets() -> bool:
    """Whether Triton's kernels run on the CPU, one program after the other, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _uses_kernels(tensor: Tensor) -> bool:
    return (tensor.is_cuda or interprets()) and has_kernels()


def _rows(tensor: Tensor) -> Tensor:
    """(B, C, …) as contiguous (B, voxels, C): without a copy where channels are last."""
    return tensor.movedim(1, -1).contiguous().flatten(1, -2)


def _as_before(rows: Tensor, like: Tensor) -> Tensor:
    """Rows in the shape of ``like``, with channels last in memory."""
    return rows.view(rows.shape[0], *like.shape[2:], rows.shape[2]).movedim(-1, 1)


@torch.library.custom_op(
    _NAME,
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float slope, float eps)"
    " -> (Tensor, Tensor, Tensor)",
)
def _norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, slope: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, added = _rows(x), None if residual is None else _rows(residual)
    if _uses_kernels(x):
        from nnssl_adapt.training.fused import norm_kernels

        y, mean, scale = norm_kernels.forward(rows, weight, bias, added, slope, eps)
    else:
        y, mean, scale = _forward(rows, weight, bias, added, slope, eps)
    return _as_before(y, x), mean, scale


@_norm_act.register_fake
def _(x: Tensor, weight: Any, bias: Any, residual: Any, slope: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    sums = [x.new_empty(x.shape[:2], dtype=_exact(x)) for _ in range(2)]
    return _like(x), sums[0], sums[1]


@torch.library.custom_op(
    f"{_NAME}_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor? y, Tensor mean, Tensor scale, Tensor? weight, Tensor? bias, float slope)"
    " -> Tensor[]",
)
def _norm_act_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
) -> list[Tensor]:
    rows, result = (_rows(gradient), _rows(x)), None if y is None else _rows(y)
    if _uses_kernels(x):
        from nnssl_adapt.training.fused import norm_kernels

        of_x, of_weight, of_bias, of_residual = norm_kernels.backward(*rows, result, mean, scale, weight, bias, slope)
    else:
        of_x, of_weight, of_bias, of_residual = _backward(*rows, result, mean, scale, weight, bias, slope)
    found = [_as_before(of_x, x)]
    found += [each for each in (of_weight, of_bias) if each is not None]
    return found if of_residual is None else [*found, _as_before(of_residual, x)]


@_norm_act_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, y: Any, mean: Tensor, scale: Tensor, weight: Any, bias: Any, slope: float
) -> list[Tensor]:
    found = [_like(x), *(torch.empty_like(each) for each in (weight, bias) if each is not None)]
    return found if y is None else [*found, _like(x)]


def _like(x: Tensor) -> Tensor:
    """Without content, of the same shape, with channels last in memory."""
    return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, residual, slope, _ = inputs
    y, mean, scale = output
    ctx.slope = slope
    ctx.added = None if residual is None else residual.dtype
    ctx.affine = weight is not None
    ctx.save_for_backward(x, None if residual is None else y, mean, scale, weight, bias)


def _differentiate(ctx: Any, gradient: Tensor, *others: Any) -> Any:
    x, y, mean, scale, weight, bias = ctx.saved_tensors
    found = list(_norm_act_backward(gradient, x, y, mean, scale, weight, bias, ctx.slope))
    of_x = found.pop(0)
    of_weight, of_bias = (found.pop(0), found.pop(0)) if ctx.affine else (None, None)
    of_residual = None if ctx.added is None else found.pop(0).to(ctx.added)
    return of_x, of_weight, of_bias, of_residual, None, None


_norm_act.register_autograd(_differentiate, setup_context=_keep)


# -- with torch's operations -------------------------------------------------------------------------------------------


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, slope: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows, as :func:`nnssl_adapt.training.fused.norm_kernels.forward`."""
    kind = _exact(x)
    variance, mean = torch.var_mean(x.to(kind), 1, correction=0)
    scale = (variance + eps).rsqrt()
    value = (x.to(kind) - mean.unsqueeze(1)) * scale.unsqueeze(1)
    if weight is not None and bias is not None:
        value = value * weight.to(kind) + bias.to(kind)
    if residual is not None:
        value = value + residual.to(kind)
    return functional.leaky_relu(value, slope).to(x.dtype), mean, scale


def _backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Of rows, as :func:`nnssl_adapt.training.fused.norm_kernels.backward`."""
    kind = _exact(x)
    level = (x.to(kind) - mean.unsqueeze(1)) * scale.unsqueeze(1)
    value = level
    if weight is not None and bias is not None:
        value = level * weight.to(kind) + bias.to(kind)
    found = gradient.to(kind)
    found = torch.where((value if y is None else y) > 0, found, found * slope)
    total, product = found.sum(1), (found * level).sum(1)
    of_x = (found - total.unsqueeze(1) / x.shape[1] - level * product.unsqueeze(1) / x.shape[1]) * scale.unsqueeze(1)
    of_x = of_x if weight is None else of_x * weight.to(kind)
    of_weight = None if weight is None else product.sum(0).to(weight.dtype)
    of_bias = None if bias is None else total.sum(0).to(bias.dtype)
    return of_x.to(x.dtype), of_weight, of_bias, None if y is None else found.to(y.dtype)
