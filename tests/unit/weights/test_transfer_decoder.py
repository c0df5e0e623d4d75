"""The decoder of a supervised network (or of a masked autoencoder, when asked), and its heads by their names."""

from dataclasses import replace

import pytest
import torch
from support.transfer_pairs import GRID_PATCH, PATCH, PLAIN, RES, image, pretrained, target
from torch.nn.functional import interpolate

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.transfer.by_name import HeadsDiffer, match_heads
from nnssl_adapt.weights.transfer.transfer import transfer_weights

TRAINED = ("background", "cord", "Lesion")


def supervised(class_name=RES, names=TRAINED, heads=3, patch=PATCH, prefix="", **changes):
    """A segmentation network and its checkpoint."""
    source = pretrained(class_name, patch=patch, **changes)
    network = build_network(source.checkpoint.architecture, 1, heads, patch).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    tensors = {f"{prefix}{name}": tensor.clone() for name, tensor in network.state_dict().items()}
    keys = {key: f"{prefix}{getattr(source.checkpoint.plan, key)}" for key in ("key_to_encoder", "key_to_stem")}
    if class_name == "Primus":
        keys["key_to_lpe"] = f"{prefix}eva.pos_embed"
    plan = source.checkpoint.plan.model_copy(update={"supervised": True, "head_names": names, **keys})
    source.network, source.checkpoint = network, replace(source.checkpoint, tensors=tensors, plan=plan)
    return source


def output(network, volume):
    with torch.no_grad():
        return network(volume)


def named(report, name):
    return next(row for row in report.rows if row.name == name)


def head_reasons(report):
    heads = report.head_modules
    return {row.reason for row in report.rows if row.name.rpartition(".")[0] in heads}


# -- the whole decoder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("class_name", [RES, PLAIN])
def test_a_supervised_network_is_the_same_network_afterwards(class_name, prefix):
    source = supervised(class_name, prefix=prefix)
    network = build_network(source.checkpoint.architecture, 1, 3, PATCH).eval()
    report = transfer_weights(source.checkpoint, network, head_names=TRAINED)
    torch.testing.assert_close(output(network, image()), output(source.network, image()))
    assert (report.coverage, report.decoder_coverage, report.parameter_coverage) == (1, 1, 1)
    assert {row.fate for row in report.rows} == {"copied"}
    dropped = {row.reason for row in report.source_rows if row.fate == "dropped"}
    assert dropped == {"the encoder again, under the decoder"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_decoder_is_averaged_in_full_precision(dtype):
    source = supervised(RES, kernel_sizes=[[3, 3, 3]] * 3)
    halves = {name: tensor.to(dtype) for name, tensor in source.checkpoint.tensors.items()}
    network = target(RES, kernel_sizes=[[1, 3, 3]] * 3)
    transfer_weights(replace(source.checkpoint, tensors=halves), network, head_names=TRAINED)
    name = "decoder.stages.0.convs.0.conv.weight"
    expected = halves[name].double().sum(2, keepdim=True)
    torch.testing.assert_close(network.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_scope_decides_whatever_the_kind_of_weights():
    source = supervised()
    report = transfer_weights(source.checkpoint, target(), scope="encoder", head_names=TRAINED[:2])
    assert (report.coverage, report.decoder_coverage) == (1, 0)
    assert named(report, "decoder.stages.0.convs.0.conv.weight").reason == "decoder (the scope is the encoder)"
    unsupervised = pretrained()
    assert transfer_weights(unsupervised.checkpoint, target()).decoder_coverage == 0
    report = transfer_weights(unsupervised.checkpoint, target(), scope="encoder+decoder")
    assert report.decoder_coverage == 1
    assert head_reasons(report) == {"segmentation head (the checkpoint's reconstructs images)"}
    assert {row.reason for row in report.source_rows if "seg_layers" in row.name} == {"reconstruction head"}


def test_a_checkpoint_without_a_decoder_is_told_loudly():
    source = pretrained(change=lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("decoder.")})
    report = transfer_weights(source.checkpoint, target(), scope="encoder+decoder")
    assert report.coverage == 1
    assert named(report, "decoder.transpconvs.0.weight").reason == "the checkpoint has no decoder"
    assert "the decoder was requested and the checkpoint has none: it stays fresh" in report.warnings


def test_damage_in_the_decoder_is_an_error():
    source = supervised()
    del source.checkpoint.tensors["decoder.transpconvs.1.weight"]
    with pytest.raises(TransferError, match=r"decoder\.transpconvs\.1\.weight is not in the checkpoint"):
        transfer_weights(source.checkpoint, target())
    report = transfer_weights(source.checkpoint, target(), waive=["decoder.transpconvs.*"])
    assert named(report, "decoder.transpconvs.1.weight").reason == "waived by 'decoder.transpconvs.*'"
    assert named(report, "decoder.transpconvs.1.bias").fate == "copied"


# -- other topologies ------------------------------------------------------------------------------------------------

FOUR = {
    "n_stages": 4,
    "features_per_stage": [4, 6, 8, 10],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 1, 1]],
    "n_blocks_per_stage": [1, 2, 1, 1],
    "n_conv_per_stage_decoder": [1, 1, 1],
}


def test_decoders_are_matched_by_resolution_from_the_finest():
    source, network = supervised(), target(**FOUR)
    report = transfer_weights(source.checkpoint, network, head_names=("background", "cord"))
    assert (
        named(report, "decoder.stages.2.convs.0.conv.weight").source == "decoder.stages.1.convs.0.all_modules.0.weight"
    )
    assert named(report, "decoder.transpconvs.1.weight").source == "decoder.transpconvs.0.weight"
    assert named(report, "decoder.seg_layers.2.bias").source == "decoder.seg_layers.1.bias"
    assert named(report, "decoder.stages.0.convs.0.conv.weight").reason == (
        "no decoder stage of its resolution in the checkpoint (2 stages)"
    )
    assert 0 < report.decoder_coverage < 1
    # From the stage that both have on, the same features give the same output.
    shapes = [(4, 8, 12, 16), (6, 8, 6, 8), (8, 4, 3, 4)]
    skips = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    with torch.no_grad():
        low = network.decoder.transpconvs[1](skips[2])
        torch.testing.assert_close(low, source.network.decoder.transpconvs[0](skips[2]))
        x = network.decoder.stages[1](torch.cat([low, skips[1]], dim=1))
        x = network.decoder.stages[2](torch.cat([network.decoder.transpconvs[2](x), skips[0]], dim=1))
        torch.testing.assert_close(network.decoder.seg_layers[2](x), source.network.decoder(skips)[:, :2])


def test_of_a_deeper_decoder_the_coarsest_stages_are_dropped():
    source, network = supervised(**FOUR), target()
    report = transfer_weights(source.checkpoint, network, head_names=TRAINED[:2])
    assert report.decoder_coverage == 1
    assert named(report, "decoder.transpconvs.0.bias").source == "decoder.transpconvs.1.bias"
    reasons = {row.name: row.reason for row in report.source_rows}
    gone = "decoder stage of a resolution that the network does not have (2 decoder stages)"
    assert reasons["decoder.stages.0.convs.0.conv.weight"] == reasons["decoder.seg_layers.0.bias"] == gone


def test_convolutions_of_a_decoder_stage_are_counted():
    report = transfer_weights(supervised().checkpoint, target(n_conv_per_stage_decoder=[1, 2]), head_names=TRAINED[:2])
    expected = "decoder: convolution 1 of stage 1 is not in the checkpoint (1 convolution)"
    assert named(report, "decoder.stages.1.convs.1.conv.weight").reason == expected
    source = supervised(n_conv_per_stage_decoder=[2, 1])
    report = transfer_weights(source.checkpoint, target(), head_names=TRAINED[:2])
    assert "decoder: the network's stage 0 has 1 convolution" in {row.reason for row in report.source_rows}


def test_a_wider_decoder_computes_in_its_leading_features_what_it_did():
    source = supervised()
    kwargs = {**source.checkpoint.architecture.kwargs, "features_per_stage": [5, 9, 13]}
    network = build_network(Architecture(RES, kwargs), 1, 3, PATCH).eval()
    report = transfer_weights(source.checkpoint, network, head_names=TRAINED)
    torch.testing.assert_close(output(network, image()), output(source.network, image()))
    assert 0.3 < report.decoder_coverage < 1
    assert named(report, "decoder.seg_layers.1.weight").reason == "heads background, cord, Lesion copied"


def test_a_decoder_without_skips_computes_the_same_as_long_as_skips_are_not_looked_at():
    def halve(tensors):
        changed = dict(tensors)
        for name, value in tensors.items():
            if name.startswith("decoder.stages.") and ".convs.0." in name and value.ndim == 5:
                changed[name] = value[:, : value.shape[1] // 2].clone()
        return changed

    source, network = pretrained(change=halve), target()
    report = transfer_weights(source.checkpoint, network, scope="encoder+decoder")
    weight = network.decoder.stages[1].convs[0].conv.weight
    assert torch.equal(weight[:, :4], source.checkpoint.tensors["decoder.stages.1.convs.0.conv.weight"])
    assert not weight[:, 4:].any()
    assert named(report, "decoder.stages.1.convs.0.conv.weight").reason == "inputs 4 → 8 (new ones zero)"


def test_upsampling_by_other_steps_is_resized_by_area():
    source = supervised()
    network = target(strides=[[1, 1, 1], [2, 2, 2], [2, 1, 2]])
    report = transfer_weights(source.checkpoint, network, head_names=TRAINED[:2])
    assert named(report, "decoder.transpconvs.0.weight").reason == "up-sampling step 2×2×2 → 2×1×2 (resized by area)"
    features = torch.randn(1, 6, 3, 2, 5, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before, after = source.network.decoder.transpconvs[1](features), network.decoder.transpconvs[1](features)
    torch.testing.assert_close(after, interpolate(before, scale_factor=(2, 1, 1), mode="nearest"))


def test_upsampling_without_bias_gets_zeros_and_may_lose_it():
    source, network = supervised(conv_bias=False), target()
    report = transfer_weights(source.checkpoint, network, head_names=TRAINED[:2])
    row = named(report, "decoder.transpconvs.0.bias")
    assert (row.fate, row.source, row.reason) == ("adapted", None, "0, as the checkpoint's up-sampling has no bias")
    torch.testing.assert_close(output(network, image()), output(source.network, image())[:, :2])
    report = transfer_weights(supervised().checkpoint, target(conv_bias=False), head_names=TRAINED[:2])
    assert any("the network's up-sampling has no bias" in row.reason for row in report.source_rows)


# -- heads -----------------------------------------------------------------------------------------------------------


def test_heads_move_by_their_names_and_the_others_stay():
    source = supervised()
    network = build_network(source.checkpoint.architecture, 1, 4, PATCH).eval()
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = transfer_weights(source.checkpoint, network, head_names=("Background", "lesion", "tumour", "CORD"))
    assert head_reasons(report) == {"heads Background, lesion, CORD copied; tumour fresh"}
    expected, found = output(source.network, image()), output(network, image())
    torch.testing.assert_close(found[:, [0, 1, 3]], expected[:, [0, 2, 1]])
    key = "decoder.seg_layers.1.weight"
    assert torch.equal(network.state_dict()[key][2], own[key][2])
    assert named(report, key).fresh_numbers == 4


@pytest.mark.parametrize(
    ("trained", "wanted", "why"),
    [
        ((), ("background", "a", "b"), "what the checkpoint's heads stand for is not known"),
        (TRAINED, (), "what the network's heads stand for is not known"),
        (
            TRAINED,
            ("background", "liver", "spleen"),
            r"no label name agrees \(liver, spleen here, cord, Lesion in",
        ),
        (TRAINED, ("cord", "lesion", "both"), "the network predicts regions, the checkpoint labels"),
        (("cord", "lesion", "both"), TRAINED, "the network predicts labels, the checkpoint regions"),
    ],
)
def test_heads_stay_fresh_when_names_do_not_agree(trained, wanted, why):
    with pytest.raises(HeadsDiffer, match=why):
        match_heads(trained, wanted)
    source = supervised(names=trained)
    network = build_network(source.checkpoint.architecture, 1, 3, PATCH)
    before = network.decoder.seg_layers[1].weight.detach().clone()
    report = transfer_weights(source.checkpoint, network, head_names=wanted)
    assert torch.equal(network.decoder.seg_layers[1].weight, before)
    (reason,) = head_reasons(report)
    assert reason.startswith("segmentation head: ")
    assert report.decoder_coverage == 1  # heads apart


def test_regions_agree_with_regions():
    assert match_heads(("whole", "core"), ("core", "rim", "whole")) == [1, None, 0]


def test_names_that_do_not_count_the_heads_are_not_believed():
    source = supervised(names=("background", "cord"))
    network = build_network(source.checkpoint.architecture, 1, 3, PATCH)
    report = transfer_weights(source.checkpoint, network, head_names=TRAINED)
    assert head_reasons(report) == {"segmentation head: the checkpoint has 3 heads and 2 names for them"}


# -- Primus ----------------------------------------------------------------------------------------------------------


def test_a_supervised_primus_is_the_same_network_afterwards():
    source = supervised("Primus", patch=GRID_PATCH)
    network = build_network(source.checkpoint.architecture, 1, 3, GRID_PATCH).eval()
    report = transfer_weights(
        source.checkpoint, network, token_order="whd", head_names=("background", "lesion", "cord")
    )
    expected = output(source.network, image(GRID_PATCH))
    torch.testing.assert_close(output(network, image(GRID_PATCH)), expected[:, [0, 2, 1]])
    assert report.decoder_coverage == 1
    assert head_reasons(report) == {"heads background, lesion, cord copied"}


def test_a_primus_decoder_moves_as_far_as_its_shapes_do():
    source = pretrained("Primus", patch=GRID_PATCH)
    network = target("Primus", patch=GRID_PATCH)
    report = transfer_weights(source.checkpoint, network, scope="encoder+decoder")
    layers = {row.name: row for row in report.rows if row.name.startswith("up_projection.")}
    trained = source.checkpoint.tensors
    for name, row in layers.items():
        if name.startswith("up_projection.decode.1"):
            assert row.reason == "segmentation head (the checkpoint's reconstructs images)"
        elif trained[name].shape == network.state_dict()[name].shape:
            assert row.fate == "copied"
        else:
            assert "widths follow the number of outputs" in row.reason
    assert {row.fate for row in layers.values()} >= {"fresh"}


def test_a_primus_decoder_of_another_depth_stays_fresh():
    source = pretrained("Primus", patch=GRID_PATCH)
    report = transfer_weights(
        source.checkpoint, target("Primus", (8, 24, 32), patch_embed_size=[4, 8, 8]), scope="encoder+decoder"
    )
    decoder = {row.reason for row in report.rows if row.name.startswith("up_projection.")}
    assert decoder == {"2 up-sampling layer(s) in the checkpoint, 3 here: another decoder"}
    assert report.coverage == 1
