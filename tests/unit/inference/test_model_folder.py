"""Model folders: what is read of them, and what is said when something is missing."""

import json
import shutil

import numpy as np
import pytest
import torch

from nnssl_adapt.errors import ModelFolderError, PlanError, UnreadableCheckpoint, UnsafeCheckpoint
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.inference.predictor import Predictor


def change(path, **entries):
    content = torch.load(path, weights_only=False)
    content.update(entries)
    torch.save(content, path)


def change_plans(folder, **entries):
    content = json.loads((folder / "plans.json").read_text())
    for key, value in entries.items():
        (content if key in content else content["configurations"]["3d_fullres"])[key] = value
    (folder / "plans.json").write_text(json.dumps(content))


def test_what_a_folder_says(make_model):
    folder = make_model(folds=(2, 0, "all"), channels=2)
    shutil.copy(folder / "fold_0" / "checkpoint_final.pth", folder / "fold_0" / "checkpoint_best.pth")
    (folder / "fold_3").mkdir()  # a run that has not come to a checkpoint
    (folder / "fold_3" / "checkpoint_latest.pth").touch()
    model = ModelFolder.open(folder)
    assert model.folds == (0, 2, "all")
    assert model.folds_with("final") == (0, 2) and model.folds_with("best") == (0,)
    assert model.configuration == model.plan.configuration == "3d_fullres"
    assert model.plan.patch_size == (16, 24, 32)
    assert model.labels.class_names == ("cord", "lesion")
    assert model.channel_names == ("MR0", "MR1")
    assert model.dataset_json["numTraining"] == 5
    assert "0, 2, all" in str(model)
    weights = model.load_weights(2)
    assert weights.trainer_name == "nnUNetTrainer" and weights.mirror_axes == (0, 1, 2)
    network = model.build_network()
    model.load_into(network, weights, "fold 2")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights.network_weights[name]), name


def test_a_folder_is_known_before_it_is_trained(tmp_path):
    model = ModelFolder(tmp_path / "nnUNetTrainer__nnUNetPlans__3d_lowres")
    assert model.folds == ()
    assert model.configuration == "3d_lowres"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compiled_and_parallel_training_are_stripped(make_model, prefix):
    folder = make_model()
    path = folder / "fold_0" / "checkpoint_final.pth"
    weights = torch.load(path, weights_only=True)["network_weights"]
    change(path, network_weights={prefix + name: tensor for name, tensor in weights.items()})
    model = ModelFolder.open(folder)
    assert model.load_weights(0).network_weights.keys() == weights.keys()
    model.load_into(model.build_network(), model.load_weights(0), "x")


def test_numpy_numbers_that_nnunet_logs_are_fine_and_no_mirroring_is_none(make_model):
    folder = make_model()
    path = folder / "fold_0" / "checkpoint_final.pth"
    change(
        path,
        _best_ema=np.float64(0.5),
        logging={"mean_fg_dice": [np.float32(0.1)], "lrs": [np.float64(0.01)]},
        inference_allowed_mirroring_axes=None,
    )
    assert ModelFolder.open(folder).load_weights(0).mirror_axes == ()


class Intruder:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_checkpoint_that_would_run_code_is_refused(make_model, capsys):
    folder = make_model()
    change(folder / "fold_0" / "checkpoint_final.pth", logging=Intruder())
    with pytest.raises(UnsafeCheckpoint, match="print"):
        ModelFolder.open(folder)
    assert capsys.readouterr().out == ""


def test_a_truncated_checkpoint_is_named(make_model):
    folder = make_model()
    path = folder / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UnreadableCheckpoint, match=r"checkpoint_final\.pth"):
        ModelFolder.open(folder)


@pytest.mark.parametrize("name", ["dataset.json", "plans.json"])
def test_missing_files_are_named(make_model, name):
    folder = make_model()
    (folder / name).unlink()
    with pytest.raises(ModelFolderError, match=f"has no {name}"):
        ModelFolder.open(folder)


def test_the_right_folder_is_proposed(make_model, tmp_path):
    folder = make_model()
    for wrong in (folder.parent, folder / "fold_0"):
        with pytest.raises(ModelFolderError, match="did you mean .*nnUNetTrainer__nnUNetPlans__3d_fullres"):
            ModelFolder.open(wrong)
    with pytest.raises(ModelFolderError, match="is not a folder"):
        ModelFolder.open(tmp_path / "nowhere")


def test_missing_folds_are_listed_with_those_there_are(make_model):
    folder = make_model(folds=(0, 1))
    model = ModelFolder.open(folder)
    with pytest.raises(ModelFolderError, match=r"fold_4/checkpoint_final\.pth.*0 \(final\), 1 \(final\)"):
        model.load_weights(4)
    with pytest.raises(ModelFolderError, match=r"no fold_0/checkpoint_best\.pth"):
        model.checkpoint_path(0, "best")
    with pytest.raises(ModelFolderError, match="unknown checkpoint 'latest'"):
        model.checkpoint_path(0, "latest")
    shutil.rmtree(folder / "fold_0")
    shutil.rmtree(folder / "fold_1")
    with pytest.raises(ModelFolderError, match="no trained fold"):
        ModelFolder.open(folder)


def test_weights_of_another_network_are_refused_and_leave_it_alone(make_model):
    folder = make_model()
    model = ModelFolder.open(folder)
    network = model.build_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights = model.load_weights(0)
    first = next(iter(weights.network_weights))
    weights.network_weights["stranger"] = weights.network_weights.pop(first)
    with pytest.raises(ModelFolderError, match="stranger has no place in it") as caught:
        model.load_into(network, weights, "fold_0/checkpoint_final.pth")
    assert f"{first} is missing" in str(caught.value) and "nnUNetTrainer builds another" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_another_number_of_labels_is_a_shape_that_does_not_match(make_model):
    folder = make_model(labels={"labels": {"background": 0, "a": 1, "b": 2, "c": 3}})
    model = ModelFolder.open(folder)
    with pytest.raises(ModelFolderError, match=r"is \(3, 6, 1, 1, 1\) and not \(4, 6, 1, 1, 1\)"):
        model.load_into(model.build_network(), model.load_weights(0), "x")


def test_weights_that_never_saw_a_previous_stage_are_no_cascade(make_model):
    folder = make_model()
    change_plans(folder, previous_stage="3d_lowres")
    model = ModelFolder.open(folder)
    with pytest.raises(ModelFolderError, match=r"is \(\d+, 1, .*and not \(\d+, 3, "):
        model.load_into(model.build_network(), model.load_weights(0), "x")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"image_reader_writer": "MyReader"}, "MyReader, which is not supported"),
        ({"resampling_fn_probabilities": "resample_torch_fornnunet"}, "resample_torch_fornnunet, not supported"),
    ],
)
def test_models_that_would_silently_come_out_wrong_are_refused(make_model, entries, message):
    folder = make_model()
    change_plans(folder, **entries)
    with pytest.raises(ModelFolderError, match=message):
        ModelFolder.open(folder)


def test_a_patch_of_other_axes_than_the_network_is_refused(make_model):
    folder = make_model()
    change_plans(folder, patch_size=[24, 32])
    with pytest.raises(PlanError, match="2 axes"):
        ModelFolder.open(folder)


def test_the_configuration_comes_from_the_checkpoint_or_else_from_the_folders_name(make_model):
    folder = make_model(name="renamed")
    assert ModelFolder.open(folder).configuration == "3d_fullres"
    change(folder / "fold_0" / "checkpoint_final.pth", init_args=None)
    with pytest.raises(ModelFolderError, match=r"init_args\.configuration"):
        ModelFolder.open(folder)


@pytest.mark.parametrize("whose", ["ours", "nnU-Net's"])
def test_a_fold_of_another_order_of_channels_or_labels_is_refused(make_model, whose):
    path = make_model(folds=(0, 1), channels=2, labels={"channel_names": {"0": "T1", "1": "T2"}})
    file = path / "fold_1" / "checkpoint_final.pth"

    def trained_with(channels, labels):
        content = torch.load(file, weights_only=True)
        description = json.loads((path / "dataset.json").read_text())
        description |= {"labels": labels, "channel_names": {str(i): name for i, name in enumerate(channels)}}
        if whose == "ours":
            content["nnssl_adapt"] = {"identity": {"channels": list(channels), "labels": labels}}
        else:
            content["init_args"]["dataset_json"] = description
        torch.save(content, file)

    labels = {"background": 0, "cord": 1, "lesion": 2}
    trained_with(("t1w", "T2"), labels)
    Predictor(path, device="cpu")
    trained_with(("T2", "T1"), labels)
    with pytest.raises(ModelFolderError, match="channels T2, T1, .* has T1, T2") as caught:
        Predictor(path, device="cpu")
    assert caught.value.path == file
    trained_with(("T1", "T2"), {"background": 0, "lesion": 1, "cord": 2})
    with pytest.raises(ModelFolderError, match="labels background, lesion, cord"):
        Predictor(path, device="cpu")
    trained_with(("T1", "T2"), {"background": 0, "spinal cord": 1, "lesion": 2})  # a better name is no other order
    Predictor(path, device="cpu", folds=(1,))
