import numpy as np
import pytest
import SimpleITK as sitk
from support.synthetic import write_image

import nnssl_adapt as na
from nnssl_adapt.errors import CaseError

SHAPE, SPACING = (6, 9, 12), (3.0, 1.0, 0.5)


def volumes():
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 2:5, 7:11] = 2
    return image, labels


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_what_is_given_is_drawn_through_the_centre_of_the_labels():
    image, labels = volumes()
    figure = na.show(image, labels, np.roll(labels, 1, 0), spacing=SPACING)
    assert titles(figure)[:3] == ["image, z = 2", "reference, z = 2", "prediction, z = 2"]  # centre 1.5, to even
    assert titles(figure)[3] == "image, y = 3" and titles(figure)[6] == "image, x = 8"  # which plane is not known
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1", "2"]
    # Rows of a coronal picture are slices of 3 mm, its columns 0.5 mm apart.
    assert figure.axes[3].get_aspect() == 6
    assert len(na.show(image).axes) == 3 and len(na.show(image[None], labels).axes) == 6
    assert na.show(image, labels, class_names=("cord",)).legends[0].get_texts()[0].get_text() == "cord"


def test_files_and_images_bring_their_spacing(tmp_path):
    image, labels = volumes()
    write_image(tmp_path / "a.nii.gz", image, SPACING)
    itk = sitk.GetImageFromArray(labels)
    itk.SetSpacing(SPACING[::-1])
    for first in (tmp_path / "a.nii.gz", str(tmp_path / "a.nii.gz")):
        assert na.show(first, itk).axes[2].get_aspect() == 6


@pytest.mark.parametrize("code", ["LPS", "RAS", "PIR", "ASL", "SRA"])
def test_however_it_is_stored_it_is_drawn_upright(code):
    """``code``: where the axes x, y, z go. What is drawn is the same, the numbers are those of the file."""
    image, labels = volumes()
    itk = [sitk.GetImageFromArray(array) for array in (image, labels)]  # LPS: Z to superior, Y to posterior, X to left
    for one in itk:
        one.SetSpacing(SPACING[::-1])
    turned = [sitk.DICOMOrient(one, code) for one in itk]
    figure = na.show(*turned)
    drawn = [plot.images[0].get_array() for plot in figure.axes[::2]]
    assert np.array_equal(drawn[0], image[2, ::-1])  # anterior is up
    assert np.array_equal(drawn[1], image[:, 3])
    assert np.array_equal(drawn[2], image[:, ::-1, 8])
    assert [plot.get_aspect() for plot in figure.axes[::2]] == [2, 6, 3]
    assert [plot.texts[0].get_text() for plot in figure.axes[::2]] == ["R", "R", "P"]
    for title, index in zip(titles(figure)[::2], ((2, 3, 8),) * 3, strict=True):
        plane, axis, number = title.removeprefix("image, ").replace(",", "").replace("=", "").split()
        world = ("axial", "coronal", "sagittal").index(plane)
        at = [0, 0, 0]
        at["xyz".index(axis)] = int(number)
        there = turned[0].TransformIndexToPhysicalPoint(at)
        assert there[2 - world] == pytest.approx(index[world] * SPACING[world])


def test_what_does_not_fit_is_said():
    image, labels = volumes()
    with pytest.raises(CaseError, match=r"\(6, 9, 11\).*\(6, 9, 12\)"):
        na.show(image, labels[..., 1:])
    with pytest.raises(CaseError, match="the prediction has values that are not whole"):
        na.show(image, labels, image)
    with pytest.raises(CaseError, match="expected three axes"):
        na.show(image[0])


def test_interactive_where_ipyniivue_is_installed(tmp_path):
    ipyniivue = pytest.importorskip("ipyniivue")
    image, labels = volumes()
    write_image(tmp_path / "a.nii.gz", image, SPACING)
    widget = na.show(tmp_path / "a.nii.gz", labels, class_names=("a", "cord"), interactive=True)
    assert isinstance(widget, ipyniivue.NiiVue)
    drawn, over = widget.volumes
    (tmp_path / "b.nii.gz").write_bytes(drawn.data)
    back, stored = sitk.ReadImage(tmp_path / "b.nii.gz"), sitk.ReadImage(tmp_path / "a.nii.gz")
    assert np.allclose(sitk.GetArrayFromImage(back), image, atol=1e-3)
    for one, other in ((back.GetSpacing(), stored.GetSpacing()), (back.GetDirection(), stored.GetDirection())):
        assert one == pytest.approx(other)
    assert back.GetOrigin() == pytest.approx(stored.GetOrigin())
    (tmp_path / "c.nii.gz").write_bytes(over.data)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "c.nii.gz")), labels)
    assert over.colormap_label.labels[2] == "cord" and 0 < over.opacity < 1
    assert widget.opts.is_radiological_convention


def test_a_notebook_without_pyplot_shows_the_figure():
    assert na.show(*volumes())._repr_png_().startswith(b"\x89PNG")


def test_interactive_without_ipyniivue_is_the_figure_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr("nnssl_adapt.evaluation.show.widget_available", lambda: False)
    figure = na.show(*volumes(), interactive=True)
    assert titles(figure)[0] == "image, z = 2" and "nnssl-adapt[viewer]" in caplog.text
