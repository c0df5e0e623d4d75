"""Every family of checkpoints × every fit, beside the network that the file was saved from.

The truth is that network, run in memory (``nnssl_families``): what a new network computes after the transfer has to be what
it computes. Where that is not possible (another topology), tensors are compared with values worked out here.
"""

from __future__ import annotations

import pytest
import torch
from support.family_checks import CNNS, TRANSFORMERS, assert_same, computed, moved, picture, report_of
from support.nnssl_families import FAMILIES, STEMS, stem_of
from support.nnssl_networks import RES, raw_cnn
from torch.nn.functional import interpolate

from nnssl_adapt.errors import NnsslAdaptError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.transfer.transfer import transfer_weights

HEADS = ("background", "right", "left")


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
