"""The learning rate at the places where schedules go wrong: start, end of the warm-up, last epoch."""

import itertools

import pytest

from nnssl_adapt.training.recipe import Recipe
from nnssl_adapt.training.schedule import learning_rate


def test_warm_up_then_poly():
    recipe = Recipe(epochs=20, warmup_epochs=4, learning_rate=0.8)
    rates = [learning_rate(epoch, recipe) for epoch in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[12] == pytest.approx(0.8 * 0.5**0.9)
    assert rates[19] == pytest.approx(0.8 * (1 / 16) ** 0.9)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_no_warm_up():
    recipe = Recipe(epochs=10, warmup_epochs=0, learning_rate=0.01)
    assert learning_rate(0, recipe) == 0.01
    assert learning_rate(9, recipe) == pytest.approx(0.01 * 0.1**0.9)
