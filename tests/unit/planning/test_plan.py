import copy
import json

import numpy as np
import pytest

import nnssl_adapt as na
from nnssl_adapt.errors import ConfigurationError, PlanError
from nnssl_adapt.planning.plan import KEEP, RESAMPLE, FinetunePlan


@pytest.fixture
def dataset(tiny_dataset):
    return tiny_dataset(spacing=(2.0, 1.0, 1.3), channels=2)


@pytest.fixture
def plan(dataset, small_resenc):
    return na.make_plan(991, na.open_checkpoint(small_resenc), name="mae", workers=1)


def test_like_pretrained(plan):
    assert plan.plans_name == "ptPlans__mae____Spacing__1.00_1.00_1.00___Norm__Z_Z"
    assert plan.spacing == (1.0, 1.0, 1.0)
    assert plan.transpose_forward == (0, 1, 2)
    assert plan.num_channels == 2
    assert plan.patch_size == (40, 24, 32)  # 160³ recommended; cropped images have about 34 × 23 × 26 voxels at 1 mm
    assert plan.settings.normalization_schemes == ("ZScoreNormalization",) * 2
    assert plan.settings_of_configuration["resampling_fn_data"] == RESAMPLE


def test_median_puts_the_coarsest_axis_first(dataset, small_resenc):
    raw = na.open_checkpoint(small_resenc)
    for mode in ("median", "default_nnunet"):
        plan = na.make_plan(991, raw, mode=mode, workers=1)
        assert plan.spacing == pytest.approx((2.0, 1.0, 1.3))
        assert plan.transpose_forward == (0, 1, 2)
    plan = na.make_plan(991, raw, mode="fixed", spacing=(1.0, 3.0, 2.0), workers=1)
    assert plan.transpose_forward == (1, 0, 2)
    assert plan.transpose_backward == (1, 0, 2)
    assert plan.spacing == (3.0, 1.0, 2.0)


def test_no_resample_is_written_so_that_nnunet_leaves_voxels_alone_too(dataset, small_resenc):
    plan = na.make_plan(991, na.open_checkpoint(small_resenc), mode="no_resample", workers=1)
    chosen = plan.settings_of_configuration
    assert plan.spacing is None
    assert chosen["resampling_fn_data"] == chosen["resampling_fn_seg"] == chosen["resampling_fn_probabilities"] == KEEP
    assert chosen["spacing"] == pytest.approx([2.0, 1.0, 1.3])
    assert "Spacing__None" in plan.plans_name


def test_a_checkpoint_without_spacing_gets_the_median_and_says_so(dataset, small_resenc, caplog):
    noresample = small_resenc.parent / "small_resenc_noresample"
    with caplog.at_level("WARNING", logger="nnssl_adapt"):
        plan = na.make_plan(991, na.open_checkpoint(noresample), workers=1)
    assert plan.spacing == pytest.approx((2.0, 1.0, 1.3))
    assert any("median" in message for message in caplog.messages)


def test_identity_not_location(plan, small_resenc):
    source = plan.provenance.source
    checkpoint = na.open_checkpoint(small_resenc)
    assert source.sha256 == checkpoint.origin.sha256
    info = plan.pretrain_info
    assert info["checkpoint_path"] == str(small_resenc)
    assert info["pt_num_in_channels"] == 1
    assert info["pt_used_patchsize"] == [32, 32, 32]
    assert info["pt_recommended_downstream_patchsize"] == [160, 160, 160]
    assert info["key_to_encoder"] == "encoder.stages"


def test_other_settings_are_another_folder(dataset, small_resenc):
    checkpoint = na.open_checkpoint(small_resenc)
    plans = [
        na.make_plan(991, checkpoint, mode="fixed", spacing=(s, 1.0, 1.0), name="a", workers=1)
        for s in (1.001, 1.002, 1.0)
    ]
    assert len({plan.data_identifier for plan in plans}) == 3
    assert len({plan.plans_name for plan in plans}) == 3
    other_name = na.make_plan(991, checkpoint, mode="fixed", spacing=(1.0, 1.0, 1.0), name="b", workers=1)
    assert other_name.data_identifier == plans[2].data_identifier  # the same voxels are stored once


def test_round_trip(plan):
    path = plan.save()
    again = FinetunePlan.load(path)
    assert again.content == json.loads(json.dumps(plan.content))
    assert again.settings == plan.settings
    assert again.architecture == plan.architecture
    assert FinetunePlan.find("Dataset991_Tiny", plan.plans_name).content == again.content
    assert FinetunePlan.find("Dataset991_Tiny", plan.plans_name + ".json").content == again.content
    assert plan.plans_name in str(plan)


def test_replaced_returns_a_copy(plan):
    before = copy.deepcopy(plan.content)
    other = plan.replaced(patch_size=(16, 24, 32), batch_size=3)
    assert (other.patch_size, other.batch_size) == ((16, 24, 32), 3)
    assert plan.content == before


def test_an_existing_fingerprint_and_plan_are_used(dataset, small_resenc, plan):
    """Intensity statistics come from the base plan where there is one."""
    base = copy.deepcopy(plan.content)
    base["plans_name"] = "nnUNetPlans"
    base["foreground_intensity_properties_per_channel"]["0"]["mean"] = 4711.0
    base["configurations"]["3d_fullres"]["batch_dice"] = True
    (plan.dataset_folder / "nnUNetPlans.json").write_text(json.dumps(base))
    again = na.make_plan(991, na.open_checkpoint(small_resenc), name="mae", workers=1)
    assert again.settings.intensity_properties["0"]["mean"] == 4711.0
    assert again.batch_dice
    with pytest.raises(PlanError, match="nnUNetResEncUNetLPlans.json.*nnUNetPlans"):
        na.make_plan(991, na.open_checkpoint(small_resenc), base_plans="nnUNetResEncUNetLPlans", workers=1)


def test_configurations_inherit(plan):
    content = copy.deepcopy(plan.content)
    content["configurations"]["finer"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    assert FinetunePlan(content, "finer").batch_size == 7
    assert FinetunePlan(content, "finer").patch_size == plan.patch_size
    content["configurations"]["finer"]["inherits_from"] = "finer"
    with pytest.raises(PlanError, match="circle"):
        FinetunePlan(content, "finer")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("transpose_forward"), "'transpose_forward' is missing"),
        (
            lambda c: c["configurations"]["3d_fullres"].pop("patch_size"),
            "patch_size' is missing",
        ),
        (
            lambda c: c["configurations"].update({"2d": c["configurations"].pop("3d_fullres")}),
            "no configuration '3d_fullres'",
        ),
    ],
)
def test_a_damaged_plan_is_named(plan, tmp_path, damage, message):
    content = copy.deepcopy(plan.content)
    damage(content)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message):
        FinetunePlan.load(path)


def test_plans_that_are_none(plan, tmp_path):
    plan.save()
    with pytest.raises(PlanError, match=f"no plans file .*; plans there: {plan.plans_name}"):
        FinetunePlan.find("Dataset991_Tiny", "ptPlans__other")
    for text in ("{", "[1]", ""):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(PlanError, match="bad.json"):
            FinetunePlan.load(tmp_path / "bad.json")


def test_names_that_can_not_be_file_names(dataset, small_resenc):
    for name in ("", "a/b", "../x", "a b"):
        with pytest.raises(ConfigurationError, match="-n"):
            na.make_plan(991, na.open_checkpoint(small_resenc), name=name, workers=1)


def test_preprocess_dataset_writes_what_nnunet_expects(plan, dataset, small_resenc):
    store = na.preprocess_dataset(plan, workers=1, progress=False)
    folder = plan.dataset_folder
    assert list(store.identifiers) == [f"case_{i:02d}" for i in range(5)]
    assert (folder / "dataset.json").read_bytes() == (dataset / "dataset.json").read_bytes()
    assert len(json.loads((folder / "splits_final.json").read_text())) == 5
    assert len(list((folder / "gt_segmentations").glob("*.nii.gz"))) == 5
    assert FinetunePlan.load(folder / f"{plan.plans_name}.json").content["plans_name"] == plan.plans_name
    assert {p.suffix for p in plan.store_folder.iterdir() if p.is_file()} == {".b2nd", ".pkl"}
    stored = store.open("case_01")
    assert np.asarray(stored.data[:]).dtype == np.float32
    # the same name for other weights is refused, since runs may need the old plan
    other = na.make_plan(991, na.open_checkpoint(small_resenc.parent / "small_plainconv"), name="mae", workers=1)
    with pytest.raises(PlanError, match="other pre-trained weights.*-n"):
        na.preprocess_dataset(other, workers=1, progress=False)
    na.preprocess_dataset(plan, workers=1, progress=False)  # the same again is fine
