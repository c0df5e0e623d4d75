"""--keep-topology: the dataset's own nnU-Net plan, plus where the weights come from."""

import copy
import json

import pytest

import nnssl_adapt as na
from nnssl_adapt.errors import ConfigurationError, PlanError, TransferError
from nnssl_adapt.planning.plan import FinetunePlan

OWN_RESAMPLING = {"force_separate_z": False, "is_seg": False, "order": 1, "order_z": 1}


@pytest.fixture
def base(tiny_dataset, small_resenc):
    """A plan such as nnU-Net writes: our planner's architecture, all else different, two configurations that inherit."""
    tiny_dataset(channels=2, spacing=(2.0, 1.0, 1.3))
    made = na.make_plan(991, na.open_checkpoint(small_resenc), mode="median", workers=1)
    content = copy.deepcopy(made.content)
    for key in ("pretrain_info", "nnssl_adapt"):
        content.pop(key)
    content.update(plans_name="nnUNetPlans", experiment_planner_used="ExperimentPlanner", extra_key=[1, 2])
    content["transpose_forward"], content["transpose_backward"] = [1, 2, 0], [2, 0, 1]
    entries = content["configurations"].pop("3d_fullres")
    entries.update(
        data_identifier="nnUNetPlans_3d_fullres",
        patch_size=[24, 16, 40],
        spacing=[1.0, 1.3, 2.0],
        normalization_schemes=["ZScoreNormalization", "CTNormalization"],
        use_mask_for_norm=[True, False],
        resampling_fn_data_kwargs=OWN_RESAMPLING,
        batch_dice=True,
    )
    content["configurations"] = {
        "2d": {"patch_size": [64, 64]},
        "basis": entries,
        "3d_fullres": {"inherits_from": "basis", "batch_size": 5},
    }
    path = made.dataset_folder / "nnUNetPlans.json"
    path.write_text(json.dumps(content))
    return FinetunePlan.load(path)


def test_everything_of_the_base_plan_stays(base, small_resenc):
    before = base.plans_file.read_bytes()
    checkpoint = na.open_checkpoint(small_resenc)
    plan = na.make_plan(991, checkpoint, name="mae", keep_topology=True, workers=1)
    assert plan.plans_name == "ptPlans_dynamic__mae"
    assert list(plan.content["configurations"]) == ["3d_fullres"]
    kept, new = base.settings_of_configuration, plan.content["configurations"]["3d_fullres"]
    assert {key: new[key] for key in kept if key != "data_identifier"} == {
        key: kept[key] for key in kept if key != "data_identifier"
    }
    assert "inherits_from" not in new
    assert (plan.batch_size, plan.patch_size, plan.spacing, plan.batch_dice) == (5, (24, 16, 40), (1.0, 1.3, 2.0), True)
    assert plan.transpose_forward == (1, 2, 0)
    assert plan.settings.resampling_data.order_z == 1
    assert plan.settings.digest() == base.settings.digest()
    top = [key for key in base.content if key not in ("plans_name", "configurations", "experiment_planner_used")]
    assert {key: plan.content[key] for key in top} == {key: base.content[key] for key in top}
    assert plan.content["experiment_planner_used"] == "nnssl_adapt"
    assert base.plans_file.read_bytes() == before


def test_cases_never_mix_with_nnunets(base, small_resenc):
    plan = na.make_plan(991, na.open_checkpoint(small_resenc), name="mae", keep_topology=True, workers=1)
    assert plan.data_identifier == f"nnssl_adapt__Spacing__2.00_1.00_1.30___Norm__Z_CT__{plan.settings.digest()[:8]}"
    store = na.preprocess_dataset(plan, workers=1, progress=False)
    assert store.folder.name == plan.data_identifier
    found = FinetunePlan.find(plan.dataset_name, "ptPlans_dynamic__mae")
    assert found.content == json.loads(json.dumps(plan.content))
    na.preprocess_dataset(plan, workers=1, progress=False)  # again is fine


def test_the_weights_are_recorded(base, small_resenc):
    checkpoint = na.open_checkpoint(small_resenc)
    plan = na.make_plan(991, checkpoint, name="mae", keep_topology=True, base_plans="nnUNetPlans.json", workers=1)
    assert plan.provenance["source"]["sha256"] == checkpoint.origin.sha256
    assert plan.provenance["spacing_mode"] == "base_plans"
    assert plan.provenance["base_plans"] == "nnUNetPlans"
    assert plan.provenance["transfer"]["scope"] == "auto"
    assert plan.pretrain_info["key_to_encoder"] == "encoder.stages"


def test_a_plan_by_a_name_of_its_own(base, small_resenc):
    checkpoint = na.open_checkpoint(small_resenc)
    plan = na.make_plan(991, checkpoint, keep_topology=True, plans_name="mine", workers=1)
    assert plan.plans_name == "mine"


def test_without_base_plans_the_command_that_makes_them_is_named(tiny_dataset, small_resenc):
    tiny_dataset()
    checkpoint = na.open_checkpoint(small_resenc)
    with pytest.raises(PlanError, match=r"found: none.*nnUNetv2_plan_and_preprocess -d 991 --no_pp;"):
        na.make_plan(991, checkpoint, keep_topology=True, workers=1)
    with pytest.raises(PlanError, match=r"-d 991 --no_pp -pl nnUNetPlannerResEncL;"):
        na.make_plan(991, checkpoint, keep_topology=True, base_plans="nnUNetResEncUNetLPlans", workers=1)


def test_spacing_can_not_be_chosen_as_well(base, small_resenc):
    for arguments in ({"mode": "median"}, {"mode": "fixed", "spacing": (1, 1, 1)}, {"spacing": (1, 1, 1)}):
        with pytest.raises(ConfigurationError, match="--keep-topology keeps the spacing"):
            na.make_plan(991, na.open_checkpoint(small_resenc), keep_topology=True, workers=1, **arguments)


def changed(base, **entries):
    content = copy.deepcopy(base.content)
    content["configurations"]["3d_fullres"].update(entries)
    base.plans_file.write_text(json.dumps(content))


def test_base_plans_that_can_not_be_followed(base, small_resenc):
    checkpoint = na.open_checkpoint(small_resenc)
    changed(base, resampling_fn_seg="resample_torch_fornnunet")
    with pytest.raises(PlanError, match="resampling_fn_seg is resample_torch_fornnunet, not supported yet"):
        na.make_plan(991, checkpoint, keep_topology=True, workers=1)
    changed(base, normalization_schemes=["ZScoreNormalization"], use_mask_for_norm=[False])
    with pytest.raises(PlanError, match="is for 1 channel.*has 2"):
        na.make_plan(991, checkpoint, keep_topology=True, workers=1)
    changed(base, features_per_stage=[1, 2, 3])
    with pytest.raises(PlanError, match="nnU-Net ignores them"):
        na.make_plan(991, checkpoint, keep_topology=True, workers=1)
    base.plans_file.write_text(json.dumps({**base.content, "dataset_name": "Dataset001_Other"}))
    with pytest.raises(PlanError, match="is a plan for Dataset001_Other"):
        na.make_plan(991, checkpoint, keep_topology=True, workers=1)


def test_weights_that_do_not_fit_the_network_stop_it(base, small_resenc):
    """A transformer's for a CNN: nothing could be moved."""
    with pytest.raises(TransferError):
        na.make_plan(
            991, na.open_checkpoint(small_resenc.parent / "small_primus_simmim"), keep_topology=True, workers=1
        )


def test_another_order_of_axes_is_worth_a_word(base, small_resenc, caplog):
    na.make_plan(991, na.open_checkpoint(small_resenc), name="mae", keep_topology=True, workers=1)
    assert any("in the order [1, 2, 0], the weights were trained with [0, 1, 2]" in m for m in caplog.messages)


def test_reoriented_copies_need_plans_of_their_own(base, small_resenc):
    """nnU-Net's plan of the original knows another order of axes."""
    with pytest.raises(PlanError, match=r"no .*Dataset999_Tiny_RPI.*-d 999 --no_pp"):
        na.make_plan(991, na.open_checkpoint(small_resenc), keep_topology=True, reorient="RPI", workers=1)
