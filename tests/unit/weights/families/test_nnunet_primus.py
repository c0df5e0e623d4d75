"""nnU-Net's Primus folders: the network follows from the trainer's name, since the plans speak of a U-Net."""

import json

import pytest
import torch
from support.nnssl_networks import nnunet_plans

from nnssl_adapt.errors import AdaptationPlanError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.families import nnunet
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.network.network_parts import NetworkParts
from nnssl_adapt.weights.network.topology import read_topology
from nnssl_adapt.weights.proof.prove import prove_transfer
from nnssl_adapt.weights.transfer.transfer import transfer_weights

TINY = {"embed_dim": 24, "eva_depth": 2, "eva_numheads": 2}
PATCH = (16, 24, 32)
PRESETS = ["PrimusS", "PrimusV2S", "PrimusV3S"]


def tiny(preset):
    return Architecture.named(preset, **TINY)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """``folder(preset)``: a model folder as its trainer leaves it, and the network; the published sizes made small."""

    def make(preset, channels=2, trainer=None):
        monkeypatch.setattr(nnunet, "architecture_of_preset", tiny)
        trainer = trainer or nnunet.PRIMUS_TRAINERS[preset]
        model = tmp_path / f"{trainer}__nnUNetPlans__3d_fullres"
        (model / "fold_0").mkdir(parents=True)
        plans = nnunet_plans("PlainConvUNet", channels)
        plans["configurations"]["3d_fullres"]["patch_size"] = list(PATCH)
        dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "cord": 1, "lesion": 2}}
        (model / "plans.json").write_text(json.dumps(plans))
        (model / "dataset.json").write_text(json.dumps(dataset))
        torch.manual_seed(0)
        network = build_network(tiny(preset), channels, 3, PATCH).eval()
        content = {
            "network_weights": network.state_dict(),
            "trainer_name": trainer,
            "init_args": {"configuration": "3d_fullres"},
        }
        torch.save(content, model / "fold_0" / "checkpoint_final.pth")
        return model, network

    return make


@pytest.mark.parametrize("preset", PRESETS)
def test_the_network_is_the_trainers_and_its_function_is_kept(folder, preset):
    model, network = folder(preset)
    checkpoint = open_checkpoint(model)
    assert checkpoint.architecture == tiny(preset) and checkpoint.notes == ()
    assert checkpoint.plan.supervised and checkpoint.plan.patch_size == PATCH
    ours = build_network(checkpoint.architecture, 2, 3, PATCH).eval()
    report = transfer_weights(checkpoint, ours, head_names=("background", "cord", "lesion"), channel_names=("T1", "T2"))
    assert report.coverage == report.decoder_coverage == 1
    image = torch.randn(1, 2, *PATCH)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), network(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_encoder_is_proven_for_every_number_of_channels(folder, preset, channels):
    """The tokenizer of V2 and V3 sees the image in two places."""
    checkpoint = open_checkpoint(folder(preset)[0])
    network = build_network(checkpoint.architecture, channels, 2, PATCH)
    transfer_weights(checkpoint, network, channels="repeat")
    assert prove_transfer(checkpoint, network, channels="repeat").passed


@pytest.mark.parametrize("preset", PRESETS)
def test_channels_are_paired_by_name_in_both_places(folder, preset):
    checkpoint = open_checkpoint(folder(preset)[0])
    network = build_network(checkpoint.architecture, 2, 2, PATCH)
    transfer_weights(checkpoint, network, channel_names=("T2w", "T1w"))
    seen = [module for module in NetworkParts.of(network).in_proj if "all_modules" not in module]
    assert len(seen) == (1 if preset == "PrimusS" else 2)
    for module in seen:
        name = f"{module}.weight"
        assert torch.equal(network.state_dict()[name], checkpoint.tensors[name][:, [1, 0]])


def test_the_decoder_follows_the_number_of_outputs(folder):
    checkpoint = open_checkpoint(folder("PrimusV3S")[0])
    network = build_network(checkpoint.architecture, 2, 9, PATCH)
    report = transfer_weights(checkpoint, network, head_names=[str(n) for n in range(9)])
    assert report.coverage == 1
    fresh = {row.reason for row in report.rows if row.name.startswith("up_projection") and row.fate == "fresh"}
    assert any("number of outputs" in reason for reason in fresh)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_order_of_tokens_is_said(folder, preset):
    checkpoint = open_checkpoint(folder(preset)[0])
    report = transfer_weights(checkpoint, build_network(checkpoint.architecture, 2, 3, PATCH))
    assert any("file whd" in note for note in report.notes)
    assert any("--token-order hwd" in warning for warning in report.warnings) == (preset == "PrimusS")


@pytest.mark.parametrize("preset", PRESETS)
def test_its_architecture_is_read_off_the_tensors(folder, preset):
    _, network = folder(preset)
    topology = read_topology(network.state_dict(), tiny(preset).kwargs)
    assert (topology.architecture.class_name, topology.channels) == (tiny(preset).class_name, 2)
    assert topology.architecture.kwargs == tiny(preset).kwargs


def test_a_folder_of_another_trainer_is_no_primus(folder):
    model, _ = folder("PrimusS", trainer="nnUNetTrainer")
    with pytest.raises(AdaptationPlanError):
        open_checkpoint(model)


@pytest.mark.parametrize("preset", [f"PrimusV{v}{size}" for v in (2, 3) for size in "SBML"])
def test_sizes_are_those_of_the_original_classes(preset):
    import dynamic_network_architectures.architectures.primus as original

    made = getattr(original, preset)
    with torch.device("meta"):
        theirs = made(1, 2, (8, 8, 8), PATCH, drop_path_rate=0.2, scale_attn_inner=True, init_values=0.1)
        ours = build_network(Architecture.named(preset), 1, 2, PATCH)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.eva.blocks[0].attn.num_heads == theirs.eva.blocks[0].attn.num_heads
