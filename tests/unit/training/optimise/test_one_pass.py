"""The losses in one pass against the readable ones: values, gradients, memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nnssl_adapt.training.fused import loss_slabs
from nnssl_adapt.training.optimise.losses import DeepSupervisionLoss, DiceBCELoss, DiceCELoss
from nnssl_adapt.training.optimise.one_pass import OnePassDiceBCELoss, OnePassDiceCELoss

SHAPE = (6, 10, 14)


def value_and_gradient(loss, logits, target):
    logits = logits.detach().clone().requires_grad_()
    # The reference is given the same numbers in float32: half precision may only round what comes out.
    value = loss(logits, target)
    (3 * value).backward()
    return value.detach(), logits.grad


def assert_close_gradients(gradient, expected, tolerance):
    """As a whole to ``tolerance``; each number to 1e-5 of the largest, and to how far its type rounds."""
    assert (gradient.float() - expected).norm() <= tolerance * expected.norm()
    rounding = torch.finfo(gradient.dtype).eps / 2
    torch.testing.assert_close(gradient.float(), expected, rtol=rounding, atol=1e-5 * expected.abs().max().item())


def doubled(tensor):
    """A second rank that has the same samples."""
    return 2 * tensor


@pytest.fixture(autouse=True)
def _several_slabs(monkeypatch):
    monkeypatch.setattr(loss_slabs, "_SLAB_ON_CPU", 5000)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 30, 118])
def test_labels(classes, batch_dice, ignore, dtype, tolerance):
    random = torch.Generator().manual_seed(classes)
    logits = (4 * torch.randn(2, classes, *SHAPE, generator=random)).to(dtype)
    labels = torch.randint(0, classes + ignore, (2, 1, *SHAPE), generator=random).to(torch.int16)
    options = {"batch_dice": batch_dice, "ignore_label": classes if ignore else None}
    if batch_dice:
        options["reduce"] = doubled
    value, gradient = value_and_gradient(OnePassDiceCELoss(**options), logits, labels)
    expected, expected_gradient = value_and_gradient(DiceCELoss(**options), logits.float(), labels)
    assert gradient.dtype == dtype
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    assert_close_gradients(gradient, expected_gradient, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("regions", [1, 3])
def test_regions(regions, batch_dice, ignore, dtype, tolerance):
    random = torch.Generator().manual_seed(regions)
    logits = (4 * torch.randn(2, regions, *SHAPE, generator=random)).to(dtype)
    target = torch.rand(2, regions + ignore, *SHAPE, generator=random) > 0.6
    value, gradient = value_and_gradient(OnePassDiceBCELoss(batch_dice, ignore), logits, target)
    expected, expected_gradient = value_and_gradient(DiceBCELoss(batch_dice, ignore), logits.float(), target)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    assert_close_gradients(gradient, expected_gradient, tolerance)


def test_at_every_resolution_and_in_channels_last():
    random = torch.Generator().manual_seed(5)
    outputs = [torch.randn(2, 3, 8, 12, 4, generator=random), torch.randn(2, 3, 4, 6, 4, generator=random)]
    outputs = [each.contiguous(memory_format=torch.channels_last_3d) for each in outputs] + [torch.randn(2, 3, 2, 3, 2)]
    labels = torch.randint(0, 3, (2, 1, 8, 12, 4), generator=random).to(torch.int16)
    strides = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)]
    results = []
    for loss in (OnePassDiceCELoss(), DiceCELoss()):
        leaves = [each.clone().requires_grad_() for each in outputs]
        value = DeepSupervisionLoss(loss, strides)(leaves, labels)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves[:2])])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


def test_nothing_annotated_costs_no_cross_entropy():
    labels = torch.full((1, 1, *SHAPE), 2, dtype=torch.int16)
    logits = torch.randn(1, 2, *SHAPE)
    ours, reference = OnePassDiceCELoss(ignore_label=2)(logits, labels), DiceCELoss(ignore_label=2)(logits, labels)
    assert torch.isfinite(ours) and ours == pytest.approx(reference.item(), abs=1e-6)


class Ledger(TorchDispatchMode):
    """Bytes of the storages that are made inside, at most at a time."""

    def __init__(self):
        super().__init__()
        self.known, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.leave, storage._cdata)
        return result

    def leave(self, key):
        self.live -= self.known.pop(key)


@pytest.mark.parametrize("classes", [30, 118])
def test_memory_besides_the_logits_is_little_more_than_their_gradient(classes):
    def peak_of(loss):
        logits = torch.empty(2, classes, 160, 160, 160, dtype=torch.bfloat16, device="meta", requires_grad=True)
        labels = torch.empty(2, 1, 160, 160, 160, dtype=torch.int16, device="meta")
        ledger = Ledger()
        ledger.known = dict.fromkeys(each.untyped_storage()._cdata for each in (logits, labels))  # were there before
        with ledger:
            torch.autograd.grad(loss(logits, labels), logits)
        return ledger.peak / (logits.numel() * 2)

    assert 1 < peak_of(OnePassDiceCELoss()) <= 1.2 < 5 < peak_of(DiceCELoss())
