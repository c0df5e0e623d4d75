"""The fastest way of a loss that gives the right numbers is used; compiled pieces give them, or are done without."""

import pytest
import torch

from nnssl_adapt.training.fused import loss_slabs, loss_ways
from nnssl_adapt.training.fused.loss_ways import COMPILED, PLAIN, Way, fastest
from nnssl_adapt.training.optimise import one_pass
from nnssl_adapt.training.optimise.losses import DiceBCELoss, DiceCELoss
from nnssl_adapt.training.optimise.one_pass import in_one_pass

CPU = torch.device("cpu")


def way(name):
    return Way(name, *[lambda *arguments: None] * 4)


def test_the_fastest_of_those_that_agree(monkeypatch, package_log):
    plain, wrong, failing, full, quick, slow = map(way, ("plain", "wrong", "failing", "full", "quick", "slow"))
    monkeypatch.setattr(loss_ways, "_seconds", lambda work, way, device: {plain: 3, wrong: 1, quick: 2, slow: 4}[way])

    def work(way):
        if way is failing:
            raise OSError("no compiler")
        if way is full:
            raise torch.OutOfMemoryError("full")
        return torch.tensor([1.0, 2.0]) * (1.5 if way is wrong else 1.0)

    assert fastest([plain, wrong, failing, full, quick, slow], work, CPU) is quick
    assert "loss: quick (plain 3000.0 ms, quick 2000.0 ms, slow 4000.0 ms)" in package_log.text
    for name, why in (("wrong", "other numbers"), ("failing", "no compiler"), ("full", "too much memory")):
        assert f"{name} is not used" in package_log.text and why in package_log.text
    with pytest.raises(torch.OutOfMemoryError):  # nothing works without the first
        fastest([full, plain], work, CPU)


def test_a_triton_that_can_not_be_loaded_is_done_without(monkeypatch, package_log):
    def failing():
        raise OSError("libcuda.so not found")

    for kernels in (True, False):
        monkeypatch.setattr(loss_ways, "has_kernels", lambda kernels=kernels: kernels)
        monkeypatch.setattr(loss_ways, "triton_way", failing)
        assert loss_ways.possible_ways(True) == [PLAIN, COMPILED] and loss_ways.possible_ways(False) == [PLAIN]
    assert package_log.text.count("libcuda.so not found") == 2


@pytest.mark.parametrize("regions", [False, True])
def test_each_way_is_measured_by_forward_and_backward_pass(regions):
    logits = torch.randn(2, 3, 600)
    target = torch.rand(2, 4, 600) > 0.5 if regions else torch.randint(0, 3, (2, 1, 600))
    figures = loss_ways._work(logits, target, True if regions else -1, regions, PLAIN)
    assert figures.shape == (1 + 3 * 2 * 3 + 2 * 3,) and bool(torch.isfinite(figures).all())
    assert bool((figures[-6:] > 0).all())


def value_and_gradient(loss, logits, target):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    return value.detach(), leaf.grad


CASES = {
    "labels": (DiceCELoss(ignore_label=3), lambda: torch.randint(0, 4, (2, 1, 6, 10, 14)).to(torch.int16)),
    "regions": (DiceBCELoss(ignore=True), lambda: torch.rand(2, 4, 6, 10, 14) > 0.6),
}


@pytest.fixture
def compiles(monkeypatch):
    """Losses use the compiled way on the CPU, in several slabs, by a backend of the test's choice."""
    monkeypatch.setattr(one_pass, "way_for", lambda *arguments: COMPILED)
    monkeypatch.setattr(loss_slabs, "_SLAB_ON_CPU", 2000)
    original = torch.compile
    loss_slabs._compiled.cache_clear()
    torch._dynamo.reset()
    yield lambda backend: monkeypatch.setattr(torch, "compile", lambda function: original(function, backend=backend))
    loss_slabs._compiled.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_compiled_it_is_the_same(compiles, package_log, name):
    compiles("aot_eager")  # inductor gives the same, after a minute of C++
    loss, target = CASES[name]
    logits, target = torch.randn(2, 3, 6, 10, 14), target()
    found = value_and_gradient(in_one_pass(loss), logits, target)
    for one, other in zip(found, value_and_gradient(loss, logits, target), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert "compiled here" not in package_log.text


def test_what_can_not_be_compiled_is_computed_as_it_is(compiles, package_log):
    def failing(module, inputs):
        raise OSError("no compiler on this machine")

    compiles(failing)
    loss, target = CASES["labels"]
    logits, target = torch.randn(2, 3, 6, 10, 14), target()
    found = value_and_gradient(in_one_pass(loss), logits, target)
    for one, other in zip(found, value_and_gradient(loss, logits, target), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert package_log.text.count("no compiler on this machine") == 2  # once for each pass, not for each slab
