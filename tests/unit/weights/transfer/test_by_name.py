"""Channels are paired by their names on both sides, told row by row, and loudly where names agree in part."""

import pytest
import torch
from support.nnssl_files import state_dict, write_checkpoint
from support.nnssl_networks import nnunet_plans

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.transfer.by_name import origin_of_channels, pair_by_name
from nnssl_adapt.weights.transfer.transfer import transfer_weights

STEM = "encoder.stem.convs.0.conv.weight"


@pytest.mark.parametrize(
    ("here", "there", "rule", "loud"),
    [
        (["T1", "T2"], ["T2", "T1"], (1, 0), []),
        (["T1w", "t2"], ["T1", "T2"], "repeat", []),  # as they are
        (["T1"], ["T2", "T1"], (1,), ["T2"]),
        (["T1", "FLAIR"], ["T1"], (0, None), ["FLAIR"]),
        (["T1", "T2"], ["ADC", "DWI"], "repeat", ["ADC", "T1"]),
        (["CT"], ["T1"], "repeat", []),  # nothing to choose
        (["MRI", "image"], ["T2", "T1"], "repeat", []),  # no names
        ([], ["T2", "T1"], "repeat", []),
        (["T1", "T2"], [], "repeat", []),
    ],
)
def test_channels_take_the_kernel_of_their_name(here, there, rule, loud):
    pairing = pair_by_name("auto", here, there, len(there) or 1)
    assert pairing.rule == rule
    assert bool(pairing.warnings) == bool(loud)
    assert all(name in " ".join(pairing.warnings) for name in loud)


def test_maps_mix_names_and_numbers():
    assert pair_by_name(("t1w", 1, None), ["a", "b", "c"], ["T2", "T1"], 2).rule == (1, 1, None)
    with pytest.raises(ConfigurationError, match=r"'FLAIR'.*T2, T1"):
        pair_by_name(("FLAIR",), ["a"], ["T2", "T1"], 2)
    with pytest.raises(ConfigurationError, match="numbers"):
        pair_by_name(("FLAIR",), ["a"], [], 2)


def test_a_rule_that_goes_against_the_names_is_told():
    assert "T1 takes the kernel of T2" in pair_by_name("repeat", ["T1", "T2"], ["T2", "T1"], 2).warnings[0]
    assert not pair_by_name("repeat", ["T1", "T2"], ["T1w", "T2w"], 2).warnings


@pytest.mark.parametrize(
    ("rule", "trained", "channels", "origin"),
    [
        ("repeat", 2, 3, [0, 1, 0]),
        ("repeat", 2, 1, [None]),
        ("mean", 1, 2, [0, 0]),
        ("zero", 2, 3, [0, 1, None]),
        ((1, None), 2, 2, [1, None]),
    ],
)
def test_whose_kernel_a_channel_takes(rule, trained, channels, origin):
    assert origin_of_channels(rule, trained, channels) == origin


@pytest.fixture
def trained_on_t2_and_t1(tmp_path):
    path = write_checkpoint(tmp_path, state_dict(channels=2))
    content = torch.load(path)
    dataset = {"channel_names": {"1": "T1", "0": "T2"}, "labels": {"background": 0, "a": 1}}
    arguments = {
        "plans": nnunet_plans("ResidualEncoderUNet", 2),
        "dataset_json": dataset,
        "configuration": "3d_fullres",
    }
    torch.save(content | {"trainer_name": "nnUNetTrainer", "init_args": arguments}, path)
    return open_checkpoint(path)


@pytest.mark.parametrize(("names", "kernels"), [(("T1", "T2"), [1, 0]), (("T1w",), [1]), (("t2", "T1"), [0, 1])])
def test_each_channel_of_the_network_gets_the_kernel_of_its_name(trained_on_t2_and_t1, names, kernels):
    checkpoint = trained_on_t2_and_t1
    assert checkpoint.plan.channel_names == ("T2", "T1")
    network = build_network(checkpoint.architecture, len(names), 2, (8, 16, 16))
    report = transfer_weights(checkpoint, network, channel_names=names)
    for channel, source in enumerate(kernels):
        assert torch.equal(network.state_dict()[STEM][:, channel], checkpoint.tensors[STEM][:, source])
    for name, source in zip(names, kernels, strict=True):
        assert any(name in note and ("T2", "T1")[source] in note for note in report.notes)
