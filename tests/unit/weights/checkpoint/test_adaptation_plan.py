"""Reading adaptation plans in all the ways that nnssl and people write them."""

import json

import pytest
from support.nnssl_files import plan

from nnssl_adapt.errors import AdaptationPlanError
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan


def configuration(content):
    return content["pretrain_plan"]["configurations"]["onemmiso"]


def test_tuples_lists_ints_and_floats_mean_the_same():
    pickled = plan(patch=(8, 12, 16), spacing=(2, 0.8, 0.7))
    written = json.loads(json.dumps(pickled))
    configuration(written)["patch_size"] = [8.0, 12.0, 16.0]
    configuration(written)["spacing"] = [2.0, 0.8, 0.7]
    one, other = AdaptationPlan.parse(pickled, "a"), AdaptationPlan.parse(written, "b")
    assert one.differences(other) == []
    assert (one.patch_size, one.spacing) == ((8, 12, 16), (2.0, 0.8, 0.7))
    assert one.recommended_patch_size == (16, 24, 32)
    assert one.keys_to_in_proj[0] == "encoder.stem.convs.0.conv"


def test_images_that_kept_their_own_spacing_have_none():
    assert AdaptationPlan.parse(plan(spacing=None), "plan").spacing is None


def test_an_overriding_patch_wins_over_the_configurations():
    assert AdaptationPlan.parse(plan(pretrain_patch_size=[4, 8, 12]), "plan").patch_size == (4, 8, 12)


def test_what_is_silent_has_defaults():
    content = plan()
    for key in ("key_to_lpe", "key_to_stem", "keys_to_in_proj", "pretrain_num_input_channels"):
        del content[key]
    del configuration(content)["normalization_schemes"]
    parsed = AdaptationPlan.parse(content, "plan")
    assert parsed.key_to_stem is None
    assert parsed.keys_to_in_proj == ()
    assert parsed.num_input_channels == 1
    assert parsed.normalization_schemes == ("ZScoreNormalization",)


def test_a_plan_by_hand_may_have_a_2d_configuration_beside_it():
    content = plan()
    configurations = content["pretrain_plan"]["configurations"]
    configurations["3d_fullres"] = configurations.pop("onemmiso")
    configurations["2d"] = {"spacing": [1, 1], "patch_size": [8, 8]}
    assert AdaptationPlan.parse(content, "plan").patch_size == (8, 12, 16)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("architecture_plans"), "no 'architecture_plans'"),
        (lambda c: c.pop("pretrain_plan"), "no 'pretrain_plan.configurations'"),
        (lambda c: c["pretrain_plan"].update(configurations={"a": {}, "b": {}}), "has a, b; expected one"),
        (lambda c: configuration(c).update(patch_size=(8, 12)), "patch_size"),
        (lambda c: configuration(c).update(patch_size=(8, 12, 0)), "patch_size.2"),
        (lambda c: configuration(c).update(spacing=(1, 1, -1)), "spacing.2"),
        (lambda c: configuration(c).update(spacing="iso"), "spacing"),
        (lambda c: c.update(key_to_encoder=7), "key_to_encoder"),
        (lambda c: c["architecture_plans"].update(arch_class_name="GPT"), "unknown network 'GPT'"),
        (lambda c: c["architecture_plans"]["arch_kwargs"].update(conv_op="os.system"), "conv_op is 'os.system'"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(spoil, message):
    content = plan()
    spoil(content)
    with pytest.raises(AdaptationPlanError, match=message) as caught:
        AdaptationPlan.parse(content, "there/plan.json")
    assert str(caught.value).startswith("there/plan.json: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_json_are_named(tmp_path):
    file = tmp_path / "adaptation_plan.json"
    file.write_text('{"architecture_plans": ')
    with pytest.raises(AdaptationPlanError, match="line 1") as caught:
        AdaptationPlan.load(file)
    assert caught.value.path == file
    file.write_text("[1, 2]")
    with pytest.raises(AdaptationPlanError, match="is a list, expected a mapping"):
        AdaptationPlan.load(file)


def test_differences_name_the_fields():
    one = AdaptationPlan.parse(plan(), "a")
    other = AdaptationPlan.parse(plan(patch=(8, 12, 32), spacing=None), "b")
    assert one.differences(other) == ["spacing", "patch_size"]
