"""Every tensor on both sides is accounted for, what has to change does, and nothing is left behind unnoticed."""

import json

import pytest
import torch
from dynamic_network_architectures.architectures.primus import PrimusV2
from support.nnssl_files import PRIMUS, architecture, plan, state_dict, write_checkpoint
from torch.nn.functional import interpolate

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.transfer.transfer import scratch_report, transfer_weights

PATCH = (8, 12, 16)
CLASSES = ["ResidualEncoderUNet", "PlainConvUNet", "Primus"]


def opened(folder, class_name="ResidualEncoderUNet", tensors=None, patch=PATCH, channels=1, **changes):
    tensors = state_dict(class_name, patch, channels) if tensors is None else tensors
    return open_checkpoint(
        write_checkpoint(folder, tensors, embedded=plan(class_name, patch, channels=channels, **changes))
    )


def network_for(checkpoint, channels=1, patch=PATCH):
    return build_network(checkpoint.architecture, channels, 3, patch)


def snapshot(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


# -- the account -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_tensor_has_exactly_one_fate_and_the_report_tells_the_truth(tmp_path, class_name):
    checkpoint = opened(tmp_path, class_name)
    network = network_for(checkpoint)
    before = snapshot(network)
    report = transfer_weights(checkpoint, network)
    after = network.state_dict()

    assert [row.name for row in report.rows] == list(dict.fromkeys(row.name for row in report.rows))
    assert {row.name for row in report.rows} == set(after)
    assert [row.name for row in report.source_rows] == list(checkpoint.tensors)
    for row in report.rows:
        assert row.fate in ("copied", "adapted", "fresh")
        if row.fate == "copied":
            assert torch.equal(after[row.name], checkpoint.tensors[row.source])
        if row.fate == "fresh":
            assert row.reason
            assert torch.equal(after[row.name], before[row.name])
    assert all(row.fate == "used" or row.reason for row in report.source_rows)
    assert report.coverage == 1


@pytest.mark.parametrize("class_name", CLASSES)
def test_only_the_encoder_moves(tmp_path, class_name):
    checkpoint = opened(tmp_path, class_name)
    report = transfer_weights(checkpoint, network_for(checkpoint))
    roots = {row.name.split(".")[0] for row in report.rows if row.fate != "fresh" and row.alias_of is None}
    assert roots == ({"eva", "down_projection"} if class_name == "Primus" else {"encoder"})


def test_the_table_is_short_and_says_it_all(tmp_path):
    checkpoint = opened(tmp_path)
    text = str(transfer_weights(checkpoint, network_for(checkpoint, channels=2)))
    assert len(text.splitlines()) < 30
    for part in ("input channels 1 → 2", "segmentation head", "100.0% of the encoder", "the encoder again"):
        assert part in text


def test_the_report_is_saved_as_json(tmp_path):
    checkpoint = opened(tmp_path)
    report = transfer_weights(checkpoint, network_for(checkpoint))
    content = json.loads(report.save(tmp_path / "run" / "transfer.json").read_text())
    assert content == json.loads(json.dumps(report.to_dict()))
    assert content["coverage"] == 1
    assert content["origin"]["sha256"] == checkpoint.origin.sha256
    assert len(content["target"]) == len(report.rows)


def test_from_scratch_is_the_same_account_with_every_row_fresh():
    network = build_network(architecture(), 1, 3, PATCH)
    before = snapshot(network)
    report = scratch_report(network)
    assert {row.name for row in report.rows} == set(before)
    assert {(row.fate, row.reason) for row in report.rows} == {("fresh", "training from scratch")}
    assert report.coverage == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_checkpoint_is_not_changed(tmp_path):
    checkpoint = opened(tmp_path, "Primus", patch=(4, 12, 16))
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    network = network_for(checkpoint, channels=2, patch=(8, 12, 8))
    transfer_weights(checkpoint, network, token_order="hwd")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.tensors.items())


# -- what is adapted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize(("old", "new"), [(1, 2), (1, 4), (2, 1), (2, 3), (2, 4), (3, 2)])
def test_any_number_of_channels_becomes_any_other(tmp_path, class_name, old, new):
    checkpoint = opened(tmp_path, class_name, channels=old)
    same, other = network_for(checkpoint, old).eval(), network_for(checkpoint, new).eval()
    for network in (same, other):
        transfer_weights(checkpoint, network)
    image = torch.randn(1, 1, *PATCH, generator=torch.Generator().manual_seed(1))
    stem = "down_projection" if class_name == "Primus" else "encoder"
    with torch.no_grad():
        expected = same.get_submodule(stem)(image.repeat(1, old, 1, 1, 1))
        actual = other.get_submodule(stem)(image.repeat(1, new, 1, 1, 1))
    for one, two in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def stem_of(checkpoint, channels, rule):
    """The stem's kernel before and after a transfer, and the network's own kernel from before."""
    network = network_for(checkpoint, channels)
    key = f"{network.keys_to_in_proj[0]}.weight"
    own = network.get_parameter(key).detach().clone()
    report = transfer_weights(checkpoint, network, channels=rule)
    (source,) = {row.source for row in report.rows if row.name == key}
    return checkpoint.tensors[source], network.get_parameter(key).detach(), own, report


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_map_of_channels_by_hand(tmp_path, class_name):
    before, after, own, report = stem_of(opened(tmp_path, class_name, channels=3), 4, (1, None, 1, 0))
    torch.testing.assert_close(after[:, 0], before[:, 1] / 2)
    torch.testing.assert_close(after[:, 2], before[:, 1] / 2)
    torch.testing.assert_close(after[:, 3], before[:, 0])
    assert torch.equal(after[:, 1], own[:, 1])
    assert "pre-training channel(s) 2 not used" in report.notes
    (row,) = [row for row in report.rows if row.fate == "adapted" and row.alias_of is None and row.part == "stem"]
    assert row.reason == "input channels 3 → 4 (1, new, 1, 0)"
    assert row.fresh_numbers * 4 == row.numbers
    assert report.coverage < 1


def test_a_map_applies_to_equal_numbers_of_channels_too(tmp_path):
    checkpoint = opened(tmp_path, channels=2)
    before, after, _, _ = stem_of(checkpoint, 2, (1, 0))
    assert torch.equal(after, before[:, [1, 0]])
    before, after, _, report = stem_of(checkpoint, 2, [0, 1])
    assert torch.equal(after, before)
    assert {row.fate for row in report.rows if row.part == "stem"} == {"copied"}


@pytest.mark.parametrize(
    ("rule", "old", "new", "expected"),
    [
        ("mean", 2, 3, lambda k: [(k[0] + k[1]) / 3] * 3),
        ("mean", 2, 2, lambda k: [(k[0] + k[1]) / 2] * 2),
        ("zero", 1, 3, lambda k: [k[0], 0 * k[0], 0 * k[0]]),
        ("zero", 3, 2, lambda k: [k[0], k[1]]),
        ("repeat", 2, 3, lambda k: [k[0] / 2, k[1], k[0] / 2]),
        ("repeat", 3, 2, lambda k: [(k[0] + k[1] + k[2]) / 2] * 2),
    ],
)
@pytest.mark.parametrize("class_name", CLASSES)
def test_rules_of_channels_by_hand(tmp_path, class_name, rule, old, new, expected):
    before, after, _, report = stem_of(opened(tmp_path, class_name, channels=old), new, rule)
    torch.testing.assert_close(after, torch.stack(expected(before.unbind(1)), dim=1))
    assert f"input channels {old} → {new} ({rule})" in str(report)
    assert ("pre-training channel(s) 2 not used" in report.notes) == (rule == "zero" and old == 3)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((0,), r"has 1 entries, the network 2"),
        ((0, 3), r"names pre-training channel 3, the checkpoint has 2 \(numbered"),
    ],
)
def test_a_map_that_does_not_fit_is_an_error(tmp_path, rule, message):
    checkpoint = opened(tmp_path, channels=2)
    with pytest.raises(TransferError, match=message):
        transfer_weights(checkpoint, network_for(checkpoint, 2), channels=rule)


def test_positions_are_interpolated_on_their_own_grid(tmp_path):
    checkpoint = opened(tmp_path, "Primus", patch=(4, 12, 16))  # grid (2, 3, 4)
    network = network_for(checkpoint, patch=(6, 8, 20))  # grid (3, 2, 5)
    report = transfer_weights(checkpoint, network, token_order="whd")
    volume = checkpoint.tensors["eva.pos_embed"].reshape(1, 2, 3, 4, 24).permute(0, 4, 1, 2, 3)
    expected = interpolate(volume, size=(3, 2, 5), mode="trilinear").permute(0, 2, 3, 4, 1).reshape(1, 30, 24)
    torch.testing.assert_close(network.eva.pos_embed.data, expected)
    row = next(row for row in report.rows if row.name == "eva.pos_embed")
    assert (row.fate, row.reason) == ("adapted", "positions 2×3×4 → 3×2×5")


@pytest.mark.parametrize("token", ["cls_token", "register_tokens"])
def test_class_and_register_tokens_are_dropped_and_listed(tmp_path, token):
    tensors = state_dict("Primus", (4, 12, 16))
    plain = tensors["eva.pos_embed"]
    count = 1 if token == "cls_token" else 3
    tensors["eva.pos_embed"] = torch.cat([torch.full((1, count, 24), 9.0), plain], dim=1)
    tensors[f"eva.{token}"] = torch.zeros(1, count, 24)
    checkpoint = opened(tmp_path, "Primus", tensors, patch=(4, 12, 16))
    network = network_for(checkpoint, patch=(4, 12, 16))
    report = transfer_weights(checkpoint, network)
    assert torch.equal(network.eva.pos_embed.data, plain)
    assert {row.name: row.reason for row in report.source_rows}[f"eva.{token}"] == "class or register token"


def test_rotary_tables_and_teachers_are_dropped_and_listed(tmp_path):
    tensors = state_dict("Primus", PATCH)
    tensors["eva.rope.pos_embed"] = torch.zeros(96, 24)
    tensors["teacher.eva.norm.weight"] = torch.zeros(24)
    tensors["projection_head.0.weight"] = torch.zeros(4, 24)
    tensors["jigsaw.bias"] = torch.zeros(4)
    checkpoint = opened(tmp_path, "Primus", tensors)
    report = transfer_weights(checkpoint, network_for(checkpoint))
    reasons = {row.name: row.reason for row in report.source_rows if row.fate == "dropped"}
    assert reasons["eva.rope.pos_embed"] == "rotary table, computed again"
    assert reasons["teacher.eva.norm.weight"] == "teacher"
    assert reasons["projection_head.0.weight"] == "projector"
    assert reasons["jigsaw.bias"] == "pre-training head 'jigsaw'"
    assert reasons["mask_token"] == "mask token"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_network_keeps_its_own_precision(tmp_path, dtype):
    checkpoint = opened(tmp_path, "Primus", {name: t.to(dtype) for name, t in state_dict("Primus", PATCH).items()})
    network = network_for(checkpoint, channels=2, patch=(4, 12, 16))
    transfer_weights(checkpoint, network)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


def test_a_file_with_only_one_of_two_names_is_enough(tmp_path):
    tensors = {name: t for name, t in state_dict().items() if "all_modules" not in name and "decoder" not in name}
    checkpoint = opened(tmp_path, tensors=tensors)
    network = network_for(checkpoint)
    assert transfer_weights(checkpoint, network).coverage == 1
    for name in ("conv.weight", "all_modules.0.weight"):
        assert torch.equal(
            network.state_dict()[f"encoder.stem.convs.0.{name}"], tensors["encoder.stem.convs.0.conv.weight"]
        )


def test_every_name_of_a_tensor_is_written(tmp_path):
    checkpoint = opened(tmp_path)
    network = network_for(checkpoint)
    transfer_weights(checkpoint, network)
    after = network.state_dict()
    names = [name for name in after if name.endswith(("stem.convs.0.conv.weight", "stem.convs.0.all_modules.0.weight"))]
    assert len(names) == 4  # twice in the block, and again under decoder.encoder
    assert all(
        torch.equal(after[name], checkpoint.tensors["encoder.stem.convs.0.all_modules.0.weight"]) for name in names
    )


def test_a_wrapped_network_is_filled_all_the_same(tmp_path):
    checkpoint = opened(tmp_path)
    network = network_for(checkpoint)
    report = transfer_weights(checkpoint, torch.nn.DataParallel(network))
    assert {row.name for row in report.rows} == set(network.state_dict())


# -- scope and waivers -----------------------------------------------------------------------------------------------


def test_scope_none_leaves_the_network_alone_and_says_why(tmp_path):
    checkpoint = opened(tmp_path)
    network = network_for(checkpoint)
    before = snapshot(network)
    report = transfer_weights(checkpoint, network, scope="none")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert {(row.fate, row.reason) for row in report.rows} == {("fresh", "not requested (scope none)")}
    assert {row.fate for row in report.source_rows} == {"dropped"}
    assert report.coverage == 0
    assert report.origin["sha256"] == checkpoint.origin.sha256


def damaged(tmp_path):
    tensors = {name: t for name, t in state_dict().items() if ".stages.2.blocks.0.conv1.conv" not in name}
    tensors = {name: t for name, t in tensors.items() if ".stages.2.blocks.0.conv1.all_modules.0" not in name}
    tensors["encoder.stages.0.gate"] = torch.zeros(3)
    return opened(tmp_path, tensors=tensors)


@pytest.mark.parametrize("target", ["encoder.stages.2.blocks.0.*", "decoder.encoder.stages.2.*conv1.conv.*"])
def test_what_is_waived_by_name_may_stay_behind(tmp_path, target):
    checkpoint = damaged(tmp_path)
    network = network_for(checkpoint)
    before = snapshot(network)
    report = transfer_weights(checkpoint, network, waive=[target, "*.gate"])
    row = next(row for row in report.rows if row.name == "encoder.stages.2.blocks.0.conv1.conv.weight")
    assert (row.fate, row.reason) == ("fresh", f"waived by {target!r}")
    assert torch.equal(network.state_dict()[row.name], before[row.name])
    assert {row.name: row.reason for row in report.source_rows}["encoder.stages.0.gate"] == "waived by '*.gate'"
    assert row.name not in {row.name for row in report.rows if row.fate != "fresh"}
    fine = next(row for row in report.rows if row.name == "encoder.stages.2.blocks.0.conv2.conv.weight")
    assert fine.fate == "copied"  # a waiver allows, it does not forbid


def test_what_is_not_waived_is_still_an_error(tmp_path):
    checkpoint = damaged(tmp_path)
    refused(checkpoint, network_for(checkpoint), "conv1.conv.weight is not in the checkpoint", waive=["*.gate"])
    refused(checkpoint, network_for(checkpoint), "gate belongs to the checkpoint's encoder", waive=["*.conv1.conv.*"])


def test_a_waiver_that_fits_nothing_is_an_error(tmp_path):
    checkpoint = opened(tmp_path)
    refused(
        checkpoint, network_for(checkpoint), r"waiver 'encoder.stage.2.\*' fits no tensor", waive=["encoder.stage.2.*"]
    )


def test_diverged_weights_can_be_waived_by_their_name_in_the_file(tmp_path):
    tensors = {f"net.{name}": tensor.clone() for name, tensor in state_dict().items()}
    tensors["net.encoder.stages.1.blocks.0.conv1.all_modules.0.bias"][3] = float("nan")
    keys = {"key_to_encoder": "net.encoder.stages", "key_to_stem": "net.encoder.stem"}
    checkpoint = opened(tmp_path, tensors=tensors, **keys)
    refused(checkpoint, network_for(checkpoint), "NaN or infinite")
    report = transfer_weights(
        checkpoint, network_for(checkpoint), waive=["net.encoder.stages.1.blocks.0.conv1.all_modules.0.bias"]
    )
    row = next(row for row in report.rows if row.name == "encoder.stages.1.blocks.0.conv1.conv.bias")
    assert row.fate == "fresh"


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(checkpoint, network, message, **settings):
    before = snapshot(network)
    with pytest.raises(TransferError, match=message) as caught:
        transfer_weights(checkpoint, network, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    return str(caught.value)


def test_an_encoder_tensor_that_would_stay_fresh_is_an_error_with_the_table(tmp_path):
    tensors = {name: t for name, t in state_dict().items() if ".stages.2.blocks.0.conv1." not in name}
    checkpoint = opened(tmp_path, tensors=tensors)
    text = refused(checkpoint, network_for(checkpoint), "stages.2.blocks.0.conv1.conv.weight is not in the checkpoint")
    assert "PROBLEM: not loaded" in text
    first, _, table = text.partition("\n")
    assert "don't fit the network" in first and "--waive" in first
    assert "how or why" in table


def test_an_encoder_tensor_without_a_place_is_an_error(tmp_path):
    tensors = state_dict()
    tensors["encoder.stages.1.blocks.1.conv1.attention.weight"] = torch.zeros(6)
    refused(
        opened(tmp_path, tensors=tensors), build_network(architecture(), 1, 3, PATCH), r"attention.*no place for it"
    )


def test_a_network_of_another_family_is_an_error(tmp_path):
    checkpoint = opened(tmp_path)
    refused(checkpoint, build_network(architecture("Primus"), 1, 3, PATCH), "don't fit the network")


def test_another_number_of_heads_is_an_error_though_every_shape_fits(tmp_path):
    checkpoint = opened(tmp_path, "Primus")
    other = Architecture("Primus", {**PRIMUS, "eva_numheads": 4})
    refused(checkpoint, build_network(other, 1, 3, PATCH), "4 attention heads, the checkpoint 2")


def test_a_transformer_of_another_width_is_an_error(tmp_path):
    checkpoint = opened(tmp_path, "Primus", trainer_name="BaseEvaMAETrainer")
    wider = Architecture("Primus", {**PRIMUS, "embed_dim": 36})
    refused(checkpoint, build_network(wider, 1, 3, PATCH), "don't fit the network")


def test_a_transformer_with_another_stem_is_an_error(tmp_path):
    deeper = PrimusV2(1, 24, (8, 8, 8), 3, eva_depth=2, eva_numheads=2, input_shape=(16, 24, 32))
    refused(opened(tmp_path, "Primus"), deeper, "it is a PrimusV2, the checkpoint a Primus")


def test_weights_that_diverged_are_an_error(tmp_path):
    tensors = state_dict()
    tensors["encoder.stages.1.blocks.0.conv1.conv.bias"][3] = float("nan")
    checkpoint = opened(tmp_path, tensors=tensors)
    refused(checkpoint, network_for(checkpoint), "NaN or infinite")


def test_a_network_that_does_not_name_its_encoder_is_an_error(tmp_path):
    with pytest.raises(TransferError, match=r"build_network\(\)"):
        transfer_weights(opened(tmp_path), torch.nn.Conv3d(1, 2, 3))
