"""--keep-topology: the dataset's own nnU-Net plan, plus where the weights come from."""

import copy
import json

import pytest

import nnssl_adapt as na
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.errors import ConfigurationError, PlanError, TransferError
from nnssl_adapt.planning.dataset_files import load_or_make_fingerprint
from nnssl_adapt.planning.dynamic import nnunet_plan
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.weights.network.architectures import Architecture

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
    assert plan.provenance.source.sha256 == checkpoint.origin.sha256
    assert plan.provenance.spacing_mode == "base_plans"
    assert plan.provenance.base_plans == "nnUNetPlans"
    assert plan.provenance.transfer.scope == "auto"
    assert plan.pretrain_info["key_to_encoder"] == "encoder.stages"


def test_a_plan_by_a_name_of_its_own(base, small_resenc):
    checkpoint = na.open_checkpoint(small_resenc)
    plan = na.make_plan(991, checkpoint, keep_topology=True, plans_name="mine", workers=1)
    assert plan.plans_name == "mine"


def test_without_nnunets_plans_the_network_is_planned_here(tiny_dataset, small_resenc):
    """Residual weights get the network of ResEncL; nothing is written that passes for nnU-Net's own."""
    tiny_dataset(shape=(20, 28, 36), spacing=(2.0, 1.0, 1.3))
    plan = na.make_plan(991, na.open_checkpoint(small_resenc), name="mae", keep_topology=True, workers=1)
    assert plan.plans_name == "ptPlans_dynamic__mae"
    assert plan.content["experiment_planner_used"] == "nnssl_adapt"
    assert plan.provenance.base_plans is None
    assert plan.provenance.topology == {"planned_by": "nnssl_adapt", "preset": "ResEncL"}
    assert plan.provenance.spacing_mode == "base_plans"
    assert plan.architecture.class_name == "ResidualEncoderUNet"
    assert plan.architecture.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 2))
    assert plan.spacing == pytest.approx((2.0, 1.0, 1.3))
    assert plan.settings.normalization_schemes == ("ZScoreNormalization",)
    assert not list(plan.dataset_folder.glob("*Plans*"))
    path = plan.save()
    assert [p.name for p in path.parent.glob("*Plans*")] == ["ptPlans_dynamic__mae.json"]
    assert na.FinetunePlan.load(path).content == json.loads(json.dumps(plan.content))


def test_plain_weights_get_the_default_network(tiny_dataset, small_resenc):
    tiny_dataset(shape=(20, 28, 36))
    checkpoint = na.open_checkpoint(small_resenc.parent / "small_plainconv")
    plan = na.make_plan(991, checkpoint, keep_topology=True, workers=1)
    assert plan.provenance.topology["preset"] == "default"
    assert plan.architecture.class_name == "PlainConvUNet"


def test_a_preset_is_taken_whatever_plans_there_are(base, small_resenc):
    checkpoint = na.open_checkpoint(small_resenc)
    plan = na.make_plan(991, checkpoint, keep_topology=True, preset="ResEncM", workers=1)
    assert plan.provenance.base_plans is None
    assert plan.provenance.topology["preset"] == "ResEncM"
    assert plan.transpose_forward == (0, 1, 2) != tuple(base.transpose_forward)
    with pytest.raises(ConfigurationError, match="leave one of them out"):
        na.make_plan(991, checkpoint, keep_topology=True, preset="ResEncM", base_plans="nnUNetPlans", workers=1)
    with pytest.raises(ConfigurationError, match="add --keep-topology"):
        na.make_plan(991, checkpoint, preset="ResEncM", workers=1)
    with pytest.raises(ConfigurationError, match="presets are default, ResEncM, ResEncL, ResEncXL"):
        na.make_plan(991, checkpoint, keep_topology=True, preset="M", workers=1)


def test_plans_named_but_missing(tiny_dataset, small_resenc):
    tiny_dataset()
    checkpoint = na.open_checkpoint(small_resenc)
    with pytest.raises(PlanError, match=r"nnUNetResEncUNetLPlans.*none.*--preset ResEncL"):
        na.make_plan(991, checkpoint, keep_topology=True, base_plans="nnUNetResEncUNetLPlans", workers=1)
    with pytest.raises(PlanError, match=r"-pl mine.*another name"):
        na.make_plan(991, checkpoint, keep_topology=True, base_plans="mine", workers=1)


@pytest.mark.parametrize("preset", ["PrimusS", "PrimusV2B", "PrimusV3S"])
def test_a_primus_is_planned_on_the_patch_of_the_default_planner(tiny_dataset, preset):
    """nnU-Net's Primus trainers train on its plans for a U-Net; axes that don't divide by 8 are rounded here."""
    tiny_dataset(spacing=(2.0, 1.0, 1.3))
    raw = RawDataset.open(991)
    fingerprint = load_or_make_fingerprint(raw, workers=1)
    default, primus = (nnunet_plan(raw, fingerprint, name) for name in ("default", preset))
    assert dict(primus.architecture.kwargs) == dict(Architecture.named(preset).kwargs)
    assert all(n % 8 == 0 and abs(n - m) <= 4 for n, m in zip(primus.patch_size, default.patch_size, strict=True))
    assert (primus.spacing, primus.batch_size) == (default.spacing, default.batch_size)
    assert primus.settings_of_configuration["architecture"]["arch_kwargs"]["input_shape"] == list(primus.patch_size)


def test_nnunet_plans_no_transformers(tiny_dataset, small_resenc):
    tiny_dataset()
    weights = na.open_checkpoint(small_resenc.parent / "small_primus_simmim")
    with pytest.raises(PlanError, match="--keep-topology is for U-Nets"):
        na.make_plan(991, weights, keep_topology=True, workers=1)


def test_images_too_small_for_a_network(tiny_dataset, small_resenc):
    tiny_dataset(shape=(9, 7, 8), spacing=(1.0, 2.2, 2.3))
    with pytest.raises(PlanError, match="too small for a U-Net"):
        na.make_plan(991, na.open_checkpoint(small_resenc), keep_topology=True, workers=1)


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
    with pytest.raises(PlanError, match="resampling_fn_seg.*resample_torch_fornnunet"):
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


def test_reoriented_copies_get_a_network_of_their_own(base, small_resenc):
    """nnU-Net's plan of the original knows another order of axes, and is not taken for the copies."""
    plan = na.make_plan(991, na.open_checkpoint(small_resenc), keep_topology=True, reorient="RPI", workers=1)
    assert plan.dataset_name == "Dataset999_Tiny_RPI"
    assert plan.provenance.topology["planned_by"] == "nnssl_adapt"
