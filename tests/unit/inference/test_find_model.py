"""Models found as nnU-Net's users name them."""

import pytest

from nnssl_adapt.errors import DatasetNotFound, ModelFolderError
from nnssl_adapt.inference.find_model import find_model_folder


@pytest.fixture
def results(nnunet_folders):
    """Three models of one dataset, one of another, and a folder without plans."""
    root = nnunet_folders / "nnUNet_results"
    for dataset, name in (
        ("Dataset041_DeepGrey", "nnUNetTrainer__nnUNetPlans__3d_fullres"),
        ("Dataset041_DeepGrey", "nnUNetTrainer__nnUNetPlans__3d_lowres"),
        ("Dataset041_DeepGrey", "PretrainedTrainer_150ep__ptPlans__openmind____Spacing__1__3d_fullres"),
        ("Dataset042_Cord", "nnUNetTrainer__nnUNetPlans__3d_fullres"),
    ):
        (root / dataset / name).mkdir(parents=True)
        (root / dataset / name / "plans.json").touch()
    (root / "Dataset042_Cord" / "nnUNetTrainer__nnUNetPlans__2d").mkdir()
    (root / "Dataset043_Empty").mkdir()
    return root


def test_the_only_one_that_fits_is_taken(results):
    assert find_model_folder(42) == results / "Dataset042_Cord" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    grey = results / "Dataset041_DeepGrey"
    assert find_model_folder("41", configuration="3d_lowres") == grey / "nnUNetTrainer__nnUNetPlans__3d_lowres"
    ours = find_model_folder("Dataset041_DeepGrey", trainer="PretrainedTrainer_150ep")
    assert ours.name == "PretrainedTrainer_150ep__ptPlans__openmind____Spacing__1__3d_fullres"
    assert find_model_folder(41, plans="ptPlans__openmind____Spacing__1") == ours


def test_several_are_listed_as_they_would_be_typed(results):
    with pytest.raises(ModelFolderError, match=r"several models; which one\?") as caught:
        find_model_folder(41)
    assert "-d Dataset041_DeepGrey -tr nnUNetTrainer -p nnUNetPlans -c 3d_lowres" in str(caught.value)
    assert "-tr PretrainedTrainer_150ep -p ptPlans__openmind____Spacing__1 -c 3d_fullres" in str(caught.value)
    with pytest.raises(ModelFolderError, match="several models with -p nnUNetPlans") as caught:
        find_model_folder(41, plans="nnUNetPlans")
    assert "PretrainedTrainer" not in str(caught.value)


def test_what_does_not_exist_is_named_with_what_does(results):
    with pytest.raises(ModelFolderError, match=r"(?s)-tr Other, -c 3d_fullres.*Dataset042_Cord"):
        find_model_folder(42, trainer="Other", configuration="3d_fullres")
    with pytest.raises(ModelFolderError, match="Dataset043_Empty has no trained model"):
        find_model_folder(43)
    with pytest.raises(DatasetNotFound, match="no dataset '77'"):
        find_model_folder(77)
