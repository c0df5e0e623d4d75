"""nnU-Net version 1, whole: the plan is read from the pickle beside the weights, and the network computes what it computed."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from support import nnunet_v1 as v1

from nnssl_adapt.errors import AdaptationPlanError, UnreadableCheckpoint, UnsafeCheckpoint
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.transfer.transfer import transfer_weights


@pytest.fixture(params=["written again", "original"])
def trained(request, tmp_path):
    if request.param == "original":
        pytest.importorskip("nnunet", reason="the original class is in nnunet 1.7.1 (no dependency of ours)")
    make = v1.original if request.param == "original" else v1.GenericUNet
    network = v1.random_numbers(make(2, 3))
    return network, v1.save(
        tmp_path / "3d_fullres" / "Task007" / "nnUNetTrainerV2__nnUNetPlansv2.1" / "fold_0", network
    )


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_network_computes_the_same_although_its_decoder_has_larger_kernels(trained, channels):
    network, path = trained
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture.kwargs["kernel_sizes"] == [[3, 3, 3]] * 3
    ours = build_network(checkpoint.architecture, channels, 3, v1.PATCH).eval()
    report = transfer_weights(checkpoint, ours, channels="repeat")
    assert report.coverage == 1 and report.decoder_coverage == 1
    image = torch.randn(1, 1, *v1.PATCH)
    ours.decoder.seg_layers[-1].weight.data.copy_(network.seg_outputs[-1].weight)
    ours.decoder.seg_layers[-1].bias.data.zero_()
    with torch.no_grad():
        here, features = image.expand(-1, channels, -1, -1, -1), image.expand(-1, 2, -1, -1, -1)
        theirs = v1.GenericUNet.skips(network, features)
        for one, other in zip(ours.encoder(here), theirs, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()
        logits = network(features)
        expected = logits[0] if isinstance(logits, tuple) else logits
        assert (ours(here) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_plan_is_what_version_1_says(trained):
    plan = open_checkpoint(trained[1]).plan
    assert plan.spacing == (3.0, 0.7, 0.8) and plan.patch_size == v1.PATCH and plan.supervised
    assert plan.normalization_schemes == ("CTNormalization", "ZScoreNormalization")
    assert plan.use_mask_for_norm == (False, True) and plan.channel_names == ("CT", "T1")
    assert (plan.intensity[0]["mean"], plan.intensity[0]["std"]) == (40.5, 90)
    assert (plan.intensity[0]["percentile_00_5"], plan.intensity[0]["percentile_99_5"]) == (-160, 240)
    assert plan.trainer_name == "nnUNetTrainerV2"


def test_spacing_and_patch_are_of_transposed_axes(tmp_path):
    network = v1.random_numbers(v1.GenericUNet(2, 3))
    content = v1.plans(transpose=(2, 0, 1))
    plan = open_checkpoint(v1.save(tmp_path, network, content=content)).plan
    assert plan.transpose_forward == (2, 0, 1) and plan.spacing == (3.0, 0.7, 0.8)


def test_the_resolution_is_the_trainers(tmp_path):
    network = v1.random_numbers(v1.GenericUNet(2, 3))
    low = v1.plans(spacing=(6.0, 1.4, 1.6))["plans_per_stage"][0]
    content = v1.plans(stages={1: v1.plans()["plans_per_stage"][0]})
    content["plans_per_stage"][0] = low
    for stage, folder, spacing in ((0, "a", 6.0), (1, "b", 3.0), (None, "3d_lowres", 6.0), (None, "3d_fullres", 3.0)):
        path = v1.save(tmp_path / folder / "fold_0", network, stage=stage, content=content)
        assert open_checkpoint(path).plan.spacing[0] == spacing, folder


def test_the_plan_comes_along_out_of_a_zip(tmp_path):
    path = v1.save(tmp_path / "model" / "fold_0", v1.random_numbers(v1.GenericUNet(2, 3)))
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
        for file in path.parent.iterdir():
            archive.write(file, f"Task007/nnUNetTrainerV2__nnUNetPlansv2.1/fold_0/{file.name}")
    assert open_checkpoint(tmp_path / "task.zip", cache_dir=tmp_path / "cache").plan.spacing == (3.0, 0.7, 0.8)


class _Runs:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (lambda mark: {"plans": _Runs(mark)}, "mkdir"),
        (lambda mark: {"plans": np.array([object()], dtype=object)}, "NumPy"),
        (lambda mark: [open_checkpoint], "open_checkpoint"),
    ],
)
def test_a_pickle_that_could_run_code_is_refused_and_not_run(trained, tmp_path, content, word):
    mark = tmp_path / "was run"
    trained[1].with_name(trained[1].name + ".pkl").write_bytes(pickle.dumps(content(mark)))
    with pytest.raises(UnsafeCheckpoint, match=word) as raised:
        open_checkpoint(trained[1])
    assert raised.value.path.name.endswith(".model.pkl") and not mark.exists()


def test_a_pickle_that_repeats_itself_a_billion_times_takes_no_time(trained):
    content = [0]
    for _ in range(40):
        content = [content, content]
    trained[1].with_name(trained[1].name + ".pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(AdaptationPlanError, match="version 1"):
        open_checkpoint(trained[1])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(trained, protocol):
    path = trained[1].with_name(trained[1].name + ".pkl")
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol))
    assert open_checkpoint(trained[1]).plan.spacing == (3.0, 0.7, 0.8)


def test_what_is_wrong_with_the_pickle_is_said(trained):
    path = trained[1].with_name(trained[1].name + ".pkl")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableCheckpoint, match="truncated"):
        open_checkpoint(trained[1])
    content = pickle.loads(whole)
    del content["plans"]["use_mask_for_norm"]
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(AdaptationPlanError, match="use_mask_for_norm"):
        open_checkpoint(trained[1])
    path.write_bytes(pickle.dumps({**pickle.loads(whole), "name": "nnUNetTrainerV2CascadeFullRes"}))
    with pytest.raises(AdaptationPlanError, match="cascade"):
        open_checkpoint(trained[1])
    content = pickle.loads(whole)
    content["plans"]["plans_per_stage"][0]["patch_size"] = [256, 256]
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(AdaptationPlanError, match="2D"):
        open_checkpoint(trained[1])
    path.unlink()
    assert any("not there" in note for note in open_checkpoint(trained[1]).notes)
