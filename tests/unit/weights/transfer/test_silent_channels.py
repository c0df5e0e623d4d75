"""The channels of a cascade's previous stage: a network starts as the one without them."""

import pytest
import torch

import nnssl_adapt as na
from nnssl_adapt.weights.network.architectures import build_network, nearest_patch
from nnssl_adapt.weights.proof.prove import prove_transfer
from nnssl_adapt.weights.transfer.transfer import transfer_weights

SILENT = 3


def networks(checkpoint):
    """With and without such channels, from the same random weights where these count."""
    patch = nearest_patch(checkpoint.architecture, checkpoint.plan.patch_size)
    channels = checkpoint.plan.num_input_channels
    return [build_network(checkpoint.architecture, channels + more, 2, patch) for more in (0, SILENT)], patch


@pytest.mark.parametrize("name", ["small_resenc", "small_plainconv", "small_primus_simmim"])
def test_the_encoder_is_the_pretrained_one_whatever_they_hold(small_resenc, name):
    checkpoint = na.open_checkpoint(small_resenc.parent / name)
    (plain, cascade), _ = networks(checkpoint)
    transfer_weights(checkpoint, plain)
    report = transfer_weights(checkpoint, cascade, silent=SILENT)
    rows = [row for row in report.rows if "previous stage silent" in (row.reason or "")]
    assert rows and {row.part for row in rows} <= {"stem"} and report.coverage == 1
    assert prove_transfer(checkpoint, cascade, silent=SILENT).passed
    image = cascade.state_dict()[rows[0].name]
    assert torch.equal(image[:, :-SILENT], plain.state_dict()[rows[0].name])
    assert not image[:, -SILENT:].any()


def test_the_proof_notices_channels_that_are_not_silent(small_resenc):
    checkpoint = na.open_checkpoint(small_resenc)
    (_, cascade), _ = networks(checkpoint)
    transfer_weights(checkpoint, cascade, silent=SILENT)
    with torch.no_grad():
        cascade.encoder.stem.convs[0].conv.weight[:, -1] += 0.1
    assert not prove_transfer(checkpoint, cascade, silent=SILENT).passed


@pytest.mark.parametrize("rule", ["mean", "zero", (0, None)])
def test_beside_other_image_channels(small_resenc, rule):
    checkpoint = na.open_checkpoint(small_resenc)
    patch = nearest_patch(checkpoint.architecture, checkpoint.plan.patch_size)
    network = build_network(checkpoint.architecture, 2 + SILENT, 2, patch)
    transfer_weights(checkpoint, network, channels=rule, silent=SILENT)
    assert prove_transfer(checkpoint, network, channels=rule, silent=SILENT).passed or rule == (0, None)
    assert not network.encoder.stem.convs[0].conv.weight[:, -SILENT:].any()
