"""On a real Slurm: no ordinary situation loses a job. What comes out equals an undisturbed run's, bit for bit."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.slurm import Slurm, eventually
from support.slurm_folders import SOURCE, assert_same_weights, model_in

import nnssl_adapt as na
from nnssl_adapt.cluster.graph import Resources
from nnssl_adapt.cluster.scripts import SlurmSettings
from nnssl_adapt.cluster.status import CANCELLED, FAILED
from nnssl_adapt.cluster.submit import Submitted, submit
from nnssl_adapt.training.recipe.recipe import Recipe

pytestmark = pytest.mark.slurm

STEP = "nnssl_adapt.training.loop:TrainingLoop.step"
PLACES = {
    "in start-up": "nnssl_adapt.training.trainer:PretrainedTrainer.run",
    "announced in start-up": "nnssl_adapt.planning.plan:FinetunePlan.find",
    "in an epoch": STEP,
    "in validation": "nnssl_adapt.training.validation:logits_by_tiles",
    "in the report": "nnssl_adapt.evaluation.report.report:write_report",
}

ANNOUNCED = ("announced in start-up", "in the report")
"""Places at which the signal is the one that ``sbatch --signal=USR1@60`` sends ahead of the end of time."""


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

    def said(self):
        return f"{self.slurm.facts(self.job)}\n{self.log[-3000:]}"

    def wait(self):
        """Until the place is reached; the process that is held there."""

        def reached():
            assert self.slurm.state(self.job) != "FAILED", self.said()
            return (self.folder / "reached").exists()

        eventually(reached, lambda: f"for the place: {self.said()}")
        return int((self.folder / "reached").read_text())

    def go(self):
        (self.folder / "go").touch()

    def finish(self):
        """Until the fold is done, by its files and for Slurm."""

        def done():
            self.slurm.hurry()
            state = self.slurm.state(self.job)
            assert state != "FAILED", self.said()
            return state == "COMPLETED" and self.submitted.graph.step("fold_0").is_done

        eventually(done, lambda: f"for the end: {self.said()}")


@pytest.fixture
def hold(prepared, slurm, tmp_path, monkeypatch):
    """Call it with a name, a place and the like: fold 0 of a preprocessed dataset is submitted, with results of its own.

    What follows the fold waits: nobody looks at it here, and it would take the cores from the other runs.
    """
    program = str(Path(__file__).parents[1] / "support" / "held_program")
    monkeypatch.setenv("PYTHONPATH", f"{program}:{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # the nodes of the test have no addresses

    def start(name, place="", call=1, fails="", resources=None, shards=1, training=()):
        folder = tmp_path / name.replace(" ", "_")
        (folder / "results").mkdir(parents=True, exist_ok=True)
        settings = {"HOLD_AT": place, "HOLD_FOLDER": str(folder), "HOLD_CALL": str(call), "HOLD_FAILS": fails}
        with monkeypatch.context() as environment:
            for variable, value in {**settings, "nnUNet_results": str(folder / "results")}.items():
                environment.setenv(variable, value)
            submitted = submit(
                "991", SOURCE, "mae", folds=[0], shards=shards, recipe=short_recipe(), device="cpu",
                resources=resources or Resources(cpus=1), settings=SlurmSettings(partition="low"),
                training=("--workers", "0", *training),
            )  # fmt: skip
        if shards == 1:
            jobs = submitted.submission.jobs
            slurm.run("scontrol", "hold", ",".join(jobs[step] for step in ("find-best", "report")))
        return Held(slurm, folder, submitted)

    return start


def test_asked_to_stop_at_any_place(hold, slurm, undisturbed):
    runs = {name: hold(name, place, call=2 if place == STEP else 1) for name, place in PLACES.items()}
    for name, run in runs.items():
        run.wait()
        slurm.run("scancel", f"--signal={'USR1' if name in ANNOUNCED else 'TERM'}", run.job)
        if "start-up" not in name:
            run.go()
    for name, run in runs.items():
        run.finish()
        assert_same_weights(undisturbed, run.model, 0)
        restarts = int(slurm.facts(run.job)["Restarts"])
        assert restarts == (0 if "report" in name else 1), (name, run.log)
    for name in ("in start-up", "announced in start-up"):
        assert "before the training began" in runs[name].log
    assert "in epoch 1 after 2 of 3 steps" in runs["in an epoch"].log
    assert "in validation, " in runs["in validation"].log
    assert "stopped" not in runs["in the report"].log


def test_time_limit_requeue_scancel_and_a_node_down(hold, slurm, undisturbed):
    """The time limit without --signal: the run knows its end by squeue."""
    limited = hold("time limit", STEP, resources=Resources(cpus=1, time="1"))
    requeued, cancelled, by_hand, down = (hold(name, STEP, call=2) for name in ("requeue", "cancel", "scancel", "down"))
    down.wait()
    node = slurm.facts(down.job)["NodeList"]
    for run in (limited, requeued, cancelled, by_hand):
        run.wait()
    slurm.run("scontrol", "requeue", requeued.job)
    assert cancelled.submitted.cancel() == 3  # with find-best and the report
    slurm.run("scancel", by_hand.job)
    for run in (requeued, cancelled, by_hand):
        run.go()
    # The step is held until there is no time for another one, and for saving (50 s).
    eventually(lambda: slurm.seconds_left(limited.job) < 45, "for the minute to be nearly over")
    limited.go()
    eventually(lambda: "stopped by the end of the Slurm job" in limited.log, limited.said)
    eventually(lambda: slurm.state(limited.job) == "PENDING", limited.said)
    slurm.run("scontrol", "update", f"jobid={limited.job}", "timelimit=30")
    for run in (cancelled, by_hand):
        eventually(lambda run=run: slurm.state(run.job) == "CANCELLED", run.said)
    slurm.kill_node(node)
    try:
        down.go()
        for run in (limited, requeued, down):
            run.finish()
            assert_same_weights(undisturbed, run.model, 0)
        assert slurm.facts(down.job)["NodeList"] != node
    finally:
        slurm.start_node(node)
    assert cancelled.submitted.status()["fold_0"].state == CANCELLED
    for run in (cancelled, by_hand):
        assert slurm.state(run.job) == "CANCELLED" and not run.submitted.graph.step("fold_0").is_done
        assert "not queued again" in run.log or "queued again" not in run.log


def test_preempted(hold, slurm, undisturbed, tmp_path):
    run = hold("preempted", STEP, call=2, resources=Resources(cpus=2))
    run.wait()
    assert "CPUs=2 " in slurm.run(
        "scontrol", "show", "step", f"{run.job}.0"
    )  # srun of 22.05 does not know it by itself
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 2\n")
    urgent = slurm.submit(script, "--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.txt")
    run.go()
    slurm.wait_for(urgent, "COMPLETED")
    run.finish()
    assert_same_weights(undisturbed, run.model, 0)


def test_a_rank_is_killed_on_two_nodes(hold, slurm, tmp_path):
    two_nodes = Resources(cpus=1, nodes=2)
    whole = hold("whole", resources=two_nodes)
    killed = hold("killed", STEP, call=2, resources=two_nodes, training=("--stage", str(tmp_path / "$SLURMD_NODENAME")))
    killed_rank = killed.wait()
    for node in ("n1", "n2"):
        eventually(lambda node=node: len([*(tmp_path / node).glob("*/case_*.b2nd")]) == 2 * 6, f"for copies on {node}")
    os.kill(killed_rank, signal.SIGKILL)
    killed.go()
    whole.finish()
    eventually(lambda: slurm.state(killed.job) == "FAILED", killed.said)
    eventually(
        lambda: not [*tmp_path.glob("n[12]/nnssl_adapt*")], lambda: f"for no copies: {[*tmp_path.glob('n[12]/*')]}"
    )
    status = killed.submitted.status()
    assert status["fold_0"].state == FAILED and status["fold_0"].detail
    killed.submitted.cancel()  # what is held would wait for ever for a fold that failed
    again = hold("killed", resources=two_nodes, training=("--stage", str(tmp_path / "$SLURMD_NODENAME")))
    again.finish()
    assert_same_weights(whole.model, again.model, 0)


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


def test_submitit(prepared, slurm, undisturbed, tmp_path, monkeypatch):
    """It announces a preemption by SIGUSR2; the training saves, and what submitit queued again goes on."""
    submitit = pytest.importorskip("submitit")
    plan = next((undisturbed.parents[2] / "nnUNet_preprocessed").glob("*/ptPlans*.json"))
    recipe, results = short_recipe(), tmp_path / "results"

    def train():
        import nnssl_adapt as na

        trainer = na.PretrainedTrainer(
            na.FinetunePlan.load(plan), 0, recipe, "cpu", SOURCE, workers=0, results_folder=results
        )
        return str(trainer.run(resume="auto").path)

    program = str(Path(__file__).parents[1] / "support" / "held_program")
    for name, value in {"HOLD_AT": STEP, "HOLD_FOLDER": str(tmp_path), "HOLD_CALL": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{program}:{os.environ['PYTHONPATH']}")
    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="slurm")
    executor.update_parameters(timeout_min=30, cpus_per_task=1, slurm_partition="low")
    job = executor.submit(na.Resumable(train))

    def log():
        return f"{slurm.facts(job.job_id)} {[path.read_text()[-2000:] for path in (tmp_path / 'logs').glob('*.[oe][ur][tr]')]}"

    eventually((tmp_path / "reached").exists, log)
    slurm.run("scancel", "--signal=USR2", job.job_id)
    (tmp_path / "go").touch()

    def done():
        slurm.hurry()
        return job.paths.result_pickle.exists()

    eventually(done, log)
    assert int(slurm.facts(job.job_id)["Restarts"]) == 1, log()
    assert_same_weights(undisturbed, model_in(results), 0)
