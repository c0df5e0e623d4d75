"""Run by test_kernels.py in a process where Triton interprets: the losses by Triton's kernels against the readable ones."""

import sys

import torch

from nnssl_adapt.training.fused.loss_ways import PLAIN, triton_way
from nnssl_adapt.training.optimise import one_pass
from nnssl_adapt.training.optimise.losses import DeepSupervisionLoss, DiceBCELoss, DiceCELoss
from nnssl_adapt.training.optimise.one_pass import in_one_pass

CASES = [  # classes or regions, whether regions, batch Dice, ignore, voxels, channels last, type
    (2, False, False, False, (3, 5, 7), False, torch.float32),
    (3, False, True, True, (3, 5, 7), True, torch.float32),
    (30, False, False, True, (9, 10, 14), False, torch.bfloat16),
    (118, False, True, False, (6, 8, 9), True, torch.bfloat16),
    (118, False, False, True, (3, 7, 9), False, torch.float32),
    (1, True, False, False, (4, 5, 7), False, torch.float32),
    (3, True, True, True, (20, 31, 33), True, torch.float32),  # several chunks
    (3, True, False, True, (5, 6, 7), False, torch.bfloat16),
]


def value_and_gradient(loss, logits, target):
    leaves = [each.detach().clone().requires_grad_() for each in logits]
    value = loss(leaves if len(leaves) > 1 else leaves[0], target)
    (3 * value).backward()
    return value.detach(), [leaf.grad for leaf in leaves]


def compare(loss, logits, target, tolerance):
    expected, gradients = value_and_gradient(loss, [each.float() for each in logits], target)
    value, found = value_and_gradient(in_one_pass(loss), logits, target)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    # The interpreter cuts digits off where a GPU rounds to bf16: an error of up to 2^-7, half of that on average.
    allowed = tolerance if logits[0].dtype == torch.float32 else 6e-3
    for one, other in zip(found, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.float() - other).norm() <= allowed * other.norm(), (one.float() - other).norm() / other.norm()


def check(count, regions, batch_dice, ignore, voxels, last, kind):
    random = torch.Generator().manual_seed(count)
    logits = (4 * torch.randn(2, count, *voxels, generator=random)).to(kind)
    logits = logits.contiguous(memory_format=torch.channels_last_3d) if last else logits
    if regions:
        target = torch.rand(2, count + ignore, *voxels, generator=random) > 0.6
        loss = DiceBCELoss(batch_dice, ignore)
    else:
        target = torch.randint(0, count + ignore, (2, 1, *voxels), generator=random).to(torch.int16)
        loss = DiceCELoss(batch_dice, count if ignore else None)
    compare(loss, [logits], target, 1e-5 if kind == torch.float32 else 2e-3)


def check_supervised():
    outputs = [torch.randn(2, 3, 8, 12, 4), torch.randn(2, 3, 4, 6, 4), torch.randn(2, 3, 2, 3, 2)]
    labels = torch.randint(0, 3, (2, 1, 8, 12, 4)).to(torch.int16)
    compare(DeepSupervisionLoss(DiceCELoss(), [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)]), outputs, labels, 1e-5)


if __name__ == "__main__":
    one_pass.way_for = lambda *arguments: triton_way()
    assert triton_way() is not PLAIN
    for case in CASES:
        check(*case)
    check_supervised()
    sys.stdout.write(f"{len(CASES) + 1} cases agree\n")
