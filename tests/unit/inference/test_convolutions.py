import copy

import pytest
import torch
from torch import nn

from nnssl_adapt.inference.convolutions import onednn_convolutions

CPU = torch.device("cpu")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, 6, (3, 1, 5), padding=(1, 0, 2)),
        nn.LeakyReLU(),
        nn.Conv3d(6, 6, 3, stride=(2, 1, 2), padding=(2, 2, 2), dilation=(1, 2, 1), groups=2, bias=False),
        nn.Conv3d(6, 5, 3, padding="same"),
        nn.Conv3d(5, 5, 3, padding=1, padding_mode="replicate"),
        nn.Conv3d(5, 3, 1),
    ).eval()


@pytest.mark.parametrize("batch", [1, 2])
def test_same_numbers_and_the_network_is_as_before(batch):
    net = network()
    image = torch.randn(batch, 2, 7, 9, 11, dtype=torch.float64)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(image)
        with onednn_convolutions(net, CPU):
            assert torch.allclose(net(image.float()).double(), exact, atol=1e-5)
            assert not torch.equal(exact, torch.zeros_like(exact))
    assert not any("forward" in vars(module) for module in net.modules())


def test_the_network_is_as_before_after_an_error():
    net = network()
    with pytest.raises(RuntimeError), onednn_convolutions(net, CPU), torch.no_grad():
        net(torch.zeros(1, 1, 7, 9, 11))
    assert not any("forward" in vars(module) for module in net.modules())


def test_the_slow_code_is_left_out():
    net = network()
    with torch.no_grad(), onednn_convolutions(net, CPU), torch.profiler.profile() as profile:
        net(torch.zeros(1, 2, 7, 9, 11))
    called = [event.key for event in profile.key_averages()]
    assert called.count("aten::mkldnn_convolution") == 1
    assert profile.key_averages()[called.index("aten::mkldnn_convolution")].count >= 2


def test_other_devices_and_precisions_are_left_alone():
    net = network()
    with onednn_convolutions(net, torch.device("cuda")):
        assert not any("forward" in vars(module) for module in net.modules())
    with onednn_convolutions(net.double(), CPU):
        assert not any("forward" in vars(module) for module in net.modules())
