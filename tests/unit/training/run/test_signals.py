"""A command that is asked to stop before it trains, or after: it says "start me again", or is not impressed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nnssl_adapt.cli.common import EXIT_STOPPED
from nnssl_adapt.errors import TrainingStopped
from nnssl_adapt.training.run import signals
from nnssl_adapt.training.run.signals import stopping_in_order
from nnssl_adapt.training.run.stopping import stop_on_signals

STOPPING = [number for number in signals.SIGNALS if number != signal.SIGINT]


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_before_the_training(number):
    before = signal.getsignal(number)
    with (
        pytest.raises(TrainingStopped, match=f"stopped by {number.name} before the training began"),
        stopping_in_order(),
    ):
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_no_library_swallows_it():
    with pytest.raises(TrainingStopped), stopping_in_order():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_got_lost_in_clean_up_is_remembered():
    class Careless:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)  # Python ignores what is raised here

    with pytest.raises(TrainingStopped, match="SIGTERM before the training"), stopping_in_order():
        careless = Careless()
        del careless
        with stop_on_signals():
            pytest.fail("nothing should begin")


def test_while_a_run_prepares_it_leaves_at_once():
    with pytest.raises(TrainingStopped, match="SIGUSR2 before the training"), stopping_in_order(), stop_on_signals():
        signal.raise_signal(signal.SIGUSR2)
        pytest.fail("nothing should go on")


def test_with_other_ranks_all_leave_together():
    with stopping_in_order(), stop_on_signals(alone=False) as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.asked() and stop.reason == "SIGUSR1"


def test_when_all_is_done_signals_are_ignored():
    with stopping_in_order():
        with stop_on_signals() as stop:
            stop.begin()
        for number in STOPPING:
            signal.raise_signal(number)
        assert stop.reason is None


PROGRAM = """
import argparse, signal, sys, time
from nnssl_adapt.cli.common import run_command, stop_in_order

def run(arguments):
    assert "torch" not in sys.modules
    print("ready", flush=True)
    {wait}
    return 0

parser = argparse.ArgumentParser()
stop_in_order(parser)
code = run_command(parser, run, None)
print("left", flush=True)
sys.stdin.readline()
sys.exit(code)
"""
IN_PYTHON = "time.sleep(60)"
IN_A_LIBRARY = "import ctypes; lib = ctypes.PyDLL(None); [lib.sleep(30) for _ in range(2)]"


@pytest.mark.parametrize("wait", [IN_PYTHON, IN_A_LIBRARY], ids=["in Python", "in a library"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a library's sleep")
def test_a_command_that_has_not_even_loaded_torch_exits_with_75(wait):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(wait=wait)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        if wait == IN_PYTHON:  # and signals that come while Python takes leave change nothing
            assert process.stdout.readline() == "left\n"
            process.send_signal(signal.SIGUSR1)
        _, complaint = process.communicate("\n", timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED
    assert "before the training began; run the same command again to go on" in complaint
