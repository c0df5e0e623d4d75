"""A cascade's segmentation channels: their augmentation, and a step of training, by nnU-Net's own classes on the same draws."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny_plans import CNN

pytest.importorskip("nnunetv2")

from batchgeneratorsv2.transforms.nnunet import random_binary_operator as theirs
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from skimage.morphology import ball as their_ball

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.batches.augment import plain_transforms
from nnssl_adapt.training.batches.patches import Place
from nnssl_adapt.training.batches.previous_stage import OPERATORS, StageSteps, ball, write_one_hot
from nnssl_adapt.training.optimise.losses import build_loss
from nnssl_adapt.training.optimise.network_options import set_deep_supervision
from nnssl_adapt.weights.network.architectures import build_network

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


PLAIN = {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}
REGIONS = {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}, "regions_class_order": [1, 2, 3]}


def sample(seed, shape):
    """An image (2, Z, Y, X), labels (Z, Y, X) with voxels outside (-1), and the previous stage's labels."""
    random = np.random.default_rng(seed)
    image = random.normal(size=(2, *shape)).astype(np.float32)
    labels = random.integers(-1, 4, shape).astype(np.int16)
    return image, labels, np.where(random.random(shape) < 0.8, np.maximum(labels, 0), 1).astype(np.int16)


def place_of(image, labels, previous):
    case = SimpleNamespace(data=image, seg=labels[None], identifier="x")
    return Place(case, (0, 0, 0), image.shape[1:], image.shape[1:], 0, previous)


@pytest.mark.parametrize("content", [PLAIN, REGIONS], ids=["labels", "regions"])
def test_loss_and_gradients_of_a_cascade(content):
    """One step by nnU-Net's validation transforms, network and loss, with the weights that a cascade starts with here."""
    scheme = LabelScheme.from_dataset_json(content)
    manager = LabelManager(content["labels"], content.get("regions_class_order"))
    shape, stage = (8, 16, 24), scheme.foreground_labels
    assert list(stage) == list(manager.foreground_labels)
    torch.manual_seed(1)
    ours = build_network(CNN, 2 + len(stage), scheme.num_heads, shape)
    with torch.no_grad():
        ours.encoder.stem.convs[0].conv.weight[:, 2:] = 0  # silent
    keys = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    theirs = get_network_from_plans(name, CNN.kwargs, keys, 2 + len(stage), manager.num_segmentation_heads, True, True)
    set_deep_supervision(ours, True)
    theirs.load_state_dict(ours.state_dict())

    samples = [sample(seed, shape) for seed in (0, 1)]
    plain = plain_transforms(scheme, stage)([place_of(*each) for each in samples])
    strides = [tuple(stride) for stride in CNN.kwargs["strides"]]
    trainer = SimpleNamespace(
        label_manager=manager, configuration_manager=SimpleNamespace(batch_dice=False, pool_op_kernel_sizes=strides),
        is_ddp=False, enable_deep_supervision=True, _do_i_compile=lambda: False,
    )  # fmt: skip
    trainer._get_deep_supervision_scales = lambda: nnUNetTrainer._get_deep_supervision_scales(trainer)
    transforms = nnUNetTrainer.get_validation_transforms(
        trainer._get_deep_supervision_scales(), True, manager.foreground_labels,
        manager.foreground_regions if manager.has_regions else None,
    )  # fmt: skip
    both = [
        transforms(image=torch.from_numpy(image), segmentation=torch.from_numpy(np.stack([seg, previous])))
        for image, seg, previous in samples
    ]
    image = torch.stack([each["image"] for each in both])
    target = [torch.stack(level) for level in zip(*(each["segmentation"] for each in both), strict=True)]
    assert torch.equal(plain["image"], image) and torch.equal(plain["target"].float(), target[0].float())

    value = build_loss(scheme, False, strides)(ours(plain["image"]), plain["target"])
    value.backward()
    expected = nnUNetTrainer._build_loss(trainer)(theirs(image), target)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    scale = max(gradient.abs().max().item() for gradient in wanted.values())
    assert got.keys() == wanted.keys() and scale > 1e-3
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max().item() < 1e-5 * scale, name
    stem = got["encoder.stem.convs.0.conv.weight"][:, 2:]
    assert stem.abs().amax((0, 2, 3, 4)).min() > 0, "silent channels learn from the first step on"
