"""The self-test of a device: its parts find what is wrong, and everything runs on a CPU by the same code."""

import shutil

import pytest
import torch
from torch import nn

from nnssl_adapt.cli.main import main
from nnssl_adapt.errors import OtherRankFailed
from nnssl_adapt.training import self_test as module
from nnssl_adapt.training.self_test import Finding, SelfTest, self_test

CPU = torch.device("cpu")


def found(name):
    return dict(module._parts(CPU))[name]


def test_all_parts_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(module, "_SHARED_MEMORY", 0)  # this machine's is not what is tested
    assert main(["doctor", "--gpu", "-device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ready" and len(lines) >= 9
    assert [line for line in lines[1:-1] if not line.startswith("ok ")] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without")
def test_without_a_gpu_it_is_refused(capsys):
    assert main(["doctor", "--gpu"]) == 1
    output = capsys.readouterr()
    assert "no cuda device" in output.err and "ready" not in output.out


def test_the_verdict_names_what_is_wrong():
    good, bad = Finding("card", "fine", True), Finding("/dev/shm", "64 MB free", False)
    assert SelfTest((good,)).verdict == "ready"
    assert SelfTest((good, bad)).verdict == "not ready: /dev/shm (64 MB free)" and not SelfTest((good, bad)).is_ready


def test_wrong_numbers_and_errors_are_findings(monkeypatch):
    monkeypatch.setattr(module, "_parts", lambda device: [("a", found_wrong), ("b", lambda: "fine"), ("c", failing)])
    told = []
    result = self_test(CPU, told.append)
    assert [finding.passed for finding in result.findings] == [False, True, False] and tuple(told) == result.findings
    assert "out of order" in result.verdict and "RuntimeError: CUDA error" in result.verdict


def found_wrong():
    raise module.Problem("out of order")


def failing():
    raise RuntimeError("CUDA error:\n an illegal instruction")


def test_wrong_gradients_are_found(monkeypatch):
    class Off(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, image):
            return self.network(image) * (1.5 if image.dtype == torch.float32 else 1)

    original = module._network
    monkeypatch.setattr(module, "_network", lambda: Off(original()))
    with pytest.raises(module.Problem, match="of float64"):
        found("gradients in fp32")()


def test_a_loss_that_differs_is_found(monkeypatch):
    monkeypatch.setattr(module, "in_one_pass", lambda loss: lambda logits, target: 1.01 * loss(logits, target))
    with pytest.raises(module.Problem, match="off by"):
        found("loss in one pass")()


def test_steps_that_change_weights_they_must_not_are_found(monkeypatch):
    def careless(optimizer, figures):
        optimizer.step()

    monkeypatch.setattr("nnssl_adapt.training.loop.step_if_finite", careless)
    with pytest.raises(module.Problem, match="changed the weights"):
        found("training steps")()


def test_labels_that_differ_are_found(monkeypatch):
    def off_by_one_voxel(logits, *arguments):
        labels = original(logits, *arguments)
        labels[3, 4, 5] += 1
        return labels

    original = module.labels_on_device
    monkeypatch.setattr(module, "labels_on_device", off_by_one_voxel)
    with pytest.raises(module.Problem, match="1 of .* voxels differ"):
        found("labels")()


def test_a_compiler_that_computes_something_else_is_found(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: lambda image: 1.5 * network(image))
    with pytest.raises(module.Problem, match="use --compile off"):
        module._compiled(CPU)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    assert "off by" in module._compiled(CPU)


def test_processes_that_don_t_find_each_other_are_told(monkeypatch):
    monkeypatch.setattr(module, "processes_talk", lost)
    with pytest.raises(module.Problem, match="no answer from 1 of 2 processes; training with -num_gpus needs it"):
        found("processes")()


def lost(count, kind):
    raise OtherRankFailed(f"no answer from 1 of {count} processes")


def test_little_shared_memory_is_told(monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=64 << 20)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(module.Resources, "here", classmethod(lambda cls: cls(2, None, 64 << 20)))
    with pytest.raises(module.Problem, match="--shm-size"):
        found("/dev/shm")()


@pytest.mark.cuda
def test_this_gpu(cuda_device):
    result = self_test(cuda_device)
    assert result.is_ready, result.verdict
