"""Opening checkpoints: where the plan is looked for, which one is believed, and how wrong ones are mended."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from support.nnssl_files import architecture, plan, state_dict, write_checkpoint

from nnssl_adapt.errors import AdaptationPlanError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, build_network


def with_prefix(tensors, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def test_a_checkpoint_without_any_plan_says_where_it_looked(tmp_path):
    path = write_checkpoint(tmp_path, state_dict(), trainer_name="BaseMAETrainer")
    with pytest.raises(
        AdaptationPlanError, match=r"'nnssl_adaptation_plan' in it and for .*adaptation_plan\.json"
    ) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["embedded", "sidecar"])
def test_a_plan_in_either_place_is_enough(tmp_path, where):
    path = write_checkpoint(tmp_path, state_dict(), **{where: plan()}, trainer_name="BaseMAETrainer")
    checkpoint = open_checkpoint(path)
    assert checkpoint.plan.patch_size == (8, 12, 16)
    assert checkpoint.trainer_name == "BaseMAETrainer"
    assert checkpoint.notes == ()


def test_safetensors_take_their_plan_from_the_sidecar(tmp_path):
    save_file({name: t.half().clone() for name, t in state_dict().items()}, tmp_path / "weights.safetensors")
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(plan(trainer_name="BaseMAETrainer")))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["encoder.stem.convs.0.conv.weight"].dtype == torch.float16
    assert (checkpoint.origin.filename, checkpoint.trainer_name) == ("weights.safetensors", "BaseMAETrainer")


@pytest.mark.parametrize("key", ["nnssl_adaptation_plan", "adaptation_plan"])
def test_safetensors_may_carry_their_plan_themselves(tmp_path, key):
    entry = {"type": "Framework", "name": "nnssl"}
    metadata = {key: json.dumps(plan()), "trainer_name": "VoCoTrainer", "citations": json.dumps([entry])}
    save_file({n: t.clone() for n, t in state_dict().items()}, tmp_path / "model.safetensors", metadata=metadata)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.plan.patch_size == (8, 12, 16)
    assert (checkpoint.trainer_name, checkpoint.citations) == ("VoCoTrainer", (entry,))
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(plan(spacing=(1, 1, 1))))
    assert any("disagree on spacing" in note for note in open_checkpoint(tmp_path).notes)


@pytest.mark.parametrize("key", ["network_weights", "state_dict", "model_state_dict", "model", "net"])
def test_the_weights_are_found_under_the_names_that_programs_give_them(tmp_path, key):
    path = write_checkpoint(tmp_path, {}, sidecar=plan())
    torch.save({key: state_dict(), "epoch": 3}, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors.keys() == state_dict().keys()
    assert checkpoint.plan.patch_size == (8, 12, 16)


def test_printing_it_tells_what_it_is(tmp_path):
    citations = [{"type": "Architecture", "name": "ResEnc", "apa_citations": ["…"]}, {"bibtex_citations": ["…"]}]
    path = write_checkpoint(tmp_path, state_dict(channels=2), embedded=plan(channels=2), citations=citations)
    text = str(open_checkpoint(path))
    for part in (
        "4-6-8",
        "2 × 0.8 × 0.7 mm",
        "8 × 12 × 16 voxels (recommended 16 × 24 × 32)",
        "2 channel(s)",
        "ResEnc",
    ):
        assert part in text


def test_citations_come_from_the_file_else_from_the_plan(tmp_path):
    entry = {"type": "Framework", "name": "nnssl"}
    path = write_checkpoint(tmp_path, state_dict(), embedded=plan(), sidecar=plan(citations=[entry]))
    assert open_checkpoint(path).citations == (entry,)
    write_checkpoint(tmp_path, state_dict(), embedded=plan(), citations=[{"name": "own"}, "not one"])
    checkpoint = open_checkpoint(path)
    assert checkpoint.citations == ({"name": "own"},)
    assert "1 of its citations can't be read" in checkpoint.notes


def test_the_patch_of_init_args_is_never_read(tmp_path):
    init_args = {"plan": {"configurations": {"onemmiso": {"patch_size": (20, 20, 20)}}}, "device": torch.device("cpu")}
    path = write_checkpoint(tmp_path, state_dict(), embedded=plan(), init_args=init_args)
    assert open_checkpoint(path).plan.patch_size == (8, 12, 16)


# -- two plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", ["embedded", "sidecar"])
def test_of_two_plans_the_one_that_fits_the_positions_is_taken(tmp_path, right):
    tensors = state_dict("Primus", (4, 12, 16))
    plans = {"embedded": plan("Primus", (8, 24, 32)), "sidecar": plan("Primus", (8, 24, 32))}
    plans[right] = plan("Primus", (4, 12, 16), recommended_downstream_patchsize=None)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, **plans))
    assert checkpoint.plan.patch_size == (4, 12, 16)
    assert any("24 positions" in note for note in checkpoint.notes)


def test_of_two_plans_the_one_that_needs_less_mending_is_taken(tmp_path):
    tensors = state_dict("Primus", (6, 12, 12))
    plans = {"embedded": plan("Primus", (8, 24, 32)), "sidecar": plan("Primus", (6, 12, 12), spacing=(1, 1, 1))}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, **plans))
    assert checkpoint.plan.spacing == (1, 1, 1)
    assert any(
        "disagree on spacing, patch_size" in note and "fits the tensors better" in note for note in checkpoint.notes
    )


def test_of_two_plans_that_fit_the_one_in_the_file_is_taken_and_said(tmp_path):
    path = write_checkpoint(tmp_path, state_dict(), embedded=plan(), sidecar=plan(spacing=(1, 1, 1)))
    checkpoint = open_checkpoint(path)
    assert checkpoint.plan.spacing == (2.0, 0.8, 0.7)
    assert any("disagree on spacing" in note for note in checkpoint.notes)


@pytest.mark.parametrize("wrong", ["embedded", "sidecar"])
def test_a_plan_that_can_not_be_read_gives_way_to_the_other(tmp_path, wrong):
    plans = {"embedded": plan(), "sidecar": plan(), wrong: {"architecture_plans": {}}}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, state_dict(), **plans))
    assert checkpoint.plan.patch_size == (8, 12, 16)
    assert any("adaptation plan has no" in note for note in checkpoint.notes)


def test_a_plan_for_another_network_gives_way_to_the_other(tmp_path):
    path = write_checkpoint(
        tmp_path, state_dict("Primus", (4, 12, 16)), embedded=plan(), sidecar=plan("Primus", (4, 12, 16))
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture.class_name == "Primus"
    assert any("no tensor fits" in note for note in checkpoint.notes)


# -- wrong keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_networks_open_like_plain_ones(tmp_path, prefix):
    content = plan(key_to_encoder="_orig_mod.encoder.stages") if prefix == "_orig_mod." else plan()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, with_prefix(state_dict(), prefix), embedded=content))
    assert checkpoint.tensors.keys() == state_dict().keys()
    assert checkpoint.plan.key_to_encoder == "encoder.stages"


@pytest.mark.parametrize("class_name", ["ResidualEncoderUNet", "PlainConvUNet"])
@pytest.mark.parametrize("wrong", ["stages", None])
def test_the_encoder_is_found_by_name_and_shape(tmp_path, class_name, wrong):
    tensors = with_prefix(state_dict(class_name), "network.")
    tensors.update(with_prefix(state_dict(class_name, seed=1), "teacher."))
    content = plan(class_name, key_to_encoder=wrong, key_to_stem=wrong, keys_to_in_proj=None)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, embedded=content))
    assert checkpoint.plan.key_to_encoder == "network.encoder.stages"
    assert checkpoint.plan.key_to_stem.startswith("network.encoder.st")
    assert all(f"{module}.weight" in tensors for module in checkpoint.plan.keys_to_in_proj)
    assert any("key_to_encoder" in note for note in checkpoint.notes)


def test_missing_keys_of_a_transformer_are_found(tmp_path):
    tensors = with_prefix(state_dict("Primus", (4, 12, 16)), "encoder.")
    content = plan("Primus", (4, 12, 16), key_to_lpe=None, key_to_encoder="eva", keys_to_in_proj=("absent",))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, embedded=content))
    assert checkpoint.plan.key_to_encoder == "encoder.eva"
    assert checkpoint.plan.key_to_lpe == "encoder.eva.pos_embed"
    assert checkpoint.plan.keys_to_in_proj == ("encoder.down_projection.proj",)


def test_a_file_with_no_tensor_of_the_network_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, {"head.weight": torch.zeros(2, 3), "body.bias": torch.zeros(3)}, embedded=plan())
    with pytest.raises(AdaptationPlanError, match="no tensor fits the encoder.*the file has body, head"):
        open_checkpoint(path)


@pytest.mark.parametrize("named", [None, "teacher.pos_embed", "decoder.pos_embed", "module.eva.pos_embed"])
def test_positions_are_the_encoders_whatever_the_plan_names(tmp_path, named):
    tensors = state_dict("Primus", (4, 12, 16))
    tensors["decoder.pos_embed"] = torch.zeros_like(tensors["eva.pos_embed"])
    path = write_checkpoint(tmp_path, tensors, embedded=plan("Primus", (4, 12, 16), key_to_lpe=named))
    checkpoint = open_checkpoint(path)
    assert checkpoint.plan.key_to_lpe == "eva.pos_embed"
    assert any("key_to_lpe" in note for note in checkpoint.notes) == (named != "module.eva.pos_embed")


def test_a_plan_that_names_one_alias_only_gets_both_and_says_so(tmp_path):
    content = plan(keys_to_in_proj=("encoder.stem.convs.0.conv",))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, state_dict(), embedded=content))
    names = ("encoder.stem.convs.0.all_modules.0", "encoder.stem.convs.0.conv")
    assert checkpoint.plan.keys_to_in_proj == names
    assert any("keys_to_in_proj are ['encoder.stem.convs.0.conv']" in note for note in checkpoint.notes)


def test_what_a_network_computes_anew_is_no_contradiction(tmp_path):
    """Rotary tables that were kept in the file, class and register tokens, counters of batch normalisation."""
    tensors = state_dict("Primus", (4, 12, 16))
    tensors |= {"eva.rope.pos_embed_cached": torch.zeros(24, 12), "eva.cls_token": torch.zeros(1, 1, 24)}
    tensors["eva.pos_embed"] = torch.cat([torch.zeros(1, 1, 24), tensors["eva.pos_embed"]], dim=1)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, embedded=plan("Primus", (4, 12, 16))))
    assert (checkpoint.notes, checkpoint.plan.patch_size) == ((), (4, 12, 16))
    kwargs = {**architecture().kwargs, "norm_op": "torch.nn.BatchNorm3d"}
    network = build_network(Architecture("ResidualEncoderUNet", kwargs), 1, 1, (8, 12, 16))
    content = plan()
    content["architecture_plans"]["arch_kwargs"] = kwargs
    counted = open_checkpoint(write_checkpoint(tmp_path, network.state_dict(), embedded=content))
    assert counted.notes == ()
    assert counted.tensors["encoder.stem.convs.0.norm.num_batches_tracked"].dtype == torch.int64


def test_a_file_that_keeps_one_of_two_names_is_whole(tmp_path):
    """safetensors' own save_model drops second names."""
    for kept in ("all_modules", ".conv."):
        names = [n for n in state_dict() if kept in n or (kept == ".conv." and ".norm." in n) or "transp" in n]
        tensors = {n: state_dict()[n].clone() for n in names if not n.startswith("decoder.encoder")}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"adaptation_plan": json.dumps(plan())})
        checkpoint = open_checkpoint(tmp_path / "model.safetensors")
        assert checkpoint.notes == ()
        assert len(checkpoint.plan.keys_to_in_proj) == 1


def test_a_decoders_stage_is_never_taken_for_a_missing_stem(tmp_path):
    """Its last stage may have the stem's very names and shapes."""
    tensors = {name: tensor for name, tensor in state_dict().items() if ".stem." not in name}
    path = write_checkpoint(tmp_path, tensors, embedded=plan())
    with pytest.raises(AdaptationPlanError, match="no tensor fits the encoder of .* and its stem"):
        open_checkpoint(path)


# -- another architecture than the plan says -------------------------------------------------------------------------


def other_architecture(class_name, **changes):
    content = plan(class_name, (4, 12, 16) if class_name == "Primus" else (8, 12, 16))
    content["architecture_plans"]["arch_kwargs"].update(changes)
    return content


@pytest.mark.parametrize(
    ("class_name", "changes"),
    [
        ("ResidualEncoderUNet", {"features_per_stage": [8, 16, 32]}),
        ("ResidualEncoderUNet", {"n_blocks_per_stage": [1, 1, 1]}),
        ("ResidualEncoderUNet", {"n_blocks_per_stage": [2, 3, 4]}),
        ("ResidualEncoderUNet", {"kernel_sizes": 3}),
        ("ResidualEncoderUNet", {"conv_bias": False}),
        ("ResidualEncoderUNet", {"norm_op_kwargs": {"eps": 1e-5, "affine": False}}),
        ("PlainConvUNet", {"n_conv_per_stage": [1, 2, 3]}),
        ("PlainConvUNet", {"features_per_stage": [4, 6, 12]}),
        ("Primus", {"embed_dim": 48}),
        ("Primus", {"eva_depth": 1}),
        ("Primus", {"eva_depth": 3}),
        ("Primus", {"init_values": None}),
        ("Primus", {"scale_attn_inner": False}),
        ("Primus", {"patch_embed_size": [4, 4, 4]}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_the_tensors_architecture_is_taken_where_the_plans_does_not_fit(tmp_path, class_name, changes, prefix):
    tensors = with_prefix(state_dict(class_name, (4, 12, 16)), prefix)
    path = write_checkpoint(tmp_path, tensors, embedded=other_architecture(class_name, **changes))
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture == architecture(class_name)
    (note,) = (note for note in checkpoint.notes if "contradicts the tensors, took theirs" in note)
    assert next(iter(changes)) in note
    assert "\n" not in note
    assert checkpoint.plan.key_to_encoder == f"{prefix}{'eva' if class_name == 'Primus' else 'encoder.stages'}"


def test_a_deeper_network_than_the_plan_says_keeps_the_strides_of_its_decoder(tmp_path):
    short = {"n_stages": 2, "features_per_stage": [4, 6], "kernel_sizes": [[1, 3, 3], [3, 3, 3]], "strides": [1, 2]}
    content = other_architecture("ResidualEncoderUNet", **short, n_blocks_per_stage=[1, 2], n_conv_per_stage_decoder=1)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, state_dict(), embedded=content))
    assert checkpoint.architecture == architecture()


@pytest.mark.parametrize(("preset", "class_name"), [("ResEncL", "ResidualEncoderUNet"), ("ResEncL", "PlainConvUNet")])
def test_a_preset_that_the_tensors_contradict_is_not_that_preset(tmp_path, preset, class_name):
    content = plan(class_name)
    content["architecture_plans"] = {"arch_class_name": preset, "arch_kwargs": None}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, state_dict(class_name), embedded=content))
    assert checkpoint.architecture == architecture(class_name)
    assert any("contradicts the tensors" in note for note in checkpoint.notes)


def test_of_two_plans_the_one_with_the_right_architecture_is_taken(tmp_path):
    wrong = other_architecture("ResidualEncoderUNet", n_blocks_per_stage=[1, 1, 1])
    path = write_checkpoint(tmp_path, state_dict(), embedded=wrong, sidecar=plan(spacing=(1, 1, 1)))
    checkpoint = open_checkpoint(path)
    assert checkpoint.plan.spacing == (1, 1, 1)
    assert any("disagree on architecture, spacing" in note for note in checkpoint.notes)


# -- what the tensors know better ------------------------------------------------------------------------------------


def test_channels_come_from_the_tensor(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, state_dict(channels=3), embedded=plan(channels=1)))
    assert checkpoint.plan.num_input_channels == 3
    assert any("the stem has 3" in note for note in checkpoint.notes)


def test_the_patch_follows_from_the_positions(tmp_path):
    tensors = state_dict("Primus", (6, 12, 12))
    wrong = plan("Primus", (8, 24, 32), recommended_downstream_patchsize=(2, 4, 8))
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, embedded=wrong))
    assert checkpoint.plan.patch_size == (6, 12, 12)  # 27 positions: a cube of 3
    assert any("27 positions" in note for note in checkpoint.notes)


def test_the_recommended_patch_explains_positions_that_the_used_one_does_not(tmp_path):
    tensors = state_dict("Primus", (4, 12, 16))
    content = plan("Primus", (2, 4, 4), recommended_downstream_patchsize=(4, 12, 16))
    assert open_checkpoint(write_checkpoint(tmp_path, tensors, embedded=content)).plan.patch_size == (4, 12, 16)


def test_positions_that_fill_no_grid_are_refused(tmp_path):
    tensors = state_dict("Primus", (4, 12, 16))
    wrong = plan("Primus", (8, 24, 32), recommended_downstream_patchsize=None)
    path = write_checkpoint(tmp_path, tensors, embedded=wrong)
    with pytest.raises(AdaptationPlanError, match="24 positions, which fill neither"):
        open_checkpoint(path)


def test_opening_changes_neither_file_nor_plan(tmp_path):
    content = plan(key_to_encoder="wrong")
    path = write_checkpoint(tmp_path, state_dict(), embedded=copy.deepcopy(content))
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    assert checkpoint.plan.raw == content
    assert path.read_bytes() == before


def test_the_licence_is_shown_where_the_plan_states_one(tmp_path):
    path = write_checkpoint(tmp_path, state_dict(), sidecar=plan())
    assert "licence   not stated" in str(open_checkpoint(path))
    (tmp_path / "adaptation_plan.json").write_text(json.dumps({**plan(), "license": "CC-BY-4.0"}))
    assert "licence   CC-BY-4.0" in str(open_checkpoint(path))
