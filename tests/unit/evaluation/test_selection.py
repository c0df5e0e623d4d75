"""The choice of the best model: what is compared, what is written, and what stops it."""

import json
import shutil

import numpy as np
import pytest
from support.crossval_folders import DATASET, LABELS, SPACING, description, write_model, write_references
from support.synthetic import write_image

from nnssl_adapt.errors import CaseError, ConfigurationError, DatasetNotFound, ModelFolderError
from nnssl_adapt.evaluation.crossval import TrainedModel, accumulate, reference_folder
from nnssl_adapt.evaluation.instructions import inference_commands, instructions_text
from nnssl_adapt.evaluation.selection import find_best, find_models, score_of

GOOD = "nnUNetTrainer__nnUNetPlans__3d_lowres"
POOR = "nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture
def models(nnunet_folders):
    """A good and a poor model of three folds; returns the dataset's results folder."""
    references = write_references(nnunet_folders)
    write_model(nnunet_folders, POOR, LABELS, references, [0.9] * 4, 1)
    write_model(nnunet_folders, GOOD, LABELS, references, [0.1] * 4, 2, islands=(2,))
    return nnunet_folders / "nnUNet_results" / DATASET


def test_the_best_and_how_to_use_it(models):
    selection = find_best(991, ensembles=False)
    assert selection.best.name == GOOD and selection.folds == (0, 1, 2)
    assert [candidate.name for candidate in selection.candidates] == [POOR, GOOD]  # nnU-Net's order
    assert len(selection.best.summary.cases) == 5
    assert selection.decision.postprocessing.steps == ((1, 2, 3),)
    steps = models / GOOD / "crossval_results_folds_0_1_2" / "postprocessing.json"
    (predict,) = inference_commands(selection)
    assert predict == (
        "nnssl-adapt predict -d Dataset991_Tiny -i INPUT_FOLDER -o OUTPUT_FOLDER -f 0 1 2 "
        f"-tr nnUNetTrainer -c 3d_lowres -p nnUNetPlans --postprocess {steps}"
    )
    assert steps.is_file() and predict in instructions_text(selection)


def test_an_ensemble_is_predicted_in_three_steps(models):
    shutil.rmtree(models / GOOD)
    references = {path.name[0]: path for path in reference_folder(DATASET).iterdir()}
    import SimpleITK as sitk

    arrays = {name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for name, path in references.items()}
    write_model(models.parents[1], "nnUNetTrainer__otherPlans__3d_fullres", LABELS, arrays, [0.9] * 4, 7)
    selection = find_best(991)
    assert selection.best.name.startswith("ensemble___")
    commands = inference_commands(selection)
    assert [command.split()[1] for command in commands[:3]] == ["predict", "predict", "ensemble"]
    assert all("--save-probabilities" in command for command in commands[:2])
    ensemble = "nnssl-adapt ensemble OUTPUT_FOLDER_MODEL_1 OUTPUT_FOLDER_MODEL_2 -o OUTPUT_FOLDER"
    if selection.decision.postprocessing.steps:
        ensemble += f" --postprocess {selection.best.folder / 'postprocessing.json'}"
    assert commands[2:] == [ensemble]


def test_what_we_cant_predict_is_predicted_with_nnunet(models):
    path = models / GOOD / "plans.json"
    content = json.loads(path.read_text())
    content["configurations"]["3d_lowres"]["patch_size"] = [24, 32]
    path.write_text(json.dumps(content))
    first, postprocess = inference_commands(find_best(991, ensembles=False))
    assert first.startswith("nnUNetv2_predict -d Dataset991_Tiny -i INPUT_FOLDER")
    steps = models / GOOD / "crossval_results_folds_0_1_2" / "postprocessing.json"
    assert postprocess == f"nnssl-adapt postprocess -i OUTPUT_FOLDER -o OUTPUT_FOLDER_PP --steps {steps}"


def test_folds_and_names_may_be_chosen(models):
    selection = find_best(991, configurations=["3d_fullres"], folds=[1, 0])
    assert selection.best.name == POOR and len(selection.candidates) == 1
    assert selection.best.folder.name == "crossval_results_folds_1_0"
    assert sorted(case.prediction_file[-8] for case in selection.best.summary.cases) == list("abde")
    names = [model.name for model in find_models(991, configurations=["3d_lowres", "3d_fullres"])]
    assert names == [GOOD, POOR]  # the order that was asked for


def test_files_of_an_earlier_time_are_gone(models):
    model = TrainedModel(models / GOOD)
    folder, _ = accumulate(model, (0, 1, 2), reference_folder(DATASET))
    (folder / "z.nii.gz").write_bytes(b"old")
    _, summary = accumulate(model, (0, 1, 2), reference_folder(DATASET))
    assert not (folder / "z.nii.gz").exists() and len(summary.cases) == 5


def test_a_class_in_no_case_does_not_stop_the_choice(models, caplog):
    for name in (GOOD, POOR):
        path = models / name / "dataset.json"
        content = json.loads(path.read_text())
        content["labels"]["never"] = 4
        path.write_text(json.dumps(content))
    selection = find_best(991, ensembles=False)
    assert selection.best.name == GOOD and 0.9 < selection.best.score < 1
    assert "in no case: never" in caplog.text
    assert np.isnan(selection.best.summary.foreground_mean_dice) and score_of(selection.decision.after) > 0.9


def test_what_is_missing_is_named(models):
    with pytest.raises(DatasetNotFound, match="'77'"):
        find_best(77)
    with pytest.raises(ModelFolderError, match=r"no model with -c 2d; there is: 3d_fullres, 3d_lowres"):
        find_best(991, configurations=["2d"])
    with pytest.raises(ModelFolderError, match=rf"not trained and validated: {POOR}: 4, {GOOD}: 4; train"):
        find_best(991, folds=[0, 4])
    for path in (models / GOOD / "fold_1" / "validation").glob("*.npz"):
        path.unlink()
    with pytest.raises(CaseError, match=r"fold_1/validation.*--disable_ensembling"):
        find_best(991)
    shutil.rmtree(models / GOOD / "fold_2")
    with pytest.raises(ModelFolderError, match=f"{GOOD}: 2"):
        find_best(991)
    with pytest.raises(ModelFolderError, match=r"has no validation of fold 2 \(validated: 0, 1\)"):
        accumulate(TrainedModel(models / GOOD), (0, 2), reference_folder(DATASET))


def test_models_that_cant_be_compared(models):
    validation = models / GOOD / "fold_1" / "validation"
    (validation / "b.nii.gz").rename(validation / "x.nii.gz")
    with pytest.raises(CaseError, match=r"same cases.*b, x"):
        find_best(991)
    (validation / "x.nii.gz").rename(validation / "b.nii.gz")
    shutil.copy(validation / "b.nii.gz", models / GOOD / "fold_0" / "validation")
    with pytest.raises(CaseError, match="b was validated in fold_0 and in fold_1"):
        find_best(991, configurations=["3d_lowres"])
    path = models / GOOD / "dataset.json"
    content = json.loads(path.read_text())
    del content["labels"]["shell"]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="shell"):
        find_best(991)


def relabel(model, labels, channels=None):
    path = model / "dataset.json"
    content = json.loads(path.read_text()) | labels
    path.write_text(json.dumps(content | ({"channel_names": channels} if channels else {})))


def test_outputs_of_models_are_paired_by_name(models, nnunet_folders):
    """The same model twice, once with its regions in another order: their ensemble is as good as each."""
    shutil.rmtree(models / GOOD)
    shutil.rmtree(models / POOR)
    references = write_references(nnunet_folders)
    regions = {"labels": {"background": 0, "whole": [1, 2, 3], "rim": 2, "tip": 3}, "regions_class_order": [1, 2, 3]}
    turned = {"labels": {"background": 0, "whole": [1, 2, 3], "Tip": 3, "RIM": 2}, "regions_class_order": [1, 3, 2]}
    write_model(nnunet_folders, GOOD, regions, references, [0.1] * 3, 2)
    for path in (models / GOOD).rglob("*.npz"):
        other = models / POOR / path.relative_to(models / GOOD)
        other.parent.mkdir(parents=True, exist_ok=True)
        with np.load(path) as saved:
            np.savez(other, probabilities=saved["probabilities"][[0, 2, 1]])
        for ending in (".pkl", ".nii.gz"):
            shutil.copy(path.with_name(path.stem + ending), other.parent)
    for name in ("dataset.json", "plans.json"):
        shutil.copy(models / GOOD / name, models / POOR)
    relabel(models / POOR, turned)
    scores = [candidate.score for candidate in find_best(991).candidates]
    assert len(scores) == 3 and max(scores) - min(scores) < 1e-9 and scores[0] > 0.9


def test_labels_that_are_numbered_differently_are_refused_by_name(models, nnunet_folders):
    relabel(models / GOOD, {"labels": {"background": 0, "rim": 1, "core": 2, "shell": 3}})
    with pytest.raises(ConfigurationError, match=f"core is label 1 in {POOR} and 2 in {GOOD}"):
        find_best(991, ensembles=False)
    path = nnunet_folders / "nnUNet_raw" / DATASET / "dataset.json"
    path.write_text(json.dumps(description(LABELS)))
    with pytest.raises(ConfigurationError, match=rf"core is label 1 in {path} and 2 in {GOOD}"):
        find_best(991, configurations=["3d_lowres"])


def test_models_that_take_their_channels_in_another_order_are_told_apart(models):
    relabel(models / POOR, {}, {"0": "T1", "1": "T2"})
    relabel(models / GOOD, {}, {"0": "T2", "1": "T1"})
    text = instructions_text(find_best(991, ensembles=False))
    assert "T2 (_0000), T1 (_0001)" in text


def test_no_references_and_no_models(models, nnunet_folders):
    shutil.rmtree(nnunet_folders / "nnUNet_preprocessed" / DATASET / "gt_segmentations")
    assert reference_folder(DATASET) == nnunet_folders / "nnUNet_raw" / DATASET / "labelsTr"
    shutil.rmtree(nnunet_folders / "nnUNet_raw" / DATASET / "labelsTr")
    with pytest.raises(CaseError, match="no reference labels of Dataset991_Tiny"):
        find_best(991)
    shutil.rmtree(models / GOOD)
    shutil.rmtree(models / POOR)
    with pytest.raises(ModelFolderError, match="has no trained models"):
        find_best(991)


def test_a_label_file_of_another_shape_stops_it(models, nnunet_folders):
    truth = nnunet_folders / "nnUNet_preprocessed" / DATASET / "gt_segmentations" / "c.nii.gz"
    write_image(truth, np.zeros((5, 6, 7), np.uint8), SPACING)
    with pytest.raises(CaseError, match=r"c\.nii\.gz has shape"):
        find_best(991, ensembles=False)
