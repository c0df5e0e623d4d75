"""Stopping in good order: signals, deadlines, and exit codes."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.training_runs import assert_same_training, at, interrupt, trainer_of

from nnssl_adapt.cli import common
from nnssl_adapt.errors import TrainingError, TrainingStopped
from nnssl_adapt.training import trainer
from nnssl_adapt.training.loop import TrainingLoop
from nnssl_adapt.training.run import signals, stopping
from nnssl_adapt.training.run.deadline import Deadline
from nnssl_adapt.training.run.stopping import StopRequest, stop_on_signals


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def steps_until_stopped(stop, clock, step, most=10_000):
    for number in range(1, most):
        clock.passes(step)
        if stop.asked():
            return number
    return None


def test_a_run_stops_before_the_deadline_by_a_step_and_two_checkpoints():
    clock = Clock()
    stop = StopRequest(Deadline(1000 + 600, "the time limit of 10"), clock)
    stop.saved(30)
    stop.saved(40)
    stop.saved(5)
    # Step n ends at 7 n. One more of 7 s, twice 40 s and 10 s to end must still fit into 600 s.
    assert steps_until_stopped(stop, clock, step=7) == (600 - 7 - 80 - 10 + 6) // 7
    assert stop.reason == "the time limit of 10"


def test_before_the_first_checkpoint_its_time_is_assumed():
    clock = Clock()
    stop = StopRequest(Deadline(1000 + 600, "x"), clock)
    assert steps_until_stopped(stop, clock, step=1) == 600 - 1 - 2 * 20 - 10


def test_a_slow_first_step_is_forgotten():
    clock = Clock()
    stop = StopRequest(Deadline(1000 + 1000, "x"), clock)
    stop.saved(1)
    clock.passes(300)  # compiling
    assert not stop.asked() and stop.reserve == 300 + 2 + 10
    for _ in range(50):
        clock.passes(2)
        assert not stop.asked()
    assert stop.reserve == 2 + 2 + 10


def test_without_a_deadline_time_means_nothing():
    clock = Clock()
    assert steps_until_stopped(StopRequest(None, clock), clock, step=1e6, most=50) is None


def test_a_run_near_its_deadline_saves_and_goes_on_later(plan, recipe, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(trainer, "stop_on_signals", functools.partial(stop_on_signals, clock=clock))
    whole = trainer_of(plan, recipe, results_folder=tmp_path / "whole").run()

    def slow_step(self, *arguments, original=TrainingLoop.step):
        clock.passes(100)
        return original(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "step", slow_step)
        deadline = Deadline(clock.now + 555, "the end of the Slurm job")
        with pytest.raises(TrainingStopped, match=r"end of the Slurm job.*epoch 2 after 2 of 3"):
            trainer_of(plan, recipe, results_folder=tmp_path / "parts").run(deadline=deadline)
    model = trainer_of(plan, recipe, results_folder=tmp_path / "parts").run(resume=True)
    assert_same_training(whole, model)


# -- signals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_signals_are_noted_and_handlers_put_back(number):
    before = {known: signal.getsignal(known) for known in signals.SIGNALS}
    with stop_on_signals() as stop:
        stop.begin()
        assert not stop.asked()
        signal.raise_signal(number)
        assert stop.asked() and stop.reason == number.name
    assert {known: signal.getsignal(known) for known in signals.SIGNALS} == before


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            stop.begin()
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked()
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked() and stop.reason == "SIGTERM"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_same_signal_several_times_is_one():
    with stop_on_signals() as stop:
        stop.begin()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.asked() and stop.reason == "SIGUSR1"


def test_no_worker_outlives_a_run_that_is_stopped(plan, recipe, monkeypatch):
    interrupt(monkeypatch, step=2)
    with pytest.raises(TrainingStopped) as raised:  # which refers to all that was there
        trainer_of(plan, recipe, workers=1).run()
    assert raised.tb is not None and not multiprocessing.active_children()


def test_a_second_ctrl_c_stops_at_once(plan, recipe, monkeypatch):
    monkeypatch.setattr(stopping, "_DOUBLE_PRESS", 0.0)

    def twice(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingLoop, "step", twice)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(plan, recipe).run()


def test_without_checkpoints_a_stop_is_a_failure(plan, recipe, monkeypatch):
    interrupt(monkeypatch, step=2)
    with pytest.raises(TrainingError, match="nothing was saved, as asked") as stopped:
        trainer_of(plan, recipe, disable_checkpointing=True).run()
    assert not isinstance(stopped.value, TrainingStopped)


SCRIPT = """
import sys
from nnssl_adapt.cli import train
from nnssl_adapt.training import trainer
from nnssl_adapt.training.loop import TrainingLoop

def announced(self, *arguments, original=TrainingLoop.step):
    if arguments[0].iteration == 2:
        print("STEP", flush=True)
        sys.stdin.readline()
    return original(self, *arguments)

TrainingLoop.step = announced
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGTERM, "0"), (signal.SIGINT, "0"), (signal.SIGHUP, "1")],
    ids=["SIGTERM", "SIGINT", "SIGHUP with a worker"],
)
def test_the_command_saves_and_exits_with_75(plan, recipe, number, workers):
    words = ["991", "3d_fullres", "0", "-p", plan.plans_name, "-device", "cpu", "--workers", workers, "--c", "auto"]
    words += ["--from_scratch", "--epochs", "1", "--iters", "4", "--warmup", "0", "--set", "validation_iterations=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while "STEP" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        os.killpg(process.pid, number)  # a scheduler's and a terminal's reach the data workers too
        _, complaint = process.communicate("go\n", timeout=60)
    finally:
        process.kill()
    assert process.returncode == common.EXIT_STOPPED == os.EX_TEMPFAIL
    (said,) = [line for line in complaint.splitlines() if line.startswith(("stopped", "error"))]
    assert said.startswith(f"stopped by {number.name} in epoch 1 after 3 of 4 steps; run the same command")
    (latest,) = plan.dataset_folder.parents[1].glob("nnUNet_results/*/*/fold_0/checkpoint_latest.pth")
    assert torch.load(latest, weights_only=True)["nnssl_adapt"]["iteration"] == 3


# -- other ends ------------------------------------------------------------------------------------------------------------


def test_a_dead_worker_is_explained(plan, recipe, monkeypatch):
    def kill_workers(self, state, batches, forward):
        next(batches)
        for child in multiprocessing.active_children():
            child.kill()
        time.sleep(30)  # torch interrupts this when it learns of it

    monkeypatch.setattr(TrainingLoop, "step", kill_workers)
    with pytest.raises(TrainingError, match=r"worker died.*Killed.*--workers.*--c"):
        trainer_of(plan, recipe, workers=1).run()


@pytest.mark.parametrize(
    ("error", "device", "where"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "cpu", "the memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:98] DefaultCPUAllocator: can't allocate memory"),
            "cpu",
            "the memory",
        ),
    ],
    ids=["of a gpu", "of this machine"],
)
def test_too_little_memory_is_explained(plan, recipe, monkeypatch, error, device, where):
    def fail():
        raise error

    at(monkeypatch, fail, step=1)
    with pytest.raises(TrainingError, match=f"{where}.*16 × 16 × 24.*--batch 1"):
        trainer_of(plan, recipe).run()
    with pytest.raises(TrainingError, match="in batches of 1: try --patch 16 16 12"):
        at(monkeypatch, fail, step=1)
        trainer_of(plan, recipe.override(batch_size=1)).run()


def test_other_errors_stay_what_they_are(plan, recipe, monkeypatch):
    def fail():
        raise RuntimeError("something else")

    at(monkeypatch, fail, step=1)
    with pytest.raises(RuntimeError, match="something else"):
        trainer_of(plan, recipe).run()
