"""What runs on a GPU, run on one that is not there.

Fake tensors have a device and a shape but no numbers, and refuse operations between devices: a tensor that was made on the
CPU by mistake shows. They know no gradients and no random generators of a GPU.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.inference import sliding_window, sums, tile_batches
from nnssl_adapt.training.batches.augment import Augmentation, SpatialRange, Target
from nnssl_adapt.training.batches.augment_gpu import DeviceAugmentation, Work
from nnssl_adapt.training.batches.intensity import Noise
from nnssl_adapt.training.optimise.losses import build_loss, count_overlap

GPU = torch.device("cuda:0")

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 7) and not torch.cuda.is_available(),
    reason="fake tensors of torch 2.6 ask for a CUDA driver",
)
PATCH = (12, 20, 16)
LABELS = {
    "labels": {"labels": {"background": 0, "a": 1, "b": 2}},
    "ignore": {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]},
}


@pytest.fixture(params=LABELS)
def labels(request):
    return LabelScheme.from_dataset_json({"channel_names": {"0": "MR"}, **LABELS[request.param]})


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # which fake tensors don't know
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def test_a_mistake_shows(fake):
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=GPU) + torch.zeros(3)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("sums_on_the_gpu", [True, False])
def test_sliding_window(sums_on_the_gpu, monkeypatch):
    weights = sliding_window.gaussian_importance((16, 8, 16))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr(sliding_window, "gaussian_importance", lambda *_, **__: mode.from_tensor(weights))
    place = sums.SumsPlace(GPU if sums_on_the_gpu else torch.device("cpu"), torch.float32)
    monkeypatch.setattr(sliding_window, "sums_places", lambda *_: [place])
    monkeypatch.setattr(sliding_window, "_refuse_non_finite", lambda *_: None)
    monkeypatch.setattr(tile_batches, "free_memory", lambda _: 1 << 30)
    with mode:
        with GPU:
            network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.Conv3d(4, 3, 1))
        monkeypatch.setattr(network, "to", lambda device: network)
        logits = sliding_window.sliding_window_logits(network, torch.zeros(1, 20, 8, 17), (16, 8, 16), 3, device=GPU)
    assert logits.device.type == "cpu"
    assert logits.shape == (3, 20, 8, 17)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("deep", [True, False])
def test_loss_and_counts(fake, labels, batch_dice, deep):
    loss = build_loss(labels, batch_dice, [(1, 1, 1), (1, 2, 2), (2, 2, 2)] if deep else None)
    shape, half = (2, labels.num_heads, 8, 12, 16), (2, labels.num_heads, 8, 6, 8)
    logits = torch.zeros(shape, device=GPU, dtype=torch.bfloat16)
    target = (
        torch.zeros(shape, dtype=torch.bool, device=GPU)
        if labels.has_regions
        else torch.zeros((2, 1, *shape[2:]), dtype=torch.int16, device=GPU)
    )
    value = loss([logits, logits.new_zeros(half)] if deep else logits, target)
    assert value.device == GPU
    assert value.shape == ()
    assert count_overlap(logits, target, labels).shape == (3, 2)


@pytest.mark.parametrize("patch", [PATCH, (4, 24, 20)])
def test_augmentation(fake, labels, patch):
    """Nothing waits for the device either: what depends on its numbers, such as how many voxels are set, fails here."""
    augmentation, on_gpu = (
        Augmentation(SpatialRange.of(patch), (0, 1, 2)),
        DeviceAugmentation(labels, [True, False]),
    )
    finished = set()
    for seed in range(60):
        drawn = augmentation.draw(seed, 2)
        drawn = replace(drawn, steps=tuple(step for step in drawn.steps if not isinstance(step, Noise)))
        size = patch if drawn.matrix is None else (15, 30, 22)
        matrix = None if drawn.matrix is None else np.concatenate([drawn.matrix, np.ones((3, 1))], axis=1)
        batch = {
            "image": torch.zeros(2 * math.prod(size)),
            "target": torch.zeros(math.prod(size), dtype=Target(labels).code_type),
            "work": [Work(drawn, matrix, patch, size)],
        }
        image, target = on_gpu(batch, GPU)
        assert image.device == target.device == GPU
        assert image.shape == (1, 2, *patch)
        finished |= {type(step).__name__ for step in drawn.steps}
    assert finished == {"Gamma", "Contrast", "Blur", "Brightness", "LowResolution"}
