"""``nnssl-adapt submit`` on a real Slurm: from a raw dataset to a cross-validated model, whatever happens on the way."""

import json

import pytest
from support.slurm import eventually
from support.slurm_folders import RECIPE, SOURCE, assert_same_weights, model_in, said_in, submit

from nnssl_adapt.cluster.submission import Submission

pytestmark = pytest.mark.slurm

FLAGS = ["-pc", str(SOURCE), "-n", "mae", "--cpus", "1", *RECIPE]


def jobs_of(results, *steps):
    jobs = Submission.load(model_in(results) / "submission").jobs
    return [jobs[step] for step in steps]


def until_done(slurm, results):
    """Wait for all steps, making those start at once that were queued again."""

    def done():
        slurm.hurry()
        return all(step.is_done for step in Submission.load(model_in(results) / "submission").graph.steps)

    try:
        eventually(done, "for all steps", 600)
        eventually(lambda: not slurm.run("squeue", "-h"), "for the jobs to end")
        return submit("--status")
    except AssertionError as error:
        raise AssertionError(f"{submit('--status')}\n{said_in(results)}") from error


def test_the_whole_graph_interrupted_twice(folders, slurm, undisturbed):
    """In jobs that get nothing of the environment but what the scripts and ``--setup`` say."""
    results, setup = folders / "nnUNet_results", folders / "setup.sh"
    setup.write_text("export OMP_NUM_THREADS=1\n")
    bare = ["--setup", str(setup), "--sbatch=--export=NONE"]
    said = submit(*FLAGS, "--folds", "0-2", "--shards", "2", "--partition", "low", *bare)
    assert "8 steps submitted" in said and "job" in said
    shard, fold = jobs_of(results, "preprocess_1", "fold_1")
    slurm.wait_for(shard, "RUNNING", "COMPLETED")  # a shard of three tiny cases may be faster than a look
    slurm.run("scontrol", "requeue", shard)
    assert "submitted already" in submit(*FLAGS, "--folds", "0-2", "--shards", "2", code=1)
    slurm.wait_for(fold, "RUNNING")
    eventually(lambda: (model_in(results) / "fold_1" / "metrics.jsonl").exists(), "for an epoch")
    slurm.run("scancel", "--signal=TERM", fold)  # as a preemption's grace time begins: to its steps only
    table = until_done(slurm, results)

    assert_same_weights(undisturbed, model_in(results), 0, 1, 2)
    logs = {path.stem: path.read_text() for path in (model_in(results) / "submission" / "logs").glob("*.txt")}
    assert len(logs) == 8 and not any("\r" in text for text in logs.values())  # no frames of progress bars
    assert [name for name, text in logs.items() if "erifying" in text] == ["prepare"]  # once for all shards
    best, local = (
        json.loads((model.parent / "inference_information.json").read_text())
        for model in (model_in(results), undisturbed)
    )
    assert best["all_results"] == local["all_results"] and best["folds"] == [0, 1, 2]
    assert (model_in(results) / "report.html").exists()
    assert [line.split()[1] for line in table.splitlines()[1:9]] == ["done"] * 8
    assert "0 steps submitted, 8 are done already" in submit(*FLAGS, "--folds", "0-2", "--shards", "2")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--partition", "nowhere"], "invalid partition specified: nowhere"),
        (["--sbatch=--gres=unknown:1"], "Invalid generic resource"),
    ],
)
def test_what_slurm_refuses_leaves_nothing(prepared, slurm, flags, said):
    text = submit(*FLAGS, "--folds", "0", *flags, code=1)
    assert "sbatch refused 03_train.sh" in text and said in text
    assert not slurm.run("squeue", "-h")
