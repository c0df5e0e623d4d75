"""Networks that were trained to segment: their plan from nnU-Net's own files, or read off the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.nnssl_files import RESENC
from support.nnssl_networks import nnunet_plans

from nnssl_adapt.errors import AdaptationPlanError, CheckpointError, DatasetJsonError, ModelFolderError
from nnssl_adapt.weights.checkpoint.checkpoint import read_checkpoint
from nnssl_adapt.weights.checkpoint.nnunet_plan import configuration_of_folder, plan_from_nnunet
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.sources.resolved import Origin, ResolvedSource

LABELS = {"background": 0, "right": 2, "left": 1}
DATASET = {"channel_names": {"0": "T1", "1": "T2"}, "labels": LABELS, "numTraining": 3, "file_ending": ".nii.gz"}


def plans(class_name="ResidualEncoderUNet", **changes):
    content = nnunet_plans(class_name, 2)
    content["configurations"]["3d_fullres"].update(changes)
    return content


# -- from nnU-Net's files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", ["ResidualEncoderUNet", "PlainConvUNet"])
def test_everything_comes_from_plans_and_dataset(class_name):
    content = plans(
        class_name, normalization_schemes=["ZScoreNormalization", "CTNormalization"], use_mask_for_norm=[True, False]
    )
    content["transpose_forward"] = [1, 0, 2]
    dataset = {**DATASET, "image_orientation": "rpi", "licence": "CC-BY-4.0"}
    plan = plan_from_nnunet(content, dataset, "3d_fullres", "model")
    assert plan.architecture.class_name == class_name
    assert plan.architecture.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    assert (plan.spacing, plan.patch_size) == ((2.0, 0.8, 0.7), (4, 16, 8))
    assert plan.normalization_schemes == ("ZScoreNormalization", "CTNormalization")
    assert plan.use_mask_for_norm == (True, False)
    assert plan.transpose_forward == (1, 0, 2)
    assert plan.num_input_channels == 2
    assert plan.head_names == ("background", "left", "right")
    assert (plan.orientation, plan.supervised) == ("RPI", True)
    assert not plan.names_keys  # they are found in the tensors
    assert [entry["name"] for entry in plan.citations] == ["nnU-Net"]
    assert plan.raw["licence"] == "CC-BY-4.0"


def test_configurations_inherit():
    content = plans()
    full = content["configurations"]["3d_fullres"]
    content["configurations"]["low"] = {"inherits_from": "3d_fullres", "spacing": [4, 2, 2]}
    content["configurations"]["lower"] = {"inherits_from": "low", "patch_size": [8, 32, 16]}
    plan = plan_from_nnunet(content, DATASET, "lower", "model")
    assert (plan.spacing, plan.patch_size) == ((4, 2, 2), (8, 32, 16))
    full["inherits_from"] = "lower"
    with pytest.raises(AdaptationPlanError, match="inherit from each other: lower → low → 3d_fullres → lower"):
        plan_from_nnunet(content, DATASET, "lower", "model")


def test_without_a_name_it_is_3d_fullres_or_the_only_one():
    content = plans()
    assert plan_from_nnunet(content, None, None, "model").patch_size == (4, 16, 8)
    content["configurations"] = {"2d": {}, "mine": content["configurations"].pop("3d_fullres")}
    assert plan_from_nnunet(content, None, None, "model").patch_size == (4, 16, 8)


def test_without_dataset_json_channels_come_from_the_plan_and_labels_are_unknown():
    plan = plan_from_nnunet(plans(), None, "3d_fullres", "model")
    assert (plan.num_input_channels, plan.head_names, plan.orientation) == (2, (), None)


def test_regions_are_heads_in_their_own_order():
    dataset = {**DATASET, "labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    assert plan_from_nnunet(plans(), dataset, "3d_fullres", "model").head_names == ("whole", "core")


def test_plans_from_before_nnunet_2_3_describe_the_same_network():
    content = plans()
    new = content["configurations"]["3d_fullres"]
    del new["architecture"]
    new.update(
        UNet_class_name="ResidualEncoderUNet",
        UNet_base_num_features=4,
        unet_max_num_features=10,
        n_conv_per_stage_encoder=[1, 2, 1],
        n_conv_per_stage_decoder=[1, 1],
        conv_kernel_sizes=RESENC["kernel_sizes"],
        pool_op_kernel_sizes=RESENC["strides"],
        num_pool_per_axis=[1, 2, 2],
    )
    plan = plan_from_nnunet(content, DATASET, "3d_fullres", "model")
    assert plan.architecture == Architecture("ResidualEncoderUNet", {**RESENC, "features_per_stage": [4, 8, 10]})
    new["UNet_class_name"] = "MyUNet"
    with pytest.raises(AdaptationPlanError, match="unknown network 'MyUNet'"):
        plan_from_nnunet(content, DATASET, "3d_fullres", "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"previous_stage": "3d_lowres"}, "second stage of a cascade"),
        ({"architecture": None}, "neither 'architecture' nor"),
        ({"architecture": {"network_class_name": "os.system", "arch_kwargs": {}}}, "unknown network 'system'"),
        ({"patch_size": None}, "wrong at patch_size"),
        ({"spacing": [1, -1, 1]}, "wrong at spacing"),
        ({"normalization_schemes": "Z"}, None),
        ({"inherits_from": "absent"}, "no configuration 'absent'; they have 3d_fullres"),
    ],
)
def test_what_can_not_be_used_is_one_clear_line(changes, message):
    if message is None:
        assert plan_from_nnunet(plans(**changes), DATASET, "3d_fullres", "model").normalization_schemes == ("Z",)
        return
    with pytest.raises(AdaptationPlanError, match=message) as caught:
        plan_from_nnunet(plans(**changes), DATASET, "3d_fullres", "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("orientation", ["RP", "RRI", "xyz", 3, "RPIS", ["R", "P", "I"]])
def test_an_orientation_is_three_letters_one_of_each_pair(orientation):
    with pytest.raises(AdaptationPlanError, match="'image_orientation' in dataset.json is .* such as RPI"):
        plan_from_nnunet(plans(), {**DATASET, "image_orientation": orientation}, "3d_fullres", "model")


def test_labels_that_make_no_sense_are_named():
    with pytest.raises(DatasetJsonError, match=r"model, dataset\.json: 'labels'"):
        plan_from_nnunet(plans(), {**DATASET, "labels": {"background": 0, "a": 5}}, "3d_fullres", "model")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nnUNetTrainer__nnUNetPlans__3d_fullres", "3d_fullres"),
        ("nnUNetTrainer__ptPlans__x____Spacing__1.00___Norm__Z__3d_lowres", "3d_lowres"),
        ("fold_0", None),
        ("a__b", None),
    ],
)
def test_the_configuration_is_the_last_part_of_the_folders_name(name, expected):
    assert configuration_of_folder(name) == expected


# -- model folders ---------------------------------------------------------------------------------------------------


def model_folder(parent: Path, class_name="PlainConvUNet", heads=3, folds=1, init_args=True, **dataset) -> Path:
    folder = parent / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    content, described = plans(class_name), {**DATASET, **dataset}
    architecture = Architecture.from_plans_dict(content["configurations"]["3d_fullres"]["architecture"])
    for fold in range(folds):
        (folder / f"fold_{fold}").mkdir(parents=True)
        torch.manual_seed(fold)
        network = build_network(architecture, 2, heads, (4, 16, 8))
        arguments = {"configuration": "3d_fullres", "fold": fold, "plans": content, "dataset_json": described}
        arguments["device"] = torch.device("cpu")
        torch.save(
            {
                "network_weights": network.state_dict(),
                "trainer_name": "nnUNetTrainer",
                "init_args": arguments if init_args else {},
                "inference_allowed_mirroring_axes": (0, 1, 2),
            },
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


def resolved(folder: Path, with_folder=True, folds=1) -> ResolvedSource:
    files = [folder / f"fold_{fold}" / "checkpoint_final.pth" for fold in range(folds)]
    origin = Origin(str(folder), "model_folder", None, None, files[0].name, "0" * 64, "mean" if folds > 1 else "0")
    return ResolvedSource(files[0], None, origin, folder if with_folder else None, tuple(files[1:]))


@pytest.mark.parametrize("class_name", ["ResidualEncoderUNet", "PlainConvUNet"])
@pytest.mark.parametrize("init_args", [True, False])
def test_a_model_folder_opens_with_its_own_plan(tmp_path, class_name, init_args):
    folder = model_folder(tmp_path, class_name, init_args=init_args, image_orientation="LPI")
    checkpoint = read_checkpoint(resolved(folder))
    assert checkpoint.notes == ()
    assert checkpoint.plan.head_names == ("background", "left", "right")
    assert checkpoint.plan.num_input_channels == 2
    text = str(checkpoint)
    for part in ("for segmentation (labels: background, left, right)", "orientation LPI", "fold 0", "2 × 0.8 × 0.7 mm"):
        assert part in text


def test_a_file_taken_out_of_its_folder_has_the_plan_that_nnunet_keeps_in_it(tmp_path):
    folder = model_folder(tmp_path)
    assert read_checkpoint(resolved(folder, with_folder=False)).plan == read_checkpoint(resolved(folder)).plan


def test_the_configuration_in_the_checkpoint_goes_before_the_folders_name(tmp_path):
    folder = model_folder(tmp_path)
    content = json.loads((folder / "plans.json").read_text())
    content["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres", "spacing": [3, 3, 3]}
    (folder / "plans.json").write_text(json.dumps(content))
    assert read_checkpoint(resolved(folder)).plan.spacing == (2.0, 0.8, 0.7)
    renamed = folder.rename(folder.with_name("nnUNetTrainer__nnUNetPlans__3d_lowres"))
    assert read_checkpoint(resolved(renamed)).plan.spacing == (2.0, 0.8, 0.7)


def test_the_mean_of_several_folds(tmp_path):
    folder = model_folder(tmp_path, folds=3)
    checkpoint = read_checkpoint(resolved(folder, folds=3))
    name = "encoder.stages.1.0.convs.0.conv.weight"
    files = [torch.load(folder / f"fold_{k}/checkpoint_final.pth", weights_only=True) for k in range(3)]
    expected = torch.stack([content["network_weights"][name] for content in files]).mean(0)
    assert torch.allclose(checkpoint.tensors[name], expected, atol=1e-7)
    assert "fold mean" in str(checkpoint)


def test_the_tensors_are_believed_where_the_plan_was_pasted_wrongly(tmp_path):
    """The contrast-agnostic guide's flat keys are ignored by nnU-Net, so that plan and network can differ."""
    folder = model_folder(tmp_path)
    content = json.loads((folder / "plans.json").read_text())
    architecture = content["configurations"]["3d_fullres"]["architecture"]
    architecture["arch_kwargs"]["strides"] = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    (folder / "plans.json").write_text(json.dumps(content))
    checkpoint = read_checkpoint(resolved(folder))
    assert checkpoint.architecture.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    assert any("contradicts the tensors" in note and "strides" in note for note in checkpoint.notes)


def test_labels_that_are_not_the_networks_name_no_heads(tmp_path):
    checkpoint = read_checkpoint(resolved(model_folder(tmp_path, heads=5)))
    assert checkpoint.plan.head_names == ()
    assert any("names 3 outputs, the network has 5" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("plans.json", "{", "plans.json"),
        ("plans.json", "[]", "plans.json"),
        ("plans.json", None, "no .*plans.json"),
        ("plans.json", "{}", "have no 'configurations'"),
        ("dataset.json", "[" * 100_000, "dataset.json"),
    ],
)
def test_a_broken_model_folder_is_one_clear_line(tmp_path, name, text, message):
    folder = model_folder(tmp_path)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises((ModelFolderError, CheckpointError), match=message) as caught:
        read_checkpoint(resolved(folder))
    assert "\n" not in str(caught.value)
