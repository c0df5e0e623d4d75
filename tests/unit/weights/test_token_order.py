"""Token order: probed in the network, told by family in the file, and repaired exactly."""

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from nnssl_files import PRIMUS, architecture, plan, state_dict

from nnssl_adapt.errors import TransferError
from nnssl_adapt.weights.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.architectures import build_network
from nnssl_adapt.weights.checkpoint import Checkpoint
from nnssl_adapt.weights.source import Origin
from nnssl_adapt.weights.token_order import file_order, network_order
from nnssl_adapt.weights.transfer import transfer_weights


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


def test_what_is_asked_for_wins_and_nonsense_is_refused():
    checkpoint = checkpoint_of({}, (4, 12, 16), "AnonRes/PrimusM-OpenMind-MAE")
    assert file_order(checkpoint, "whd") == ("whd", "as asked for")
    with pytest.raises(TransferError, match="auto, hwd or whd"):
        file_order(checkpoint, "dhw")
