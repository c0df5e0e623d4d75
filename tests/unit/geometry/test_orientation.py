"""Orientation codes against nibabel and SimpleITK, which name the other end of each axis."""

import itertools

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.orientation import check_code, is_oriented, opposite, orientation_code

CODES = [
    "".join(letters) for order in itertools.permutations(["RL", "AP", "SI"]) for letters in itertools.product(*order)
]


def direction_of(code):
    """Direction cosines of an image whose axes come from these sides, written out by hand (world: L, P, S)."""
    vector = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "I": (0, 0, 1), "S": (0, 0, -1)}
    return np.array([vector[letter] for letter in code], float).T.ravel()


def by_nibabel(direction):
    to_ras = np.diag([-1.0, -1.0, 1.0]) @ np.asarray(direction).reshape(3, 3) @ np.diag([2.0, 0.7, 1.3])
    affine = np.eye(4)
    affine[:3, :3] = to_ras
    return "".join(nibabel.aff2axcodes(affine))


def test_there_are_48_codes():
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("code", CODES)
def test_every_code(code):
    direction = direction_of(code)
    assert orientation_code(direction) == code
    assert opposite(code) == by_nibabel(direction)
    assert opposite(opposite(code)) == code
    assert sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(direction.tolist()) == opposite(code)
    assert [c for c in CODES if is_oriented(direction, c)] == [code]


def test_as_the_spinal_cord_toolbox_says_it():
    """Its RPI is nibabel's LAS; the identity, which ITK calls LPS, is RAI."""
    assert opposite("RPI") == "LAS"
    assert orientation_code(np.eye(3).ravel()) == "RAI"
    assert orientation_code([1, 0, 0, 0, -1, 0, 0, 0, 1]) == "RPI"


def test_simpleitk_reorients_to_what_we_call_it():
    image = sitk.Image(3, 5, 7, sitk.sitkInt16)
    image.SetDirection(direction_of("PIR"))
    for code in CODES:
        assert orientation_code(sitk.DICOMOrient(image, opposite(code)).GetDirection()) == code


rotations = st.integers(0, 2**32 - 1).map(lambda seed: Rotation.random(random_state=seed).as_matrix())


@settings(max_examples=200, deadline=None)
@given(rotations, st.booleans())
def test_oblique_images_as_simpleitk(rotation, mirrored):
    direction = (rotation @ np.diag([1, 1, -1 if mirrored else 1])).ravel()
    theirs = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(direction.tolist())
    code = orientation_code(direction)
    assert opposite(code) == theirs
    assert is_oriented(direction, code)
    nearest = np.abs(direction.reshape(3, 3)).argmax(axis=0)
    if sorted(nearest) == [0, 1, 2]:  # else nibabel's answer depends on the order of the axes
        assert opposite(code) == by_nibabel(direction)


def test_an_image_between_two_orientations_has_both():
    half = np.sqrt(0.5)
    direction = [half, -half, 0, half, half, 0, 0, 0, 1]
    assert [code for code in CODES if is_oriented(direction, code)] == ["RAI", "ALI"]


@pytest.mark.parametrize("code", ["", "RP", "RPIA", "RRI", "RLI", "XYZ", "LR S", "RP1"])
def test_codes_that_are_none(code):
    with pytest.raises(ConfigurationError, match="three letters such as RPI"):
        check_code(code)


def test_small_letters_will_do():
    assert check_code(" rpi ") == "RPI"
