"""Every family of checkpoints into a network of another shape, beside the network that the file was saved from."""

from __future__ import annotations

import pytest
import torch
from support.family_checks import CNNS, TRANSFORMERS, assert_same, computed, picture, report_of
from support.nnssl_networks import BLOCKS, CNN, PRIMUS, raw_cnn, raw_primus
from torch.nn.functional import interpolate

# -- topology: convolutions ------------------------------------------------------------------------------------------


def cnn_of(checkpoint, channels=1, **changes):
    class_name = checkpoint.architecture.class_name
    network = raw_cnn(class_name, channels, 3, **changes)
    network.apply(network.initialize)
    return network


def blocks_key(checkpoint):
    return next(iter(BLOCKS[checkpoint.architecture.class_name]))


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
