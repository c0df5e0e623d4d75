"""The augmentation chain on asymmetric patches, on the CPU and as it is on a device."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.batches import spatial as spatial_module
from nnssl_adapt.training.batches.augment import (
    Augmentation,
    SpatialRange,
    Target,
    plain_transforms,
    training_transforms,
)
from nnssl_adapt.training.batches.augment_gpu import DeviceAugmentation, device_transforms
from nnssl_adapt.training.batches.intensity import Noise
from nnssl_adapt.training.batches.patches import Place

PLAIN = LabelScheme.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}})
MANY = LabelScheme.from_dataset_json({"labels": {"background": 0, **{f"l{v}": v for v in range(1, 300)}}})
REGIONS = LabelScheme.from_dataset_json(
    {"labels": {"background": 0, "all": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
)
SHAPE = (20, 33, 41)


class Case:
    """What is asked of a stored case."""

    def __init__(self, channels=2, highest=2):
        random = np.random.RandomState(0)
        self.data = random.randn(channels, *SHAPE).astype(np.float32)
        coarse = random.randint(-1, highest + 1, [n // 3 + 1 for n in SHAPE])
        repeated = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)
        self.seg = repeated[tuple(slice(n) for n in SHAPE)][None].astype(np.int16)


def places(patch, seeds, case=None, corner=(-1, 2, 3)):
    spatial = SpatialRange.of(patch)
    return [Place(case or Case(), corner, spatial.read_size, patch, seed) for seed in seeds]


def test_slices_far_apart_are_turned_one_by_one():
    thin, thick = SpatialRange.of((8, 32, 24)), SpatialRange.of((8, 24, 20))
    assert thin.slice_by_slice and thin.rotation == math.pi and thin.read_size[0] == 8
    assert not thick.slice_by_slice and thick.rotation == pytest.approx(math.radians(30))
    assert all(read > patch for read, patch in zip(thick.read_size, (8, 24, 20), strict=True))


@pytest.mark.parametrize("labels", [PLAIN, MANY, REGIONS], ids=["labels", "many", "regions"])
@pytest.mark.parametrize("patch", [(8, 12, 16), (4, 24, 20)])
def test_the_chain_returns_finished_patches(patch, labels):
    spatial = SpatialRange.of(patch)
    chain = training_transforms(patch, spatial, (0, 1, 2), (False, False), labels)
    out = chain(places(patch, range(12), Case(highest=max(labels.all_labels))))
    assert out["image"].shape == (12, 2, *patch) and torch.isfinite(out["image"]).all()
    if labels is REGIONS:
        assert out["target"].shape == (12, 3, *patch) and out["target"].dtype == torch.bool
    else:
        assert out["target"].shape == (12, 1, *patch) and out["target"].dtype == torch.int16
        assert out["target"].min() == 0 and out["target"].max() == (2 if labels is PLAIN else out["target"].max())


def test_without_augmentation_it_is_the_patch():
    patch, case = (8, 12, 16), Case()
    (place,) = places(patch, [0], case, (2, 3, 4))
    out = plain_transforms(PLAIN)([place])
    where = tuple(slice(a, b) for a, b in zip(place.patch_box.start, place.patch_box.stop, strict=True))
    assert np.array_equal(out["image"][0].numpy(), case.data[(slice(None), *where)])
    assert np.array_equal(out["target"][0, 0].numpy(), np.maximum(case.seg[0][where], 0))


def test_masked_channels_are_zero_outside_and_others_not():
    patch, case = (8, 12, 16), Case()
    case.seg[:, :, :, 20:] = -1
    chain = training_transforms(patch, SpatialRange.of(patch), (), (False, True), PLAIN)
    image = chain(places(patch, range(20), case))["image"]
    assert (image[:, 1] == 0).float().mean() > 0.1 > (image[:, 0] == 0).float().mean()


def test_regions_and_the_ignore_label_become_channels():
    codes = torch.tensor([-1, 0, 1, 2, 3], dtype=torch.uint8).add(1).view(1, 1, 5)
    target = torch.empty((3, 1, 1, 5), dtype=torch.bool)
    Target(REGIONS).write(target, codes)
    assert target[:, 0, 0].int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_a_sample_follows_from_its_seed_and_leaves_the_global_generators_alone():
    patch = (8, 12, 16)
    chain = training_transforms(patch, SpatialRange.of(patch), (0, 1, 2), (False, False), PLAIN)
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.uniform()
    torch.manual_seed(3)
    np.random.seed(3)
    whole = chain(places(patch, range(10)))
    assert (torch.rand(1), np.random.uniform()) == expected
    one = chain(places(patch, [7]))
    assert torch.equal(whole["image"][7], one["image"][0]) and torch.equal(whole["target"][7], one["target"][0])
    assert not torch.equal(whole["image"][6], whole["image"][7])


def test_how_often_patches_are_turned_scaled_and_mirrored():
    augmentation = Augmentation(SpatialRange.of((16, 16, 16)), (0, 2))
    samples = [augmentation.draw(seed, 1) for seed in range(8000)]
    matrices = [drawn.matrix for drawn in samples if drawn.matrix is not None]
    assert len(matrices) / len(samples) == pytest.approx(0.36, abs=0.02)
    scales = np.array([np.cbrt(np.linalg.det(matrix)) for matrix in matrices])
    scaled = scales[np.abs(scales - 1) > 1e-9]
    assert len(scaled) / len(samples) == pytest.approx(0.2, abs=0.02)
    assert scaled.mean() == pytest.approx(1.05, abs=0.02) and 0.7 <= scaled.min() < 0.71 < 1.39 < scaled.max() <= 1.4
    turns = [matrix / scale for matrix, scale in zip(matrices, scales, strict=True)]
    turned = [turn for turn in turns if not np.allclose(turn, np.eye(3))]
    assert len(turned) / len(samples) == pytest.approx(0.2, abs=0.02)
    angles = np.array([math.asin(-turn[2, 0]) for turn in turned])  # about the second axis
    assert angles.std() == pytest.approx(math.radians(60) / math.sqrt(12), rel=0.05) and abs(angles.mean()) < 0.03
    assert np.mean([0 in drawn.mirrored for drawn in samples]) == pytest.approx(0.5, abs=0.03)
    assert not any(1 in drawn.mirrored for drawn in samples)


@pytest.mark.parametrize("labels", [PLAIN, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("patch", [(8, 12, 16), (4, 24, 20)])
def test_the_device_makes_what_the_cpu_makes(patch, labels):
    spatial, masks = SpatialRange.of(patch), (True, False)
    expected = training_transforms(patch, spatial, (0, 1, 2), masks, labels)(places(patch, range(40)))
    batch = device_transforms(spatial, (0, 1, 2), labels)(places(patch, range(40)))
    assert any(work.matrix is not None for work in batch["work"]) and any(work.matrix is None for work in batch["work"])
    augmentation = DeviceAugmentation(labels, masks)
    for _ in range(2):  # the batch is left as it was
        image, target = augmentation(batch, "cpu")
        assert torch.equal(image, expected["image"]) and torch.equal(target, expected["target"])


@pytest.mark.parametrize("labels", [PLAIN, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("patch", [(8, 12, 16), (4, 24, 20)])
def test_labels_decided_everywhere_are_those_decided_where_corners_disagree(patch, labels, monkeypatch):
    """The way of a GPU, which waits for nothing, on the CPU; in pieces that end within the patch."""
    spatial = SpatialRange.of(patch)
    batch = device_transforms(spatial, (0, 1, 2), labels)(places(patch, range(40)))
    augmentation = DeviceAugmentation(labels, (True, False))
    _, expected = augmentation(batch, "cpu")
    monkeypatch.setattr(spatial_module, "_decides_everywhere", lambda device: True)
    monkeypatch.setattr(spatial_module, "_EVERYWHERE_VOXELS", 77)
    monkeypatch.setattr(spatial_module, "_positions", None)  # is not asked
    _, found = augmentation(batch, "cpu")
    assert torch.equal(found, expected)


def test_a_batch_is_one_tensor_of_each_kind():
    """Each is pinned and sent once, whatever was read of each sample."""
    batch = device_transforms(SpatialRange.of((8, 12, 16)), (0, 1, 2), PLAIN)(places((8, 12, 16), range(20)))
    voxels = sum(math.prod(work.read_size) for work in batch["work"])
    assert len({work.read_size for work in batch["work"]}) > 1
    assert batch["image"].shape == (2 * voxels,) and batch["target"].shape == (voxels,)


@pytest.mark.cuda
def test_the_gpu_makes_what_the_cpu_makes(cuda_device):
    patch = (8, 12, 16)
    spatial, masks = SpatialRange.of(patch), (True, False)
    expected = training_transforms(patch, spatial, (0, 1, 2), masks, PLAIN)(places(patch, range(60)))
    batch = device_transforms(spatial, (0, 1, 2), PLAIN)(places(patch, range(60)))
    image, target = DeviceAugmentation(PLAIN, masks)(batch, cuda_device)
    again, _ = DeviceAugmentation(PLAIN, masks)(batch, cuda_device)
    assert torch.equal(image, again)
    quiet = [i for i, work in enumerate(batch["work"]) if not any(isinstance(s, Noise) for s in work.drawn.steps)]
    assert torch.allclose(image.cpu()[quiet], expected["image"][quiet], atol=1e-3)
    assert (target.cpu() != expected["target"]).float().mean() < 1e-3


def test_the_previous_stage_is_the_same_on_the_device():
    """Turned, mirrored and augmented with the patch: the channels of a cascade's first network."""
    patch, stage = (8, 12, 16), (1, 2)
    case, spatial = Case(), SpatialRange.of((8, 12, 16))
    previous = np.roll(np.maximum(case.seg[0], 0), 3, axis=2).astype(np.uint8)
    samples = [replace(place, previous=previous) for place in places(patch, range(24), case)]
    cpu = training_transforms(patch, spatial, (0, 1, 2), (False, False), PLAIN, stage)(samples)
    batch = device_transforms(spatial, (0, 1, 2), PLAIN, stage)(samples)
    image, target = DeviceAugmentation(PLAIN, (False, False), stage)(batch, "cpu")
    assert torch.equal(image[:, 2:], cpu["image"][:, 2:]) and torch.equal(target, cpu["target"])
    drawn = [work.drawn for work in batch["work"]]
    assert any(each.stage.operations for each in drawn) and any(each.stage.removals for each in drawn)
    assert any(each.matrix is not None for each in drawn) and set(image[:, 2:].unique().tolist()) == {0.0, 1.0}
