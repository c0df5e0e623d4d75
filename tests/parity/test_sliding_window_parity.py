"""Tiles, weights and logits against those of nnU-Net's own predictor."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("nnunetv2")

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl_adapt.inference.sliding_window import gaussian_importance, sliding_window_logits, tile_positions

PATCH = (16, 24, 32)


@pytest.mark.parametrize("patch", [(10, 20, 30), (64, 192, 160), (7, 33, 48)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1, 10])
def test_weights_are_equal_bit_for_bit(patch, dtype, scale):
    theirs = compute_gaussian(patch, 1 / 8, scale, dtype=dtype, device=torch.device("cpu"))
    assert torch.equal(gaussian_importance(patch, scale, dtype), theirs)


def test_tiles_are_equal():
    random = np.random.default_rng(0)
    for _ in range(300):
        patch = random.integers(2, 200, 3)
        shape = patch + random.integers(0, 400, 3)
        step = float(random.choice([0.5, 1, 0.25, 0.3, 0.77]))
        theirs = compute_steps_for_sliding_window(tuple(shape), tuple(patch), step)
        assert tile_positions(shape.tolist(), patch.tolist(), step) == theirs


def tiny_network(seed=0):
    """Small, and neither symmetric nor smooth, so that wrong tiles and wrong flips show."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv3d(2, 6, 3, padding=1),
        nn.InstanceNorm3d(6, affine=True),
        nn.LeakyReLU(),
        nn.Conv3d(6, 6, 5, padding=2),
        nn.LeakyReLU(),
        nn.Conv3d(6, 3, 1),
    )
    return network.eval()


def peers_logits(network, image, mirror_axes):
    class Configuration:
        patch_size = list(PATCH)

    predictor = nnUNetPredictor(
        use_mirroring=mirror_axes is not None, device=torch.device("cpu"), verbose=False, allow_tqdm=False
    )
    predictor.network = network
    predictor.configuration_manager = Configuration()
    predictor.label_manager = LabelManager({"background": 0, "a": 1, "b": 2}, None)
    predictor.allowed_mirroring_axes = mirror_axes
    return predictor.predict_sliding_window_return_logits(image)


@pytest.mark.parametrize("mirror_axes", [None, (0, 1, 2), (1, 2)])
@pytest.mark.parametrize("shape", [(21, 40, 50), (10, 37, 29)])
def test_logits_and_labels(shape, mirror_axes):
    network = tiny_network()
    image = torch.randn((2, *shape), generator=torch.Generator().manual_seed(1))
    theirs = peers_logits(network, image, mirror_axes)

    compatible = sliding_window_logits(
        network, image, PATCH, 3, mirror_axes=mirror_axes, accumulation_dtype=torch.float16
    )
    assert torch.equal(compatible, theirs)

    # Sums in float32 differ from theirs by the rounding of float16: a thousandth, but more in the corners, where their
    # weights have few digits left (logits are off by up to 0.5 there).
    ours = sliding_window_logits(network, image, PATCH, 3, mirror_axes=mirror_axes)
    inner = (slice(None), *(slice(n // 8, n - n // 8) for n in shape))
    torch.testing.assert_close(ours[inner], theirs.float()[inner], atol=2e-3, rtol=2e-3)
    first, second = ours[inner].topk(2, dim=0).values
    decided = first - second > 5e-3
    assert decided.float().mean() > 0.9
    assert torch.equal(ours[inner].argmax(0)[decided], theirs[inner].argmax(0)[decided])
