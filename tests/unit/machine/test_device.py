import pytest
import torch

from nnssl_adapt.errors import DeviceUnavailable
from nnssl_adapt.machine.device import check_device


def test_the_cpu_is_always_there():
    assert check_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:1"], ids=["any", "second"])
def test_without_a_gpu_the_way_out_is_named(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="-device cpu"):
        check_device(name)


def test_a_gpu_too_many(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert check_device("cuda") == torch.device("cuda") and chosen == []
    assert check_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]  # or kernels compiled here would run on the first GPU
    with pytest.raises(DeviceUnavailable, match="cuda:0 to cuda:1"):
        check_device("cuda:2")


def test_nonsense():
    with pytest.raises(DeviceUnavailable, match="'gpu' is unknown"):
        check_device("gpu")
