"""STU-Net: files of its authors' layout, with and without the pickle beside them, compute what they computed."""

import pytest
import torch
from support import nnunet_v1 as v1
from support.stu_net_files import DIMS, PATCH, POOLS, PublishedSTUNet, stu_net_folder

from nnssl_adapt.errors import ArchitectureError
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.families import nnunet
from nnssl_adapt.weights.families.stu_net import LABELS
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.proof.prove import prove_transfer
from nnssl_adapt.weights.transfer.transfer import transfer_weights

DEPTH = [1, 2, 1, 1]


@pytest.fixture
def published(tmp_path):
    network = v1.random_numbers(PublishedSTUNet(1, 105, DEPTH))
    content = v1.plans(modalities=("CT",), patch=PATCH, spacing=(1.5, 1.5, 1.5))
    content["plans_per_stage"][0]["pool_op_kernel_sizes"] = [*POOLS, [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    content["normalization_schemes"] = {0: "nonCT"}
    return network, v1.save(tmp_path, network, "STUNetTrainer_base", content=content, filename="base_ep4k.model")


@pytest.fixture
def five_steps(tmp_path):
    """The published strides, on a network with six stages."""
    pools = [[2, 2, 2]] * 4 + [[1, 1, 2]]
    network = PublishedSTUNet(1, 105, [1] * 6, [4] * 6, pools, [[3, 3, 3]] * 6)
    path = v1.save(tmp_path / "five", v1.random_numbers(network), filename="small_ep4k.model")
    path.with_name("small_ep4k.model.pkl").unlink()
    return network, path


def closest(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_names_of_its_outputs():
    assert len(LABELS) == len(set(LABELS)) == 105 and list(LABELS[1:]) == sorted(LABELS[1:])
    assert LABELS[40] == "liver" and LABELS[104] == "vertebrae_T9" and LABELS[53] == "rib_left_2"


@pytest.mark.parametrize("channels", [1, 2])
def test_every_stage_and_the_logits_are_the_originals(five_steps, channels):
    original, path = five_steps
    checkpoint = open_checkpoint(path)
    ours = build_network(checkpoint.architecture, channels, 105, (32, 32, 64)).eval()
    report = transfer_weights(checkpoint, ours, head_names=LABELS, channels="repeat")
    assert report.coverage == report.decoder_coverage == 1
    image = torch.randn(1, 1, 32, 32, 64)
    here = image.expand(-1, channels, -1, -1, -1)
    with torch.no_grad():
        for one, other in zip(ours.encoder(here), original.skips(image), strict=True):
            closest(one, other)
        closest(ours(here), original(image))
        ours.decoder.deep_supervision = True
        for one, other in zip(ours(here), original.outputs(image), strict=True):
            closest(one, other)


def test_without_its_pickle_the_published_plan_is_taken_and_said(five_steps):
    checkpoint = open_checkpoint(five_steps[1])
    plan = checkpoint.plan
    assert plan.spacing == (1.5, 1.5, 1.5) and plan.patch_size == (128, 128, 128) and plan.head_names == LABELS
    assert plan.normalization_schemes == ("ZScoreNormalization",) and plan.architecture.total_stride == (16, 16, 32)
    assert any("1.5 mm" in note for note in checkpoint.notes)
    assert {entry["name"] for entry in plan.citations} == {"nnU-Net", "STU-Net"}


def test_with_its_pickle_the_strides_are_its_own(published):
    _, path = published
    network = PublishedSTUNet(1, 105, [*DEPTH, 1, 1], [*DIMS, 8, 8], [*POOLS, [1, 1, 1], [1, 1, 1]], [[3, 3, 3]] * 6)
    v1.save(path.parent / "six", v1.random_numbers(network), filename="base_ep4k.model")
    (path.parent / "six" / "base_ep4k.model.pkl").write_bytes(path.with_name("base_ep4k.model.pkl").read_bytes())
    checkpoint = open_checkpoint(path.parent / "six" / "base_ep4k.model")
    assert checkpoint.architecture.total_stride == (2, 4, 8) and checkpoint.plan.patch_size == PATCH
    assert checkpoint.trainer_name == "STUNetTrainer_base" and checkpoint.plan.channel_names == ("CT",)
    ours = build_network(checkpoint.architecture, 1, 3, PATCH).eval()
    transfer_weights(checkpoint, ours)
    image = torch.randn(1, 1, *PATCH)
    with torch.no_grad():
        for one, other in zip(ours.encoder(image), network.skips(image), strict=True):
            closest(one, other)
    assert prove_transfer(checkpoint, ours).passed


SMALL = {"features_per_stage": [4, 6, 8, 8, 8, 8], "n_blocks_per_stage": [1] * 6}


@pytest.fixture
def version_2(tmp_path, monkeypatch):
    """A model folder of STU-Net's trainer for nnU-Net 2, whose plans speak of a PlainConvUNet with three stages."""
    monkeypatch.setattr(nnunet, "architecture_of_preset", lambda preset: Architecture.named(preset, **SMALL))
    return stu_net_folder(tmp_path, SMALL["features_per_stage"])


def test_a_folder_of_version_2_is_read_and_predicted_with(version_2, tmp_path):
    model, original = version_2
    checkpoint = open_checkpoint(model)
    kwargs = checkpoint.architecture.kwargs
    assert checkpoint.architecture.preset == "STUNetS" and kwargs["features_per_stage"] == SMALL["features_per_stage"]
    assert kwargs["strides"] == [[1, 1, 1], [1, 2, 2], [2, 2, 2], *([[1, 1, 1]] * 3)]
    assert checkpoint.plan.supervised and checkpoint.plan.head_names == ("background", "core", "rim")
    assert {entry["name"] for entry in checkpoint.citations} == {"nnU-Net", "STU-Net"}
    opened = ModelFolder.open(model)
    ours = opened.build_network(empty=True).eval()
    opened.load_into(ours, opened.load_weights(0), model)
    again = build_network(checkpoint.architecture, 1, 3, PATCH).eval()
    report = transfer_weights(checkpoint, again, head_names=("background", "core", "rim"))
    assert report.coverage == report.decoder_coverage == 1
    image = torch.randn(1, 1, *PATCH)
    with torch.no_grad():
        closest(ours(image), original(image))
        closest(again(image), original(image))


@pytest.mark.parametrize(
    ("letter", "features", "blocks", "millions"),
    [("S", 16, 1, 14.6), ("B", 32, 1, 58.3), ("L", 64, 2, 440.3), ("H", 96, 3, 1457.3)],
)
def test_sizes_are_the_published_ones(letter, features, blocks, millions):
    architecture = Architecture.named(f"STUNet{letter}")
    with torch.device("meta"):
        network = build_network(architecture, 1, 105, (128, 128, 128))
    assert architecture.kwargs["features_per_stage"] == [features * n for n in (1, 2, 4, 8, 16, 16)]
    assert architecture.kwargs["n_blocks_per_stage"] == [blocks] * 6
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_what_is_wrong_with_its_arguments_is_said():
    kwargs = dict(Architecture.named("STUNetS").kwargs)
    with pytest.raises(ArchitectureError, match="strides"):
        Architecture("STUNet", {**kwargs, "strides": kwargs["strides"][:4]})
    with pytest.raises(ArchitectureError, match="n_blocks_per_stage"):
        Architecture("STUNet", {**kwargs, "n_blocks_per_stage": [1, 1, 0, 1, 1, 1]})
