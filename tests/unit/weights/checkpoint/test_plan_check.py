"""Plan and tensors brought together."""

from nnssl_adapt.weights.checkpoint.plan_check import find_token_grid


def test_grid_comes_from_the_first_candidate_that_fits_then_from_a_cube():
    assert find_token_grid(24, [None, (2, 3, 5), (2, 3, 4), (4, 3, 2)]) == (2, 3, 4)
    assert find_token_grid(27, [(2, 3, 4)]) == (3, 3, 3)
    assert find_token_grid(28, [(2, 3, 4)]) is None
