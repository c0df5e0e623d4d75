"""nnU-Net's Primus folders: the network follows from the trainer's name, since the plans speak of a U-Net."""

import json

import pytest
import torch
from support.nnssl_networks import nnunet_plans

from nnssl_adapt.errors import AdaptationPlanError
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.families import nnunet
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.network.network_parts import NetworkParts
from nnssl_adapt.weights.network.topology import read_topology
from nnssl_adapt.weights.proof.prove import prove_transfer
from nnssl_adapt.weights.transfer.token_order import file_order
from nnssl_adapt.weights.transfer.token_order_measured import measure_smoothness
from nnssl_adapt.weights.transfer.transfer import transfer_weights

TINY = {"embed_dim": 24, "eva_depth": 2, "eva_numheads": 2}
PATCH = (16, 24, 32)
PRESETS = ["PrimusS", "PrimusV2S", "PrimusV3S"]


def tiny(preset):
    return Architecture.named(preset, **TINY)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """``folder(preset)``: a model folder as its trainer leaves it, and the network; the published sizes made small."""

    def make(preset, channels=2, trainer=None, ended=None, patch=PATCH):
        monkeypatch.setattr(nnunet, "architecture_of_preset", tiny)
        trainer = trainer or nnunet.PRIMUS_TRAINERS[preset]
        model = tmp_path / f"{trainer}__nnUNetPlans__3d_fullres"
        (model / "fold_0").mkdir(parents=True)
        plans = nnunet_plans("PlainConvUNet", channels)
        plans["configurations"]["3d_fullres"]["patch_size"] = list(patch)
        dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "cord": 1, "lesion": 2}}
        dataset |= {"file_ending": ".nii.gz", "numTraining": 1}
        (model / "plans.json").write_text(json.dumps(plans))
        (model / "dataset.json").write_text(json.dumps(dataset))
        torch.manual_seed(0)
        network = build_network(tiny(preset), channels, 3, patch).eval()
        content = {
            "network_weights": network.state_dict(),
            "trainer_name": trainer,
            "init_args": {"configuration": "3d_fullres"},
            "logging": {"epoch_end_timestamps": [0.0, ended] if ended else []},
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


JUNE_2025, NOVEMBER_2025, MARCH_2026 = 1_750_000_000.0, 1_763_000_000.0, 1_772_500_000.0


@pytest.mark.parametrize(
    ("ended", "order", "other"),
    [(JUNE_2025, "hwd", None), (NOVEMBER_2025, "hwd", "whd"), (MARCH_2026, "whd", "hwd"), (None, "whd", "hwd")],
)
def test_the_order_is_told_by_the_day_of_training(folder, ended, order, other):
    """Certain before there was another order; else taken, with the flag that says otherwise."""
    checkpoint = open_checkpoint(folder("PrimusS", ended=ended, patch=(16, 16, 32))[0])
    assert file_order(checkpoint, "auto")[0] == order
    report = transfer_weights(checkpoint, build_network(checkpoint.architecture, 2, 3, (16, 16, 32)))
    asked = [warning for warning in report.warnings if "--token-order" in warning]
    assert len(asked) == (other is not None) and all(f"--token-order {other}" in warning for warning in asked)


@pytest.mark.parametrize("preset", ["PrimusV2S", "PrimusV3S"])
def test_younger_networks_never_had_another_order(folder, preset):
    assert file_order(open_checkpoint(folder(preset, ended=JUNE_2025)[0]), "auto")[0] == "whd"


def test_a_log_beside_the_weights_tells_the_day_too(folder):
    model, _ = folder("PrimusS", patch=(16, 16, 32))
    for name in ("training_log_2025_6_3_09_00_01.txt", "training_log_2025_5_28_10_00_00.txt", "training_log_x.txt"):
        (model / "fold_0" / name).write_text("")
    checkpoint = open_checkpoint(model)
    assert str(checkpoint.trained_until) == "2025-06-03" and file_order(checkpoint, "auto")[0] == "hwd"


def smooth_positions(grid, order, noise=0.3):
    """(1, tokens, 24): slow waves over a grid (Z, Y, X), flattened in an order."""
    generator = torch.Generator().manual_seed(2)
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in grid), indexing="ij")
    waves = torch.randn(3, 24, generator=generator) * 0.7
    values = torch.sin(torch.stack(axes, dim=-1) @ waves + torch.randn(24, generator=generator))
    values = values + noise * torch.randn(values.shape, generator=generator)
    return (values if order == "whd" else values.transpose(0, 1)).reshape(1, -1, 24)


@pytest.mark.parametrize("order", ["hwd", "whd"])
@pytest.mark.parametrize("grid", [(4, 8, 6), (9, 5, 3)])
def test_smooth_positions_tell_the_order_on_a_grid_that_is_not_square(order, grid):
    found = measure_smoothness(smooth_positions(grid, order), grid)
    assert found.order == order and "measured" in str(found)


def test_positions_tell_nothing_on_a_square_grid_nor_where_nothing_was_learned():
    assert measure_smoothness(smooth_positions((6, 6, 4), "hwd"), (6, 6, 4)) is None
    random = torch.randn(1, 4 * 8 * 6, 24, generator=torch.Generator().manual_seed(0))
    assert measure_smoothness(random, (4, 8, 6)).order is None


def test_what_is_measured_goes_before_a_day_that_is_not_certain(folder):
    model, _ = folder("PrimusS", ended=MARCH_2026, patch=(32, 64, 48))
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path)
    content["network_weights"]["eva.pos_embed"] = smooth_positions((4, 8, 6), "hwd")
    torch.save(content, path)
    checkpoint = open_checkpoint(model)
    order, reason = file_order(checkpoint, "auto")
    assert order == "hwd" and reason.startswith("measured")
    report = transfer_weights(checkpoint, build_network(checkpoint.architecture, 2, 3, (32, 64, 48)))
    assert not any("--token-order" in warning for warning in report.warnings)


@pytest.mark.parametrize("ended", [JUNE_2025, MARCH_2026])
def test_predicting_flattens_as_in_training(folder, ended, caplog):
    model, network = folder("PrimusS", ended=ended, patch=(16, 24, 32))
    opened = ModelFolder.open(model)
    ours = opened.build_network(empty=True).eval()
    opened.load_into(ours, opened.load_weights(0), model)
    image = torch.randn(1, 2, 16, 24, 32)
    with torch.no_grad():
        theirs = as_before(network, image) if ended == JUNE_2025 else network(image)
        torch.testing.assert_close(ours(image), theirs, rtol=1e-5, atol=1e-5)
    assert ("predicts something else" in caplog.text) == (ended == JUNE_2025)


def as_before(network, image):
    """What dynamic_network_architectures up to 0.4.2 computed with these weights."""
    volume = network.down_projection(image)
    _, c, w, h, d = volume.shape
    tokens, _ = network.eva(volume.permute(0, 3, 2, 4, 1).reshape(1, h * w * d, c))
    return network.up_projection(tokens.reshape(1, h, w, d, c).permute(0, 4, 2, 1, 3))


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
