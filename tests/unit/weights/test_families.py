"""Every family of checkpoints × every fit, beside the network that the file was saved from.

The truth is that network, run in memory (``nnssl_families``): what a new network computes after the transfer has to be what
it computes. Where that is not possible (another topology), tensors are compared with values worked out here.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from nnssl_families import FAMILIES, STEMS, stem_of
from nnssl_networks import BLOCKS, CNN, PRIMUS, RES, raw_cnn, raw_primus
from torch.nn.functional import interpolate

from nnssl_adapt.errors import NnsslAdaptError
from nnssl_adapt.weights.architectures import build_network
from nnssl_adapt.weights.checkpoint import open_checkpoint
from nnssl_adapt.weights.transfer import transfer_weights

TRANSFORMERS = [name for name in FAMILIES if "Primus" in name or "Eva" in name or "SimMIM" in name or "token" in name]
CNNS = [name for name in FAMILIES if name not in TRANSFORMERS]
HEADS = ("background", "right", "left")


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """``family(name, channels)``: the family's files and truth, made once."""

    @cache
    def build(name, channels=1):
        return FAMILIES[name](name, tmp_path_factory.mktemp("family") / "files", channels)

    return build


@pytest.fixture(scope="session")
def opened(family):
    """``opened(name, channels)``: our reading of it; of several stems the first."""

    @cache
    def read(name, channels=1):
        stem = STEMS[0] if name == "MultiTalent" else None
        return open_checkpoint(family(name, channels).source, stem=stem)

    return read


def picture(channels, patch, seed=5):
    """A structured image with another scale along every axis."""
    axes = [torch.linspace(0, 1, n) for n in patch]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    smooth = torch.stack([torch.sin(4 * z + c) + 2 * y * x - torch.cos(7 * x) * (c + 1) for c in range(channels)])
    return (smooth + 0.5 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(seed)))[None]


def computed(network, image):
    """What the network's encoder computes, under the names that ``Family.features`` has."""
    network = network.eval()
    found = {}
    hooks = []
    with torch.no_grad():
        if hasattr(network, "encoder"):
            return {f"stage {i}": skip for i, skip in enumerate(network.encoder(image))}

        def keep(name, to_places):
            def hook(_module, _inputs, output):
                found[name] = to_places(output)

            return hook

        def places(tokens):  # the installed Primus flattens (w h d)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
            grid = found["patch embedding"].shape[2:]
            return tokens.reshape(1, *grid, -1).permute(0, 4, 1, 2, 3)

        hooks.append(network.down_projection.register_forward_hook(keep("patch embedding", lambda volume: volume)))
        for i, block in enumerate(network.eva.blocks):
            hooks.append(block.register_forward_hook(keep(f"block {i}", places)))
        hooks.append(network.eva.norm.register_forward_hook(keep("last norm", places)))
        network(image)
        for hook in hooks:
            hook.remove()
    return found


def assert_same(found, truth, tolerance=2e-5):
    assert found
    for name, features in found.items():
        assert features.shape == truth[name].shape, name
        error = ((features - truth[name]).norm() / truth[name].norm()).item()
        assert error < tolerance, f"{name} is off by {error:.1e}"


def moved(checkpoint, channels, patch, **settings):
    network = build_network(checkpoint.architecture, channels, 3, patch)
    report = transfer_weights(checkpoint, network, **settings)
    assert report.coverage == 1
    return network


# -- channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_copies_of_one_image_give_the_features_of_pre_training(family, opened, name, channels):
    truth = family(name, 1)
    image = picture(1, truth.patch)
    network = moved(opened(name, 1), channels, truth.patch)
    assert_same(computed(network, image.repeat(1, channels, 1, 1, 1)), truth.features(image))


@pytest.mark.parametrize("name", FAMILIES)
def test_two_channels_to_one_sums_what_the_image_did_in_both(family, opened, name):
    truth = family(name, 2)
    image = picture(1, truth.patch)
    network = moved(opened(name, 2), 1, truth.patch)
    assert_same(computed(network, image), truth.features(image.repeat(1, 2, 1, 1, 1)))


@pytest.mark.parametrize("name", FAMILIES)
def test_two_channels_to_three_shares_the_first_among_its_copies(family, opened, name):
    truth = family(name, 2)
    image = picture(2, truth.patch)
    network = moved(opened(name, 2), 3, truth.patch)
    assert_same(computed(network, image[:, [0, 1, 0]]), truth.features(image))
    # The copies share equally, so that neither of two different images in their place is favoured.
    key = network.keys_to_in_proj[0] + ".weight"
    trained = network.get_parameter(key)
    assert torch.equal(trained[:, 0], trained[:, 2])
    source = truth.network.get_parameter(key)
    torch.testing.assert_close(trained[:, 1], source[:, 1])
    torch.testing.assert_close(trained[:, 0], source[:, 0] / 2)


# -- patches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CNNS)
def test_a_cnn_computes_the_same_on_another_patch(family, opened, name):
    truth = family(name, 1)
    patch = (8, 12, 20)
    image = picture(1, patch)
    assert_same(computed(moved(opened(name, 1), 1, patch), image), truth.features(image))


OTHER_PATCHES = [(name, (4, 16, 16)) for name in TRANSFORMERS]
OTHER_PATCHES += [(name, patch) for name in ("EvaMAE", "SimMIM", "Primus VoCo") for patch in ((12, 24, 8), (8, 8, 20))]


@pytest.mark.parametrize(("name", "patch"), OTHER_PATCHES, ids=str)
def test_a_transformer_keeps_its_positions_in_space_on_another_patch(family, opened, name, patch):
    truth = family(name, 1)
    network = moved(opened(name, 1), 1, patch)
    old = truth.network.eva.pos_embed.detach()
    z, y, x = truth.grid
    if truth.order == "hwd":
        volume = torch.stack([old[0, (h * z + w) * x + d] for w in range(z) for h in range(y) for d in range(x)])
    else:
        volume = old[0]
    volume = volume.reshape(z, y, x, -1).permute(3, 0, 1, 2)[None]
    new_grid = [n // s for n, s in zip(patch, (2, 4, 4), strict=True)]
    expected = interpolate(volume, size=new_grid, mode="trilinear", align_corners=False)
    found = network.eva.pos_embed.detach().reshape(1, *new_grid, -1).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(found, expected)
    image = picture(1, patch)
    assert_same(computed(network, image), truth.at_patch(patch).features(image))


def test_the_positions_would_be_seen_if_their_axes_were_exchanged(family, opened):
    """The comparison above can fail: the wrong token order is off by far more than the tolerance."""
    for name in ("EvaMAE", "Primus VoCo", "Primus MG", "Primus VF"):
        truth = family(name, 1)
        image = picture(1, truth.patch)
        network = moved(opened(name, 1), 1, truth.patch, token_order="whd")
        difference = computed(network, image)["last norm"] - truth.features(image)["last norm"]
        assert difference.norm() / truth.features(image)["last norm"].norm() > 1e-2


# -- topology: convolutions ------------------------------------------------------------------------------------------


def cnn_of(checkpoint, channels=1, **changes):
    class_name = checkpoint.architecture.class_name
    network = raw_cnn(class_name, channels, 3, **changes)
    network.apply(network.initialize)
    return network


def blocks_key(checkpoint):
    return next(iter(BLOCKS[checkpoint.architecture.class_name]))


def report_of(checkpoint, network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = transfer_weights(checkpoint, network)
    after = network.state_dict()
    for row in report.rows:
        if row.fate == "fresh":
            assert row.reason, row
            assert torch.equal(before[row.name], after[row.name]), f"{row.name} is reported fresh and was changed"
    return report, after


@pytest.mark.parametrize("name", CNNS)
def test_an_extra_stage_is_fresh_and_the_others_compute_the_same(family, opened, name):
    truth = family(name, 1)
    checkpoint = opened(name, 1)
    blocks = next(iter(BLOCKS[checkpoint.architecture.class_name].values()))
    changes = {
        "n_stages": 4,
        "features_per_stage": [4, 6, 8, 10],
        "kernel_sizes": [*CNN["kernel_sizes"], [3, 3, 3]],
        "strides": [*CNN["strides"], [1, 2, 2]],
        "n_conv_per_stage_decoder": [1, 1, 1],
        blocks_key(checkpoint): [*blocks, 1],
    }
    network = cnn_of(checkpoint, **changes)
    report, _ = report_of(checkpoint, network)
    assert 0 < report.coverage < 1
    assert {row.fate for row in report.rows if row.name.startswith("encoder.stages.3.")} == {"fresh"}
    image = picture(1, (4, 24, 16))
    found, expected = computed(network, image), truth.features(image)
    del found["stage 3"]
    assert_same(found, expected)


@pytest.mark.parametrize("name", CNNS)
def test_fewer_stages_compute_the_same_and_the_last_is_accounted_for(family, opened, name):
    truth = family(name, 1)
    checkpoint = opened(name, 1)
    blocks = next(iter(BLOCKS[checkpoint.architecture.class_name].values()))
    changes = {
        "n_stages": 2,
        "features_per_stage": [4, 6],
        "kernel_sizes": CNN["kernel_sizes"][:2],
        "strides": CNN["strides"][:2],
        "n_conv_per_stage_decoder": [1],
        blocks_key(checkpoint): blocks[:2],
    }
    network = cnn_of(checkpoint, **changes)
    report, _ = report_of(checkpoint, network)
    assert report.coverage == 1
    prefix = checkpoint.plan.key_to_encoder
    dropped = [row for row in report.source_rows if row.name.startswith(f"{prefix}.2.")]
    assert dropped
    assert all(row.fate == "dropped" and row.reason for row in dropped)
    image = picture(1, truth.patch)
    assert_same(computed(network, image), truth.features(image))


@pytest.mark.parametrize("name", CNNS)
def test_wider_stages_compute_in_their_first_features_what_they_did(family, opened, name):
    truth = family(name, 1)
    network = cnn_of(opened(name, 1), features_per_stage=[6, 9, 10])
    report_of(opened(name, 1), network)
    image = picture(1, truth.patch)
    found, expected = computed(network, image), truth.features(image)
    leading = {key: features[:, : expected[key].shape[1]] for key, features in found.items()}
    assert_same(leading, expected)


@pytest.mark.parametrize("name", CNNS)
def test_narrower_stages_keep_the_leading_part_of_every_kernel(family, opened, name):
    checkpoint, trained = opened(name, 1), family(name, 1).network.state_dict()
    network = cnn_of(checkpoint, features_per_stage=[3, 4, 5])
    report, after = report_of(checkpoint, network)
    encoder = [row for row in report.rows if row.part != "rest" and row.fate != "fresh"]
    assert encoder
    for row in encoder:
        leading = tuple(slice(0, n) for n in after[row.name].shape)
        assert torch.equal(after[row.name], trained[row.name][leading].to(after[row.name].dtype)), row.name


@pytest.mark.parametrize("name", CNNS)
def test_extra_blocks_are_fresh_and_fewer_blocks_are_the_first_ones(family, opened, name):
    truth, checkpoint = family(name, 1), opened(name, 1)
    trained = truth.network.state_dict()
    image = picture(1, truth.patch)
    key = blocks_key(checkpoint)
    blocks = BLOCKS[checkpoint.architecture.class_name][key]

    more = cnn_of(checkpoint, **{key: [blocks[0], blocks[1] + 1, blocks[2]]})
    report, after = report_of(checkpoint, more)
    fresh = {row.name for row in report.rows if row.fate == "fresh" and row.part != "rest"}
    fresh = {entry for entry in fresh if not entry.startswith("decoder.encoder.")}  # second names
    extra = "encoder.stages.1.blocks.2." if key.startswith("n_blocks") else "encoder.stages.1.0.convs.2."
    assert fresh
    assert all(entry.startswith(extra) for entry in fresh)
    for entry, tensor in after.items():
        if entry.startswith("encoder.") and entry not in fresh:
            assert torch.equal(tensor, trained[entry]), entry
    assert_same({"stage 0": computed(more, image)["stage 0"]}, truth.features(image))

    fewer = cnn_of(checkpoint, **{key: [blocks[0], 1, blocks[2]]})
    report, after = report_of(checkpoint, fewer)
    assert report.coverage == 1
    for entry, tensor in after.items():
        if entry.startswith("encoder."):
            assert torch.equal(tensor, trained[entry]), entry
    assert_same({"stage 0": computed(fewer, image)["stage 0"]}, truth.features(image))


@pytest.mark.parametrize("name", CNNS)
def test_growing_kernels_keep_the_function_and_shrinking_ones_the_average(family, opened, name):
    truth, checkpoint = family(name, 1), opened(name, 1)
    image = picture(1, truth.patch)
    grown = cnn_of(checkpoint, kernel_sizes=[[3, 3, 3], [3, 5, 3], [3, 3, 5]])
    report, _ = report_of(checkpoint, grown)
    assert report.coverage == 1
    assert_same(computed(grown, image), truth.features(image))

    shrunk = cnn_of(checkpoint, kernel_sizes=[[1, 3, 3], [1, 3, 3], [3, 3, 1]])
    report, after = report_of(checkpoint, shrunk)
    assert report.coverage == 1
    trained = truth.network.state_dict()
    for entry, tensor in after.items():
        if not entry.startswith("encoder.") or tensor.ndim != 5:
            continue
        old = trained[entry]
        axes = [axis for axis in (2, 3, 4) if tensor.shape[axis] == 1 < old.shape[axis]]
        # An image that does not change along the axis meets the sum of the weights along it.
        expected = old.sum(dim=axes, keepdim=True) if axes else old
        torch.testing.assert_close(tensor, expected, msg=entry)


# -- topology: transformers ------------------------------------------------------------------------------------------


def primus_of(checkpoint, patch, **changes):
    kwargs = {k: checkpoint.architecture.kwargs[k] for k in ("init_values", "scale_attn_inner")}
    return raw_primus(1, 3, patch, **{**kwargs, **changes})


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_that_both_have_compute_the_same(family, opened, name, depth):
    truth, checkpoint = family(name, 1), opened(name, 1)
    network = primus_of(checkpoint, truth.patch, encoder_eva_depth=depth)
    report, _ = report_of(checkpoint, network)
    image = picture(1, truth.patch)
    found, expected = computed(network, image), truth.features(image)
    common = [key for key in found if key in expected and key != "last norm"]
    assert len(common) == 1 + min(depth, PRIMUS["encoder_eva_depth"])
    assert_same({key: found[key] for key in common}, expected)
    fresh = {row.name for row in report.rows if row.fate == "fresh" and row.part != "rest"}
    assert all(name.startswith(("eva.blocks.2.", "eva.blocks.3.")) for name in fresh)
    assert bool(fresh) == (depth == 4)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_larger_patch_embedding_sees_in_a_larger_image_what_the_smaller_one_saw(family, opened, name):
    """Each patch of the image twice as long, its voxels interpolated: the same tokens in the same places."""
    truth, checkpoint = family(name, 1), opened(name, 1)
    network = primus_of(checkpoint, (12, 12, 8), patch_embed_size=(4, 4, 4))
    report, _ = report_of(checkpoint, network)
    assert report.coverage == 1
    image = picture(1, truth.patch)
    cells = image.reshape(3, 2, -1).permute(0, 2, 1)  # the patches' two voxels along z
    longer = interpolate(cells, size=4, mode="linear", align_corners=False).permute(0, 2, 1).reshape(1, 1, 12, 12, 8)
    assert_same(computed(network, longer), truth.features(image))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_smaller_patch_embedding_sees_every_voxel_as_the_several_it_stands_for(family, opened, name):
    truth, checkpoint = family(name, 1), opened(name, 1)
    network = primus_of(checkpoint, (6, 6, 4), patch_embed_size=(2, 2, 2))
    report, _ = report_of(checkpoint, network)
    assert report.coverage == 1
    image = picture(1, (6, 6, 4))
    repeated = image.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    assert_same(computed(network, image), truth.features(repeated))


# -- what only some have ---------------------------------------------------------------------------------------------


def stem_network(family, tensors):
    network = raw_cnn(RES, family.channels)
    state = {k: v for k, v in family.network.state_dict().items() if not k.startswith("encoder.stem.")}
    network.load_state_dict({**state, **tensors, **{f"decoder.{k}": v for k, v in tensors.items()}})
    return network.eval()


@pytest.mark.parametrize("stem", [*STEMS, "mean", None])
def test_a_stem_of_several_is_chosen_or_averaged(family, stem):
    truth = family("MultiTalent", 1)
    stems = [stem_of(truth, name) for name in STEMS]
    if stem in STEMS:
        tensors = stems[STEMS.index(stem)]
    else:
        tensors = {key: sum(each[key] for each in stems) / len(STEMS) for key in stems[0]}
    checkpoint = open_checkpoint(truth.source, stem=stem)
    image = picture(1, truth.patch)
    with torch.no_grad():
        expected = {f"stage {i}": skip for i, skip in enumerate(stem_network(truth, tensors).encoder(image))}
    assert_same(computed(moved(checkpoint, 1, truth.patch), image), expected)


def test_a_stem_that_is_not_there_is_an_error_that_lists_those_that_are(family):
    with pytest.raises(NnsslAdaptError) as caught:
        open_checkpoint(family("MultiTalent", 1).source, stem="Dataset999_None")
    assert "Dataset999_None" in str(caught.value)
    assert all(stem in str(caught.value) for stem in STEMS)


@pytest.mark.parametrize("name", ["supervised", "supervised PlainConv"])
def test_of_a_supervised_network_the_decoder_moves_and_heads_by_their_names(family, opened, name):
    truth, checkpoint = family(name, 1), opened(name, 1)
    image = picture(1, truth.patch)
    network = build_network(checkpoint.architecture, 1, 3, truth.patch).eval()
    transfer_weights(checkpoint, network, head_names=HEADS)
    with torch.no_grad():
        expected = truth.network(image)
        torch.testing.assert_close(network(image), expected[:, [0, 2, 1]])
        # Half of the names agree: those heads are taken over, the other one is fresh.
        other = build_network(checkpoint.architecture, 1, 3, truth.patch).eval()
        transfer_weights(checkpoint, other, head_names=("background", "heart", "left"))
        found = other(image)
    torch.testing.assert_close(found[:, [0, 2]], expected[:, [0, 1]])
    assert not torch.allclose(found[:, 1], expected[:, 2], atol=1e-3)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("supervised")])
def test_nothing_but_the_encoder_of_a_self_supervised_network_moves(opened, name):
    checkpoint = opened(name, 1)
    network = build_network(checkpoint.architecture, 1, 3, checkpoint.plan.patch_size)
    report, _ = report_of(checkpoint, network)
    assert {row.fate for row in report.rows if row.part == "rest" and row.alias_of is None} == {"fresh"}
    assert len(report.source_rows) == len({row.name for row in report.source_rows})
    assert all(row.fate == "used" or row.reason for row in report.source_rows)


@pytest.mark.parametrize("name", ["MAE fp16", "EvaMAE bf16"])
def test_half_precision_becomes_the_precision_of_the_network(opened, name):
    network = moved(opened(name, 1), 1, opened(name, 1).plan.patch_size)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


def test_tensors_of_a_gpu_are_read_without_one(family):
    path = family("MAE saved on CUDA", 1).source / "checkpoint_final.pth"
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    assert {tensor.device.type for tensor in open_checkpoint(path.parent).tensors.values()} == {"cpu"}


def test_every_family_of_the_table_is_here():
    assert set(TRANSFORMERS) | set(CNNS) == set(FAMILIES)
    assert len(TRANSFORMERS) == 18 and len(CNNS) == 22
