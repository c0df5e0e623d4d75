from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import write_image

from nnssl_adapt.data.images import (
    NIFTI_READERS,
    ImageGeometry,
    count_channels,
    distinct_values,
    read_geometry,
    read_image,
    read_labels,
    write_labels,
)
from nnssl_adapt.data.nifti import unpacked
from nnssl_adapt.errors import CaseError, OutputError

SHAPE = (6, 10, 14)
SPACING = (2.5, 0.7, 1.1)


def image_of(random: np.random.Generator, dtype: str) -> np.ndarray:
    values = random.normal(100, 30, SHAPE)
    return np.rint(values).astype(dtype) if np.dtype(dtype).kind in "iu" else values.astype(dtype)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_voxels_and_geometry_are_what_simpleitk_reads(tmp_path: Path, ending: str, dtype: str) -> None:
    voxels = image_of(np.random.default_rng(1), dtype)
    path = tmp_path / f"x{ending}"
    write_image(path, voxels, SPACING, origin=(5, -6, 7.5))
    image, geometry = read_image([path])
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert image.dtype == np.float32 and image.shape == (1, *SHAPE)
    np.testing.assert_array_equal(image[0], expected.astype(np.float32))
    np.testing.assert_allclose(geometry.spacing, SPACING, rtol=1e-6)
    assert geometry.origin == (5, -6, 7.5)
    assert geometry.size == SHAPE
    assert read_geometry(path) == geometry


@pytest.mark.parametrize("dtype", ["int16", "float64"])
@pytest.mark.parametrize("slope, intercept", [(2.5, -7.25), (1.0, 3.0), (0.0, 0.0), (1.0, 0.0), (0.0, 5.0), (0.1, 1e4)])
def test_intensity_scaling_in_a_nifti_header_is_applied_as_simpleitk_does(
    tmp_path: Path, dtype: str, slope: float, intercept: float
) -> None:
    path = tmp_path / "x.nii"
    write_image(path, image_of(np.random.default_rng(2), dtype), SPACING)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    path.write_bytes(content)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)
    np.testing.assert_array_equal(read_image([path])[0][0], expected)


def test_labels_that_a_nifti_header_scales_are_whole_numbers(tmp_path: Path) -> None:
    """1/255 is no float32: 255 times it is 1 only if rounded as ITK does."""
    path = tmp_path / "x.nii"
    write_image(path, np.array([[[0, 255, 0], [255, 255, 0]]], np.uint8), SPACING)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([1 / 255, 0], "<f4").tobytes()
    path.write_bytes(content)
    assert read_labels(path)[0].tolist() == [[[[0, 1, 0], [1, 1, 0]]]]


def test_big_endian_nifti(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    voxels = image_of(np.random.default_rng(3), "int16")
    header = nibabel.Nifti1Header(endianness=">")
    nibabel.save(
        nibabel.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([1.1, 0.7, 2.5, 1]), header), tmp_path / "x.nii.gz"
    )
    np.testing.assert_array_equal(read_image([tmp_path / "x.nii.gz"])[0][0], voxels.astype(np.float32))


def test_gzip_is_unpacked_in_small_pieces_however_well_it_was_packed(tmp_path: Path) -> None:
    content = b"nothing" * 300_000
    path = tmp_path / "packed.gz"
    path.write_bytes(gzip.compress(content))

    pieces = list(unpacked(path))

    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= 1 << 18


def test_gzip_of_several_members_is_whole(tmp_path: Path) -> None:
    write_image(tmp_path / "x.nii", image_of(np.random.default_rng(4), "int16"), SPACING)
    content = (tmp_path / "x.nii").read_bytes()
    (tmp_path / "y.nii.gz").write_bytes(gzip.compress(content[:900]) + gzip.compress(content[900:]))
    np.testing.assert_array_equal(read_image([tmp_path / "x.nii"])[0], read_image([tmp_path / "y.nii.gz"])[0])


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_a_truncated_file_is_refused(tmp_path: Path, ending: str, kept: float) -> None:
    path = tmp_path / f"x{ending}"
    write_image(path, image_of(np.random.default_rng(5), "float32"), SPACING)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CaseError, match=rf"x\{ending}.*truncated"):
        read_image([path])


def test_gzip_data_without_their_checksum_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    write_image(path, image_of(np.random.default_rng(5), "float32"), SPACING)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CaseError, match=r"truncated.*end early"):
        read_image([path])


def test_a_flipped_bit_in_gzip_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    write_image(path, image_of(np.random.default_rng(6), "float32"), SPACING)
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    path.write_bytes(content)
    with pytest.raises(CaseError, match=r"x\.nii\.gz"):
        read_image([path])


@pytest.mark.parametrize("content", [b"", b"hello, this is no image", gzip.compress(b"nor is this", mtime=0)])
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.nii.gz"
    path.write_bytes(content)
    with pytest.raises(CaseError, match=r"x\.nii\.gz can't be read"):
        read_image([path])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"gone\.nii\.gz: no such file"):
        read_image([tmp_path / "gone.nii.gz"])


def test_channels_come_in_the_given_order(tmp_path: Path) -> None:
    for channel in range(3):
        write_image(tmp_path / f"x_{channel:04d}.nii.gz", np.full(SHAPE, channel + 1, np.int16), SPACING)
    image, _ = read_image([tmp_path / f"x_{channel:04d}.nii.gz" for channel in (2, 0, 1)])
    assert image.shape == (3, *SHAPE)
    assert [float(channel.mean()) for channel in image] == [3, 1, 2]


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.int16), SPACING)
    write_image(tmp_path / "b.nii.gz", np.zeros((6, 10, 15), np.int16), SPACING)
    write_image(tmp_path / "c.nii.gz", np.zeros(SHAPE, np.int16), (2.5, 0.7, 1.2))
    with pytest.raises(CaseError, match=r"b\.nii\.gz: shape 6 × 10 × 15"):
        read_image([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])
    with pytest.raises(CaseError, match=r"c\.nii\.gz: spacing 2\.5 × 0\.7 × 1\.2 mm"):
        read_image([tmp_path / "a.nii.gz", tmp_path / "c.nii.gz"])


def test_another_origin_is_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.int16), SPACING)
    write_image(tmp_path / "b.nii.gz", np.zeros(SHAPE, np.int16), SPACING, origin=(0, 0, 0))
    read_image([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])
    assert "b.nii.gz: origin" in caplog.text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_voxels_are_refused(tmp_path: Path, bad: float) -> None:
    voxels = image_of(np.random.default_rng(7), "float32")
    voxels[2, 3, 4] = bad
    write_image(tmp_path / "x.nii.gz", voxels, SPACING)
    with pytest.raises(CaseError, match=r"x\.nii\.gz: (1 voxels are NaN and 0|0 voxels are NaN and 1) infinite"):
        read_image([tmp_path / "x.nii.gz"])


def test_a_4d_file_holds_channels(tmp_path: Path) -> None:
    voxels = np.arange(2 * 4 * 5 * 6, dtype=np.float32).reshape(2, 4, 5, 6)
    image = sitk.GetImageFromArray(voxels, isVector=False)
    image.SetSpacing([1.1, 0.7, 2.5, 1.0])
    sitk.WriteImage(image, str(tmp_path / "x.nii.gz"))
    read, geometry = read_image([tmp_path / "x.nii.gz"])
    np.testing.assert_array_equal(read, voxels)
    np.testing.assert_allclose(geometry.spacing, (2.5, 0.7, 1.1), rtol=1e-6)
    assert geometry.size == (4, 5, 6) and len(geometry.direction) == 9
    assert count_channels(tmp_path / "x.nii.gz") == 2


def test_vector_images_and_pictures_among_images_are_told(tmp_path: Path) -> None:
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((4, 5, 6, 2), np.float32), isVector=True), str(tmp_path / "v.nii.gz")
    )
    with pytest.raises(CaseError, match="2 numbers a voxel"):
        read_image([tmp_path / "v.nii.gz"])
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6), np.uint8)), str(tmp_path / "p.png"))
    with pytest.raises(CaseError, match="is a picture"):
        read_image([tmp_path / "p.png"])


def test_labels_stored_as_floats_are_fine(tmp_path: Path) -> None:
    labels = np.random.default_rng(8).integers(0, 300, SHAPE)
    write_image(tmp_path / "x.nii.gz", labels.astype(np.float64), SPACING)
    read, _ = read_labels(tmp_path / "x.nii.gz")
    assert read.dtype == np.int16 and read.shape == (1, *SHAPE)
    np.testing.assert_array_equal(read[0], labels)


@pytest.mark.parametrize(
    "value, message", [(1.5, "whole numbers, 1 voxels are not"), (np.nan, "NaN"), (70000, "between -32768 and 32767")]
)
def test_bad_labels_are_refused(tmp_path: Path, value: float, message: str) -> None:
    labels = np.zeros(SHAPE)
    labels[1, 2, 3] = value
    write_image(tmp_path / "x.nii.gz", labels, SPACING)
    with pytest.raises(CaseError, match=rf"x\.nii\.gz.*{message}"):
        read_labels(tmp_path / "x.nii.gz")


@pytest.mark.parametrize("highest, dtype", [(254, np.uint8), (255, np.uint16), (999, np.uint16)])
def test_written_labels_come_back_in_their_geometry(tmp_path: Path, highest: int, dtype: type) -> None:
    labels = np.random.default_rng(9).integers(0, highest, SHAPE).astype(np.uint16)
    labels[0, 0, 0] = highest
    turned = (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    geometry = ImageGeometry(SPACING, (1.0, 2.0, -3.0), turned, SHAPE)
    write_labels(tmp_path / "new" / "x.nii.gz", labels, geometry)
    stored = sitk.ReadImage(str(tmp_path / "new" / "x.nii.gz"))
    assert sitk.GetArrayFromImage(stored).dtype == dtype
    read, back = read_labels(tmp_path / "new" / "x.nii.gz")
    np.testing.assert_array_equal(read[0], labels)
    np.testing.assert_allclose(back.direction, turned, atol=1e-6)
    np.testing.assert_allclose(back.spacing, SPACING, rtol=1e-6)
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "x.nii.gz"]


def test_writing_in_an_unknown_format_says_so(tmp_path: Path) -> None:
    geometry = ImageGeometry(SPACING, (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), SHAPE)
    with pytest.raises(OutputError, match=r"x\.unknown"):
        write_labels(tmp_path / "x.unknown", np.zeros(SHAPE, np.uint8), geometry)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_what_itk_wrote_only_in_part_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    write = sitk.WriteImage

    def write_part(image: sitk.Image, name: str, compress: bool) -> None:
        write(image, name, compress)
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: len(content) * 2 // 3])

    monkeypatch.setattr(sitk, "WriteImage", write_part)
    geometry = ImageGeometry(SPACING, (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), SHAPE)
    labels = np.random.default_rng(0).integers(0, 9, SHAPE)
    with pytest.raises(OutputError, match="could not be written whole"):
        write_labels(tmp_path / f"x{ending}", labels, geometry)
    assert not list(tmp_path.iterdir())


def test_geometry_survives_nnunets_properties(tmp_path: Path) -> None:
    geometry = ImageGeometry(SPACING, (1.0, 2.0, -3.0), (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0), SHAPE)
    properties = geometry.to_properties()
    assert properties["spacing"] == list(SPACING)
    assert properties["sitk_stuff"]["spacing"] == SPACING[::-1]
    assert ImageGeometry.from_properties(properties, SHAPE) == geometry
    for stuff in ({"itk_stuff": {}}, {"nibabel_stuff": {}}, {"nibabel_stuff": {"original_affine": [1, 2]}}):
        with pytest.raises(CaseError, match="preprocess it again"):
            ImageGeometry.from_properties({"spacing": [1, 1, 1], **stuff}, SHAPE)


def test_a_sheared_affine_is_told_as_that(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[0, 1] = 0.4
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), affine), str(tmp_path / "a.nii.gz"))
    with pytest.raises(CaseError, match="sheared.*NibabelIO"):
        read_image([tmp_path / "a.nii.gz"])
    image, geometry = read_image([tmp_path / "a.nii.gz"], "NibabelIO")
    assert image.shape == (1, 5, 4, 3) and geometry.spacing == pytest.approx((3, np.hypot(2, 0.4), 1))


@pytest.mark.parametrize(
    "name", ["c.nii.nii.gz", "c.hdr.nii.gz", "c.nia.nii.gz", "c.img.nii", "c.NII.GZ", "c.nii.GZ", "c.nii.gz.nii.gz"]
)
@pytest.mark.parametrize("reader", NIFTI_READERS)
def test_only_the_ending_of_a_name_says_what_a_file_is(tmp_path: Path, name: str, reader: str) -> None:
    labels = np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.int16)
    write_image(tmp_path / "plain.nii.gz", labels.astype(np.uint8), SPACING)
    _, geometry = read_labels(tmp_path / "plain.nii.gz", reader)
    expected = read_labels(tmp_path / "plain.nii.gz", reader)[0]
    write_labels(tmp_path / name, expected[0], geometry)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "plain.nii.gz"])
    again, same = read_labels(tmp_path / name, reader)
    np.testing.assert_array_equal(again, expected)
    assert same.spacing == pytest.approx(geometry.spacing) and same.reader == reader


@pytest.mark.parametrize("reader", NIFTI_READERS[1:])
def test_what_nibabel_cannot_read_is_one_case_error(tmp_path: Path, reader: str) -> None:
    write_image(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 99, (9, 12, 11)).astype(np.int16), SPACING)
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "half.nii.gz").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.nii.gz").write_text("no image")
    (tmp_path / "empty.nii").write_bytes(b"")
    for name in ("half.nii.gz", "text.nii.gz", "empty.nii", "gone.nii.gz", "a.nrrd"):
        with pytest.raises(CaseError, match=name):
            read_image([tmp_path / name], reader)


def test_distinct_values() -> None:
    labels = np.random.default_rng(10).choice([-1, 0, 3, 7, 32767], (3, 4, 5)).astype(np.int16)
    assert distinct_values(labels) == sorted(np.unique(labels).tolist())
    assert distinct_values(labels.transpose(2, 0, 1)) == sorted(np.unique(labels).tolist())
    assert distinct_values(np.zeros((0, 3), np.int16)) == [] and distinct_values(np.full((1, 2), 5)) == [5]
    long = np.zeros((1 << 20) + 3, np.int16)
    long[1 << 20] = 4
    long[-1] = -2
    assert distinct_values(long) == [-2, 0, 4]
