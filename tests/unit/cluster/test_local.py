"""A submission on this machine: one step after another, stopped, gone on with, failed."""

import os
import re
import sys
import threading
import time

import pytest

from nnssl_adapt.cluster import local
from nnssl_adapt.cluster.graph import Graph, Resources, Step
from nnssl_adapt.cluster.local import LocalRun, StepFailed, gpu_slots
from nnssl_adapt.cluster.status import status_of
from nnssl_adapt.cluster.submission import LOCAL, Submission
from nnssl_adapt.errors import ConfigurationError, TrainingStopped

PROGRAM = """
import os, pathlib, signal, sys, time
kind, out = sys.argv[1:]
print(kind, os.environ.get("CUDA_VISIBLE_DEVICES", "none"), flush=True)
out = pathlib.Path(out)
if kind == "fail":
    sys.exit(3)
if kind == "wait" and not out.with_suffix(".half").exists():
    def stop(*_):
        out.with_suffix(".half").write_text("half")
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    out.with_suffix(".began").touch()
    time.sleep(60)
if kind == "gpu":
    time.sleep(0.5)
out.write_text("done")
"""


@pytest.fixture
def submission(tmp_path, monkeypatch):
    """Call it with (name, group, kind, groups to wait for) of steps."""
    monkeypatch.setattr(local, "PROGRAM", (sys.executable, "-c", PROGRAM))
    monkeypatch.setattr(local, "_LOOK_EVERY", 0.02)

    def make(*steps, **options):
        made = [
            Step(name, group, (kind, str(tmp_path / f"{name}.out")), (tmp_path / f"{name}.out",), after=after,
                 watch=(tmp_path / f"{name}.half",))
            for name, group, kind, after in steps
        ]  # fmt: skip
        found = Submission(tmp_path / "model" / "submission", Graph("test", tuple(made), **options), LOCAL)
        found.folder.mkdir(parents=True, exist_ok=True)
        found.save()
        return found

    return make


def test_steps_wait_for_each_other(submission, tmp_path):
    made = submission(("one", "one", "do", ()), ("two_0", "two", "do", ("one",)), ("two_1", "two", "do", ("one",)))
    LocalRun(made, gpu_slots([], 0)).run()
    times = [(tmp_path / f"{name}.out").stat().st_mtime_ns for name in ("one", "two_0", "two_1")]
    assert times == sorted(times)
    status = status_of(Submission.load(made.folder))
    assert status.is_done and status["two_1"].last_line == "do none" and "3 of 3 steps are done" in str(status)
    LocalRun(made, gpu_slots([], 0)).run()  # nothing is done twice
    assert times == [(tmp_path / f"{name}.out").stat().st_mtime_ns for name in ("one", "two_0", "two_1")]


def test_as_many_as_there_are_gpus(submission):
    made = submission(
        *((f"fold_{n}", "train", "gpu", ()) for n in range(3)), resources={"train": Resources(gpus="2", tasks=2)}
    )
    LocalRun(made, gpu_slots(["4", "5", "6", "7", "8"], 2)).run()
    used = [made.log(step).read_text().split()[1] for step in made.graph.steps]
    assert used[:2] == ["4,5", "6,7"] and used[2] in used[:2]


def test_what_comes_after_a_failed_step_is_not_started(submission, tmp_path):
    made = submission(
        ("bad", "train", "fail", ()),
        ("good", "train", "do", ()),
        ("best", "best", "do", ("train",)),
        ("end", "end", "do", ("best",)),
    )
    with pytest.raises(StepFailed, match=r"1 of 4 steps.*bad.*exit code 3.*train-0.txt"):
        LocalRun(made, gpu_slots([], 0)).run()
    assert (tmp_path / "good.out").exists() and not (tmp_path / "best.out").exists()
    status = status_of(made)
    assert status["bad"].state == "failed" and status["bad"].detail == "exit code 3" and status["good"].state == "done"
    assert status["end"].state == "not submitted" and status.is_over


def test_stopped_and_gone_on_with(submission, tmp_path):
    made = submission(("one", "one", "wait", ()), ("two", "two", "do", ("one",)))

    def ask_to_stop():
        until = time.monotonic() + 240  # on a busy machine
        while not (tmp_path / "one.began").exists() and time.monotonic() < until:
            time.sleep(0.02)
        seen.append(status_of(made)["one"].state)
        with pytest.raises(ConfigurationError, match=f"is being run by process {os.getpid()}"):
            made.refuse_if_alive()
        assert made.cancel() == 1  # by SIGTERM

    seen: list[str] = []
    asking = threading.Thread(target=ask_to_stop)
    asking.start()
    with pytest.raises(TrainingStopped, match="stopped by SIGTERM; the same command goes on"):
        LocalRun(made, gpu_slots([], 0)).run()
    asking.join()
    assert made.cancel() == 0
    assert seen == ["running"] and not (tmp_path / "two.out").exists()
    LocalRun(made, gpu_slots([], 0)).run()
    assert status_of(made).is_done


def test_too_few_gpus():
    with pytest.raises(ConfigurationError, match=re.escape("--gpus 4: this machine shows 2 GPUs")):
        gpu_slots(["0", "1"], 4)
