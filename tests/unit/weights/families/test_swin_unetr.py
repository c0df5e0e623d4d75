"""Published Swin UNETRs: stand-ins made of MONAI's own class, in each family's layout, compute what they did."""

from functools import cache

import pytest
import torch
from support.monai_files import swin_decoded, swin_file, swin_hidden, swin_names, swin_unetr

from nnssl_adapt.errors import AdaptationPlanError, ArchitectureError, ConfigurationError, TransferError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.modules.swin_unetr import without_scale
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.network.topology import read_topology
from nnssl_adapt.weights.proof.prove import prove_transfer
from nnssl_adapt.weights.transfer.transfer import transfer_weights

PATCH = (32, 64, 32)
VERSIONS = {"voco": 2, "vocomni": 2}
ONLY_SWIN = ("nvidia", "disruptive", "brainsegfounder")


def opened(tmp_path, family, channels=1, **options):
    network = monais(VERSIONS.get(family, 1), channels)[0]
    path = tmp_path / f"{family}.pt"
    torch.save(swin_file(family, network), path)
    return network, open_checkpoint(path, **options)


@cache
def monais(version, channels):
    """(MONAI's network, an image, its skips, what its transformer gives for each): computed once for all families of it."""
    network = swin_unetr(channels, 21, version)
    image = torch.randn(1, channels, *PATCH, generator=torch.Generator().manual_seed(3))
    return network, image, *swin_hidden(network, image)


@cache
def ours(version, channels):
    """Our network with MONAI's tensors under our names, and its skips, which equal MONAI's at every stage."""
    theirs, image, skips, hidden = monais(version, channels)
    arguments = {"feature_size": 12, "version": version, "patch_merging": "old"}
    network = build_network(Architecture("SwinUNETR", arguments), channels, 21, PATCH).eval()
    network.load_state_dict({swin_names(name): tensor for name, tensor in theirs.state_dict().items()})
    with torch.no_grad():
        swin = [network.encoder.stem(image)]
        for stage in network.encoder.stages[2:]:
            swin.append(stage(swin[-1]))
        features = [without_scale(found) for found in swin]
        full = [image, *features]
        found = [stage.skip(full[i]) for i, stage in enumerate(network.encoder.stages)]
    for name, made, truth in (("skip", found, skips), ("swin", features, hidden)):
        for stage, (one, expected) in enumerate(zip(made, truth, strict=True)):
            assert (one - expected).abs().max() <= 1e-5 * expected.abs().max(), (name, stage)
    return network, image, found


@pytest.mark.parametrize(
    ("family", "channels"),
    [
        ("nvidia", 1),
        ("disruptive", 1),
        ("voco", 1),
        ("vocomni", 1),
        ("vocomni", 3),
        ("suprem", 1),
        ("brainsegfounder", 2),
    ],
)
def test_every_stage_equals_the_original(tmp_path, family, channels):
    """Its transferred tensors are, bit for bit, those with which our network computes what MONAI's computes at every stage."""
    _, checkpoint = opened(tmp_path, family, channels)
    assert checkpoint.architecture.kwargs["patch_merging"] == "old"
    assert checkpoint.plan.transpose_forward == (2, 1, 0) and checkpoint.plan.orientation == "LPI"
    assert checkpoint.plan.supervised == (family in ("vocomni", "suprem"))
    network = build_network(checkpoint.architecture, channels, 4, PATCH).eval()
    report = transfer_weights(checkpoint, network)
    assert report.coverage == 1 or (family in ONLY_SWIN and 0 < report.coverage < 1)
    proved = ours(VERSIONS.get(family, 1), channels)[0].state_dict()
    of_encoder = {name for name in proved if name.startswith("encoder.")}
    if family in ONLY_SWIN:
        of_encoder = {name for name in of_encoder if ".swin." in name or ".stem." in name}
    assert len(of_encoder) > 60
    for name in of_encoder:
        torch.testing.assert_close(network.state_dict()[name], proved[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["nvidia", "vocomni"])
def test_the_proof_knows_what_a_file_lacks(tmp_path, family):
    _, checkpoint = opened(tmp_path, family)
    network = build_network(checkpoint.architecture, 2, 4, PATCH)
    transfer_weights(checkpoint, network)
    proof = prove_transfer(checkpoint, network)
    assert proof.passed and len(proof.stages) == (5 if family == "nvidia" else 11), proof


def test_heads_of_the_same_labels_and_the_whole_output_are_kept(tmp_path):
    theirs, checkpoint = opened(tmp_path, "vocomni")
    network = build_network(checkpoint.architecture, 1, 21, PATCH).eval()
    report = transfer_weights(checkpoint, network, head_names=checkpoint.plan.head_names)
    assert all(row.fate == "copied" for row in report.rows)
    _, _, found = ours(2, 1)
    with torch.no_grad():
        expected = swin_decoded(theirs, monais(2, 1)[2])
        assert (network.decoder(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_file_of_unknown_origin_is_asked_how_it_merges_patches(tmp_path):
    with pytest.raises(AdaptationPlanError, match="--patch-merging old"):
        opened(tmp_path, "unknown")
    _, checkpoint = opened(tmp_path, "unknown", patch_merging="new")
    assert checkpoint.architecture.kwargs["patch_merging"] == "new"
    assert checkpoint.choices == {"patch_merging": "new"}
    other = build_network(
        Architecture("SwinUNETR", {**checkpoint.architecture.kwargs, "patch_merging": "old"}), 1, 3, PATCH
    )
    with pytest.raises(TransferError, match="patch_merging is old"):
        transfer_weights(checkpoint, other)


def test_the_choice_means_nothing_for_other_networks(tmp_path):
    from support.monai_files import seg_res_net

    torch.save(seg_res_net("segresnet")[1], tmp_path / "other.pt")
    with pytest.raises(ConfigurationError, match="--patch-merging old"):
        open_checkpoint(tmp_path / "other.pt", patch_merging="old")
    with pytest.raises(ConfigurationError, match="auto, old, new"):
        open_checkpoint(tmp_path / "other.pt", patch_merging="both")


def test_other_widths_and_other_networks_are_refused(tmp_path):
    _, checkpoint = opened(tmp_path, "vocomni")
    wider = Architecture("SwinUNETR", {**checkpoint.architecture.kwargs, "feature_size": 24})
    with pytest.raises(TransferError, match="can't be made from"):
        transfer_weights(checkpoint, build_network(wider, 1, 3, PATCH))
    tiny = {"n_stages": 2, "features_per_stage": [4, 8], "conv_op": "Conv3d", "kernel_sizes": 3, "strides": [1, 2]}
    unet = Architecture("PlainConvUNet", {**tiny, "n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1})
    with pytest.raises(TransferError, match="it is a PlainConvUNet"):
        transfer_weights(checkpoint, build_network(unet, 1, 3, PATCH))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "encoder.stem.weight": torch.zeros(12, 1, 2, 2)}, "2D network"),
        (
            lambda t: {**t, "encoder.stages.2.swin.blocks.0.attn.relative_position_bias_table": torch.zeros(729, 3)},
            "windows of 7",
        ),
        (
            lambda t: {**t, "encoder.stages.2.swin.blocks.2.attn.qkv.weight": torch.zeros(36, 12)},
            "more than two blocks",
        ),
    ],
)
def test_networks_that_are_built_otherwise_are_named(tmp_path, change, words):
    _, checkpoint = opened(tmp_path, "vocomni")
    with pytest.raises(ArchitectureError, match=words):
        read_topology(change(dict(checkpoint.tensors)), {"patch_merging": "old"})
