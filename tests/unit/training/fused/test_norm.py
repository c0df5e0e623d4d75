"""Instance normalisation, sum and activation as one operation."""

import pytest
import torch
from torch.nn import functional

from nnssl_adapt.training.fused.norm import _norm_act, norm_act


def separate(x, weight=None, bias=None, residual=None, slope=1.0):
    value = functional.instance_norm(x, weight=weight, bias=bias)
    return functional.leaky_relu(value if residual is None else value + residual, slope)


def inputs(affine, residual, kind=torch.float64, shape=(2, 5, 3, 4, 6)):
    torch.manual_seed(3)
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 7).to(kind)
    weights = [torch.randn(shape[1], dtype=torch.float64).to(kind) if affine else None for _ in range(2)]
    added = torch.randn(shape, dtype=torch.float64).to(kind) if residual else None
    return [None if each is None else each.requires_grad_() for each in (x, *weights, added)]


@pytest.mark.parametrize("slope", [0.01, 0.0, 1.0])
@pytest.mark.parametrize(("affine", "residual"), [(True, True), (False, False), (True, False), (False, True)])
def test_values_and_gradients_are_those_of_one_after_the_other(affine, residual, slope):
    for kind, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            given = inputs(affine, residual, kind)
            given[0] = given[0].detach().contiguous(memory_format=layout).requires_grad_()
            asked = [each for each in given if each is not None]
            found, expected = norm_act(*given, slope), separate(*given, slope)
            weights = torch.randn_like(found)
            gradients = zip(
                torch.autograd.grad(found, asked, weights), torch.autograd.grad(expected, asked, weights), strict=True
            )
            assert found.is_contiguous(memory_format=torch.channels_last_3d) and found.dtype == kind
            for one, other in ((found, expected), *gradients):
                assert torch.allclose(one, other, atol=tolerance, rtol=tolerance)


def test_half_precision_in_and_out_with_sums_in_float32():
    x = (torch.randn(1, 3, 20, 30, 40) + 50).bfloat16()
    found = norm_act(x, torch.ones(3), torch.zeros(3), x, 0.01)
    exact = separate(x.double(), residual=x.double(), slope=0.01)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own check asks for it
@pytest.mark.parametrize(("affine", "residual"), [(True, True), (False, False)])
def test_torch_compiles_it_as_one_operation(affine, residual):
    given = inputs(affine, residual)
    torch.library.opcheck(_norm_act, (*given, 0.01, 1e-5))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *values: norm_act(*values, 0.01).sum(1), backend="aot_eager", fullgraph=True)
    asked = [each for each in given if each is not None]
    found, expected = compiled(*given), norm_act(*given, 0.01).sum(1)
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.pow(2).sum(), asked), torch.autograd.grad(expected.pow(2).sum(), asked), strict=True
    ):
        assert torch.allclose(one, other)
