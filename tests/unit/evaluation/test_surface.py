"""Distances of surfaces that can be worked out by hand, on grids with three different spacings."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from nnssl_adapt.evaluation.surface import surface, surface_distances

SPACING = (3.0, 1.0, 0.5)


def box(z, y, x, shape=(10, 20, 30)):
    mask = np.zeros(shape, bool)
    mask[slice(*z), slice(*y), slice(*x)] = True
    return mask


def test_the_surface_is_what_has_a_neighbour_outside():
    mask = box((2, 6), (5, 10), (8, 14))
    assert surface(mask).sum() == 4 * 5 * 6 - 2 * 3 * 4
    touching = box((0, 4), (0, 5), (0, 6))  # the image's border is a surface as well
    assert surface(touching).sum() == 4 * 5 * 6 - 2 * 3 * 4


@pytest.mark.parametrize(("axis", "step"), [*enumerate(SPACING)])
def test_two_voxels_apart_along_each_axis(axis, step):
    first, second = np.zeros((2, 10, 20, 30), bool)
    place = [4, 5, 6]
    first[tuple(place)] = True
    place[axis] += 3
    second[tuple(place)] = True
    distances = surface_distances(first, second, SPACING)
    assert distances.hausdorff95 == distances.average == pytest.approx(3 * step)
    assert distances.dice_at(3 * step) == 1 and distances.dice_at(3 * step - 0.01) == 0


def test_a_plate_moved_by_one_slice():
    # 2 × 3 × 4 voxels: all are surface. Half of each mask lies in the other, the other half one slice (3 mm) off.
    first, second = box((2, 4), (5, 8), (10, 14)), box((3, 5), (5, 8), (10, 14))
    distances = surface_distances(first, second, SPACING)
    assert sorted(distances.from_prediction.tolist()) == [0.0] * 12 + [3.0] * 12
    assert distances.average == pytest.approx(1.5)
    assert distances.hausdorff95 == pytest.approx(3.0)
    assert distances.dice_at(1.0) == 0.5 and distances.dice_at(3.0) == 1


def test_the_worse_direction_counts_and_the_percentile_is_linear():
    # One voxel against a row of 21 along X: from the row 0, 0.5, ..., 10 mm; the 95th percentile is the 20th of 21.
    row = box((4, 5), (7, 8), (3, 24))
    start = box((4, 5), (7, 8), (3, 4))
    distances = surface_distances(row, start, SPACING)
    assert distances.hausdorff95 == pytest.approx(9.5)
    assert surface_distances(start, row, SPACING).hausdorff95 == pytest.approx(9.5)
    assert distances.average == pytest.approx((sum(0.5 * n for n in range(21)) + 0) / 22)
    assert distances.dice_at(2.0) == pytest.approx(6 / 22)


def test_oblique_distances_use_every_spacing():
    first, second = np.zeros((2, 5, 6, 7), bool)
    first[1, 1, 1] = second[2, 3, 5] = True
    assert surface_distances(first, second, SPACING).average == pytest.approx(math.sqrt(3**2 + 2**2 + 2**2))


def test_nothing_to_measure():
    empty, mask = np.zeros((2, 5, 6, 7), bool)
    mask[2, 2, 2] = True
    for pair in ((empty, mask), (mask, empty), (empty, empty)):
        distances = surface_distances(*pair, SPACING)
        assert math.isnan(distances.hausdorff95) and math.isnan(distances.average) and math.isnan(distances.dice_at(1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.9))
def test_like_a_distance_transform_of_everything(seed, share):
    first, second = np.random.default_rng(seed).random((2, 7, 9, 11)) < share
    if not (first.any() and second.any()):
        return
    distances = surface_distances(first, second, SPACING)
    expected = distance_transform_edt(~surface(second), sampling=SPACING)[surface(first)]
    np.testing.assert_allclose(np.sort(distances.from_prediction), np.sort(expected), atol=1e-12)
