"""Processes that are started together end together: with one exit code, one clear error, and nobody left behind."""

import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support import rank_program
from support.killing import forked

from nnssl_adapt.errors import ConfigurationError, DeviceUnavailable, TrainingError
from nnssl_adapt.training.launch import launch
from nnssl_adapt.training.launch.launch import launch_wanted, run_ranks

PROGRAM = (sys.executable, str(Path(rank_program.__file__)))
PATIENCE = 120  # seconds that a test waits at most for what takes two or three


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def launcher(tmp_path):
    """The process ids of a launcher, in a process of its own, and of its two ranks, which wait to be stopped."""

    def launch_two():
        sys.stderr = (tmp_path / "stderr.txt").open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        os._exit(run_ranks([str(tmp_path), "wait_for_stop"], 2, "cpu", PROGRAM))

    process = forked(launch_two)
    ready = [tmp_path / f"ready_{rank}" for rank in range(2)]
    eventually(lambda: all(path.exists() and path.read_text() for path in ready))
    pids = [int(path.read_text()) for path in ready]
    yield process, pids
    for pid in (process, *pids):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(process, 0)


@pytest.mark.parametrize("sent", ["SIGUSR1", "SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_are_passed_on_and_the_exit_code_is_kept(launcher, tmp_path, sent):
    process, pids = launcher
    os.kill(process, getattr(signal, sent))
    eventually(lambda: not is_running(process))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 75
    assert (tmp_path / "stderr.txt").read_text() == "error: stopped as asked\n"
    # Each got it once; the second may have agreed to stop before its own copy came.
    told = [(tmp_path / f"stopped_{rank}").read_text() for rank in range(2)]
    assert set(told) - {""} == {sent}
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
def test_ranks_save_and_end_when_their_launcher_is_killed(launcher, tmp_path):
    process, pids = launcher
    os.kill(process, signal.SIGKILL)
    eventually(lambda: not any(is_running(pid) for pid in pids))
    assert "SIGTERM" in (tmp_path / "stopped_0").read_text() + (tmp_path / "stopped_1").read_text()


def test_a_killed_rank_ends_the_run_with_its_name(tmp_path, capfd):
    with pytest.raises(TrainingError, match=r"rank 1 of 2.*SIGKILL.*memory.*--c"):
        run_ranks([str(tmp_path), "die"], 2, "cpu", PROGRAM)
    assert re.fullmatch("error: rank 0 of 2 got no answer .*\n", capfd.readouterr().err)


def test_the_error_of_the_rank_that_failed_is_the_one_that_is_told(tmp_path, capfd):
    with pytest.raises(TrainingError, match="^rank 1 of 2.*only this one knows why$"):
        run_ranks([str(tmp_path), "fail"], 2, "cpu", PROGRAM)


def test_an_error_of_all_is_told_once(tmp_path, capfd):
    assert run_ranks([str(tmp_path), "fail_alike"], 2, "cpu", PROGRAM) == 1
    assert capfd.readouterr().err == "error: all know why\n"


def test_a_rank_that_hangs_is_made_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_TO_NOTICE", 1.0)
    monkeypatch.setattr(launch, "_TO_END", 1.0)
    with pytest.raises(TrainingError, match=r"^rank 1 of 2 failed: (\S+ )*last words"):
        run_ranks([str(tmp_path), "hang"], 2, "cpu", PROGRAM)
    for rank in range(2):
        assert not is_running((tmp_path / f"pid_{rank}").read_text())


def test_more_processes_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceUnavailable, match="-num_gpus 4, but this machine shows 2 GPUs"):
        run_ranks([], 4)
    with pytest.raises(ConfigurationError, match="-device mps"):
        run_ranks([], 2, "mps")


def test_only_who_was_not_started_by_a_launcher_starts_processes():
    assert launch_wanted(4, {})
    assert launch_wanted(4, {"WORLD_SIZE": "1"})
    assert not launch_wanted(1, {})
    assert not launch_wanted(4, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
    assert not launch_wanted(1, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})


def test_contradictory_numbers_are_an_error():
    with pytest.raises(ConfigurationError, match="-num_gpus 2, but torchrun started 4"):
        launch_wanted(2, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
    with pytest.raises(ConfigurationError, match="-num_gpus 0: expected 1 or more"):
        launch_wanted(0, {})


def test_what_is_set_stays_set(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment = launch._environment(1, 3, 29511, tmp_path / "rank_1")
    assert environment["OMP_NUM_THREADS"] == "7"
    assert [environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")] == [
        "1",
        "1",
        "3",
        "29511",
    ]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert int(launch._environment(1, 1000, 29511, tmp_path)["OMP_NUM_THREADS"]) == 1


# -- the guide -------------------------------------------------------------------------------------------------------------
