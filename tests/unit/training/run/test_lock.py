"""Two runs in one folder are one too many."""

import fcntl
import re
import signal
import subprocess
import sys

import pytest
from support.training_runs import fold_of, trainer_of

from nnssl_adapt.errors import TrainingError
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
        assert (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_text() == ""


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


def test_file_systems_without_locks_are_no_obstacle(tmp_path, monkeypatch, package_log):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_run_in(tmp_path):
        pass
    assert "can't be locked" in package_log.text


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
