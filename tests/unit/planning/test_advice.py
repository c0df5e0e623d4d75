"""The comparison of spacing modes, with numbers worked out by hand."""

import pytest

from nnssl_adapt.planning.advice import advise_spacing
from nnssl_adapt.planning.patch import fit_patch

SHAPES = [(40, 256, 320)] * 3
SPACINGS = [(4.0, 0.8, 0.5)] * 3


def advice(pretrained=(1.0, 1.0, 1.0), spacings=SPACINGS, shapes=SHAPES, patch=(64, 128, 96), fixed=None):
    return advise_spacing(pretrained, spacings, shapes, patch, (8, 16, 16), fixed)


def test_every_mode_is_worked_out():
    modes = {outlook.mode: outlook for outlook in advice(fixed=(2.0, 1.6, 1.0)).outlooks}
    assert list(modes) == ["like_pretrained", "median", "fixed", "no_resample"]
    like = modes["like_pretrained"]
    assert like.median_shape == (160, 205, 160) and like.patch_size == (64, 128, 96)
    assert like.voxels == pytest.approx(160 * 205 * 160 / (40 * 256 * 320))
    assert like.coverage == pytest.approx(64 * 128 * 96 / (160 * 205 * 160))
    assert like.tiles == 4 * 3 * 3  # steps of 32, 64 and 48 voxels
    kept = modes["no_resample"]
    assert kept.spacing is None and kept.voxels == 1 and kept.median_shape == (40, 256, 320)
    assert kept.patch_size == (40, 128, 96)  # no deeper than the image
    assert modes["fixed"].median_shape == (80, 128, 160) and modes["fixed"].coverage == pytest.approx(0.8 * 0.6)


def test_the_patch_shown_is_the_plans():
    """Between two images of 128 and 129 voxels lies a median of 128.5, which 128 do not cover."""
    shapes, spacings = [(40, 128, 64), (40, 129, 64)], [(1.0, 1.0, 1.0)] * 2
    kept = advice(spacings=spacings, shapes=shapes, patch=(64, 256, 96)).outlooks[-1]
    assert kept.patch_size == fit_patch((64, 256, 96), (8, 16, 16), (40, 128.5, 64)) == (40, 144, 64)


@pytest.mark.parametrize(
    ("pretrained", "spacing", "picked", "reason"),
    [
        ((1, 1, 1), (1.2, 0.9, 0.9), "like_pretrained", "no detail is lost"),
        ((1, 1, 1), (1, 0.5, 1), "median", "2 times coarser"),
        ((1, 1, 1), (1, 0.67, 1), "like_pretrained", "no detail"),
        ((1, 1, 1), (5, 1.3, 1.3), "median", "8.4 times as many voxels"),
        ((1, 1, 1), (5, 1.0, 1.0), "like_pretrained", "no detail"),
        (None, (1, 1, 1), "median", "no spacing of its own"),
    ],
)
def test_auto_keeps_to_its_rule(pretrained, spacing, picked, reason):
    result = advice(pretrained, [spacing] * 3, [(40, 60, 50)] * 3)
    assert result.picked == picked and reason in result.reason


def test_the_table_marks_what_was_picked():
    lines = str(advice()).splitlines()
    assert len(lines) == 6 and len({len(line.rstrip()) > 40 for line in lines}) == 1
    assert lines[1].startswith("  like_pretrained") and "1 × 1 × 1" in lines[1]
    assert lines[2].startswith("* median") and "4 × 0.8 × 0.5" in lines[2]
    assert "each its own" in lines[3]
    assert "coarsest first" in lines[4]
    assert lines[5].startswith("* auto picks median: ") and "2 times coarser" in lines[5]
