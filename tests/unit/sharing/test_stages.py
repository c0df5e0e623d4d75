"""A cascade is published and installed with its first stage, and predicts from that alone."""

import zipfile

import numpy as np
import pytest
from support.model_folders import write_cascade, write_model_folder
from support.planar import write_planar_model

from nnssl_adapt.errors import ConfigurationError, ModelFolderError, SourceError
from nnssl_adapt.inference.predictor import Predictor
from nnssl_adapt.inference.published import find_published
from nnssl_adapt.sharing.install import install_model
from nnssl_adapt.sharing.package import make_package
from nnssl_adapt.sharing.push import push_model

LOW, CASCADE = (f"nnUNetTrainer__nnUNetPlans__{name}" for name in ("3d_lowres", "3d_cascade_fullres"))


@pytest.fixture
def cascade(tmp_path, nnunet_folders):
    return write_cascade(tmp_path / "trained")


def labels_of(model, tmp_path):
    image = np.random.default_rng(0).normal(size=(1, 20, 30, 34)).astype(np.float32)
    return Predictor(model, device="cpu", tta=False).predict(image, spacing=(1.0, 1.0, 1.0))


def test_both_stages_are_in_the_zip_and_predict_as_before(cascade, tmp_path):
    package = make_package(cascade, tmp_path / "out", prove=False)
    assert list(package.zips) == ["nnunet"]  # the toolbox has one network a package
    with zipfile.ZipFile(package.zips["nnunet"]) as archive:
        weights = {name for name in archive.namelist() if name.endswith(".pth")}
    assert weights == {f"Dataset991_Tiny/{name}/fold_0/checkpoint_final.pth" for name in (LOW, CASCADE)}
    model = install_model(package.zips["nnunet"])
    assert model.path.name == CASCADE and (model.path.parent / LOW / "installed.json").is_file()
    ours, before = labels_of(model, tmp_path), labels_of(cascade, tmp_path)
    assert np.array_equal(ours, before) and len(np.unique(before)) == 3
    assert "3d_lowres" in (package.folder / "README.md").read_text()
    with pytest.raises(ConfigurationError, match="one network"):
        make_package(cascade, tmp_path / "sct", layout="sct", prove=False)


def test_a_first_stage_that_is_missing_or_of_other_folds_is_named(tmp_path, nnunet_folders, caplog):
    cascade = write_cascade(tmp_path / "trained", folds=(0, 1))
    low = cascade.with_name(LOW)
    (low / "fold_1" / "checkpoint_final.pth").unlink()
    with pytest.raises(ModelFolderError, match="3d_lowres has no fold_1"):
        make_package(cascade, tmp_path / "out", prove=False)
    low.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelFolderError) as caught:
        make_package(cascade, tmp_path / "out", prove=False)
    assert caught.value.path == low and not (tmp_path / "out").exists()
    install_model(cascade)
    assert LOW in caplog.text and "-prev_stage_predictions" in caplog.text


def test_a_folder_brings_the_stage_beside_it(cascade, nnunet_folders):
    model = install_model(cascade)
    assert sorted(path.name for path in model.path.parent.iterdir()) == [CASCADE, LOW]


def test_the_same_first_stage_may_be_there_already(cascade, tmp_path):
    install_model(cascade.with_name(LOW))
    install_model(cascade)
    with pytest.raises(ConfigurationError, match="--overwrite"):
        install_model(cascade)


def test_of_several_models_one_is_asked_for(cascade, tmp_path):
    write_model_folder(cascade.parents[1], name="nnUNetTrainer__nnUNetPlans__3d_other")
    with pytest.raises(SourceError, match="-c"):
        install_model(cascade.parent)
    model = install_model(cascade.parent, configuration="3d_cascade_fullres")
    assert sorted(path.name for path in model.path.parent.iterdir()) == [CASCADE, LOW]
    alone = install_model(cascade.parent, dataset="Dataset012_Low", configuration="3d_lowres")
    assert [path.name for path in alone.path.parent.iterdir()] == [LOW]
    with pytest.raises(SourceError, match="3d_none"):
        install_model(cascade.parent, configuration="3d_none")


def test_the_hub_has_both_stages(cascade, hub, tmp_path):
    pushed = push_model("me/cascade", cascade, licence="MIT")
    assert {name.split("/")[0] for name in pushed.files if "/" in name} == {LOW, CASCADE}
    found = find_published("me/cascade")
    assert found.name == CASCADE and (found.parent / LOW / "fold_0" / "checkpoint_final.pth").is_file()
    assert np.array_equal(labels_of("me/cascade", tmp_path), labels_of(cascade, tmp_path))
    assert install_model("me/cascade").path.with_name(LOW).is_dir()


def test_a_model_of_pictures_is_proven_on_a_picture(tmp_path, nnunet_folders):
    pytest.importorskip("PIL")
    model = write_planar_model(tmp_path / "trained")
    package = make_package(model, tmp_path / "out")
    assert list(package.zips) == ["nnunet"] and package.proof.with_model == 1
    assert "A 2D segmentation model" in (package.folder / "README.md").read_text()
    assert install_model(package.zips["nnunet"]).plan.is_planar
