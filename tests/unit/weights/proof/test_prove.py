"""The proof passes where the encoder computes the same, fails where it does not, and says what it can't compare."""

from functools import cache

import pytest
import torch
from support import nnssl_files
from support.nnssl_families import FAMILIES
from support.nnssl_networks import BLOCKS, CNN, RES, raw_cnn, raw_primus

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint, open_checkpoint
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.proof.prove import Proof, StageDifference, prove_transfer
from nnssl_adapt.weights.transfer.transfer import transfer_weights

SAME_KEYS = ["MAE", "MAE PlainConv", "Spark", "GVSL", "EvaMAE", "SimMIM", "Primus VoCo", "Primus MG", "class token"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """``checkpoint(name, channels)`` of a family, read once."""

    @cache
    def read(name, channels=1):
        family = FAMILIES[name](name, tmp_path_factory.mktemp("family") / "files", channels)
        return open_checkpoint(family.source)

    return read


def filled(checkpoint, inputs=1, patch=None, **settings):
    network = build_network(checkpoint.architecture, inputs, 3, patch or checkpoint.plan.patch_size)
    transfer_weights(checkpoint, network, **settings)
    return network


# -- it passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("name", SAME_KEYS)
def test_a_good_transfer_is_proven(checkpoint, name, old, new):
    source = checkpoint(name, old)
    proof = prove_transfer(source, filled(source, new))
    assert proof.passed, str(proof)
    names = [stage.name for stage in proof.stages]
    if source.architecture.is_transformer:
        assert names == ["patch embedding", "with positions", "block 0", "block 1", "last norm"]
        assert proof.stages[0].shape == (24, 3, 3, 2)
    else:
        assert names == ["stage 0", "stage 1", "stage 2"]
        assert [stage.shape[0] for stage in proof.stages] == [4, 6, 8]


@pytest.mark.parametrize("name", SAME_KEYS)
def test_without_a_network_the_checkpoints_own_is_built_and_filled(checkpoint, name):
    proof = prove_transfer(checkpoint(name, 2))
    assert proof.passed
    assert "PROVEN" in str(proof)


@pytest.mark.parametrize("name", ["EvaMAE", "SimMIM", "Primus VoCo"])
def test_another_grid_is_compared_with_interpolated_positions(checkpoint, name):
    source = checkpoint(name)
    proof = prove_transfer(source, filled(source, patch=(4, 16, 20)))
    assert proof.passed, str(proof)
    assert any("grid of [2, 4, 5] tokens, pre-training had [3, 3, 2]" in note for note in proof.notes)


def test_the_network_is_left_as_it_was(checkpoint):
    source = checkpoint("EvaMAE")
    network = filled(source).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    prove_transfer(source, network)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_network_in_half_precision_is_compared_in_float32(checkpoint):
    source = checkpoint("MAE")
    network = filled(source).half()
    proof = prove_transfer(source, network, tolerance=1e-2)
    assert proof.passed
    assert any("float32" in note for note in proof.notes)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}


# -- it fails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EvaMAE", "Primus VoCo", "Primus MG"])
def test_a_transfer_with_the_wrong_token_order_is_found_out(checkpoint, name):
    proof = prove_transfer(checkpoint(name), token_order="whd")
    assert not proof.passed
    by_name = {stage.name: stage.difference for stage in proof.stages}
    assert by_name["patch embedding"] < 1e-6
    assert by_name["with positions"] > 1e-2
    assert by_name["last norm"] > 1e-2
    assert "NOT PROVEN" in str(proof)
    assert "DIFFERS" in str(proof)


def test_the_opposite_mistake_is_found_out_too(checkpoint):
    assert not prove_transfer(checkpoint("SimMIM"), token_order="hwd").passed


@pytest.mark.parametrize("name", ["encoder.stages.1.blocks.1.conv2.norm.bias", "encoder.stem.convs.0.conv.weight"])
def test_one_wrong_tensor_is_found_out(checkpoint, name):
    source = checkpoint("MAE")
    network = filled(source)
    with torch.no_grad():
        tensor = network.get_parameter(name)
        tensor[0] += 0.1
    proof = prove_transfer(source, network)
    assert not proof.passed
    assert proof.stages[0].difference < 1e-6 or "stem" in name


def test_an_untouched_network_is_no_pretrained_one(checkpoint):
    source = checkpoint("MAE")
    assert not prove_transfer(source, build_network(source.architecture, 1, 3, source.plan.patch_size)).passed


def test_values_that_are_not_finite_are_no_proof(checkpoint):
    source = checkpoint("MAE")
    network = filled(source)
    with torch.no_grad():
        network.get_parameter("encoder.stages.2.blocks.0.conv1.conv.weight")[0] = torch.nan
    proof = prove_transfer(source, network)
    assert not proof.passed
    assert proof.stages[2].difference == float("inf")


def test_exchanged_channels_are_found_out(checkpoint):
    source = checkpoint("MAE", 2)
    network = filled(source, 2)
    with torch.no_grad():
        kernel = network.get_parameter("encoder.stem.convs.0.conv.weight")
        kernel.copy_(kernel.flip(1))
    assert not prove_transfer(source, network).passed


# -- what can't be compared ------------------------------------------------------------------------------------------


def cnn_like(trained, **changes):
    """A network of another topology that has the trained tensors wherever names and shapes agree."""
    network = raw_cnn(RES, 1, 3, **changes)
    state = network.state_dict()
    fitting = {k: v for k, v in trained.items() if k in state and state[k].shape == v.shape}
    network.load_state_dict(fitting, strict=False)
    return network


def test_stages_after_one_with_other_blocks_are_left_out(checkpoint):
    source = checkpoint("MAE")
    proof = prove_transfer(source, cnn_like(source.tensors, n_blocks_per_stage=[1, 3, 1]))
    assert proof.passed
    assert [stage.name for stage in proof.stages] == ["stage 0"]
    assert any("stage 1 and what follows can't be compared: other blocks" in note for note in proof.notes)


def test_fewer_stages_are_compared_as_far_as_they_go(checkpoint):
    source = checkpoint("MAE")
    changes = {"n_stages": 2, "features_per_stage": [4, 6], "n_conv_per_stage_decoder": [1]}
    changes |= {"kernel_sizes": CNN["kernel_sizes"][:2], "strides": CNN["strides"][:2]}
    changes |= {"n_blocks_per_stage": BLOCKS[RES]["n_blocks_per_stage"][:2]}
    proof = prove_transfer(source, cnn_like(source.tensors, **changes))
    assert proof.passed
    assert len(proof.stages) == 2
    assert any("2 of 3 pre-trained stages" in note for note in proof.notes)


def test_a_narrower_network_proves_nothing(checkpoint):
    source = checkpoint("MAE")
    proof = prove_transfer(source, cnn_like(source.tensors, features_per_stage=[3, 6, 8]))
    assert not proof.passed
    assert not proof.stages
    assert any("narrower" in note for note in proof.notes)
    assert "no stage of the two encoders can be compared" in str(proof)


def test_other_strides_prove_nothing(checkpoint):
    source = checkpoint("MAE")
    changed = cnn_like(source.tensors, strides=[[1, 1, 1], [2, 2, 1], [1, 2, 2]])
    proof = prove_transfer(source, changed)
    assert [stage.name for stage in proof.stages] == ["stage 0"]
    assert any("strides [1, 2, 2] and [2, 2, 1]" in note for note in proof.notes)


def test_blocks_of_a_deeper_transformer_are_compared_as_far_as_they_go(checkpoint):
    source = checkpoint("SimMIM")
    network = raw_primus(1, 3, encoder_eva_depth=3)
    state = network.state_dict()
    network.load_state_dict({k: v for k, v in source.tensors.items() if k in state and "up_" not in k}, strict=False)
    proof = prove_transfer(source, network)
    assert proof.passed
    assert [stage.name for stage in proof.stages][-1] == "block 1"
    assert any("the pre-trained encoder has 2, the network 3" in note for note in proof.notes)


def test_blocks_are_left_out_where_pre_training_itself_distorted_positions(tmp_path):
    """(h w d) order on a grid of (2, 3, 4): nnssl's rotary table belonged to other places."""
    patch = (4, 12, 16)
    tensors = nnssl_files.state_dict("Primus", patch)
    path = nnssl_files.write_checkpoint(
        tmp_path, tensors, embedded=nnssl_files.plan("Primus", patch), trainer_name="BaseEvaMAETrainer"
    )
    proof = prove_transfer(open_checkpoint(path))
    assert proof.passed
    assert [stage.name for stage in proof.stages] == ["patch embedding", "with positions"]
    assert any("blocks can't be compared" in note and "[2, 3, 4]" in note for note in proof.notes)


def test_another_patch_embedding_proves_nothing(checkpoint):
    source = checkpoint("SimMIM")
    proof = prove_transfer(source, raw_primus(1, 3, (12, 12, 8), patch_embed_size=(4, 4, 4)))
    assert not proof.passed
    assert any("patch embedding is [4, 4, 4], was [2, 4, 4]" in note for note in proof.notes)


@pytest.mark.parametrize("decoder_too", [True, False])
def test_the_decoder_is_compared_where_it_was_moved(checkpoint, decoder_too):
    source = checkpoint("MAE")
    network = filled(source)
    if decoder_too:
        state = network.state_dict()
        heads = {k: v for k, v in source.tensors.items() if "seg_layers" not in k and k in state}
        network.load_state_dict(heads, strict=False)
    proof = prove_transfer(source, network, scope="encoder+decoder")
    assert [stage.name for stage in proof.stages] == ["stage 0", "stage 1", "stage 2", "decoder 0", "decoder 1"]
    assert proof.passed == decoder_too
    assert proof.stages[2].difference < 1e-6


def test_what_is_assumed_is_in_the_verdict(checkpoint):
    source = checkpoint("SimMIM")
    unnamed = Checkpoint(source.tensors, source.plan.model_copy(update={"trainer_name": None}), source.origin)
    proof = prove_transfer(unnamed)
    assert proof.passed
    assert "given the token order that was assumed" in str(proof)
    assert prove_transfer(source).assumption == ""


def test_a_file_that_does_not_fill_its_own_network_is_an_error(checkpoint):
    source = checkpoint("MAE")
    network = filled(source)
    missing = {k: v for k, v in source.tensors.items() if not k.startswith("encoder.stages.1.blocks.1.")}
    broken = Checkpoint(missing, source.plan, source.origin)
    with pytest.raises(TransferError, match=r"without a value encoder\.stages\.1\.blocks\.1"):
        prove_transfer(broken, network)


# -- how channels are compared ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["repeat", "mean", "zero"])
@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3)])
def test_every_channel_rule_is_proven_on_images_that_fit_it(checkpoint, rule, old, new):
    source = checkpoint("MAE", old)
    proof = prove_transfer(source, filled(source, new, channels=rule), channels=rule)
    assert proof.passed, str(proof)


@pytest.mark.parametrize("chosen", [(0, None, 1), (1, 0), (1, None), (0, 0, 1)], ids=str)
def test_a_channel_map_is_proven(checkpoint, chosen):
    source = checkpoint("MAE", 2)
    proof = prove_transfer(source, filled(source, len(chosen), channels=chosen), channels=chosen)
    assert proof.passed, str(proof)


def test_a_map_done_wrong_is_found_out(checkpoint):
    source = checkpoint("MAE", 2)
    network = filled(source, 2, channels=(1, 0))
    assert not prove_transfer(source, network, channels=(0, 1)).passed


# -- what it says ----------------------------------------------------------------------------------------------------


def test_many_blocks_that_agree_are_one_row():
    blocks = [StageDifference(f"block {i}", 1e-7 * i, (8, 2, 2, 2)) for i in range(5)]
    text = str(Proof((*blocks, StageDifference("block 5", 0.5, (8, 2, 2, 2))), False, 1e-4))
    assert "  block 0 to 4   4.0e-07  8×2×2×2\n  block 5        5.0e-01  8×2×2×2  DIFFERS\n" in text


@pytest.mark.parametrize(("order", "passes"), [("auto", True), ("whd", False)])
def test_of_very_many_tokens_some_are_compared(checkpoint, monkeypatch, order, passes):
    monkeypatch.setattr("nnssl_adapt.weights.proof.reference_encoder.MANY_TOKENS", 10)
    monkeypatch.setattr("nnssl_adapt.weights.proof.reference_encoder.SAMPLE", 7)
    proof = prove_transfer(checkpoint("EvaMAE"), token_order=order)
    assert proof.passed == passes
    shapes = {stage.name: stage.shape for stage in proof.stages}
    assert shapes["with positions"] == (24, 3, 3, 2)
    assert shapes["block 1"] == shapes["last norm"] == (24, 7)
    assert any("7 of the 18 tokens" in note for note in proof.notes)


def test_the_table_and_the_dict_say_the_same():
    stages = (StageDifference("stage 0", 1e-7, (4, 8, 8, 8)), StageDifference("stage 1", 0.3, (8, 4, 4, 4)))
    proof = Proof(stages, False, 1e-4, ("a note",))
    assert str(proof).splitlines() == [
        "largest relative difference to the pre-trained encoder:",
        "  stage 0   1.0e-07  4×8×8×8",
        "  stage 1   3.0e-01  8×4×4×4  DIFFERS",
        "  note: a note",
        "NOT PROVEN: the encoder computes something else (differences above 0.0001)",
    ]
    content = proof.to_dict()
    assert content["stages"][1] == {"name": "stage 1", "difference": 0.3, "shape": [8, 4, 4, 4]}
    assert content["passed"] is False
