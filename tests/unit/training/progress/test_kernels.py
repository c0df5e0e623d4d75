"""How much of the time kernels run, by a profile: real ones on a GPU, made up ones here."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from support.training_runs import trainer_of
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from nnssl_adapt.training.progress import kernels as kernel_profile
from nnssl_adapt.training.progress.kernels import EVERY, KernelProfile, is_profiled, kernel_figures

CPU = torch.device("cpu")


def event(start, end, name="volta_conv", device=DeviceType.CUDA, **more):
    return SimpleNamespace(time_range=SimpleNamespace(start=start, end=end), name=name, device_type=device, **more)


def test_overlapping_kernels_count_once_and_copies_not_at_all():
    events = [
        event(4000, 5000),
        event(1000, 2000),
        event(1500, 2500, "on another stream"),
        event(1600, 1700, "within"),
        event(0, 900, "Memcpy HtoD (Pinned -> Device)"),
        event(2500, 4000, "Memset (Device)"),
        event(0, 9000, "aten::conv3d", DeviceType.CPU),
        event(0, 9000, "Optimizer.step", is_user_annotation=True),
    ]
    figures = kernel_figures(events, steps=2)
    assert figures.busy == pytest.approx(2500 / 4000) and figures.idle_ms == pytest.approx(1.5 / 2)
    assert math.isnan(kernel_figures(events[4:], 2).busy)


def test_the_profiler_s_own_events():
    """Of a known trace: 30 µs of kernels in 40 µs, copies beside; three steps."""
    spans = [("conv", 100, 110), ("Memcpy DtoD (Device -> Device)", 108, 125), ("norm", 115, 125), ("sgd", 130, 140)]
    events = [FunctionEvent(0, name, 0, *span, device_type=DeviceType.CUDA) for name, *span in spans]
    events.append(FunctionEvent(1, "aten::add", 0, 0, 500, device_type=DeviceType.CPU))
    figures = kernel_figures(events, steps=3)
    assert figures.busy == pytest.approx(30 / 40) and figures.idle_ms == pytest.approx(0.010 / 3)


def test_which_epochs():
    assert [epoch for epoch in range(120) if is_profiled(epoch, 1000)] == [1, 1 + EVERY, 1 + 2 * EVERY]
    assert is_profiled(0, 1)


class Recorded:
    """A profiler that notes between which steps it ran."""

    def __init__(self, fails=False):
        self.running, self.fails, self.count = False, fails, 0

    def start(self):
        self.running, self.count = True, self.count + 1
        return self

    def stop(self):
        self.running = False
        if self.fails:
            raise RuntimeError("CUPTI is for administrators")

    def events(self):
        return [event(0, 60), event(70, 100)]


def profiled_steps(profile, recorded, epoch, steps, done=0):
    profile.begin_epoch(epoch, 200, steps, done)
    seen = []
    for step in range(done, steps):
        profile.before(step)
        if recorded.running:
            seen.append(step)
        profile.after(step)
    return seen


@pytest.mark.parametrize(
    ("steps", "done", "expected"),
    [(250, 0, range(10, 15)), (250, 100, range(110, 115)), (7, 0, range(2, 7)), (3, 0, range(3)), (6, 6, range(0))],
)
def test_which_steps(steps, done, expected):
    recorded = Recorded()
    profile = KernelProfile(CPU, start=recorded.start)
    assert profiled_steps(profile, recorded, 0, steps, done) == [] and math.isnan(profile.take().busy)
    assert profiled_steps(profile, recorded, 1, steps, done) == list(expected)
    assert profile.take().busy == pytest.approx(0.9 if expected else math.nan, nan_ok=True)
    profiled_steps(profile, recorded, 2, steps, done)
    assert math.isnan(profile.take().busy)  # not the last epoch's


def test_a_card_that_can_not_be_profiled_is_left_alone(caplog):
    recorded = Recorded(fails=True)
    profile = KernelProfile(CPU, start=recorded.start)
    for epoch in (1, 1 + EVERY):
        profiled_steps(profile, recorded, epoch, 20)
        assert math.isnan(profile.take().busy)
    assert recorded.count == 1
    off = KernelProfile(CPU, enabled=False, start=recorded.start)
    assert profiled_steps(off, recorded, 1, 20) == []


def test_a_run_writes_them(plan, recipe, monkeypatch):
    recorded = Recorded()
    original = KernelProfile
    monkeypatch.setattr(
        "nnssl_adapt.training.loop.KernelProfile", lambda device, enabled: original(device, enabled, recorded.start)
    )
    model = trainer_of(plan, recipe).run()
    first, second = (json.loads(line) for line in (model.path / "fold_0/metrics.jsonl").read_text().splitlines())
    assert first["kernel_busy"] is None and second["kernel_busy"] == pytest.approx(0.9)
    assert second["kernel_idle_ms_per_step"] == pytest.approx(0.01 / 3)
    assert first["data_wait_ms_per_step"] > 0


@pytest.mark.cuda
def test_a_real_profile(cuda_device):
    device = cuda_device
    profile = KernelProfile(device)
    a = torch.randn(*[2048 if device.type == "cuda" else 32] * 2, device=device)
    profile.begin_epoch(0, 1, 5)
    for step in range(5):
        profile.before(step)
        for _ in range(20):
            a @ a
        profile.after(step)
    figures = profile.take()
    if device.type == "cuda":
        assert 0.5 < figures.busy <= 1 and figures.idle_ms < 10, kernel_profile
