"""Images of every kind that datasets and callers have, and those that are no good."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.synthetic import make_case, write_image

from nnssl_adapt.errors import CaseError, ConfigurationError, ModelFolderError, PredictionError
from nnssl_adapt.inference.predictor import Predictor

SPACING = (3.0, 1.2, 0.8)  # Z, Y, X
SHAPE = (14, 30, 40)


def make_images(folder, names="ab", channels=1, shape=SHAPE):
    folder.mkdir()
    for name in names:
        image, _ = make_case(np.random.default_rng(ord(name)), shape, channels, 3)
        for channel in range(channels):
            write_image(folder / f"{name}_{channel:04d}.nii.gz", image[channel].astype(np.int16), SPACING)
    return folder


def predictor_of(model, **arguments):
    return Predictor(model, **{"device": "cpu", "tta": False, **arguments})


# -- what they are -----------------------------------------------------------------------------------------------------


def test_simpleitk_images(make_model, tmp_path):
    folder = make_images(tmp_path / "images", channels=2)
    predictor = predictor_of(make_model(channels=2))
    files = [folder / "a_0000.nii.gz", folder / "a_0001.nii.gz"]
    expected = predictor.predict(files)
    images = [sitk.ReadImage(str(file)) for file in files]
    images[0].SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    images[1].SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    labels = predictor.predict(images)
    assert isinstance(labels, sitk.Image) and np.array_equal(sitk.GetArrayFromImage(labels), expected)
    for part in ("Size", "Spacing", "Origin", "Direction"):
        assert getattr(labels, f"Get{part}")() == pytest.approx(getattr(images[0], f"Get{part}")())
    vector = sitk.Compose(images)  # channels as components, as NRRD and MHA files have them
    assert np.array_equal(sitk.GetArrayFromImage(predictor.predict(vector)), expected)
    named = tmp_path / "out.nii.gz"
    assert predictor.predict(images, named) == [named]
    assert sitk.ReadImage(str(named)).GetDirection() == pytest.approx(images[0].GetDirection())
    with pytest.raises(CaseError, match="channel 1: .*channel 0"):
        predictor.predict([images[0], images[1][:, :, :-1]])
    with pytest.raises(CaseError, match="2 channel"):
        predictor.predict(images[0])
    with pytest.raises(CaseError, match="got 2 axes"):
        predictor.predict(images[0][:, :, 3])


def test_several_files_are_told_apart_by_their_names(make_model, tmp_path):
    folder = make_images(tmp_path / "images", names="abc", channels=2)
    predictor = predictor_of(make_model(channels=2))
    files = sorted(folder.iterdir(), reverse=True)  # channels in the wrong order too
    expected = predictor.predict(folder)
    found = predictor.predict(files)
    assert found.keys() == {"a", "b", "c"}
    for name, labels in expected.items():
        assert np.array_equal(found[name], labels)
    written = predictor.predict(files[:4], tmp_path / "out")
    assert sorted(path.name for path in written) == ["b.nii.gz", "c.nii.gz"]
    with pytest.raises(PredictionError, match=r"1 of 3 images.*\n  a: .*a_0000\.nii\.gz"):
        predictor.predict(files[:5], tmp_path / "most")
    assert sorted(path.name for path in (tmp_path / "most").glob("*.nii.gz")) == ["b.nii.gz", "c.nii.gz"]
    with pytest.raises(ConfigurationError, match="output folder"):
        predictor.predict(files, tmp_path / "x.nii.gz")


def test_several_files_of_one_channel_are_several_images(make_model, tmp_path):
    folder = make_images(tmp_path / "images")
    (tmp_path / "other").mkdir()
    predictor = predictor_of(make_model())
    files = sorted(folder.iterdir())
    assert predictor.predict(files).keys() == {"a", "b"}
    twin = tmp_path / "other" / "a_0000.nii.gz"
    twin.write_bytes(files[0].read_bytes())
    with pytest.raises(PredictionError, match="different folders.*--keep-folders"):
        predictor.predict([*files, twin])
    written = predictor.predict([*files, twin], tmp_path / "out", keep_folders=True)
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in written) == [
        "images/a.nii.gz",
        "images/b.nii.gz",
        "other/a.nii.gz",
    ]


@pytest.mark.parametrize("shape", [(1, 40, 50), (14, 1, 40)])
def test_a_single_slice(make_model, tmp_path, shape):
    """2D images in a 3D file are padded to the patch like all that is small."""
    folder = make_images(tmp_path / "images", names="a")
    image = np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)
    write_image(folder / "a_0000.nii.gz", image, (1.0, 1.2, 0.8))
    (path,) = predictor_of(make_model()).predict(folder, tmp_path / "out")
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert labels.shape == shape and len(np.unique(labels)) > 1


def test_regions_and_an_ignore_label(make_model, tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    model = make_model(labels={"labels": labels, "regions_class_order": [1, 2]}, heads=2)
    predictor = predictor_of(model)
    folder = make_images(tmp_path / "images", names="a")
    (path,) = predictor.predict(folder, tmp_path / "out", save_probabilities=True)
    segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    probabilities = np.load(tmp_path / "out" / "a.npz")["probabilities"]
    assert probabilities.shape == (2, *SHAPE) and set(np.unique(segmentation)) == {0, 1, 2}
    core, whole = probabilities[1] > 0.5, probabilities[0] > 0.5
    assert np.array_equal(segmentation, np.where(core, 2, np.where(whole, 1, 0)))


def test_an_ignore_label_has_no_output_of_its_own(make_model, tmp_path):
    labels = {"background": 0, "cord": 1, "lesion": 2, "ignore": 3}
    predictor = predictor_of(make_model(labels={"labels": labels}))
    found = predictor.predict(make_images(tmp_path / "images", names="a"))
    assert set(np.unique(found["a"])) == {0, 1, 2}


# -- what is wrong with them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "spacing", "problem"),
    [((14, 30, 41), SPACING, "shape|size|voxels"), (SHAPE, (3.0, 1.3, 0.8), "spacing")],
)
def test_channels_on_different_grids(make_model, tmp_path, shape, spacing, problem):
    folder = make_images(tmp_path / "images", channels=2)
    write_image(folder / "a_0001.nii.gz", np.ones(shape, np.int16), spacing)
    with pytest.raises(CaseError, match=rf"a_0001\.nii\.gz: .*({problem}).*a_0000\.nii\.gz"):
        predictor_of(make_model(channels=2)).predict([folder / "a_0000.nii.gz", folder / "a_0001.nii.gz"])


def test_an_empty_folder(make_model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaseError, match="has no images: expected names like CASE_0000.nii.gz"):
        predictor_of(make_model()).predict(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_plan(make_model):
    model = make_model(folds=(0, 1))
    path = model / "fold_1" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    first = next(iter(content["network_weights"]))
    content["network_weights"][first] = torch.zeros(9, 1, 3, 3, 3)
    torch.save(content, path)
    with pytest.raises(ModelFolderError, match=r"fold_1/checkpoint_final\.pth.*plans\.json"):
        predictor_of(model)
    assert predictor_of(model, folds=0).folds == (0,)


def test_folds_of_different_configurations_are_not_averaged(make_model):
    model = make_model(folds=(0, 1))
    path = model / "fold_1" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "init_args": {"configuration": "3d_lowres", "fold": 1}}, path)
    with pytest.raises(ModelFolderError, match="configuration 3d_lowres, other folds .* in 3d_fullres"):
        predictor_of(model)


def test_a_precision_that_overflows_is_an_error_where_there_is_no_other(make_model, tmp_path):
    model = make_model()
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    name = next(reversed(content["network_weights"]))
    content["network_weights"][name] = content["network_weights"][name] * float("inf")
    torch.save(content, path)
    from nnssl_adapt.errors import PredictionError

    with pytest.raises(PredictionError, match="NaN or infinite"):
        predictor_of(model).predict_array(np.random.default_rng(0).normal(size=SHAPE), spacing=SPACING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"precision": "int8"}, "expected fp16, bf16, fp32"), ({"batch_size": 0}, "at least one")],
)
def test_wishes_that_make_no_sense(make_model, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        predictor_of(make_model(), **arguments)
