"""The augmentation chain on asymmetric patches; parity with nnU-Net's is tests/parity's."""

import math

import numpy as np
import pytest
import torch

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training.augment import SpatialRange, plain_transforms, training_transforms
from nnssl_adapt.training.patches import global_random_state

PLAIN = LabelScheme.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}})
REGIONS = LabelScheme.from_dataset_json(
    {"labels": {"background": 0, "all": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
)


def sample(shape, channels=2):
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 3, (1, *shape), generator=random).to(torch.int16)
    return {"image": torch.randn(channels, *shape, generator=random), "segmentation": labels}


def test_slices_far_apart_are_turned_one_by_one():
    thin, thick = SpatialRange.of((8, 32, 24)), SpatialRange.of((8, 24, 20))
    assert thin.slice_by_slice and thin.rotation == math.pi and thin.read_size[0] == 8
    assert not thick.slice_by_slice and thick.rotation == pytest.approx(math.radians(30))
    assert all(read > patch for read, patch in zip(thick.read_size, (8, 24, 20), strict=True))


@pytest.mark.parametrize("patch", [(8, 12, 16), (4, 24, 20)])
def test_the_chain_returns_the_patch_without_outside(patch):
    spatial = SpatialRange.of(patch)
    chain = training_transforms(patch, spatial, (0, 1, 2), (False, False), PLAIN)
    for seed in range(8):
        with global_random_state(seed, seed):
            out = chain(**sample(spatial.read_size))
        assert out["image"].shape == (2, *patch) and out["segmentation"].shape == (1, *patch)
        assert out["segmentation"].min() >= 0 and torch.isfinite(out["image"]).all()


def test_masked_channels_are_zero_outside_and_others_not():
    patch = (8, 12, 16)
    spatial = SpatialRange.of(patch)
    chain = training_transforms(patch, spatial, (), (False, True), PLAIN)
    data = sample(spatial.read_size)
    data["segmentation"][:] = -1
    with global_random_state(3, 3):
        out = chain(**data)["image"]
    assert (out[1] == 0).all() and (out[0] != 0).any()


def test_mirroring_keeps_to_its_axes():
    patch = (4, 6, 8)
    spatial = SpatialRange.of(patch)
    chain = training_transforms(patch, spatial, (2,), (False,), PLAIN)
    mirror = next(t for t in chain.transforms if type(t).__name__ == "MirrorTransform")
    assert mirror.allowed_axes == (2,)
    none = training_transforms(patch, spatial, (), (False,), PLAIN)
    assert not any(type(t).__name__ == "MirrorTransform" for t in none.transforms)


def test_regions_and_the_ignore_label_become_channels():
    labels = torch.tensor([-1, 0, 1, 2, 3], dtype=torch.int16).view(1, 1, 1, 5)
    target = plain_transforms(REGIONS)(image=torch.zeros(1, 1, 1, 5), segmentation=labels)["segmentation"]
    assert target.dtype == torch.bool
    assert target[:, 0, 0].int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_the_same_state_gives_the_same_sample():
    patch = (8, 12, 16)
    spatial = SpatialRange.of(patch)
    chain = training_transforms(patch, spatial, (0, 1, 2), (False, False), PLAIN)
    np.random.seed(0)
    results = []
    for _ in range(2):
        with global_random_state(11, 12):
            results.append(chain(**sample(spatial.read_size)))
    assert torch.equal(results[0]["image"], results[1]["image"])
    assert torch.equal(results[0]["segmentation"], results[1]["segmentation"])
