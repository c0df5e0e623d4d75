"""Strips of slices: which are chosen, that no error is lost in a small picture, and how large a case may become."""

import io

import numpy as np
import pytest
from PIL import Image

from nnssl_adapt.evaluation.report.strips import (
    ADDED,
    HIT,
    MISSED,
    THUMBNAIL,
    WRONG,
    Size,
    UprightCase,
    draw_strips,
    encode_pairs,
    error_palette,
    png_with_palette,
)

SHAPE, SPACING = (30, 120, 90), (3.0, 0.5, 1.0)


def case(reference, prediction, image=None, spacing=SPACING):
    numbers = [[f"{letter} = {index}" for index in range(n)] for letter, n in zip("zyx", reference.shape, strict=True)]
    image = np.zeros(reference.shape, np.float32) if image is None else image
    return UprightCase(image, reference, prediction, spacing, tuple(numbers))


def volumes():
    reference = np.zeros(SHAPE, np.int16)
    reference[5:25, 20:100, 30:60] = 1
    prediction = reference.copy()
    prediction[9, 50, 40] = 0
    prediction[20, 40, 44] = 2
    return reference, prediction


def picture(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_a_pair_of_labels_has_one_code():
    reference, prediction = volumes()
    codes, pairs = encode_pairs(reference, prediction)
    assert pairs[0] == (1, 1) and set(pairs) == {(1, 1), (1, 0), (1, 2)}
    assert codes[0, 0, 0] == 0 and pairs[codes[9, 50, 40] - 1] == (1, 0) and pairs[codes[20, 40, 44] - 1] == (1, 2)
    assert error_palette([(1, 1), (1, 0), (0, 1), (2, 1)]) == [HIT, MISSED, ADDED, WRONG]


def test_more_pairs_than_a_palette_has_colours():
    random = np.random.default_rng(0)
    reference, prediction = (random.integers(0, 60, (20, 30, 40)).astype(np.int16) for _ in range(2))
    codes, pairs = encode_pairs(reference, prediction)
    assert len(pairs) == 255
    wrong = np.array([False, *(a != b for a, b in pairs)])
    assert wrong[codes][reference != prediction].all()  # the rarer ones too


@pytest.mark.parametrize("pixels", [24, 200])
def test_no_wrong_voxel_is_lost(pixels):
    """Each is a single one, smaller than a pixel of the small pictures."""
    reference, prediction = volumes()
    strips = draw_strips(case(reference, prediction), [Size(pixels, 24, 70)])
    codes = {pair: number + 1 for number, pair in enumerate(strips.codes)}
    for plane in strips.planes:
        drawn = picture(plane.labels)
        slices = np.split(drawn, plane.count, axis=1)
        start = slices[plane.start]
        assert (start == codes[1, 0]).any() or (start == codes[1, 2]).any(), plane.name
        assert drawn.shape == picture(plane.grey).shape
        if pixels == 200:  # as many millimetres of the body across as down
            assert plane.ratio == pytest.approx(slices[0].shape[1] / slices[0].shape[0], rel=1e-3)


def test_slices_are_over_the_labels_and_the_worst_is_among_them():
    reference, prediction = volumes()
    prediction[13, 30:50, 30:50] = 0
    axial = draw_strips(case(reference, prediction), [Size(64, 5, 70)]).planes[0]
    numbers = [int(name.removeprefix("z = ")) for name in axial.numbers]
    assert len(numbers) == 5 and numbers == sorted(numbers) and numbers[axial.start] == 13
    assert numbers[0] >= 3 and numbers[-1] <= 26
    thumbnail = draw_strips(case(reference, prediction), [THUMBNAIL]).planes[0]
    assert thumbnail.numbers == ["z = 13"] and thumbnail.start == 0


def test_up_is_up():
    """The first row of a picture is the last of the array: to the head, to the front."""
    reference = np.zeros((20, 30, 40), np.int16)
    reference[12:18, 20:28, 5:15] = 1
    planes = draw_strips(case(reference, reference, spacing=(1.0, 1.0, 1.0)), [Size(40, 1, 70)]).planes
    for plane in planes:
        rows, columns = np.nonzero(picture(plane.labels))
        assert rows.mean() < picture(plane.labels).shape[0] / 2, plane.name
    rows, columns = np.nonzero(picture(planes[0].labels))
    assert columns.mean() < picture(planes[0].labels).shape[1] / 2  # the array's x runs to the patient's left


def test_without_labels_the_whole_image_is_drawn():
    empty = np.zeros((6, 30, 20), np.int16)
    strips = draw_strips(case(empty, empty), [Size(40, 24, 70)])
    assert strips.codes == [] and strips.planes[0].numbers == [f"z = {index}" for index in range(6)]


def test_a_case_fits_its_share_of_the_page():
    """Noise is what JPEG can do least with."""
    image = np.random.default_rng(0).normal(size=(30, 130, 120)).astype(np.float32)
    labels = np.zeros(image.shape, np.int16)
    labels[2:28, 3:127, 3:117] = 1
    noisy = labels * np.random.default_rng(1).integers(0, 2, labels.shape).astype(np.int16)
    strips = draw_strips(case(labels, noisy, image, (1.0, 1.0, 1.0)), limit=250_000)
    assert 50_000 < strips.size <= 250_000


def test_a_png_keeps_every_colour_of_its_palette():
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    opened = Image.open(io.BytesIO(png_with_palette(indices, ["#00000000", "#ff800080", "#0102ffff", "#aabbccdd"])))
    assert opened.mode == "P" and np.array_equal(np.asarray(opened), indices)
    assert np.asarray(opened.convert("RGBA"))[0, 1].tolist() == [255, 128, 0, 128]
