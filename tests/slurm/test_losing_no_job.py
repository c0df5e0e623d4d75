"""On a real Slurm: no ordinary situation loses a job. What comes out equals an undisturbed run's, bit for bit."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.slurm import Slurm, eventually
from support.slurm_folders import SOURCE, assert_same_weights

from nnssl_adapt.cluster.graph import Resources
from nnssl_adapt.cluster.scripts import SlurmSettings
from nnssl_adapt.cluster.status import CANCELLED, FAILED
from nnssl_adapt.cluster.submit import Submitted, submit
from nnssl_adapt.training.recipe.recipe import Recipe

pytestmark = pytest.mark.slurm

STEP = "nnssl_adapt.training.loop:TrainingLoop.step"
PLACES = {
    "in start-up": "nnssl_adapt.training.trainer:PretrainedTrainer.run",
    "in an epoch": STEP,
    "in validation": "nnssl_adapt.training.validation:FoldValidation._predict",
    "in the report": "nnssl_adapt.evaluation.report.report:write_report",
}


def short_recipe():
    """What the flags of the undisturbed run say."""
    return Recipe.load("default").override(
        epochs=3, iterations_per_epoch=3, validation_iterations=1, warmup_epochs=1, patch_size=(16, 24, 16)
    )


@dataclass
class Held:
    """A submission whose fold 0 is held at a place."""

    slurm: Slurm
    folder: Path
    submitted: Submitted

    @property
    def job(self):
        return self.submitted.submission.jobs["fold_0"]

    @property
    def model(self):
        return self.submitted.folder.parent

    @property
    def log(self):
        path = self.submitted.submission.log(self.submitted.graph.step("fold_0"))
        return path.read_text() if path.exists() else ""

    def wait(self):
        eventually((self.folder / "reached").exists, f"for the place\n{self.log[-2000:]}")
        return int((self.folder / "reached").read_text())

    def go(self):
        (self.folder / "go").touch()

    def finish(self):
        """Until the fold is done, by its files and for Slurm."""

        def done():
            self.slurm.hurry()
            return self.submitted.graph.step("fold_0").is_done and self.slurm.state(self.job) == "COMPLETED"

        try:
            eventually(done, f"for {self.job}", 150)
        except AssertionError as error:
            raise AssertionError(f"{self.slurm.facts(self.job)}\n{self.log[-3000:]}") from error


@pytest.fixture
def hold(prepared, slurm, tmp_path, monkeypatch):
    """Call it with a name, a place and the like: fold 0 of a preprocessed dataset is submitted, with results of its own."""
    program = str(Path(__file__).parents[1] / "support" / "held_program")
    monkeypatch.setenv("PYTHONPATH", f"{program}:{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # the nodes of the test have no addresses

    def start(name, place="", call=1, fails="", resources=None, flags=(), shards=1):
        folder = tmp_path / name.replace(" ", "_")
        (folder / "results").mkdir(parents=True, exist_ok=True)
        settings = {"HOLD_AT": place, "HOLD_FOLDER": str(folder), "HOLD_CALL": str(call), "HOLD_FAILS": fails}
        with monkeypatch.context() as environment:
            for variable, value in {**settings, "nnUNet_results": str(folder / "results")}.items():
                environment.setenv(variable, value)
            submitted = submit(
                "991", SOURCE, "mae", folds=[0], shards=shards, recipe=short_recipe(), device="cpu",
                resources=resources or Resources(cpus=1), settings=SlurmSettings(partition="low", flags=tuple(flags)),
                training=("--workers", "0"),
            )  # fmt: skip
        return Held(slurm, folder, submitted)

    return start


@pytest.mark.interruptions
def test_asked_to_stop_at_any_place(hold, slurm, undisturbed):
    runs = {name: hold(name, place, call=2 if place == STEP else 1) for name, place in PLACES.items()}
    for name, run in runs.items():
        run.wait()
        slurm.run("scancel", f"--signal={'USR1' if 'report' in name else 'TERM'}", run.job)
        if name != "in start-up":
            run.go()
    for name, run in runs.items():
        run.finish()
        assert_same_weights(undisturbed, run.model, 0)
        restarts = int(slurm.facts(run.job)["Restarts"])
        assert restarts == (0 if "report" in name else 1), (name, run.log)
    assert "before the training began" in runs["in start-up"].log
    assert "in epoch 1 after 2 of 3 steps" in runs["in an epoch"].log
    assert "in validation, " in runs["in validation"].log
    assert "stopped" not in runs["in the report"].log


@pytest.mark.interruptions
def test_time_limit_requeue_and_scancel(hold, slurm, undisturbed):
    """Without --signal; the run knows its end by squeue."""
    limited = hold("time limit", STEP, call=2, resources=Resources(cpus=1, time="1"))
    requeued, cancelled = (hold(name, STEP, call=2) for name in ("requeue", "scancel"))
    for run in (requeued, cancelled):
        run.wait()
    slurm.run("scontrol", "requeue", requeued.job)
    assert cancelled.submitted.cancel() == 3  # with find-best and the report
    cancelled.go()
    requeued.go()
    limited.wait()
    time.sleep(15)  # a step so long does not fit any more into what is left of the minute
    limited.go()
    eventually(lambda: "stopped by the end of the Slurm job" in limited.log, f"for the end\n{limited.log}")
    eventually(lambda: slurm.state(limited.job) == "PENDING", "for the limited job to wait")
    slurm.run("scontrol", "update", f"jobid={limited.job}", "timelimit=10")
    for run in (limited, requeued):
        run.finish()
        assert_same_weights(undisturbed, run.model, 0)
    eventually(lambda: slurm.state(cancelled.job) in ("CANCELLED", ""), f"for the end: {slurm.facts(cancelled.job)}")
    assert cancelled.submitted.status()["fold_0"].state == CANCELLED
    assert not cancelled.submitted.graph.step("fold_0").is_done


def test_a_cancelled_job_stays_cancelled_whoever_cancels_it(hold, slurm):
    run = hold("scancel", STEP, call=2)
    run.wait()
    slurm.run("scancel", run.job)
    run.go()
    eventually(lambda: slurm.state(run.job) == "CANCELLED", "for the end")
    assert "not queued again" in run.log or "queued again" not in run.log


@pytest.mark.interruptions
def test_a_node_goes_down(hold, slurm, undisturbed):
    run = hold("node down", STEP, call=2)
    run.wait()
    node = slurm.facts(run.job)["NodeList"]
    slurm.kill_node(node)
    try:
        run.go()
        run.finish()
        assert slurm.facts(run.job)["NodeList"] != node
    finally:
        slurm.start_node(node)
    assert_same_weights(undisturbed, run.model, 0)


def test_preempted(hold, slurm, undisturbed, tmp_path):
    run = hold("preempted", STEP, call=2)
    run.wait()
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 2\n")
    urgent = slurm.submit(script, "--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.txt")
    run.go()
    slurm.wait_for(urgent, "COMPLETED")
    run.finish()
    assert_same_weights(undisturbed, run.model, 0)


def test_a_rank_is_killed_on_two_nodes(hold, slurm):
    two_nodes = Resources(cpus=1, nodes=2)
    whole, killed = hold("whole", resources=two_nodes), hold("killed", STEP, call=2, resources=two_nodes)
    os.kill(killed.wait(), signal.SIGKILL)
    killed.go()
    whole.finish()
    eventually(lambda: slurm.state(killed.job) == "FAILED", f"for the end {killed.log}")
    status = killed.submitted.status()
    assert status["fold_0"].state == FAILED and status["fold_0"].detail
    again = hold("killed", resources=two_nodes)
    again.finish()
    assert_same_weights(whole.model, again.model, 0)


@pytest.mark.interruptions
def test_a_failed_shard(folders, hold, slurm, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(folders / "nnUNet_preprocessed"))
    run = hold("shards", "nnssl_adapt.data.preprocess_cases:preprocess_case", fails="yes", shards=2)
    eventually(lambda: not slurm.run("squeue", "-h"), "for the queue to be empty")
    status = run.submitted.status()
    assert sorted(status[f"preprocess_{n}"].state for n in (1, 2)) == ["done", FAILED]
    assert status["fold_0"].state == CANCELLED and "a step before it failed" in status["fold_0"].detail
    again = hold("shards", shards=2)
    assert len(again.submitted.new) == 4
    again.finish()
