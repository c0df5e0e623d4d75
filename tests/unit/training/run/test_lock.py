"""Two runs in one folder are one too many."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from support.training_runs import fold_of, trainer_of

from nnssl_adapt.errors import TrainingError, TrainingStopped
from nnssl_adapt.machine import heartbeat, lock
from nnssl_adapt.machine.heartbeat import STALE, Heartbeat, Holder
from nnssl_adapt.machine.lock import LOCK, only_run_in

HOLDER = """
import sys
from pathlib import Path
from nnssl_adapt.machine.lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def refusal(folder):
    """What who comes second is told."""
    with pytest.raises(TrainingError) as raised, only_run_in(folder):
        pass
    return str(raised.value)


def test_another_process_is_refused_and_named(holder, tmp_path):
    for _ in range(2):  # a refusal doesn't forget who it is
        assert re.search(f"in use by process {holder.pid} on .*, since .*: wait for it or end it$", refusal(tmp_path))


def test_the_lock_dies_with_its_process(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with only_run_in(tmp_path):
        assert Heartbeat(tmp_path / f"{LOCK}_heartbeat").holder().process == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_one_after_the_other(tmp_path):
    for _ in range(2):
        with only_run_in(tmp_path):
            pass
    with pytest.raises(ZeroDivisionError), only_run_in(tmp_path):
        raise ZeroDivisionError
    with only_run_in(tmp_path):
        pass


def test_several_tasks_of_one_job_are_told_why(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with only_run_in(tmp_path):
        assert re.search("Slurm job 77, .*this job's 4 tasks.*-num_gpus", refusal(tmp_path))
        monkeypatch.setenv("SLURM_NTASKS", "1")
        assert "this job's" not in refusal(tmp_path)


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that has none."""

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_file_systems_without_locks_are_no_obstacle(tmp_path, no_locks, package_log):
    with only_run_in(tmp_path):
        pass
    assert "can't be locked" in package_log.text


# -- the second check ------------------------------------------------------------------------------------------------------


class ElsewhereLock:
    """What a run on another machine leaves in a folder, whose lock this machine knows nothing of."""

    def __init__(self, folder, **details):
        self.file = folder / f"{LOCK}_heartbeat"
        self.holder = Holder(**{"process": 4711, "machine": "node7", "since": "noon", "token": "theirs", **details})
        self.file.write_text(json.dumps(vars(self.holder)))

    def beat(self, ago=0.0):
        now = time.time() - ago
        os.utime(self.file, (now, now))


@pytest.mark.parametrize("locks", ["silently local", "none"])
def test_a_run_on_another_machine_is_seen_by_its_heartbeat(tmp_path, locks, request):
    if locks == "none":
        request.getfixturevalue("no_locks")
    ElsewhereLock(tmp_path).beat(ago=STALE / 2)
    assert "in use by process 4711 on node7, since noon" in refusal(tmp_path)


@pytest.mark.parametrize("locks", ["silently local", "none", "outlives its machine"])
def test_the_heartbeat_of_a_dead_holder_goes_stale(tmp_path, locks, request, package_log):
    if locks == "none":
        request.getfixturevalue("no_locks")
    if locks == "outlives its machine":
        request.getfixturevalue("holder")
    other = ElsewhereLock(tmp_path)
    other.beat(ago=STALE + 5)
    with only_run_in(tmp_path):
        assert Heartbeat(other.file).holder().process == os.getpid()
        assert "process 4711 on node7, since noon is dead" in package_log.text
    assert not other.file.exists()


def test_an_earlier_round_of_the_same_job_is_dead(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    ElsewhereLock(tmp_path, job="77", restarts=1).beat()
    with only_run_in(tmp_path):
        pass
    ElsewhereLock(tmp_path, job="77", restarts=2).beat()
    assert "Slurm job 77" in refusal(tmp_path)


def test_a_job_waits_and_is_queued_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    monkeypatch.setattr(lock, "_LOOK_EVERY", 0.05)
    monkeypatch.setattr(lock, "PATIENCE_OF_JOBS", 0.3)
    other = ElsewhereLock(tmp_path, job="77")
    other.beat()
    with pytest.raises(TrainingStopped, match=r"Slurm job 77.*Waited 0 s"), only_run_in(tmp_path):
        pass
    monkeypatch.setattr(lock, "PATIENCE_OF_JOBS", 60)
    threading.Timer(0.3, other.file.unlink).start()
    with only_run_in(tmp_path):
        pass


def test_the_holder_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.05)
    with only_run_in(tmp_path):
        beat = Heartbeat(tmp_path / f"{LOCK}_heartbeat")
        long_ago = time.time() - 1000
        os.utime(beat.path, (long_ago, long_ago))
        until = time.monotonic() + 30
        while beat.age() > 500 and time.monotonic() < until:
            time.sleep(0.02)
        assert beat.age() < 500


def test_of_two_that_find_a_dead_holder_one_goes_on(tmp_path, monkeypatch):
    other = ElsewhereLock(tmp_path)
    other.beat(ago=STALE + 5)
    claim = Heartbeat.claim

    def beaten(self, holder, dead):
        assert claim(self, replace(other.holder, token="faster"), dead)
        return claim(self, holder, dead)

    monkeypatch.setattr(Heartbeat, "claim", beaten)
    assert "in use by process 4711" in refusal(tmp_path)


def test_a_second_training_of_a_fold_touches_nothing(plan, recipe):
    recipe = recipe.override(epochs=1, warmup_epochs=0, iterations_per_epoch=1)
    first = trainer_of(plan, recipe)
    model = first.run()
    fold = fold_of(model)
    before = {path.name: path.stat().st_mtime_ns for path in fold.iterdir() if path.name != LOCK}
    for options in ({}, {"resume": "auto"}, {"validate_only": True}):
        with only_run_in(fold), pytest.raises(TrainingError, match="in use by process"):
            trainer_of(plan, recipe).run(**options)
    assert {path.name: path.stat().st_mtime_ns for path in fold.iterdir() if path.name != LOCK} == before
    trainer_of(plan, recipe.override(trainer_name="Other")).run()  # another folder is free
