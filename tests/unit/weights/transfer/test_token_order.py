"""Token order: probed in the network, told by family in the file, and repaired exactly."""

import dataclasses

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from support import tiny_autoencoder
from support.nnssl_files import PRIMUS, architecture, plan, state_dict
from support.tiny_autoencoder import trained

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.sources.resolved import Origin
from nnssl_adapt.weights.transfer.token_order import file_order, network_order
from nnssl_adapt.weights.transfer.token_order_measured import measure_order, measure_smoothness
from nnssl_adapt.weights.transfer.transfer import transfer_weights


class OldPrimus(Primus):
    """Flattens (h w d), as dynamic_network_architectures did up to 0.4.2."""

    def forward(self, x):
        volume = self.down_projection(x)
        b, c, w, h, d = volume.shape
        tokens, _ = self.eva(volume.permute(0, 3, 2, 4, 1).reshape(b, h * w * d, c))
        return self.up_projection(tokens.reshape(b, h, w, d, c).permute(0, 4, 2, 1, 3))


def old_primus(patch, channels=1):
    return OldPrimus(input_channels=channels, num_classes=3, input_shape=patch, **PRIMUS)


def checkpoint_of(tensors, patch, repo_id=None, trainer_name=None, **changes):
    content = plan("Primus", patch, recommended_downstream_patchsize=None, **changes)
    origin = Origin("made up", "huggingface" if repo_id else "file", repo_id, None, "checkpoint_final.pth", "0" * 64)
    return Checkpoint(dict(tensors), AdaptationPlan.parse(content, "plan"), origin, trainer_name)


def encoded(network, image):
    seen = {}
    hook = network.up_projection.register_forward_pre_hook(lambda _, inputs: seen.update(features=inputs[0]))
    with torch.no_grad():
        network.eval()(image)
    hook.remove()
    return seen["features"]


def randomised(network, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("channels", [1, 3])
def test_the_order_of_a_network_is_seen_not_believed(channels):
    patch = (4, 12, 16)
    assert network_order(build_network(architecture("Primus"), channels, 2, patch)) == "whd"
    assert network_order(old_primus(patch, channels)) == "hwd"


def test_probing_leaves_no_trace():
    network = build_network(architecture("Primus"), 1, 2, (4, 12, 16)).train()
    network_order(network)
    assert network.training
    assert not network.eva._forward_pre_hooks
    assert not network.down_projection._forward_hooks


@pytest.mark.parametrize(("patch"), [(4, 8, 16), (6, 12, 8)])  # grids (2, 2, 4) and (3, 3, 2)
@pytest.mark.parametrize("directions", ["old to new", "new to old"])
def test_the_repair_is_exact_in_both_directions(patch, directions):
    old, new = randomised(old_primus(patch)), randomised(build_network(architecture("Primus"), 1, 3, patch), seed=4)
    source, target, order = (old, new, "hwd") if directions == "old to new" else (new, old, "whd")
    image = torch.randn(1, 1, *patch, generator=torch.Generator().manual_seed(5))
    expected = encoded(source, image)
    report = transfer_weights(checkpoint_of(source.state_dict(), patch), target, token_order=order)
    torch.testing.assert_close(encoded(target, image), expected, rtol=1e-5, atol=1e-5)
    assert any("exchanged exactly" in note for note in report.notes)


@pytest.mark.parametrize("order", ["hwd", "whd"])
def test_equal_orders_change_nothing(order):
    patch = (4, 12, 16)
    source = randomised(old_primus(patch) if order == "hwd" else build_network(architecture("Primus"), 1, 3, patch))
    target = old_primus(patch) if order == "hwd" else build_network(architecture("Primus"), 1, 3, patch)
    transfer_weights(checkpoint_of(source.state_dict(), patch), target, token_order=order)
    for name, tensor in source.eva.state_dict().items():
        assert torch.equal(target.eva.state_dict()[name], tensor), name


def test_a_grid_that_is_not_square_is_said_to_be_inexact():
    patch = (4, 12, 16)  # grid (2, 3, 4)
    target = build_network(architecture("Primus"), 1, 3, patch)
    report = transfer_weights(checkpoint_of(old_primus(patch).state_dict(), patch), target, token_order="hwd")
    assert any("not square" in note for note in report.notes)


@pytest.mark.parametrize(
    ("repo_id", "trainer", "expected"),
    [
        ("AnonRes/PrimusM-OpenMind-MAE", None, "hwd"),
        ("AnonRes/PrimusM-OpenMind-SimMIM", None, "whd"),
        ("AnonRes/PrimusM-OpenMind-MG", None, "hwd"),
        ("AnonRes/PrimusM-OpenMind-VF", None, "hwd"),
        ("MIC-DKFZ/nnFoundationViT", None, "hwd"),
        (None, "BaseEvaMAETrainer", "hwd"),
        (None, "SimMIMEvaTrainer_BS8", "whd"),
        (None, "VolumeFusionEvaTrainer", "hwd"),
        (None, "ModelsGenesisEvaTrainer", "hwd"),
        (None, "VoCoEvaTrainer", "hwd"),
        (None, "SimCLREvaTrainer", "hwd"),
        (None, "SwinUNETREvaTrainer", "hwd"),
        (None, "nnFoundationViT_small_trainer", "hwd"),
        (None, "BaseKVConsisEvaTrainer", "hwd"),  # nnssl's aligned autoencoders build on EvaMAE too
    ],
)
def test_the_order_of_a_file_is_known_by_its_source_or_trainer(repo_id, trainer, expected):
    order, reason = file_order(checkpoint_of({}, (4, 12, 16), repo_id, trainer), "auto")
    assert order == expected
    assert (repo_id or trainer) in reason


def test_the_order_of_an_unnamed_file_is_told_by_its_tensors():
    patch = (4, 12, 16)
    second_transformer = {"decoder.blocks.0.norm1.weight": torch.zeros(24)}
    assert file_order(checkpoint_of(second_transformer, patch), "auto")[0] == "hwd"
    assert file_order(checkpoint_of({}, patch, key_to_encoder="encoder.eva"), "auto")[0] == "hwd"
    order, reason = file_order(checkpoint_of(state_dict("Primus", patch), patch), "auto")
    assert (order, reason.startswith("assumed")) == ("whd", True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/data/pretrained/PrimusM-OpenMind-MG", "hwd"),
        ("PrimusM-OpenMind-VF@main/checkpoint_final.pth", "hwd"),
        ("PrimusB-OpenMind-SimMIM.zip", "whd"),
        ("/data/mae/VoCo/mine", None),
    ],
)
def test_a_copy_of_a_published_repository_is_known_by_its_folder(source, expected):
    patch = (4, 12, 16)
    unnamed = checkpoint_of(state_dict("Primus", patch), patch)
    copied = dataclasses.replace(unnamed, origin=dataclasses.replace(unnamed.origin, source=source))
    order, reason = file_order(copied, "auto")
    assert (order if reason.startswith("by the name of its folder") else None) == expected


def test_an_order_that_nothing_tells_is_a_warning():
    patch = (4, 12, 12)
    unnamed = checkpoint_of(state_dict("Primus", patch), patch)
    target = build_network(architecture("Primus"), 1, 3, patch)
    assert any("--token-order hwd" in warning for warning in transfer_weights(unnamed, target).warnings)
    assert transfer_weights(unnamed, target, token_order="whd").warnings == ()


def test_what_is_asked_for_wins_and_nonsense_is_refused():
    checkpoint = checkpoint_of({}, (4, 12, 16), "AnonRes/PrimusM-OpenMind-MAE")
    assert file_order(checkpoint, "whd") == ("whd", "as requested")
    with pytest.raises(TransferError, match="auto, hwd or whd"):
        file_order(checkpoint, "dhw")


# -- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def autoencoders():
    """Masked autoencoders that have learned waves, one in each order."""
    return {order: trained(order, steps=300) for order in ("hwd", "whd")}


def autoencoder_checkpoint(tensors, **named):
    checkpoint = checkpoint_of(tensors, tiny_autoencoder.PATCH, **named)
    kwargs = {**PRIMUS, "embed_dim": tiny_autoencoder.WIDTH, "patch_embed_size": tiny_autoencoder.KERNEL}
    changed = checkpoint.plan.model_copy(update={"architecture": Architecture("Primus", kwargs)})
    return dataclasses.replace(checkpoint, plan=changed)


@pytest.mark.parametrize("order", ["hwd", "whd"])
def test_learned_positions_are_smoother_in_the_order_of_training(autoencoders, order):
    other = {"hwd": "whd", "whd": "hwd"}[order]
    for name in ("eva.pos_embed", "decoder.pos_embed"):
        found = measure_smoothness(autoencoders[order][name], tiny_autoencoder.GRID)
        assert getattr(found, order) < getattr(found, other) and found.order in (order, None)


@pytest.mark.parametrize("order", ["hwd", "whd"])
def test_a_trained_autoencoder_tells_its_own_order(autoencoders, order):
    measured = measure_order(autoencoder_checkpoint(autoencoders[order]))
    assert measured.order == order
    assert getattr(measured, order) < 0.8
    other = {"hwd": "whd", "whd": "hwd"}[order]
    assert getattr(measured, other) > 1.2 * getattr(measured, order)


def test_measuring_is_repeatable_and_changes_nothing(autoencoders):
    before = {name: tensor.clone() for name, tensor in autoencoders["hwd"].items()}
    checkpoint = autoencoder_checkpoint(autoencoders["hwd"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = measure_order(checkpoint)
    assert measure_order(checkpoint) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in autoencoders["hwd"].items())


def test_a_clear_measurement_outweighs_the_table_and_both_are_told(autoencoders):
    order, reason = file_order(autoencoder_checkpoint(autoencoders["whd"], trainer_name="BaseEvaMAETrainer"), "auto")
    assert order == "whd"
    assert "measured: reconstruction error" in reason
    assert "outweighs that BaseEvaMAETrainer" in reason
    order, reason = file_order(autoencoder_checkpoint(autoencoders["hwd"], trainer_name="BaseEvaMAETrainer"), "auto")
    assert order == "hwd"
    assert reason.startswith("BaseEvaMAETrainer trains nnssl's EvaMAE; measured")
    assert file_order(autoencoder_checkpoint(autoencoders["whd"]), "hwd") == ("hwd", "as requested")


def test_an_autoencoder_that_has_learned_nothing_has_no_say(autoencoders):
    generator = torch.Generator().manual_seed(5)
    noise = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in autoencoders["whd"].items()}
    checkpoint = autoencoder_checkpoint(noise)
    assert measure_order(checkpoint).order is None
    order, reason = file_order(checkpoint, "auto")
    assert order == "hwd"
    assert "second transformer; not told by measuring" in reason


@pytest.mark.parametrize(
    "missing", ["mask_token", "decoder.pos_embed", "decoder.norm.weight", "up_projection.decode.0.0.weight"]
)
def test_without_the_whole_autoencoder_nothing_is_measured(autoencoders, missing):
    tensors = {name: tensor for name, tensor in autoencoders["hwd"].items() if name != missing}
    assert measure_order(autoencoder_checkpoint(tensors)) is None


def test_values_that_are_not_finite_are_not_measured(autoencoders):
    tensors = dict(autoencoders["hwd"])
    tensors["mask_token"] = torch.full_like(tensors["mask_token"], float("nan"))
    assert measure_order(autoencoder_checkpoint(tensors)) is None
