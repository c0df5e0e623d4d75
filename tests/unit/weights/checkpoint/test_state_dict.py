"""Folds of one trained model averaged."""

from pathlib import Path

import pytest
import torch
from support.nnssl_files import state_dict

from nnssl_adapt.errors import CheckpointError
from nnssl_adapt.weights.checkpoint.state_dict import average_folds

PATHS = (Path("fold_0/a.pth"), Path("fold_1/a.pth"), Path("fold_2/a.pth"))


def folds(dtype=torch.float32):
    return [
        (
            path,
            {name: tensor.to(dtype) for name, tensor in state_dict(seed=seed).items()}
            | {"bn.count": torch.tensor(seed)},
        )
        for seed, path in enumerate(PATHS)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_numbers_are_averaged_and_counters_taken_from_the_first(dtype):
    given = folds(dtype)
    averaged = average_folds(given)
    assert list(averaged) == list(given[0][1])
    assert averaged["bn.count"] == 0
    for name, tensor in averaged.items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            expected = sum(tensors[name].double() for _, tensors in given) / 3
            assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_folds_are_not_changed_and_aliases_stay_one_tensor():
    given = [(path, state_dict(seed=seed)) for seed, path in enumerate(PATHS)]
    before = [{name: tensor.clone() for name, tensor in tensors.items()} for _, tensors in given]
    averaged = average_folds(given)
    assert all(torch.equal(tensors[n], b[n]) for (_, tensors), b in zip(given, before, strict=True) for n in b)
    assert averaged["encoder.stem.convs.0.conv.weight"] is averaged["encoder.stem.convs.0.all_modules.0.weight"]


def test_untrained_aliases_of_one_fold_only_are_kept_apart():
    given = [(path, dict(state_dict(seed=seed))) for seed, path in enumerate(PATHS)]
    given[2][1]["encoder.stem.convs.0.norm.weight"] = torch.ones(4)
    averaged = average_folds(given)
    assert not torch.equal(
        averaged["encoder.stem.convs.0.norm.weight"], averaged["encoder.stem.convs.0.all_modules.1.weight"]
    )


def test_other_names_or_shapes_are_errors_that_say_where():
    given = folds()
    del given[1][1]["bn.count"]
    with pytest.raises(CheckpointError, match=r"fold_0/a.pth has 'bn.count', fold_1/a.pth has not.*--fold"):
        average_folds(given)
    given = folds()
    given[2][1]["encoder.stem.convs.0.conv.bias"] = torch.zeros(9)
    with pytest.raises(CheckpointError, match=r"'encoder.stem.convs.0.conv.bias' is \[4\] in fold_0.*\[9\] in fold_2"):
        average_folds(given)
