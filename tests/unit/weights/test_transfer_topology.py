"""Networks with other stages, blocks, widths and kernels than the checkpoint: what fits is moved by a rule that is told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nnssl_files import PLAINCONV, RESENC
from support.transfer_pairs import BASE, BLOCKS, GRID_PATCH, PATCH, PLAIN, RES, image, pretrained, target
from torch.nn.functional import interpolate

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.transfer.transfer import transfer_weights


def skips(network, image):
    with torch.no_grad():
        return network.encoder(image)


def reasons(report, fate="fresh"):
    return {row.reason for row in report.rows if row.fate == fate and row.part != "rest"}


def dropped(report):
    return {row.reason for row in report.source_rows if row.fate == "dropped"}


# -- stages and blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", [RES, PLAIN])
def test_a_further_stage_is_fresh_and_says_how_many_there_were(class_name):
    source = pretrained(class_name)
    more = target(
        class_name,
        patch=(8, 24, 16),
        n_stages=4,
        features_per_stage=[4, 6, 8, 10],
        kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        strides=[*RESENC["strides"], [1, 2, 2]],
        n_conv_per_stage_decoder=[1, 1, 1],
        **{BLOCKS[class_name]: [*BASE[class_name][BLOCKS[class_name]], 2]},
    )
    report = transfer_weights(source.checkpoint, more)
    assert reasons(report) == {"stage 3 is not in the checkpoint (3 stages)"}
    for one, other in zip(skips(source.network, image((8, 24, 16))), skips(more, image((8, 24, 16))), strict=False):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("class_name", [RES, PLAIN])
def test_fewer_stages_drop_the_deepest(class_name):
    source = pretrained(class_name)
    fewer = target(
        class_name,
        n_stages=2,
        features_per_stage=[4, 6],
        kernel_sizes=RESENC["kernel_sizes"][:2],
        strides=RESENC["strides"][:2],
        n_conv_per_stage_decoder=[1],
        **{BLOCKS[class_name]: BASE[class_name][BLOCKS[class_name]][:2]},
    )
    report = transfer_weights(source.checkpoint, fewer)
    assert report.coverage == 1
    assert "the network has 2 stages" in dropped(report)
    for one, other in zip(skips(source.network, image()), skips(fewer, image()), strict=False):
        torch.testing.assert_close(one, other)


def test_further_blocks_are_fresh_and_fewer_are_the_first():
    source = pretrained(n_blocks_per_stage=[1, 2, 3])
    network = target(n_blocks_per_stage=[2, 2, 1])
    report = transfer_weights(source.checkpoint, network)
    assert reasons(report) == {"block 1 of stage 0 is not in the checkpoint (1 block)"}
    assert "the network's stage 2 has 1 block" in dropped(report)
    trained, after = source.network.state_dict(), network.state_dict()
    for name in ("encoder.stages.0.blocks.0.conv1.conv.weight", "encoder.stages.2.blocks.0.conv2.norm.bias"):
        assert torch.equal(after[name], trained[name])


def test_convolutions_of_a_plain_stage_are_counted_as_such():
    source = pretrained(PLAIN, n_conv_per_stage=[2, 1, 3])
    report = transfer_weights(source.checkpoint, target(PLAIN, n_conv_per_stage=[3, 2, 2]))
    expected = {
        f"convolution {c} of stage {s} is not in the checkpoint ({w})" for c, s, w in [(2, 0, "2 convolutions")]
    }
    assert reasons(report) == expected | {"convolution 1 of stage 1 is not in the checkpoint (1 convolution)"}
    assert "the network's stage 2 has 2 convolutions" in dropped(report)


def test_a_block_that_the_architecture_promises_and_the_file_lacks_is_damage():
    def lose(tensors):
        return {name: tensor for name, tensor in tensors.items() if "stages.1.blocks.1." not in name}

    source = pretrained(change=lose)
    with pytest.raises(TransferError, match=r"stages\.1\.blocks\.1\.conv1.* is not in the checkpoint"):
        transfer_weights(source.checkpoint, target())
    report = transfer_weights(source.checkpoint, target(), waive=["encoder.stages.1.blocks.1.*"])
    assert reasons(report) == {"waived by 'encoder.stages.1.blocks.1.*'"}


# -- blocks built another way ----------------------------------------------------------------------------------------


def test_a_projection_that_one_side_lacks_is_fresh_or_dropped():
    with_projection, without = {"features_per_stage": [4, 6, 8]}, {"features_per_stage": [6, 6, 8]}
    report = transfer_weights(pretrained(**with_projection).checkpoint, target(**without))
    assert "projection of a skip connection, the network's passes on its input as it is" in dropped(report)
    report = transfer_weights(pretrained(**without).checkpoint, target(**with_projection))
    assert "projection of a skip connection, the checkpoint's passes on its input as it is" in reasons(report)


def test_a_projection_is_found_behind_the_pooling_that_other_strides_bring():
    source = pretrained(strides=[[1, 1, 1], [1, 1, 1], [2, 2, 2]])
    assert "encoder.stages.1.blocks.0.skip.0.conv.weight" in source.checkpoint.tensors
    network = target()  # stage 1 steps by 1×2×2
    report = transfer_weights(source.checkpoint, network)
    row = next(row for row in report.rows if row.name == "encoder.stages.1.blocks.0.skip.1.conv.weight")
    assert (row.fate, row.source) == ("copied", "encoder.stages.1.blocks.0.skip.0.all_modules.0.weight")
    assert report.coverage == 1
    assert any("stage 1 has strides 1×2×2, was 1×1×1" in warning for warning in report.warnings)


def test_convolutions_without_bias_are_told_not_refused():
    report = transfer_weights(pretrained(conv_bias=False).checkpoint, target())
    assert reasons(report) >= {"the checkpoint's convolutions have no bias"}
    report = transfer_weights(pretrained().checkpoint, target(conv_bias=False))
    assert "the network's convolutions have no bias (normalisation takes it away)" in dropped(report)
    assert report.coverage == 1


def test_normalisation_without_weights_can_be_filled_but_not_lost():
    plain = {"norm_op_kwargs": {"eps": 1e-5, "affine": False}}
    source = pretrained(PLAIN, **plain)
    network = build_network(Architecture(PLAIN, dict(PLAINCONV)), 1, 2, PATCH).eval()  # 1 and 0, as initialised
    report = transfer_weights(source.checkpoint, network)
    said = "the checkpoint's normalisation has no weight and bias; new ones are 1 and 0 and do the same"
    assert reasons(report) == {said}
    for one, other in zip(skips(source.network, image()), skips(network, image()), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(TransferError, match="normalisation with weights on one side"):
        transfer_weights(pretrained(PLAIN).checkpoint, target(PLAIN, **plain))


def test_bottleneck_blocks_do_not_become_basic_ones():
    source = pretrained(block="BottleneckD", bottleneck_channels=[2, 3, 4])
    with pytest.raises(TransferError, match="bottleneck blocks on one side"):
        transfer_weights(source.checkpoint, target())


def test_another_kind_of_network_is_said_to_be_one():
    with pytest.raises(TransferError, match="it is a PlainConvUNet, the checkpoint a ResidualEncoderUNet"):
        transfer_weights(pretrained().checkpoint, target(PLAIN))


# -- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", [RES, PLAIN])
def test_leading_features_of_a_wider_network_compute_exactly_what_they_did(class_name):
    source, network = pretrained(class_name), target(class_name, features_per_stage=[5, 9, 13])
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = transfer_weights(source.checkpoint, network)
    for one, other in zip(skips(source.network, image()), skips(network, image()), strict=True):
        torch.testing.assert_close(one, other[:, : one.shape[1]])
    stage = "encoder.stages.1.blocks.0.conv2" if class_name == RES else "encoder.stages.1.0.convs.1"
    weight, bias = (network.state_dict()[f"{stage}.conv.{kind}"] for kind in ("weight", "bias"))
    assert torch.equal(weight[6:], own[f"{stage}.conv.weight"][6:])
    assert torch.equal(bias[6:], own[f"{stage}.conv.bias"][6:])
    assert not weight[:6, 6:].any()
    row = next(row for row in report.rows if row.name == f"{stage}.conv.weight")
    assert row.reason == "features 6 → 9 (the leading 6), inputs 6 → 9 (new ones zero)"
    assert (row.numbers, row.fresh_numbers) == (9 * 9 * 27, 3 * 9 * 27)
    assert 0.3 < report.coverage < 1


def test_of_a_narrower_network_each_kernel_is_the_leading_part():
    source, network = pretrained(), target(features_per_stage=[3, 4, 5])
    report = transfer_weights(source.checkpoint, network)
    assert report.coverage == 1
    trained, after = source.network.state_dict(), network.state_dict()
    for row in (row for row in report.rows if row.part != "rest"):
        leading = tuple(slice(n) for n in after[row.name].shape)
        assert torch.equal(after[row.name], trained[row.name][leading]), row.name
    assert any("features 6 → 4 (the leading 4)" in reason for reason in reasons(report, "adapted"))


def test_kernels_grow_with_the_function_kept():
    source, network = pretrained(), target(kernel_sizes=[[3, 5, 3], [3, 3, 5], [5, 3, 3]])
    report = transfer_weights(source.checkpoint, network)
    for one, other in zip(skips(source.network, image()), skips(network, image()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert "kernel 1×3×3 → 3×5×3 (zeros around it)" in reasons(report, "adapted")
    report = transfer_weights(source.checkpoint, target(kernel_sizes=[[3, 1, 3], [3, 3, 3], [3, 3, 3]]))
    assert "kernel 1×3×3 → 3×1×3 (zeros around it and averaged)" in reasons(report, "adapted")


def test_a_transfer_of_little_says_so_loudly():
    report = transfer_weights(pretrained().checkpoint, target(features_per_stage=[16, 24, 40]))
    assert report.coverage < 0.5
    assert any("OF THE ENCODER'S NUMBERS ARE PRE-TRAINED" in warning for warning in report.warnings)
    assert "WARNING: ONLY" in str(report)
    assert not transfer_weights(pretrained().checkpoint, target()).warnings


# -- transformers ----------------------------------------------------------------------------------------------------


def blocks_of(network, volume):
    """What each block computes, tokens in the network's order."""
    found, hooks = [], []
    for block in network.eva.blocks:
        hooks.append(block.register_forward_hook(lambda _module, _inputs, output: found.append(output)))
    with torch.no_grad():
        network(volume)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("depth", [1, 3])
def test_blocks_of_a_transformer_with_another_depth(depth):
    source = pretrained("Primus", patch=GRID_PATCH)
    network = target("Primus", patch=GRID_PATCH, eva_depth=depth)
    report = transfer_weights(source.checkpoint, network)
    for one, other in zip(*(blocks_of(n, image(GRID_PATCH)) for n in (source.network, network)), strict=False):
        torch.testing.assert_close(one, other)
    if depth == 1:
        assert "the network has 1 block" in dropped(report)
        assert report.coverage == 1
    else:
        assert reasons(report) == {"block 2 is not in the checkpoint (2 blocks)"}


@pytest.mark.parametrize("heads", [3, 1])
def test_a_transformer_of_another_width_keeps_whole_heads_and_says_what_is_lost(heads):
    source = pretrained("Primus", patch=GRID_PATCH)
    network = target("Primus", patch=GRID_PATCH, embed_dim=12 * heads, eva_numheads=heads)
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = transfer_weights(source.checkpoint, network)
    trained, after = source.network.state_dict(), network.state_dict()
    width = min(12 * heads, 24)
    for name in ("eva.blocks.0.attn.q_proj.weight", "eva.blocks.1.attn.proj.weight"):
        assert torch.equal(after[name][:width, :width], trained[name][:width, :width])
        assert not after[name][:width, width:].any()
        assert torch.equal(after[name][width:], own[name][width:])
    assert torch.equal(after["eva.pos_embed"][..., :width], trained["eva.pos_embed"][..., :width])
    assert torch.equal(after["eva.pos_embed"][..., width:], own["eva.pos_embed"][..., width:])
    assert any("without computing the same" in warning for warning in report.warnings)


def test_another_inner_width_is_told_as_well():
    report = transfer_weights(
        pretrained("Primus", patch=GRID_PATCH).checkpoint, target("Primus", GRID_PATCH, mlp_ratio=3)
    )
    assert any("without computing the same" in warning for warning in report.warnings)
    assert not transfer_weights(
        pretrained("Primus", patch=GRID_PATCH).checkpoint, target("Primus", GRID_PATCH)
    ).warnings


def test_heads_of_another_width_are_an_error_that_says_which_are_possible():
    source = pretrained("Primus", patch=GRID_PATCH)
    with pytest.raises(TransferError, match=r"heads are 18 wide, the checkpoint's 12: .*3 heads here"):
        transfer_weights(source.checkpoint, target("Primus", patch=GRID_PATCH, embed_dim=36))


def test_blocks_that_were_not_scaled_are_scaled_by_one():
    source = pretrained("Primus", patch=GRID_PATCH, init_values=None)
    network = target("Primus", patch=GRID_PATCH)
    report = transfer_weights(source.checkpoint, network)
    for one, other in zip(*(blocks_of(n, image(GRID_PATCH)) for n in (source.network, network)), strict=True):
        torch.testing.assert_close(one, other)
    assert "1, as the checkpoint's blocks are not scaled" in reasons(report, "adapted")
    with pytest.raises(TransferError, match=r"scaled \(init_values\) on one side only"):
        transfer_weights(
            pretrained("Primus", patch=GRID_PATCH).checkpoint, target("Primus", GRID_PATCH, init_values=None)
        )
    with pytest.raises(TransferError, match=r"scale_attn_inner\) on one side only"):
        unscaled = pretrained("Primus", patch=GRID_PATCH, scale_attn_inner=False)
        transfer_weights(unscaled.checkpoint, target("Primus", GRID_PATCH))


def test_a_larger_patch_embedding_gives_the_tokens_of_the_smaller_image():
    source = pretrained("Primus", patch=GRID_PATCH)  # patches of 2×4×4
    network = target("Primus", patch=(6, 24, 20), patch_embed_size=(3, 8, 5))  # 2×3×4 of them
    with torch.no_grad():
        small = image(GRID_PATCH)
        tiles = small.reshape(2, 2, 3, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(24, 1, 2, 4, 4)
        larger = interpolate(tiles, size=(3, 8, 5), mode="trilinear", align_corners=False)
        larger = larger.reshape(2, 3, 4, 3, 8, 5).permute(0, 3, 1, 4, 2, 5).reshape(1, 1, 6, 24, 20)
        report = transfer_weights(source.checkpoint, network)
        torch.testing.assert_close(network.down_projection(larger), source.network.down_projection(small))
    assert "patch embedding 2×4×4 → 3×8×5 (pseudo-inverse of resizing)" in reasons(report, "adapted")
    assert torch.equal(network.eva.pos_embed, source.network.eva.pos_embed)


def test_positions_go_to_an_anisotropic_grid_and_only_the_leading_width():
    source = pretrained("Primus", patch=GRID_PATCH)
    network = target("Primus", patch=(10, 4, 8))
    transfer_weights(source.checkpoint, network, token_order="whd")
    volume = source.network.eva.pos_embed.detach().reshape(1, 2, 3, 4, 24).permute(0, 4, 1, 2, 3)
    expected = interpolate(volume, size=(5, 1, 2), mode="trilinear", align_corners=False)
    torch.testing.assert_close(network.eva.pos_embed.detach(), expected.flatten(2).transpose(1, 2))


# -- any pair --------------------------------------------------------------------------------------------------------


@st.composite
def topologies(draw):
    """Keyword arguments of a small U-Net: stages, blocks, widths, kernels and strides of any kind."""
    stages = draw(st.integers(2, 4))

    def each(values):
        return [draw(values) for _ in range(stages)]

    kernels, steps = st.sampled_from([1, 3, 5]), st.sampled_from([1, 2])
    return {
        "n_stages": stages,
        "features_per_stage": each(st.integers(2, 6)),
        "kernel_sizes": each(st.tuples(kernels, kernels, kernels).map(list)),
        "strides": [[1, 1, 1], *each(st.tuples(steps, steps, steps).map(list))[1:]],
        "n_conv_per_stage_decoder": each(st.integers(1, 2))[1:],
        "blocks": each(st.integers(1, 2)),
        "conv_bias": draw(st.booleans()),
    }


@given(
    class_name=st.sampled_from([RES, PLAIN]),
    trained=topologies(),
    wanted=topologies(),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    scope=st.sampled_from(["encoder", "encoder+decoder"]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_pair_of_topologies_is_accounted_for(class_name, trained, wanted, channels, scope):
    for arguments in (trained, wanted):
        arguments[BLOCKS[class_name]] = arguments.pop("blocks")
    source = pretrained(class_name, channels[0], patch=(16, 16, 32), **trained)
    network = target(class_name, (16, 16, 32), channels[1], **wanted)
    check_account(source, network, scope=scope)


@st.composite
def transformers(draw):
    """Keyword arguments of a small Primus with heads 12 wide, and its patch."""
    steps = st.sampled_from([1, 2, 4])
    kernel = [draw(steps), draw(steps), draw(st.sampled_from([2, 4]))]
    heads = draw(st.integers(1, 3))
    grid = [draw(st.integers(1, 3)) for _ in range(3)]
    kwargs = {"embed_dim": 12 * heads, "eva_numheads": heads, "eva_depth": draw(st.integers(1, 3))}
    return {**kwargs, "patch_embed_size": kernel}, tuple(g * k for g, k in zip(grid, kernel, strict=True))


@given(
    trained=transformers(),
    wanted=transformers(),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    order=st.sampled_from(["hwd", "whd"]),
    scope=st.sampled_from(["encoder", "encoder+decoder"]),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_pair_of_transformers_is_accounted_for(trained, wanted, channels, order, scope):
    source = pretrained("Primus", channels[0], trained[1], **trained[0])
    network = target("Primus", wanted[1], channels[1], **wanted[0])
    check_account(source, network, scope=scope, token_order=order)


def check_account(source, network, **settings):
    """Every tensor of both sides has one fate, and the network is what the report says."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = transfer_weights(source.checkpoint, network, **settings)
    after = network.state_dict()
    assert {row.name for row in report.rows} == set(after)
    assert [row.name for row in report.source_rows] == list(source.checkpoint.tensors)
    for row in report.rows:
        if row.fate == "fresh":
            assert row.reason
            assert torch.equal(after[row.name], before[row.name]), row.name
        elif row.fate == "copied":
            assert torch.equal(after[row.name], source.checkpoint.tensors[row.source])
        else:
            assert row.reason
            assert after[row.name].shape == row.target_shape
            assert 0 <= row.fresh_numbers < row.numbers
    used = {row.name for row in report.source_rows if row.fate == "used"}
    assert {row.source for row in report.rows if row.fate != "fresh"} - {None} <= used
    assert all(row.reason for row in report.source_rows if row.fate == "dropped")
