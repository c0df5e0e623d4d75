"""Plans that people edit and copy, as the published guide to the contrast-agnostic weights tells them to."""

import copy
import json

import pytest

import nnssl_adapt as na
from nnssl_adapt.errors import ConfigurationError, PlanError
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.plans_file import check_plans_name, read_plans
from nnssl_adapt.planning.preprocess_dataset import preprocess_dataset
from nnssl_adapt.training.run.folder import RunFolder
from nnssl_adapt.weights.network.architectures import Architecture

GUIDE = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "n_conv_per_stage": [2, 2, 2, 2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2, 2, 2, 2],
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
    "kernel_sizes": [[3, 3, 3]] * 6,
}


@pytest.fixture
def plan(tiny_dataset, small_resenc):
    tiny_dataset()
    return na.make_plan(991, na.open_checkpoint(small_resenc.parent / "small_plainconv"), name="plain", workers=1)


def saved(plan, name="nnUNetPlans_contrast_agnostic", **entries):
    """A copy of the plan under another file name with more entries in its configuration."""
    content = copy.deepcopy(plan.content)
    content["configurations"]["3d_fullres"].update(entries)
    plan.dataset_folder.mkdir(parents=True, exist_ok=True)
    (plan.dataset_folder / f"{name}.json").write_text(json.dumps(content))
    return name


def test_a_copied_plan_does_not_write_into_the_other_ones_runs(plan, caplog):
    original = plan.save()
    name = saved(plan)
    for given in (name, f"{name}.json", str(plan.dataset_folder / f"{name}.json")):
        caplog.clear()
        found = FinetunePlan.find(plan.dataset_name, given)
        assert found.plans_name == name
        assert len([m for m in caplog.messages if f"{plan.plans_name} inside" in m]) == 1
        assert RunFolder.of(found, "T", 0).model.name == f"T__{name}__3d_fullres"
        assert found.data_identifier == plan.data_identifier
        assert found.plans_file == plan.dataset_folder / f"{name}.json"
    assert FinetunePlan.load(original).content == json.loads(json.dumps(plan.content))  # and the files are as they were
    caplog.clear()
    assert FinetunePlan.find(plan.dataset_name, plan.plans_name + ".json").plans_name == plan.plans_name
    assert not caplog.messages


def test_the_copy_in_a_model_folder_keeps_its_name(plan, tmp_path, caplog):
    (tmp_path / "plans.json").write_text(json.dumps(plan.content))
    assert FinetunePlan.find(plan.dataset_name, str(tmp_path / "plans.json")).plans_name == plan.plans_name
    assert FinetunePlan.load(tmp_path / "plans.json").plans_name == plan.plans_name
    assert not caplog.messages


def test_the_guides_flat_keys_are_not_ignored_silently(plan):
    name = saved(plan, patch_size=[64, 192, 320], **GUIDE)
    with pytest.raises(PlanError) as error:
        FinetunePlan.find(plan.dataset_name, name)
    for part in (
        f"{name}.json: configuration 3d_fullres",
        "features_per_stage is [32, 64, 128, 256, 320, 320] there, the network has [8, 16, 32, 64]",
        "nnU-Net ignores them",
        "architecture.arch_kwargs",
        "nnUNetv2_preprocess_like_nnssl",
        "--plans_name nnUNetPlans_contrast_agnostic",
    ):
        assert part in str(error.value)


def test_flat_keys_that_agree_are_harmless(plan):
    kwargs = plan.settings_of_configuration["architecture"]["arch_kwargs"]
    name = saved(plan, **{key: kwargs[key] for key in GUIDE})
    assert FinetunePlan.find(plan.dataset_name, name).architecture == plan.architecture
    name = saved(plan, n_conv_per_stage=2)  # one number for a list of it
    assert FinetunePlan.find(plan.dataset_name, name)
    name = saved(plan, n_conv_per_stage=1)
    with pytest.raises(PlanError, match=r"n_conv_per_stage.*1.*\[2, 2, 2, 2\]"):
        FinetunePlan.find(plan.dataset_name, name)


def test_flat_keys_of_another_kind_of_network(plan):
    name = saved(plan, n_blocks_per_stage=[1, 3, 4, 6])
    with pytest.raises(PlanError, match="n_blocks_per_stage.*no such key"):
        FinetunePlan.find(plan.dataset_name, name)


def test_a_key_that_stands_twice(tmp_path, caplog):
    path = tmp_path / "a.json"
    path.write_text(
        '{"strides": [1], "inner": {"strides": [[2]], "kept": 1, "strides": [[2]]}, "strides": [2], "x": 1, "x": 3}'
    )
    assert read_plans(path) == {"strides": [2], "inner": {"strides": [[2]], "kept": 1}, "x": 3}
    assert [message.rpartition(" has ")[2] for message in caplog.messages] == [
        "the key 'strides' twice, with different values: the last one counts",
        "the key 'x' twice, with different values: the last one counts",
    ]
    caplog.clear()
    path.write_text('{"strides": [[1, 2]], "strides": [[1, 2]]}')  # as in the guide
    read_plans(path)
    assert not caplog.messages


def test_a_name_of_ones_own(tiny_dataset, small_resenc):
    tiny_dataset()
    checkpoint = na.open_checkpoint(small_resenc)
    for given in ("nnUNetPlans_contrast_agnostic", "nnUNetPlans_contrast_agnostic.json"):
        plan = na.make_plan(991, checkpoint, plans_name=given, workers=1)
        assert plan.plans_name == "nnUNetPlans_contrast_agnostic"
        assert plan.plans_file.name == "nnUNetPlans_contrast_agnostic.json"


@pytest.mark.parametrize("name", ["nnUNetPlans", "nnUNetResEncUNetLPlans.json", "dataset", "splits_final"])
def test_names_that_nnunet_writes_itself(name):
    with pytest.raises(ConfigurationError, match="nnU-Net writes .* itself"):
        check_plans_name(name)


def test_names_that_are_none():
    with pytest.raises(ConfigurationError, match="--plans_name"):
        check_plans_name("a/b")


def test_somebody_elses_plan_is_never_replaced(plan, small_resenc):
    content = {key: value for key, value in plan.content.items() if key not in ("nnssl_adapt", "pretrain_info")}
    path = plan.dataset_folder / "mine.json"
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    with pytest.raises(PlanError, match="mine.json exists and was not made by this command"):
        na.make_plan(991, na.open_checkpoint(small_resenc), plans_name="mine", workers=1)
    other = FinetunePlan({**plan.content, "plans_name": "mine"})
    with pytest.raises(PlanError, match="not made by this command"):
        preprocess_dataset(other, overwrite=True, progress=False, workers=1)
    assert path.read_bytes() == before


def test_the_same_name_for_another_fit_is_refused(tiny_dataset, small_resenc):
    from nnssl_adapt.weights.transfer.settings import TransferSettings

    tiny_dataset(channels=2)
    checkpoint = na.open_checkpoint(small_resenc)
    plan = na.make_plan(991, checkpoint, plans_name="mine", workers=1)
    plan.save()
    mapped = na.make_plan(991, checkpoint, plans_name="mine", transfer=TransferSettings(channels="mean"), workers=1)
    with pytest.raises(PlanError, match="another way of fitting the weights"):
        preprocess_dataset(mapped, progress=False, workers=1)
    with pytest.raises(PlanError, match="another network or patch"):
        preprocess_dataset(plan.replaced(patch_size=(32, 32, 32)), progress=False, workers=1)


OLD = {
    **{"UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 8, "unet_max_num_features": 12},
    **{"n_conv_per_stage_encoder": [2, 1], "n_conv_per_stage_decoder": [2], "num_pool_per_axis": [0, 1, 1]},
    **{"pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2]], "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3]]},
    "patch_size": [8, 16, 16],
}


def test_plans_before_2_3_are_read_as_nnunet_reads_them(tmp_path):
    handler = pytest.importorskip("nnunetv2.utilities.plans_handling.plans_handler")
    content = {"configurations": {"3d_fullres": OLD, "3d_cascade_fullres": {"inherits_from": "3d_fullres"}}}
    (tmp_path / "plans.json").write_text(json.dumps(content))
    found = read_plans(tmp_path / "plans.json")["configurations"]
    theirs = handler.ConfigurationManager(copy.deepcopy(OLD)).configuration["architecture"]["arch_kwargs"]
    ours = Architecture.from_plans_dict(found["3d_fullres"]["architecture"])
    assert ours == Architecture(ours.class_name, theirs) and ours.class_name == "PlainConvUNet"
    assert found["3d_fullres"].keys() == {"patch_size", "architecture"}
    assert found["3d_cascade_fullres"] == {"inherits_from": "3d_fullres"}


@pytest.mark.parametrize("change", [{"UNet_class_name": "MyUNet"}, {"conv_kernel_sizes": None}, {"patch_size": 3}])
def test_plans_before_2_3_that_make_no_sense_are_left_to_who_uses_them(tmp_path, change):
    (tmp_path / "plans.json").write_text(json.dumps({"configurations": {"3d_fullres": {**OLD, **change}}}))
    assert read_plans(tmp_path / "plans.json")["configurations"]["3d_fullres"] == {**OLD, **change}
