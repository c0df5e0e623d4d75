"""Losses, schedules, sampling and augmentation against the real nnunetv2."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2")

from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.lr_scheduler.warmup import Lin_incr_LRScheduler, PolyLRScheduler_offset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.augment import SpatialRange, plain_transforms, training_transforms
from nnssl_adapt.training.checkpointing import TrainingState
from nnssl_adapt.training.losses import build_loss, count_overlap, pseudo_dice
from nnssl_adapt.training.optimizer import build_optimizer
from nnssl_adapt.training.patches import (
    PatchSampler,
    annotated_key,
    global_random_state,
    is_forced_foreground,
)
from nnssl_adapt.training.progress import History
from nnssl_adapt.training.recipe import Recipe
from nnssl_adapt.training.schedule import learning_rate
from nnssl_adapt.training.trainer import PretrainedTrainer

PLAIN = {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}
IGNORE = {"labels": {**PLAIN["labels"], "ignore": 4}}
REGIONS = {"labels": {"background": 0, "all": [1, 2, 3], "mid": [2, 3], "c": 3}, "regions_class_order": [1, 2, 3]}
REGIONS_IGNORE = {**REGIONS, "labels": {**REGIONS["labels"], "ignore": 4}}
ALL_LABELS = [PLAIN, IGNORE, REGIONS, REGIONS_IGNORE]
NAMES = ["labels", "ignore", "regions", "regions+ignore"]
SHAPE = (6, 8, 10)


def schemes(content):
    theirs = LabelManager(content["labels"], content.get("regions_class_order"))
    return LabelScheme.from_dataset_json(content), theirs


def their_loss(labels, batch_dice):
    if labels.has_regions:
        return DC_and_BCE_loss(
            {},
            {"batch_dice": batch_dice, "do_bg": True, "smooth": 1e-5, "ddp": False},
            use_ignore_label=labels.ignore_label is not None,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
    return DC_and_CE_loss(
        {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        ignore_label=labels.ignore_label,
        dice_class=MemoryEfficientSoftDiceLoss,
    )


def batch(labels, seed=0):
    random = torch.Generator().manual_seed(seed)
    values = len(labels.all_labels) + (labels.ignore_label is not None)
    target = torch.randint(0, values, (2, 1, *SHAPE), generator=random).to(torch.int16)
    target[0, 0, :3] = 0
    if labels.has_regions:
        chain = plain_transforms(labels)
        target = torch.stack([chain(image=t.float(), segmentation=t.clone())["segmentation"] for t in target])
    return 3 * torch.randn(2, labels.num_heads, *SHAPE, generator=random), target


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("content", ALL_LABELS, ids=NAMES)
def test_loss_and_gradients(content, batch_dice):
    labels, _ = schemes(content)
    logits, target = batch(labels)
    results = []
    for loss in (build_loss(labels, batch_dice), their_loss(labels, batch_dice)):
        own = logits.clone().requires_grad_()
        value = loss(own, target.clone())
        value.backward()
        results.append((value.item(), own.grad))
    (ours, our_gradient), (theirs, their_gradient) = results
    assert ours == pytest.approx(theirs, abs=1e-5)
    scale = their_gradient.abs().max().item()
    assert (our_gradient - their_gradient).abs().max().item() < 1e-5 * scale


@pytest.mark.parametrize(("name", "clip"), [("default", 12.0), ("primus", 1.0)])
def test_steps_change_the_weights_alike(name, clip):
    labels, _ = schemes(PLAIN)
    recipe = Recipe.load(name).override(learning_rate=0.05)
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Conv3d(2, 6, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv3d(6, 4, 1))
    theirs = copy.deepcopy(ours)
    trainer = PretrainedTrainer.__new__(PretrainedTrainer)
    trainer.recipe, trainer.device, trainer.autocast_dtype = recipe, torch.device("cpu"), None
    trainer._loss = build_loss(labels, batch_dice=False)
    state = TrainingState(ours, build_optimizer(ours, recipe, trainer.device), scaler=None)
    fake = SimpleNamespace(device=trainer.device, network=theirs, grad_scaler=None, loss=their_loss(labels, False))
    if name == "default":
        fake.optimizer = torch.optim.SGD(theirs.parameters(), 0.05, weight_decay=3e-5, momentum=0.99, nesterov=True)
        step = nnUNetTrainer.train_step
    else:
        fake.optimizer = torch.optim.AdamW(theirs.parameters(), 0.05, weight_decay=5e-2, betas=(0.9, 0.98))
        step = AbstractPrimus.train_step
    assert recipe.gradient_clip == clip
    before = [p.detach().clone() for p in ours.parameters()]
    for seed in range(4):
        _, target = batch(labels, seed)
        image = 20 * torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(seed))
        value = trainer._step(state, {"image": image, "target": target})
        assert value == pytest.approx(step(fake, {"data": image, "target": target})["loss"].item(), abs=1e-5)
    for mine, other, old in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert torch.allclose(mine, other, atol=1e-5) and not torch.allclose(mine, old, atol=1e-3)


@pytest.mark.parametrize("content", ALL_LABELS, ids=NAMES)
def test_pseudo_dice(content):
    labels, their_labels = schemes(content)
    logits, target = batch(labels, seed=4)
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
    assert ours.to_dict().keys() == theirs.get_checkpoint().keys()


@pytest.mark.parametrize(("epochs", "warmup"), [(1000, 50), (150, 15), (7, 3)])
def test_learning_rates_with_warm_up(epochs, warmup):
    recipe = Recipe(epochs=epochs, warmup_epochs=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    scheduler = Lin_incr_LRScheduler(optimizer, recipe.learning_rate, warmup)
    for epoch in range(epochs):
        if epoch == warmup:
            scheduler = PolyLRScheduler_offset(optimizer, recipe.learning_rate, epochs, warmup)
        scheduler.step(epoch)
        assert learning_rate(epoch, recipe) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_learning_rates_without_warm_up():
    recipe = Recipe.load("from_scratch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    scheduler = PolyLRScheduler(optimizer, 1e-2, 1000)
    for epoch in range(1000):
        scheduler.step(epoch)
        assert learning_rate(epoch, recipe) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


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


def chains(patch, content, masks):
    labels, their_labels = schemes(content)
    rotation, dummy_2d, read_size, mirror_axes = their_spatial_range(patch)
    theirs = nnUNetTrainer.get_training_transforms(
        patch,
        rotation,
        None,
        mirror_axes,
        dummy_2d,
        use_mask_for_norm=masks,
        foreground_labels=their_labels.foreground_labels,
        regions=their_labels.foreground_regions if their_labels.has_regions else None,
        ignore_label=their_labels.ignore_label,
    )
    ours = training_transforms(patch, SpatialRange.of(patch), (0, 1, 2), masks, labels)
    return ours, theirs, tuple(int(n) for n in read_size)


TIMED_CHOICE = {"benchmark", "benchmark_use_fft", "benchmark_num_runs"}


def described(thing):
    """Type and settings of a transform, all the way down; without blur's choice of an algorithm by timing."""
    if isinstance(thing, torch.Tensor):
        return thing.tolist()
    if isinstance(thing, (list, tuple)):
        return [described(item) for item in thing]
    if hasattr(thing, "__dict__"):
        return type(thing).__name__, {k: described(v) for k, v in vars(thing).items() if k not in TIMED_CHOICE}
    return round(thing, 12) if isinstance(thing, float) else thing


@pytest.mark.parametrize("masks", [[False, False], [True, False]])
@pytest.mark.parametrize("content", ALL_LABELS, ids=NAMES)
@pytest.mark.parametrize("patch", [(16, 32, 24), (8, 32, 24)])
def test_the_augmentation_chain(patch, content, masks):
    ours, theirs, _ = chains(patch, content, masks)
    assert described(ours) == described(theirs)


@pytest.mark.parametrize("patch", [(8, 16, 12), (4, 16, 20)])
def test_augmented_samples(patch):
    ours, theirs, read_size = chains(patch, REGIONS_IGNORE, [True, False])
    for transform in theirs.transforms:
        if type(getattr(transform, "transform", None)).__name__ == "GaussianBlurTransform":
            transform.transform.benchmark = False
    random = torch.Generator().manual_seed(0)
    image = torch.randn(2, *read_size, generator=random)
    labels = torch.randint(-1, 5, (1, *read_size), generator=random).to(torch.int16)
    changed = 0
    for seed in range(30):
        results = []
        for chain in (ours, theirs):
            with global_random_state(seed, seed):
                results.append(chain(image=image.clone(), segmentation=labels.clone()))
        assert torch.equal(results[0]["image"], results[1]["image"])
        assert torch.equal(results[0]["segmentation"], results[1]["segmentation"])
        changed += results[0]["image"].std().item() != pytest.approx(image.std().item(), rel=1e-3)
    assert changed > 5


@pytest.mark.parametrize("content", ALL_LABELS, ids=NAMES)
def test_the_chain_of_validation(content):
    labels, their_labels = schemes(content)
    theirs = nnUNetTrainer.get_validation_transforms(
        None,
        regions=their_labels.foreground_regions if their_labels.has_regions else None,
        ignore_label=their_labels.ignore_label,
    )
    assert described(plain_transforms(labels)) == described(theirs)
