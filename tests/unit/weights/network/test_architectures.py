"""Descriptions of networks: what is understood, what is refused, and that the built network is the one described."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.heavy_modules import HEAVY
from support.nnssl_files import PLAINCONV, PRIMUS, RESENC, architecture

from nnssl_adapt.errors import ArchitectureError
from nnssl_adapt.weights.network.architectures import Architecture, build_network, check_patch, nearest_patch, outline

# Millions of parameters of the whole network with one channel and one class: ResEnc-L's 102 M and the Primus sizes as
# published (arXiv 2410.23132 and 2503.01835).
PUBLISHED = {
    "ResEncL": 102.35,
    "NoSkipResEncL": 102.35,
    "PrimusS": 23.3,
    "PrimusB": 92.0,
    "PrimusM": 145.3,
    "PrimusL": 323.9,
}


@pytest.mark.parametrize(("preset", "millions"), PUBLISHED.items())
def test_presets_have_their_published_size(preset, millions):
    network = outline(Architecture.named(preset), 1, (64, 64, 64))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_presets_are_read_from_adaptation_plans_without_arguments():
    read = Architecture.from_adaptation({"arch_class_name": "PrimusM", "arch_kwargs": None})
    assert read == Architecture.named("PrimusM")
    assert (read.preset, read.total_stride, read.kwargs["drop_path_rate"]) == ("PrimusM", (8, 8, 8), 0.2)


def test_the_encoder_without_skips_is_the_encoder_with_skips():
    assert Architecture.named("NoSkipResEncL").kwargs == Architecture.named("ResEncL").kwargs


@pytest.mark.parametrize("spelling", ["torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU", "LeakyReLU"])
def test_operations_are_known_in_every_spelling(spelling):
    assert Architecture("ResidualEncoderUNet", {**RESENC, "nonlin": spelling}) == architecture()


@pytest.mark.parametrize(
    "name",
    ["os.system", "evil.nn.LeakyReLU", "torch.nn.Linear", "torch.hub.load", "torch.nnevil.LeakyReLU", "builtins.eval"],
)
def test_operations_outside_of_the_list_are_refused(name):
    with pytest.raises(ArchitectureError, match=r"nonlin is .* none of"):
        Architecture("ResidualEncoderUNet", {**RESENC, "nonlin": name})


def test_single_numbers_mean_every_stage():
    short = {**RESENC, "kernel_sizes": 3, "strides": [1, 2, 2], "features_per_stage": 8, "n_conv_per_stage_decoder": 2}
    spelled = Architecture("ResidualEncoderUNet", short).kwargs
    assert spelled["kernel_sizes"] == [[3, 3, 3]] * 3
    assert spelled["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    assert spelled["features_per_stage"] == [8, 8, 8]
    assert spelled["n_conv_per_stage_decoder"] == [2, 2]


def test_nnssl_names_of_a_free_primus_become_the_downstream_networks():
    pretraining = {
        "input_channels": 1,
        "output_channels": 1,
        "input_shape": [4, 12, 16],
        "embed_dim": 24,
        "patch_embed_size": [2, 4, 4],
        "encoder_eva_depth": 2,
        "encoder_eva_numheads": 2,
        "decoder_eva_depth": 1,
        "decoder_eva_numheads": 2,
        "patch_drop_rate": 0.75,
        "drop_path_rate": 0.2,
        "attn_drop_rate": 0,
        "init_values": [0.1],  # a list of one in nnFoundationViT's plan
        "scale_attn_inner": True,
    }
    read = Architecture.from_adaptation({"arch_class_name": "PrimusX", "arch_kwargs": pretraining})
    assert read == architecture("Primus")
    network = build_network(read, 1, 2, (4, 12, 16))
    assert network.eva.patch_drop is None
    assert network.eva.blocks[0].gamma_1 is not None


def test_without_layer_scale_and_inner_norm_their_tensors_do_not_exist():
    network = build_network(
        Architecture("Primus", {**PRIMUS, "init_values": None, "scale_attn_inner": False}), 1, 2, (4, 8, 12)
    )
    names = network.state_dict()
    assert not [name for name in names if "gamma" in name or "attn.norm" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_stages": None}, "missing n_stages"),
        ({"strides": [[1, 1, 1], [1, 2, 2]]}, "strides has 2 entries, expected 3"),
        ({"kernel_sizes": [[3, 3], [3, 3], [3, 3]]}, "only 3D"),
        ({"features_per_stage": [4, 6, 0]}, "positive whole number"),
        ({"flavour": "plain"}, "unknown architecture argument flavour"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ArchitectureError, match=message):
        Architecture("ResidualEncoderUNet", {**RESENC, **changes})


def test_wrong_primus_and_unknown_networks_are_named():
    with pytest.raises(ArchitectureError, match="multiple of 6 × eva_numheads"):
        Architecture("Primus", {**PRIMUS, "embed_dim": 32})
    with pytest.raises(ArchitectureError, match="missing eva_depth"):
        Architecture("Primus", {**PRIMUS, "eva_depth": None})
    with pytest.raises(ArchitectureError, match=r"unknown network 'UNETR'.*ResEncL"):
        Architecture.from_adaptation({"arch_class_name": "monai.networks.UNETR", "arch_kwargs": {}})


@pytest.mark.parametrize(
    ("class_name", "patch", "nearest"),
    [
        ("ResidualEncoderUNet", (10, 20, 30), (10, 20, 32)),
        ("ResidualEncoderUNet", (7, 13, 1), (8, 12, 4)),
        ("ResidualEncoderUNet", (2, 4, 4), (4, 4, 4)),  # one voxel at the bottom
        ("Primus", (3, 12, 17), (4, 12, 16)),
    ],
)
def test_patches_that_do_not_fit_come_with_the_nearest_that_does(class_name, patch, nearest):
    with pytest.raises(ArchitectureError, match="use " + "×".join(map(str, nearest))):
        check_patch(architecture(class_name), patch)
    assert nearest_patch(architecture(class_name), patch) == nearest
    assert check_patch(architecture(class_name), nearest) == nearest


@pytest.mark.parametrize(("class_name", "patch"), [("ResidualEncoderUNet", (4, 8, 12)), ("Primus", (4, 12, 16))])
def test_networks_map_channels_to_classes_on_an_uneven_patch(class_name, patch):
    network = build_network(architecture(class_name), 2, 3, patch).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 2, *patch)).shape == (1, 3, *patch)


def test_deep_supervision_returns_the_finest_first_and_is_refused_for_primus():
    network = build_network(architecture("PlainConvUNet"), 1, 3, (4, 8, 12), deep_supervision=True).eval()
    with torch.no_grad():
        shapes = [tuple(output.shape[2:]) for output in network(torch.zeros(1, 1, 4, 8, 12))]
    assert shapes == [(4, 8, 12), (4, 4, 6)]
    with pytest.raises(ArchitectureError, match="single output"):
        build_network(architecture("Primus"), 1, 3, (4, 12, 16), deep_supervision=True)


@pytest.mark.parametrize("class_name", ["ResidualEncoderUNet", "PlainConvUNet", "Primus"])
def test_plans_entry_survives_json_and_comes_back(class_name):
    described = architecture(class_name)
    entry = json.loads(json.dumps(described.to_plans_dict((4, 12, 16))))
    assert Architecture.from_plans_dict(entry) == described


def test_rare_arguments_survive_the_plans_entry():
    bottleneck = "dynamic_network_architectures.building_blocks.residual.BottleneckD"
    rare = {**RESENC, "block": bottleneck, "bottleneck_channels": 4, "stem_channels": 5, "deep_supervision": True}
    entry = Architecture("ResidualEncoderUNet", rare).to_plans_dict((4, 12, 16))
    assert "block" in entry["_kw_requires_import"]
    assert "deep_supervision" not in entry["arch_kwargs"]
    network = build_network(Architecture.from_plans_dict(entry), 1, 2, (4, 8, 12))
    assert network.state_dict()["encoder.stem.convs.0.conv.weight"].shape[0] == 5
    first = Architecture("PlainConvUNet", {**PLAINCONV, "nonlin_first": True}).to_plans_dict((4, 12, 16))
    assert Architecture.from_plans_dict(first).kwargs["nonlin_first"] is True


def test_descriptions_do_not_share_what_they_were_made_from():
    given = copy.deepcopy(RESENC)
    described = Architecture("ResidualEncoderUNet", given)
    described.to_plans_dict((4, 8, 12))["arch_kwargs"]["strides"][0][0] = 7
    given["strides"][1][1] = 9
    assert described.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2))


@pytest.mark.parametrize("name", ["ResEncL", "ResidualEncoderUNet", "PlainConvUNet", "Primus"])
def test_stock_nnunet_builds_the_same_network_from_the_plans_entry(name):
    peer = pytest.importorskip("nnunetv2.utilities.get_network_from_plans")
    described = Architecture.named(name) if name == "ResEncL" else architecture(name)
    patch = (32, 64, 96)
    entry = described.to_plans_dict(patch)
    deep_supervision = None if described.is_transformer else False
    with torch.device("meta"):
        theirs = peer.get_network_from_plans(
            entry["network_class_name"],
            entry["arch_kwargs"],
            entry["_kw_requires_import"],
            input_channels=2,
            output_channels=3,
            allow_init=False,
            deep_supervision=deep_supervision,
        )
        ours = build_network(described, 2, 3, patch)
    assert type(theirs) is type(ours)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}


def test_what_is_compared_with_a_file_costs_no_heavy_import():
    """An outline of a CNN, and opening a checkpoint of one, import neither torch's compiler nor what only a Primus needs."""
    program = (
        "import sys\n"
        "from nnssl_adapt.weights.network.architectures import Architecture, outline\n"
        "from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint\n"
        "from nnssl_adapt.weights.transfer.transfer import transfer_weights\n"
        "outline(Architecture.named('ResEncL'), 2, (160, 160, 160))\n"
        "open_checkpoint(sys.argv[1])\n"
        f"print(*({set(HEAVY)} & set(sys.modules)))\n"
    )
    source = Path(__file__).parents[3] / "data" / "nnssl_checkpoints" / "small_resenc"
    done = subprocess.run([sys.executable, "-c", program, str(source)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_an_outline_has_the_names_and_shapes_of_the_network():
    for preset in ("PrimusS", "PrimusV3S"):
        small = Architecture.named(preset, embed_dim=24, eva_depth=1, eva_numheads=2)
        built, drawn = build_network(small, 2, 1, (8, 16, 24)), outline(small, 2, (8, 16, 24))
        assert {k: v.shape for k, v in built.state_dict().items()} == {
            k: v.shape for k, v in drawn.state_dict().items()
        }
        assert all(tensor.is_meta for tensor in drawn.parameters())
