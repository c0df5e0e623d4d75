import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnssl_adapt.planning.patch import describe_fit, fit_patch


@pytest.mark.parametrize(
    ("wanted", "divisors", "median", "expected"),
    [
        ((160, 160, 160), (32, 32, 32), (180, 256, 200), (160, 160, 160)),  # fits as it is
        ((160, 160, 160), (32, 32, 32), (79, 112, 33), (96, 128, 64)),  # no larger than it takes to cover the image
        (
            (160, 160, 160),
            (32, 32, 32),
            (10, 500, 500),
            (32, 160, 160),
        ),  # one voxel of an axis at the bottleneck is enough
        ((96, 96, 96), (32, 32, 32), (20, 31, 30), (32, 64, 32)),  # and two in all, along the axis that is filled most
        ((64, 32, 32), (32, 32, 32), (500, 500, 500), (64, 32, 32)),  # what is asked for is kept
        ((32, 128, 128), (16, 16, 16), (14, 100, 200), (16, 112, 128)),
        ((100, 50, 31), (8, 8, 8), (500, 500, 500), (96, 48, 24)),  # multiples of the strides
        ((20, 20, 20), (1, 4, 4), (7, 50, 50), (7, 20, 20)),  # an axis without strides
    ],
)
def test_fit_patch(wanted, divisors, median, expected):
    assert fit_patch(wanted, divisors, median) == expected


triples = st.tuples(*[st.integers(1, 200)] * 3)


@given(triples, st.tuples(*[st.sampled_from([1, 2, 8, 16, 32])] * 3), triples)
def test_every_fitted_patch_can_be_used(wanted, divisors, median):
    patch = fit_patch(wanted, divisors, median)
    for size, divisor, extent in zip(patch, divisors, median, strict=True):
        assert size % divisor == 0
        assert divisor <= size < extent + divisor or size == 2 * divisor
    assert math.prod(patch) > math.prod(divisors)
    assert fit_patch(patch, divisors, median) == patch


def test_describe_fit_speaks_only_of_changes():
    assert describe_fit((32, 32, 32), (32, 32, 32), (40, 40, 40)) is None
    assert "160 × 160 × 160 fitted to 64 × 96 × 32" in describe_fit((160, 160, 160), (64, 96, 32), (50.0, 80, 30))
    assert "has 50 × 128.5 × 30 voxels" in describe_fit((160, 160, 160), (64, 144, 32), (50.0, 128.5, 30))


@pytest.mark.parametrize(
    ("last", "wanted", "median", "expected"),
    [
        # The published patches, for images that are large enough in every axis (array order SI, AP, RL; then reversed).
        ([1, 2, 2], (64, 192, 320), (900, 320, 320), (64, 192, 320)),
        ([2, 2, 1], (320, 192, 64), (320, 320, 900), (320, 192, 64)),
        # A sagittal spine of few slices: the thin axis shrinks to what the strides allow.
        ([1, 2, 2], (64, 192, 320), (400, 300, 15), (64, 192, 32)),
        ([2, 2, 1], (320, 192, 64), (400, 300, 15), (320, 192, 16)),
        # Tiny images.
        ([1, 2, 2], (64, 192, 320), (5, 6, 7), (32, 32, 32)),
        ([2, 2, 1], (320, 192, 64), (5, 6, 7), (32, 32, 32)),
    ],
)
def test_the_contrast_agnostic_patch(contrast_agnostic_strides, last, wanted, median, expected):
    import torch

    from nnssl_adapt.weights.network.architectures import build_network, check_patch

    network = contrast_agnostic_strides(last)
    patch = fit_patch(wanted, network.total_stride, median)
    assert patch == expected
    assert check_patch(network, patch) == patch
    assert math.prod(patch) > math.prod(network.total_stride)
    if max(patch) <= 64:  # and the network takes it in training, where instance normalisation needs two voxels
        built = build_network(network, 1, 2, patch).train()
        assert built(torch.zeros(1, 1, *patch)).shape == (1, 2, *patch)
