"""The augmentation of a cascade's segmentation channels, by nnU-Net's own classes on the same draws."""

import numpy as np
import pytest
import torch

pytest.importorskip("batchgeneratorsv2")

from batchgeneratorsv2.transforms.nnunet import random_binary_operator as theirs
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from skimage.morphology import ball as their_ball

from nnssl_adapt.training.batches.previous_stage import OPERATORS, StageSteps, ball, write_one_hot

SHAPE = (14, 18, 23)
THEIR_OPERATORS = {
    "dilation": theirs.binary_dilation_torch,
    "erosion": theirs.binary_erosion_torch,
    "closing": theirs.binary_closing_torch,
    "opening": theirs.binary_opening_torch,
}


def labels(seed=0):
    """Blobs of two labels (Z, Y, X), some of them at the border."""
    random = np.random.default_rng(seed)
    found = np.zeros(SHAPE, dtype=np.int16)
    for label in (1, 3, 1, 3, 1):
        corner = [int(random.integers(-2, n - 3)) for n in SHAPE]
        found[tuple(slice(max(0, c), c + int(random.integers(3, 7))) for c in corner)] = label
    return torch.from_numpy(found)


def channels(seed=0):
    found = torch.empty((2, *SHAPE))
    write_one_hot(found, labels(seed) + 1, (1, 3))
    return found


def test_one_hot_channels():
    image = torch.randn(1, *SHAPE)
    both = {"image": image, "segmentation": torch.stack([torch.zeros(SHAPE, dtype=torch.int16), labels()])}
    expected = MoveSegAsOneHotToDataTransform(1, (1, 3))(**both)["image"]
    assert torch.equal(torch.cat([image, channels()]), expected)


@pytest.mark.parametrize("radius", [1.0, 1.3, 2.5, 3.1, 3.7, 6.1, 7.99])
def test_structuring_elements(radius):
    assert np.array_equal(ball(radius).numpy(), their_ball(radius, dtype=bool))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("radius", [1.0, 1.3, 2.7, 4.6])
def test_binary_operations(operator, radius):
    transform = theirs.ApplyRandomBinaryOperatorTransform(channel_idx=[-2, -1])
    parameters = {
        "apply_to_channels": [-1, -2],
        "operators": [THEIR_OPERATORS[operator]] * 2,
        "strel_size": [radius, radius + 0.4],
    }
    expected = transform._apply_to_image(channels(1), **parameters)
    ours = channels(1)
    StageSteps(operations=((1, operator, radius), (0, operator, radius + 0.4))).apply(ours)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, channels(1)) or operator == "closing"


def test_components_are_left_out(monkeypatch):
    transform = RemoveRandomConnectedComponentFromOneHotEncodingTransform([-2, -1], 0, 0.15)
    several = 0
    for seed in range(4):
        for which in (0.0, 0.4, 0.99):
            monkeypatch.setattr(np.random, "choice", lambda found, which=which: found[int(which * len(found))])
            expected = transform._apply_to_image(channels(seed), apply_to_channels=[-1, -2])
            ours = channels(seed)
            StageSteps(removals=((1, which), (0, which))).apply(ours)
            assert torch.equal(ours, expected)
            several += int(not torch.equal(ours, channels(seed)))
    assert several > 6


def test_large_components_stay():
    whole = torch.ones((1, *SHAPE))
    StageSteps(removals=((0, 0.5),)).apply(whole)
    assert whole.all()


def test_probabilities_are_nnunets():
    drawn = [StageSteps.draw(seed, 3) for seed in range(4000)]
    changed = [steps for steps in drawn if steps.operations]
    # 0.4 that anything is changed at all, and then each of three labels with 0.5
    assert len(changed) / len(drawn) == pytest.approx(0.4 * (1 - 0.5**3), abs=0.03)
    assert sum(bool(steps.removals) for steps in drawn) / len(drawn) == pytest.approx(0.2 * (1 - 0.5**3), abs=0.03)
    operations = [operation for steps in changed for operation in steps.operations]
    assert len(operations) / len(drawn) == pytest.approx(0.4 * 1.5, abs=0.05)
    radii = [radius for _, _, radius in operations]
    assert 1 <= min(radii) < 1.1 and 7.9 < max(radii) <= 8
    assert {name for _, name, _ in operations} == set(OPERATORS)
    assert {channel for channel, _, _ in operations} == {0, 1, 2}
    assert StageSteps.draw(5, 3) == StageSteps.draw(5, 3)
