import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnssl_adapt.planning.patch import describe_fit, fit_patch


@pytest.mark.parametrize(
    ("wanted", "divisors", "median", "expected"),
    [
        ((160, 160, 160), (32, 32, 32), (180, 256, 200), (160, 160, 160)),  # fits as it is
        ((160, 160, 160), (32, 32, 32), (79, 112, 33), (96, 128, 64)),  # no larger than it takes to cover the image
        ((160, 160, 160), (32, 32, 32), (10, 500, 500), (64, 160, 160)),  # two voxels at the bottleneck
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
        assert size >= divisor * (2 if divisor > 1 else 1)
        assert size < extent + divisor or size == 2 * divisor
    assert fit_patch(patch, divisors, median) == patch


def test_describe_fit_speaks_only_of_changes():
    assert describe_fit((32, 32, 32), (32, 32, 32), (40, 40, 40)) is None
    assert "160 × 160 × 160 fitted to 64 × 96 × 32" in describe_fit((160, 160, 160), (64, 96, 32), (50.0, 80, 30))
