"""Published SegResNets: stand-ins made of MONAI's own classes, in each family's layout, compute what they did."""

import pytest
import torch
from support.monai_files import seg_res_net

from nnssl_adapt.errors import ArchitectureError, TransferError, UnreadableCheckpoint
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.network.topology import read_topology
from nnssl_adapt.weights.proof.prove import prove_transfer
from nnssl_adapt.weights.transfer.transfer import transfer_weights

PATCH = (16, 8, 24)
SAME_AXES = ("ctfm", "ctfm_extractor", "whole_body")


def opened(tmp_path, family, channels=1):
    network, content = seg_res_net(family, channels)
    path = tmp_path / f"{family}.pth"
    torch.save(content, path)
    return network, open_checkpoint(path)


def original_stages(network, image):
    with torch.no_grad():
        if hasattr(network, "encode"):
            return network.encode(image)[1]
        encoder = network.encoder if hasattr(network, "encoder") else network
        return encoder(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("family", ["ctfm", "ctfm_extractor", "whole_body", "vista3d", "suprem", "segresnet"])
def test_every_stage_equals_the_original(tmp_path, family, channels):
    theirs, checkpoint = opened(tmp_path, family, channels)
    network = build_network(checkpoint.architecture, channels, 4, PATCH).eval()
    assert transfer_weights(checkpoint, network).coverage == 1
    image = torch.randn(1, channels, *PATCH, generator=torch.Generator().manual_seed(3))
    turned = image if family in SAME_AXES else image.permute(0, 1, 4, 3, 2)  # MONAI's arrays are (x, y, z)
    truth = original_stages(theirs, turned)
    with torch.no_grad():
        found = network.encoder(image)
    for stage, (ours, expected) in enumerate(zip(found, truth, strict=True)):
        expected = expected if family in SAME_AXES else expected.permute(0, 1, 4, 3, 2)
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max(), stage
    assert prove_transfer(checkpoint).passed
    assert checkpoint.plan.supervised == (family in ("whole_body", "suprem", "segresnet"))


@pytest.mark.parametrize(("family", "classes"), [("whole_body", 9), ("suprem", 32)])
def test_a_segmentation_network_is_kept_whole(tmp_path, family, classes):
    theirs, checkpoint = opened(tmp_path, family)
    names = checkpoint.plan.head_names or [f"label {index}" for index in range(classes)]
    network = build_network(checkpoint.architecture, 1, classes, PATCH).eval()
    report = transfer_weights(checkpoint, network, head_names=names)
    image = torch.randn(1, 1, *PATCH, generator=torch.Generator().manual_seed(3))
    turned = image if family in SAME_AXES else image.permute(0, 1, 4, 3, 2)
    head = network.decoder.seg_layers[-1]
    if not checkpoint.plan.head_names:  # no file names them
        assert any("seg_layers" in row.name and row.fate == "fresh" for row in report.rows)
        head.load_state_dict(theirs.up_layers[-1]["head"].state_dict())
    with torch.no_grad():
        expected = theirs(turned)
        expected = expected if family in SAME_AXES else expected.permute(0, 1, 4, 3, 2)
        assert (network(image) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_statistics_of_pre_training_stay_as_they_are_in_training(tmp_path):
    _, checkpoint = opened(tmp_path, "ctfm")
    network = build_network(checkpoint.architecture, 1, 2, PATCH, deep_supervision=True).train()
    transfer_weights(checkpoint, network)
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    image = torch.randn(2, 1, *PATCH)
    outputs = network(image)
    assert [tuple(output.shape[2:]) for output in outputs] == [PATCH, (8, 4, 12)]
    sum(output.sum() for output in outputs).backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in network.named_buffers())
    assert network.encoder.stages[0].blocks[0].norm1.weight.grad.abs().sum() > 0
    assert not any("running" in name for name, _ in network.decoder.named_buffers()), (
        "a fresh decoder has no statistics"
    )


def test_other_normalisation_than_the_weights_had_is_refused(tmp_path):
    _, checkpoint = opened(tmp_path, "vista3d")
    assert checkpoint.architecture.kwargs["norm"] == "instance"
    group = Architecture("SegResNet", {**checkpoint.architecture.kwargs, "norm": "group", "init_filters": 8})
    with pytest.raises(TransferError, match="norm is group"):
        transfer_weights(checkpoint, build_network(group, 1, 2, PATCH))


def test_vista3d_has_no_ordinary_head(tmp_path):
    _, checkpoint = opened(tmp_path, "vista3d")
    network = build_network(checkpoint.architecture, 1, 2, PATCH)
    report = transfer_weights(checkpoint, network, scope="encoder+decoder")
    assert any("decoder was requested" in warning for warning in report.warnings)
    assert any("embeddings" in note for note in checkpoint.notes)


def test_what_can_not_be_read_is_named(tmp_path):
    _, checkpoint = opened(tmp_path, "segresnet")
    tensors = dict(checkpoint.tensors)
    with pytest.raises(ArchitectureError, match="2D network"):
        read_topology({**tensors, "encoder.stem.weight": torch.zeros(8, 1, 3, 3)})
    with pytest.raises(ArchitectureError, match="one spacing"):
        read_topology({**tensors, "encoder.stages.0.blocks.0.conv1.weight": torch.zeros(8, 8, 3, 3, 1)})
    _, content = seg_res_net("segresnet")
    content["state_dict"]["model.up_samples.0.1.deconv.weight"] = torch.zeros(3, 3, 3, 3, 3)
    torch.save(content, tmp_path / "deconv.pth")
    with pytest.raises(UnreadableCheckpoint, match="deconv"):
        open_checkpoint(tmp_path / "deconv.pth")
