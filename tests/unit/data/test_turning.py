"""Turning is exact, leads back, and agrees with SimpleITK's own."""

import itertools
import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import ImageGeometry
from nnssl_adapt.data.reorient import common_orientation
from nnssl_adapt.data.turning import turn_geometry, turn_image
from nnssl_adapt.geometry.orientation import Turn, opposite, orientation_code

CODES = [
    "".join(pair[side] for pair, side in zip(axes, sides, strict=True))
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for sides in itertools.product((0, 1), repeat=3)
]


def stored(oblique=0.2):
    voxels = np.random.default_rng(0).integers(0, 99, (5, 7, 11)).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.8, 1.2, 3.0))
    image.SetOrigin((-11.0, 20.5, 7.25))
    c, s = np.cos(oblique), np.sin(oblique)
    image.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1))
    return image


def geometry_of(image):
    z, y, x = sitk.GetArrayViewFromImage(image).shape
    return ImageGeometry(image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection(), (z, y, x))


@pytest.mark.parametrize("code", CODES)
def test_every_orientation_as_simpleitk_turns_and_back(code):
    image = stored()
    expected = sitk.DICOMOrient(image, opposite(code))
    voxels = sitk.GetArrayFromImage(image)[None]
    turned, geometry, turn = turn_image(voxels, geometry_of(image), code)
    assert np.array_equal(turned[0], sitk.GetArrayFromImage(expected))
    wanted = geometry_of(expected)
    assert geometry.size == wanted.size and geometry.spacing == pytest.approx(wanted.spacing)
    assert geometry.origin == pytest.approx(wanted.origin) and geometry.direction == pytest.approx(wanted.direction)
    assert orientation_code(geometry.direction) == code
    assert np.array_equal(turn.undo(turned), voxels)


def test_an_image_that_lies_right_stays():
    geometry = geometry_of(stored())
    turn = Turn.to(orientation_code(geometry.direction), geometry.direction)
    assert turn.is_none and turn_geometry(geometry, turn) is geometry


@pytest.mark.parametrize(("codes", "expected"), [(("RPI", "RPI"), "RPI"), (("RPI", "LPI"), None)])
def test_how_all_training_images_lie(tmp_path, codes, expected):
    folder = tmp_path / "Dataset042_X"
    for place in ("imagesTr", "labelsTr"):
        (folder / place).mkdir(parents=True)
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "cord": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "image_orientation": "LAS",  # what somebody wrote does not count where images lie otherwise
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    for name, code in zip("ab", codes, strict=True):
        turned = sitk.DICOMOrient(stored(), opposite(code))
        sitk.WriteImage(turned, str(folder / "imagesTr" / f"{name}_0000.nii.gz"))
        sitk.WriteImage(turned, str(folder / "labelsTr" / f"{name}.nii.gz"))
    assert common_orientation(RawDataset.open(folder)) == expected
