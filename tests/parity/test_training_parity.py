"""Losses, steps, pseudo-Dice and where patches lie, against the real nnunetv2."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny_plans import CNN

pytest.importorskip("nnunetv2")

from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.batches.augment import SpatialRange
from nnssl_adapt.training.batches.patches import PatchSampler, annotated_key, is_forced_foreground
from nnssl_adapt.training.loop import TrainingLoop
from nnssl_adapt.training.optimise.losses import build_loss, count_overlap, pseudo_dice, steps_of_outputs, thinned
from nnssl_adapt.training.optimise.network_options import to_device
from nnssl_adapt.training.optimise.optimizer import build_optimizer
from nnssl_adapt.training.progress.history import History
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import TrainingState
from nnssl_adapt.weights.network.architectures import Architecture, build_network

PLAIN = {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}
IGNORE = {"labels": {**PLAIN["labels"], "ignore": 4}}
REGIONS = {"labels": {"background": 0, "all": [1, 2, 3], "mid": [2, 3], "c": 3}, "regions_class_order": [1, 2, 3]}
REGIONS_IGNORE = {**REGIONS, "labels": {**REGIONS["labels"], "ignore": 4}}
ALL_LABELS = [PLAIN, IGNORE, REGIONS, REGIONS_IGNORE]
NAMES = ["labels", "ignore", "regions", "regions+ignore"]
CPU = torch.device("cpu")

STRIDES = [(1, 1, 1), (1, 2, 2), (2, 3, 2), (2, 1, 2)]
SHAPE = (4, 12, 16)
DEEP = Architecture(
    "ResidualEncoderUNet",
    {
        **CNN.kwargs,
        "n_stages": 4,
        "features_per_stage": [4, 6, 8, 10],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [list(stride) for stride in STRIDES],
        "n_blocks_per_stage": [1, 1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1, 1],
    },
)


def schemes(content):
    theirs = LabelManager(content["labels"], content.get("regions_class_order"))
    return LabelScheme.from_dataset_json(content), theirs


def their_trainer(content, batch_dice, deep_supervision=False, **more):
    """What nnUNetTrainer's own methods look at."""
    _, labels = schemes(content)
    plan = SimpleNamespace(batch_dice=batch_dice, pool_op_kernel_sizes=STRIDES)
    trainer = SimpleNamespace(
        label_manager=labels,
        configuration_manager=plan,
        is_ddp=False,
        enable_deep_supervision=deep_supervision,
        _do_i_compile=lambda: False,
        device=CPU,
        grad_scaler=None,
        **more,
    )
    trainer._get_deep_supervision_scales = lambda: nnUNetTrainer._get_deep_supervision_scales(trainer)
    trainer.loss = nnUNetTrainer._build_loss(trainer)
    return trainer


def their_targets(trainer, target):
    """A list of targets, finest first, as nnU-Net's data loaders make them of one sample each."""
    scales = trainer._get_deep_supervision_scales()
    if scales is None:
        return target
    each = [DownsampleSegForDSTransform(scales)(segmentation=sample)["segmentation"] for sample in target]
    return [torch.stack(level) for level in zip(*each, strict=True)]


def batch(content, seed=0, shape=SHAPE):
    """Labels, or regions, (2, 1 or R, Z, Y, X), and logits of the right number of channels."""
    labels, their_labels = schemes(content)
    random = torch.Generator().manual_seed(seed)
    values = len(labels.all_labels) + (labels.ignore_label is not None)
    target = torch.randint(0, values, (2, 1, *shape), generator=random).to(torch.int16)
    target[0, 0, : shape[0] // 2] = 0
    if labels.has_regions:
        ignored = [labels.ignore_label] if labels.ignore_label is not None else []
        convert = ConvertSegmentationToRegionsTransform([*their_labels.foreground_regions, *ignored])
        target = torch.stack([convert(segmentation=sample)["segmentation"] for sample in target])
    return 3 * torch.randn(2, labels.num_heads, *shape, generator=random), target


# -- loss and gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("content", ALL_LABELS, ids=NAMES)
def test_loss_and_its_gradient(content, batch_dice):
    labels, _ = schemes(content)
    logits, target = batch(content)
    results = []
    for loss in (build_loss(labels, batch_dice), their_trainer(content, batch_dice).loss):
        own = logits.clone().requires_grad_()
        value = loss(own, target.clone())
        value.backward()
        results.append((value.item(), own.grad))
    (ours, our_gradient), (theirs, their_gradient) = results
    assert ours == pytest.approx(theirs, abs=1e-5)
    scale = their_gradient.abs().max().item()
    assert (our_gradient - their_gradient).abs().max().item() < 1e-5 * scale


def their_network(labels, deep_supervision):
    keys = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    return get_network_from_plans(name, DEEP.kwargs, keys, 2, labels.num_heads, deep_supervision=deep_supervision)


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("content", ALL_LABELS, ids=NAMES)
def test_gradients_of_all_weights(content, batch_dice, deep_supervision):
    """The same weights, batch and seed through both: network, targets, loss and backward pass."""
    labels, _ = schemes(content)
    recipe = Recipe(deep_supervision=deep_supervision)
    torch.manual_seed(1)
    theirs = their_network(labels, deep_supervision)
    ours = to_device(build_network(DEEP, 2, labels.num_heads, SHAPE), recipe, CPU)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(2))
    _, target = batch(content)

    value = build_loss(labels, batch_dice, STRIDES if deep_supervision else None)(ours(image), target)
    value.backward()
    trainer = their_trainer(content, batch_dice, deep_supervision)
    expected = trainer.loss(theirs(image), their_targets(trainer, target))
    expected.backward()

    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    expected_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    scale = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    assert scale > 1e-3
    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert got.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (got[name] - gradient).abs().max().item() < 1e-5 * scale, name


SCALES = [(1, 1, 1), (1, 2, 2), (2, 2, 3), (3, 3, 1), (4, 6, 5), (7, 4, 8)]


@pytest.mark.parametrize("content", [IGNORE, REGIONS_IGNORE], ids=["labels", "regions"])
@pytest.mark.parametrize("shape", [(12, 24, 40), (84, 12, 120), (28, 12, 15), (10, 25, 13), (7, 9, 11)])
def test_coarser_targets(content, shape):
    """Even and odd factors, of sizes that divide and of sizes that don't."""
    _, target = batch(content, shape=shape)
    theirs = DownsampleSegForDSTransform([[1 / every for every in step] for step in SCALES])
    for step, expected in zip(SCALES, theirs(segmentation=target[1])["segmentation"], strict=True):
        thin = thinned(target, step)
        assert thin.dtype == target.dtype and thin[1].shape == expected.shape and torch.equal(thin[1], expected), step


@pytest.mark.parametrize("strides", [STRIDES, [(1, 1, 1), (3, 3, 3), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)]])
def test_factors_and_weights_of_the_outputs(strides):
    trainer = their_trainer(PLAIN, False)
    trainer.enable_deep_supervision, trainer.configuration_manager.pool_op_kernel_sizes = True, strides
    scales = trainer._get_deep_supervision_scales()
    assert [[1 / every for every in step] for step in steps_of_outputs(strides)] == scales
    ours = build_loss(schemes(PLAIN)[0], False, strides)
    assert ours.weights == pytest.approx(nnUNetTrainer._build_loss(trainer).weight_factors)


@pytest.mark.parametrize(
    ("name", "clip", "deep_supervision"), [("default", 12.0, False), ("default", 12.0, True), ("primus", 1.0, False)]
)
def test_steps_change_the_weights_alike(name, clip, deep_supervision):
    labels, _ = schemes(PLAIN)
    recipe = Recipe.load(name).override(learning_rate=0.05, precision="fp32", deep_supervision=deep_supervision)
    assert recipe.gradient_clip == clip
    torch.manual_seed(0)
    ours = to_device(build_network(DEEP, 2, labels.num_heads, SHAPE), recipe, CPU)
    theirs = copy.deepcopy(ours)
    loss = build_loss(labels, False, STRIDES if deep_supervision else None)
    loop = TrainingLoop(recipe, loss, labels, batch_size=2, device=CPU)
    state = TrainingState(ours, build_optimizer(ours, recipe, CPU), scaler=None)
    trainer = their_trainer(PLAIN, False, deep_supervision, network=theirs)
    if name == "default":
        trainer.optimizer = torch.optim.SGD(theirs.parameters(), 0.05, weight_decay=3e-5, momentum=0.99, nesterov=True)
        step = nnUNetTrainer.train_step
    else:
        trainer.optimizer = torch.optim.AdamW(theirs.parameters(), 0.05, weight_decay=5e-2, betas=(0.9, 0.98))
        step = AbstractPrimus.train_step
    before = [p.detach().clone() for p in ours.parameters()]
    for group in state.optimizer.param_groups:
        group["lr"] = 0.05
    for seed in range(3):
        _, target = batch(PLAIN, seed)
        image = 20 * torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(seed))
        value = loop.step(state, [{"image": image, "target": target}], ours)
        theirs_batch = {"data": image, "target": their_targets(trainer, target)}
        assert value == pytest.approx(step(trainer, theirs_batch)["loss"].item(), abs=1e-5)
    moved = 0
    for mine, other, old in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert torch.allclose(mine, other, atol=1e-4 if name == "primus" else 1e-5)
        moved += not torch.allclose(mine, old, atol=1e-3)
    assert moved > 10


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ALL_LABELS, ids=NAMES)
def test_pseudo_dice(content):
    labels, their_labels = schemes(content)
    logits, target = batch(content, seed=4)
    fake = SimpleNamespace(
        device=torch.device("cpu"),
        network=lambda image: logits,
        loss=lambda output, target: torch.zeros(()),
        enable_deep_supervision=False,
        label_manager=their_labels,
    )
    theirs = nnUNetTrainer.validation_step(fake, {"data": torch.zeros(1), "target": target.clone()})
    ours = count_overlap(logits, target, labels)
    for row, name in zip(ours, ("tp_hard", "fp_hard", "fn_hard"), strict=True):
        assert np.array_equal(row.numpy(), theirs[name])
    tp, fp, fn = (theirs[name] for name in ("tp_hard", "fp_hard", "fn_hard"))
    assert pseudo_dice(ours) == pytest.approx((2 * tp / (2 * tp + fp + fn)).tolist())


def test_smoothed_pseudo_dice(tmp_path):
    theirs, ours = MetaLogger(tmp_path, False), History()
    for epoch, dice in enumerate([0.1, 0.5, 0.4, 0.9]):
        theirs.log("mean_fg_dice", dice, epoch)
        ours.add(1.0, 1.0, [dice - 0.1, dice + 0.1, math.nan], 0.1, 0.0, 1.0)
    assert ours.ema_fg_dice == pytest.approx(theirs.get_value("ema_fg_dice", None))
    assert ours.to_dict().keys() == theirs.get_checkpoint().keys()  # nnU-Net goes on from our checkpoints


# -- sampling ------------------------------------------------------------------------------------------------------------


def locations_of(labels, shape, random):
    classes = list(labels.sampled_classes)
    counts = random.randint(0, 4, len(classes))
    return {
        key: np.stack([np.zeros(n, int), *(random.randint(0, s, n) for s in shape)], axis=1)
        for key, n in zip(classes, counts, strict=True)
    }


@pytest.mark.parametrize("content", ALL_LABELS, ids=NAMES)
@pytest.mark.filterwarnings("ignore:Warning! No annotated pixels")
def test_where_patches_lie(content):
    labels, their_labels = schemes(content)
    setup = np.random.RandomState(0)
    for seed in range(300):
        shape = setup.randint(5, 40, 3)
        patch = tuple(int(n) for n in setup.randint(4, 24, 3))
        read = tuple(p + int(extra) for p, extra in zip(patch, setup.randint(0, 9, 3), strict=True))
        locations = locations_of(labels, shape, setup)
        theirs = nnUNetDataLoader(SimpleNamespace(identifiers=["x"]), 2, read, patch, their_labels, 0.33)
        ours = PatchSampler(read, patch, annotated_key(labels))
        for forced in (False, True):
            np.random.seed(seed)
            expected, _ = theirs.get_bbox(shape, forced, locations)
            got = ours.lower_corner(shape, forced, lambda found=locations: found, np.random.RandomState(seed))
            assert list(got) == [int(n) for n in expected]


def test_which_samples_are_forced():
    _, their_labels = schemes(PLAIN)
    for size in range(1, 12):
        for fraction in (0.0, 0.2, 0.33, 0.5, 0.75, 1.0):
            loader = nnUNetDataLoader(
                SimpleNamespace(identifiers=["x"]),
                size,
                SHAPE,
                SHAPE,
                their_labels,
                oversample_foreground_percent=fraction,
            )
            for sample in range(size):
                assert is_forced_foreground(sample, size, fraction) == loader.get_do_oversample(sample)


PATCHES = [(160, 160, 160), (16, 32, 24), (8, 32, 24), (20, 320, 256), (64, 192, 320), (48, 16, 40), (7, 21, 20)]


def their_spatial_range(patch):
    fake = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=patch), print_to_log_file=lambda *words: None
    )
    return nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(fake)


@pytest.mark.parametrize("patch", PATCHES)
def test_rotation_and_size_to_read(patch):
    rotation, dummy_2d, read_size, mirror_axes = their_spatial_range(patch)
    ours = SpatialRange.of(patch)
    assert (-ours.rotation, ours.rotation) == pytest.approx(rotation)
    assert ours.slice_by_slice == dummy_2d
    assert list(ours.read_size) == list(read_size)
    assert Recipe().mirror_axes == mirror_axes
