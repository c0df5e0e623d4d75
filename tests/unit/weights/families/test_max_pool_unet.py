"""UNet3D and FOMO25's baseline: their names are translated, and our U-Net with max pooling computes what they compute."""

import pytest
import torch
from support.max_pool_files import PATCH, PublishedBaseline, PublishedUNet3D, fomo25, genesis, randomised, suprem
from torch import nn

from nnssl_adapt.errors import AdaptationPlanError, ArchitectureError, ConfigurationError, UnreadableCheckpoint
from nnssl_adapt.planning.memory import StepSettings, estimate_memory
from nnssl_adapt.training.optimise.layers import frozen_layers, layers_of
from nnssl_adapt.training.optimise.network_options import recompute_activations
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.modules.max_pool_unet import OwnStatistics
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.proof.prove import prove_transfer
from nnssl_adapt.weights.sources.published import fitting_models
from nnssl_adapt.weights.transfer.transfer import transfer_weights


class Gardening(nn.Module):
    """gardening_tools' own class, where it is installed."""

    def __init__(self, channels=1, classes=1, filters=2, skips=True):
        super().__init__()
        unet = pytest.importorskip("gardening_tools.modules.networks.unet")
        self.network = unet.UNet(channels, classes, starting_filters=filters, use_skip_connections=skips)

    def state_dict(self, *arguments, **named):
        return self.network.state_dict(*arguments, **named)

    def skips(self, image):
        return self.network.encoder(image)

    def forward(self, image):
        return self.network(image)


KINDS = {
    "genesis": (PublishedUNet3D, genesis, "Genesis_Chest_CT.pt"),
    "fomo25": (PublishedBaseline, fomo25, "last.ckpt"),
    "gardening": (Gardening, fomo25, "last.ckpt"),
}


@pytest.fixture(params=KINDS)
def published(request, tmp_path):
    """(the original, its file)"""
    make, layout, filename = KINDS[request.param]
    network = randomised(make())
    torch.save(layout(network), tmp_path / filename)
    return network, tmp_path / filename


def reversed_axes(tensor):
    return tensor.permute(0, 1, 4, 3, 2)


def closest(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("channels", [1, 3])
def test_every_stage_and_the_decoder_are_the_originals(published, channels):
    original, path = published
    checkpoint = open_checkpoint(path)
    ours = build_network(checkpoint.architecture, channels, 1, PATCH).eval()
    report = transfer_weights(checkpoint, ours, scope="encoder+decoder", channels="repeat")
    assert report.coverage == 1
    last = ours.decoder.seg_layers[-1]
    for name in ("weight", "bias"):  # of a reconstruction: it starts fresh, and is filled here to compare
        number = len(ours.decoder.seg_layers) - 1
        getattr(last, name).data.copy_(checkpoint.tensors[f"decoder.seg_layers.{number}.{name}"])
    image = torch.randn(1, 1, *PATCH)
    here = image.expand(-1, channels, -1, -1, -1)
    with torch.no_grad():
        for one, other in zip(ours.encoder(here), original.skips(reversed_axes(image)), strict=True):
            closest(one, reversed_axes(other))
        closest(ours(here), reversed_axes(original(reversed_axes(image))))
    assert prove_transfer(checkpoint, ours, channels="repeat").passed


def test_every_tensor_is_accounted_for(published):
    checkpoint = open_checkpoint(published[1])
    report = transfer_weights(checkpoint, build_network(checkpoint.architecture, 1, 2, PATCH))
    dropped = {row.name: row.reason for row in report.source_rows if row.fate == "dropped"}
    statistics = {name: why for name, why in dropped.items() if "running" in name or "batches" in name}
    assert all("statistics" in why for why in statistics.values())
    assert {why for name, why in dropped.items() if name not in statistics} <= {"pre-training decoder"}
    assert all(name.startswith("decoder.") for name in dropped if name not in statistics)


def test_statistics_are_the_batchs_in_training_and_each_images_own_in_evaluation(tmp_path):
    """As the published class over the batch; and as it on every image alone, stored statistics or not."""
    original = randomised(PublishedUNet3D())
    torch.save(genesis(original), tmp_path / "Genesis_Chest_CT.pt")
    checkpoint = open_checkpoint(tmp_path / "Genesis_Chest_CT.pt")
    assert any("own statistics" in note for note in checkpoint.notes)
    ours = build_network(checkpoint.architecture, 1, 2, PATCH)
    transfer_weights(checkpoint, ours)
    batch = torch.randn(2, 1, *PATCH) * torch.tensor([1.0, 5.0]).reshape(2, 1, 1, 1, 1)
    together, alone = original.skips(reversed_axes(batch)), original.skips(reversed_axes(batch[1:]))
    with torch.no_grad():
        for one, other in zip(ours.train().encoder(batch), together, strict=True):
            closest(one, reversed_axes(other))
        for one, other in zip(ours.eval().encoder(batch), alone, strict=True):
            closest(one[1:], reversed_axes(other))
    assert not list(ours.buffers()) and sum(isinstance(m, OwnStatistics) for m in ours.modules()) == 14


def test_what_the_families_know(tmp_path):
    torch.save(genesis(randomised(PublishedUNet3D())), tmp_path / "Genesis_Chest_CT.pt")
    torch.save(suprem(randomised(PublishedUNet3D(classes=0))), tmp_path / "supervised_suprem_unet_2100.pth")
    torch.save(genesis(randomised(PublishedUNet3D(classes=3))), tmp_path / "tuned.pth")
    torch.save(fomo25(randomised(PublishedBaseline())), tmp_path / "unet_b.ckpt")
    made, trained, tuned, fomo = (
        open_checkpoint(tmp_path / name)
        for name in ("Genesis_Chest_CT.pt", "supervised_suprem_unet_2100.pth", "tuned.pth", "unet_b.ckpt")
    )
    plan = made.plan
    assert (
        plan.patch_size == (32, 64, 64) and plan.spacing is None and plan.normalization_schemes == ("CTNormalization",)
    )
    assert plan.intensity[0]["percentile_99_5"] == 1000 and plan.intensity[0]["std"] == 2000 and not plan.supervised
    assert trained.plan.supervised and trained.plan.spacing == (1.5, 1.5, 1.5) and trained.plan.orientation == "LPI"
    assert tuned.plan.supervised and any("who trained it" in note for note in tuned.notes)
    assert fomo.plan.spacing == (1.0, 1.0, 1.0) and fomo.plan.normalization_schemes == ("ZScoreNormalization",)
    assert {made.citation_names[0], fomo.citation_names[0]} == {
        "Pretraining: Models Genesis",
        "Pretraining: FOMO25 baseline",
    }


@pytest.mark.parametrize(
    ("widths", "norm", "supervised", "entry"),
    [
        ([64, 128, 256, 512], "own_statistics", False, "genesis-chest-ct"),
        ([64, 128, 256, 512], "own_statistics", True, "suprem-unet"),
        ([32, 64, 128, 256, 512], "instance", False, "fomo25-unet-b"),
        ([64, 128, 256, 512, 1024], "instance", False, "fomo25-unet-xl"),
    ],
)
def test_the_catalogue_recognises_the_published_sizes(widths, norm, supervised, entry):
    kwargs = {"features_per_stage": widths, "norm": norm}
    assert [model.id for model in fitting_models("MaxPoolUNet", kwargs, 1, None, supervised)] == [entry]


def test_a_supervised_backbone_is_taken_with_its_decoder(tmp_path):
    original = randomised(PublishedUNet3D(classes=0))
    torch.save(suprem(original), tmp_path / "supervised_suprem_unet_2100.pth")
    checkpoint = open_checkpoint(tmp_path / "supervised_suprem_unet_2100.pth")
    ours = build_network(checkpoint.architecture, 1, 3, PATCH)
    report = transfer_weights(checkpoint, ours)
    assert report.coverage == 1
    fresh = {row.name for row in report.rows if row.fate == "fresh"}
    assert fresh and all(name.startswith("decoder.seg_layers.") for name in fresh)
    assert torch.equal(ours.decoder.transpconvs[0].weight, reversed_axes(original.up_tr256.up_conv.weight))


def test_a_decoder_without_skips_gives_its_part(tmp_path):
    torch.save(fomo25(randomised(PublishedBaseline(skips=False))), tmp_path / "last.ckpt")
    checkpoint = open_checkpoint(tmp_path / "last.ckpt")
    ours = build_network(checkpoint.architecture, 1, 2, PATCH)
    report = transfer_weights(checkpoint, ours, scope="encoder+decoder")
    kernel = ours.decoder.stages[3].convs[0].conv.weight
    assert report.coverage == 1 and torch.equal(
        kernel[:, :2], checkpoint.tensors["decoder.stages.3.convs.0.conv.weight"]
    )
    assert kernel[:, 2:].abs().max() == 0


@pytest.mark.parametrize("make", [genesis, fomo25])
def test_a_name_of_another_network_is_refused(tmp_path, make):
    content = make(randomised(PublishedUNet3D() if make is genesis else PublishedBaseline()))
    content["state_dict"]["module.attention.weight"] = torch.zeros(3)
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(UnreadableCheckpoint, match="attention"):
        open_checkpoint(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda name, tensor: tensor[..., 0] if tensor.ndim == 5 else tensor, "2D network"),
        (lambda name, tensor: None if "down_tr128.ops.1.conv1" in name else tensor, "two for each stage"),
        (lambda name, tensor: tensor[..., :1] if "down_tr128.ops.1.conv1.weight" in name else tensor, "other kernels"),
    ],
)
def test_what_is_no_such_network_is_said(tmp_path, damage, word):
    content = genesis(randomised(PublishedUNet3D()))
    changed = {name: damage(name, tensor) for name, tensor in content["state_dict"].items()}
    torch.save({"state_dict": {name: t for name, t in changed.items() if t is not None}}, tmp_path / "file.pt")
    with pytest.raises(AdaptationPlanError, match=word):
        open_checkpoint(tmp_path / "file.pt")


def test_two_values_under_two_names_of_a_layer_are_damage(tmp_path):
    content = fomo25(randomised(PublishedBaseline()))
    layer = "model._orig_mod.encoder.in_conv.conv1"
    content["state_dict"][f"{layer}.all_modules.0.weight"] = content["state_dict"][f"{layer}.conv.weight"] + 1
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(UnreadableCheckpoint, match="two values"):
        open_checkpoint(tmp_path / "last.ckpt")


NETWORK = Architecture(
    "MaxPoolUNet",
    {
        "features_per_stage": [4, 6, 8],
        "first_features_per_stage": [2, 4, 6],
        "narrows": False,
        "norm": "own_statistics",
        "slope": 0,
    },
)


def test_a_recipe_works_on_it_or_is_refused():
    network = build_network(NETWORK, 1, 2, (8, 12, 16))
    layers = layers_of(network)
    assert [layer.name for layer in layers if layer.part == "encoder"] == ["encoder.0", "encoder.1", "encoder.2"]
    assert sum(len(layer.parameters) for layer in layers) == len(list(network.parameters()))
    assert frozen_layers(network, 2) == {"encoder.0", "encoder.1"}
    everything, less, frozen = (
        estimate_memory(NETWORK, 1, 2, (8, 12, 16), 2, StepSettings(device="cpu", **more)).total
        for more in ({}, {"activation_checkpointing": True}, {"freeze": "encoder"})
    )
    assert 0 < less < everything and frozen < everything
    with pytest.raises(ConfigurationError, match="CNN"):
        Recipe(lora_rank=2).check_against(NETWORK, "cpu")


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    image = torch.randn(2, 1, 8, 12, 16, generator=torch.Generator().manual_seed(0))
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = build_network(NETWORK, 1, 2, (8, 12, 16), deep_supervision=True).train()
        if recomputed:
            assert recompute_activations(network) == 5
        sum(output.square().mean() for output in network(image)).backward()
        gradients.append(network.encoder.stages[0].convs[0].conv.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_what_is_wrong_with_its_arguments_is_said():
    for change, word in (
        ({"norm": "batch"}, "norm"),
        ({"first_features_per_stage": [2, 4]}, "for each stage"),
        ({"features_per_stage": 3}, "features_per_stage"),
        ({"slope": "steep"}, "slope"),
    ):
        with pytest.raises(ArchitectureError, match=word):
            Architecture("MaxPoolUNet", {**NETWORK.kwargs, **change})


@pytest.mark.parametrize(
    ("make", "millions"), [(lambda: PublishedUNet3D(base=32), 19.08), (lambda: PublishedBaseline(filters=32), None)]
)
def test_sizes_are_the_published_ones(make, millions, tmp_path):
    with torch.device("meta"):
        network = make()
    count = sum(p.numel() for p in network.parameters())
    kwargs = (
        {"features_per_stage": [64, 128, 256, 512], "first_features_per_stage": [32, 64, 128, 256], "narrows": False}
        if millions
        else {
            "features_per_stage": [32, 64, 128, 256, 512],
            "first_features_per_stage": [32, 64, 128, 256, 512],
            "narrows": True,
        }
    )
    with torch.device("meta"):
        ours = build_network(
            Architecture("MaxPoolUNet", {**kwargs, "norm": "instance", "slope": 0}), 1, 1, (32, 32, 32)
        )
    heads = sum(p.numel() for layer in list(ours.decoder.seg_layers)[:-1] for p in layer.parameters())
    assert sum(p.numel() for p in ours.parameters()) - heads == count
    assert millions is None or count / 1e6 == pytest.approx(millions, rel=1e-3)
