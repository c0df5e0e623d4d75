import pytest

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.geometry.spacing import canonical_mode, choose_spacing, resampled_shape

SPACINGS = [(3.0, 1.0, 0.8), (2.0, 0.9, 0.8), (2.5, 1.1, 0.8)]
SHAPES = [(30, 100, 120)] * 3


def choose(mode, pretrained=(1.0, 1.0, 1.0), fixed=None):
    return choose_spacing(mode, pretrained=pretrained, spacings=SPACINGS, shapes=SHAPES, fixed=fixed)


def test_each_mode():
    assert choose("like_pretrained", (1, 1.5, 2)).spacing == (1.0, 1.5, 2.0)
    assert choose("median").spacing == choose("default_nnunet").spacing == (2.5, 1.0, 0.8)
    assert choose("fixed", fixed=(2, 1, 0.5)).spacing == (2.0, 1.0, 0.5)
    assert choose("no_resample").spacing is None
    assert canonical_mode("default_nnunet") == "median"


def test_a_pre_training_without_spacing_falls_back_and_says_so():
    choice = choose("like_pretrained", pretrained=None)
    assert choice.mode == "median" and choice.spacing == (2.5, 1.0, 0.8) and "median" in choice.note
    assert choose("like_pretrained").note == ""


@pytest.mark.parametrize(
    ("mode", "fixed", "message"),
    [
        ("isotropic", None, "unknown spacing mode 'isotropic'.*like_pretrained"),
        ("fixed", None, "-os Z Y X"),
        ("median", (1, 1, 1), "takes no spacing"),
        ("fixed", (1, 1), "three positive numbers"),
        ("fixed", (1, 0, 1), "three positive numbers"),
        ("fixed", (1, float("nan"), 1), "three positive numbers"),
    ],
)
def test_wrong_wishes(mode, fixed, message):
    with pytest.raises(ConfigurationError, match=message):
        choose(mode, fixed=fixed)


def test_resampled_shape_rounds_half_to_even():
    assert resampled_shape((10, 5, 7), (1.0, 0.5, 1.5), (1.0, 1.0, 1.0)) == (10, 2, 10)


def test_an_axis_never_vanishes():
    assert resampled_shape((1, 3, 2), (0.4, 1.0, 0.2), (1.0, 2.0, 1.0)) == (1, 2, 1)
