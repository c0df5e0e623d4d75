"""Pictures and TIFF stacks, read and written as nnU-Net's NaturalImage2DIO and Tiff3DIO do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from nnssl_adapt.data.images import ImageGeometry, read_geometry, read_image, read_labels, write_labels
from nnssl_adapt.data.pictures import NATURAL_2D, TIFF_3D, reader_for_ending

pytest.importorskip("nnunetv2")
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

HEIGHT, WIDTH = 5, 8


def numbers(*shape: int, dtype: type = np.uint8, high: int = 200) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, high, shape).astype(dtype)


def grey(path: Path) -> None:
    Image.fromarray(numbers(HEIGHT, WIDTH)).save(path)


def colours(path: Path, channels: int = 3) -> None:
    Image.fromarray(numbers(HEIGHT, WIDTH, channels)).save(path)


def palette(path: Path) -> None:
    Image.fromarray(numbers(HEIGHT, WIDTH, 3)).convert("P").save(path)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(numbers(HEIGHT, WIDTH, dtype=np.uint16, high=60000)).save(path)


def one_bit(path: Path) -> None:
    Image.fromarray(numbers(HEIGHT, WIDTH) > 100).save(path)


def jpeg(path: Path) -> None:
    Image.fromarray(numbers(HEIGHT, WIDTH, 3)).save(path, format="JPEG")


def tif(*shape: int, **options: object):
    return lambda path: tifffile.imwrite(path, numbers(*shape, dtype=np.float32), **options)


PICTURES = {
    "grey.png": grey,
    "rgb.png": colours,
    "rgba.png": lambda path: colours(path, 4),
    "palette.png": palette,
    "sixteen.png": sixteen_bits,
    "one_bit.png": one_bit,
    "rgb.bmp": colours,
    "rgb.jpg": jpeg,
    "grey.tif": tif(HEIGHT, WIDTH),
    "rgb.tif": tif(HEIGHT, WIDTH, 3),
    "colours_first.tif": tif(3, HEIGHT, WIDTH),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_read_as_by_nnunet(tmp_path: Path, name: str) -> None:
    path = tmp_path / name.replace(".", "_0000.")
    PICTURES[name](path)
    expected, properties = NaturalImage2DIO().read_images((str(path),))
    image, geometry = read_image([path], NATURAL_2D)
    np.testing.assert_array_equal(image, expected)
    assert image.dtype == expected.dtype and geometry.reader == NATURAL_2D
    assert geometry == read_geometry(path, NATURAL_2D) == ImageGeometry.from_properties(properties, geometry.size)
    assert tuple(geometry.to_properties()["spacing"]) == properties["spacing"]
    assert geometry.to_properties().keys() == properties.keys()


def test_several_pictures_are_one_image(tmp_path: Path) -> None:
    paths = [tmp_path / f"a_000{channel}.png" for channel in range(2)]
    for path in paths:
        colours(path)
    expected, _ = NaturalImage2DIO().read_images([str(path) for path in paths])
    np.testing.assert_array_equal(read_image(paths, NATURAL_2D)[0], expected)


@pytest.mark.parametrize("highest", [3, 300])
@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_labels_are_written_as_by_nnunet(tmp_path: Path, ending: str, highest: int) -> None:
    if (ending, highest) == (".bmp", 300):
        pytest.skip("a .bmp has 8 bits")
    labels = numbers(1, HEIGHT, WIDTH, high=3).astype(np.int16)
    labels[0, 0, 0] = highest
    geometry = ImageGeometry((999, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), labels.shape, picture=NATURAL_2D)
    write_labels(tmp_path / f"ours{ending}", labels, geometry)
    NaturalImage2DIO().write_seg(labels, str(tmp_path / f"theirs{ending}"), {})
    from skimage.io import imread

    ours, theirs = (imread(tmp_path / f"{who}{ending}") for who in ("ours", "theirs"))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(read_labels(tmp_path / f"ours{ending}", NATURAL_2D)[0][0], labels)


@pytest.mark.parametrize("spacing", [None, [2.5, 0.75, 1.25]])
def test_stacks_are_read_and_written_as_by_nnunet(tmp_path: Path, spacing: list[float] | None) -> None:
    images = [tmp_path / f"a_000{channel}.tif" for channel in range(2)]
    for path in images:
        tif(6, HEIGHT, WIDTH)(path)
    label = tmp_path / "a.tif"
    tifffile.imwrite(label, numbers(6, HEIGHT, WIDTH, high=3), compression="zlib")
    if spacing is not None:
        (tmp_path / "a.json").write_text(json.dumps({"spacing": spacing}))
    expected, properties = Tiff3DIO().read_images([str(path) for path in images])
    image, geometry = read_image(images, TIFF_3D)
    np.testing.assert_array_equal(image, expected)
    assert list(geometry.spacing) == list(properties["spacing"])
    assert geometry == ImageGeometry.from_properties(properties, geometry.size)
    labels, label_geometry = read_labels(label, TIFF_3D)
    np.testing.assert_array_equal(labels, Tiff3DIO().read_seg(str(label))[0])
    (tmp_path / "ours").mkdir()
    write_labels(tmp_path / "ours" / "a.tif", labels[0], label_geometry)
    again, written = Tiff3DIO().read_seg(str(tmp_path / "ours" / "a.tif"))
    np.testing.assert_array_equal(again, labels)
    assert list(written["spacing"]) == list(label_geometry.spacing)


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (6, HEIGHT, WIDTH), (3, HEIGHT, WIDTH), (HEIGHT, WIDTH, 4)])
def test_which_reader_a_tif_has(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a_0000.tif"
    tif(*shape)(path)
    peer = determine_reader_writer_from_file_ending(".tif", str(path), verbose=False)
    assert reader_for_ending(".tif", path) == peer.__name__
