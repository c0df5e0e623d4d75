"""``3d_lowres`` and the cascade in plans: where nnU-Net would have them, beside what is planned already."""

import dataclasses
import json

import pytest

import nnssl_adapt as na
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.errors import ConfigurationError, PlanError
from nnssl_adapt.planning.plan import CASCADE, CONFIGURATION, LOW_RESOLUTION, FinetunePlan

STAGES = (LOW_RESOLUTION, CONFIGURATION, CASCADE)


@pytest.fixture
def fingerprint(tiny_dataset):
    """Of a dataset whose images claim to be large."""
    tiny_dataset()
    names = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
    return DatasetFingerprint(
        spacings=((1.0, 1.0, 1.0),) * 3,
        shapes_after_crop=((300, 330, 390), (302, 332, 392), (304, 334, 394)),
        intensity={"0": dict.fromkeys(names, 1.0)},
        median_relative_size_after_cropping=1.0,
    )


def test_stages_beside_the_full_resolution(fingerprint, small_resenc):
    checkpoint = na.open_checkpoint(small_resenc)
    usual = na.make_plan(991, checkpoint, fingerprint=fingerprint)
    plan = na.make_plan(991, checkpoint, fingerprint=fingerprint, configurations=[LOW_RESOLUTION])
    assert list(usual.content["configurations"]) == [CONFIGURATION]
    assert set(plan.content["configurations"]) == set(STAGES) and plan.configuration == LOW_RESOLUTION
    full, cascade = plan.seen_through(CONFIGURATION), plan.seen_through(CASCADE)
    assert full.content["configurations"][CONFIGURATION] == usual.content["configurations"][CONFIGURATION]
    assert plan.content["nnssl_adapt"] == usual.content["nnssl_adapt"]
    assert cascade.store_folder == full.store_folder != plan.store_folder
    assert cascade.settings_of_configuration["previous_stage"] == LOW_RESOLUTION
    assert plan.settings_of_configuration["next_stage"] == CASCADE
    assert plan.architecture == full.architecture and not plan.batch_dice
    assert all(low > own for low, own in zip(plan.spacing, full.spacing, strict=True))


@pytest.mark.parametrize("options", [{}, {"keep_topology": True, "preset": "ResEncM"}])
def test_small_images_are_refused(tiny_dataset, small_resenc, options):
    tiny_dataset()
    with pytest.raises(PlanError, match="too small for 3d_lowres"):
        na.make_plan(991, small_resenc, workers=1, configurations=[CASCADE], **options)


def test_no_lowres_where_the_kept_plan_has_none_or_images_keep_their_spacing(fingerprint, small_resenc):
    checkpoint = na.open_checkpoint(small_resenc)
    with pytest.raises(ConfigurationError, match="no_resample"):
        na.make_plan(991, checkpoint, "no_resample", fingerprint=fingerprint, configurations=[LOW_RESOLUTION])
    base = na.make_plan(991, checkpoint, "median", fingerprint=fingerprint)
    path = base.save(base.dataset_folder / "nnUNetPlans.json")
    with pytest.raises(PlanError, match="has no 3d_lowres") as caught:
        na.make_plan(991, checkpoint, fingerprint=fingerprint, keep_topology=True, configurations=[LOW_RESOLUTION])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("names", [(), ("3d_fullres", "3d_fullres"), ("4d",)])
def test_configurations_that_make_no_sense(names):
    with pytest.raises(ConfigurationError, match="3d_lowres"):
        na.planning.request.PlanRequest(configurations=names)


def test_earlier_configurations_stay_in_the_plan(fingerprint, small_resenc, monkeypatch):
    checkpoint = na.open_checkpoint(small_resenc)
    plan = na.make_plan(991, checkpoint, fingerprint=fingerprint, configurations=STAGES)
    plan.save()
    usual = na.make_plan(991, checkpoint, fingerprint=fingerprint)
    na.preprocess_dataset(usual, workers=1, progress=False)
    saved = json.loads(plan.plans_file.read_text())
    assert set(saved["configurations"]) == set(STAGES)
    other = dataclasses.replace(usual, content=json.loads(json.dumps(plan.content)))
    other.content["configurations"][LOW_RESOLUTION]["spacing"] = [9.0, 9.0, 9.0]
    other.save(plan.plans_file)
    with pytest.raises(PlanError, match="other preprocessing settings"):
        na.preprocess_dataset(plan, workers=1, progress=False)


def test_each_configuration_gets_a_store(fingerprint, small_resenc):
    checkpoint = na.open_checkpoint(small_resenc)
    plan = na.make_plan(991, checkpoint, fingerprint=fingerprint, configurations=[LOW_RESOLUTION])
    low = na.preprocess_dataset(plan, workers=1, progress=False, configurations=[LOW_RESOLUTION, CASCADE])
    full = na.preprocess_dataset(plan.seen_through(CONFIGURATION), workers=1, progress=False)
    assert low.folder == plan.store_folder
    assert low.identifiers == full.identifiers != []
    case = low.identifiers[0]
    assert low.open(case).data.shape[1:] < full.open(case).data.shape[1:]
    assert FinetunePlan.load(plan.plans_file, CASCADE).store_folder == full.folder
