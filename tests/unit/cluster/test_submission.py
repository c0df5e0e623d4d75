"""Submissions to a Slurm of a few lines of shell: what is submitted, refused, cancelled, and queued again."""

import os
from pathlib import Path

import pytest

from nnssl_adapt.cluster.graph import Graph, Resources, Step
from nnssl_adapt.cluster.requeue import after_round
from nnssl_adapt.cluster.rounds import Verdict
from nnssl_adapt.cluster.scripts import SlurmSettings, group_script
from nnssl_adapt.cluster.slurm import SlurmError
from nnssl_adapt.cluster.status import status_of
from nnssl_adapt.cluster.submission import Submission
from nnssl_adapt.errors import ConfigurationError

SBATCH = """#!/bin/bash
echo "sbatch $*" >> "$FAKE/said"
if [ -n "$REFUSED" ] && [[ "$*" == *"$REFUSED"* ]]; then
    echo "sbatch: error: invalid partition specified: $REFUSED" >&2
    exit 1
fi
number=$(( $(cat "$FAKE/count" 2>/dev/null || echo 10) + 1 )); echo $number > "$FAKE/count"; echo $number
"""
OTHERS = """#!/bin/bash
name=$(basename "$0")
echo "$name $*" >> "$FAKE/said"
cat "$FAKE/$name.out" 2>/dev/null
exit 0
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder: what is in COMMAND.out is what the command answers, ``said`` has what it was asked."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        (folder / name).write_text(SBATCH if name == "sbatch" else OTHERS)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("REFUSED", "")
    return folder


@pytest.fixture
def submission(tmp_path, slurm):
    steps = [Step("prepare", "prepare", ("verify",), (tmp_path / "prepare.txt",))]
    steps += [
        Step(f"fold_{n}", "train", ("train", "-f", str(n)), (tmp_path / f"fold_{n}.txt",), after=("prepare",))
        for n in range(3)
    ]
    steps += [Step("best", "best", ("find-best",), (tmp_path / "best.txt",), after=("train",))]
    graph = Graph("mae-991", tuple(steps), {"train": Resources(4, "a100:2", 2, 2, "48G", "1-00")}, {"train": 2})
    made = Submission(tmp_path / "model" / "submission", graph, command=("nnssl-adapt", "submit"))
    made.write_scripts(SlurmSettings("gpu", "lab", None, ("--qos=long",)))
    return made


def said(slurm, command):
    lines = (slurm / "said").read_text().splitlines() if (slurm / "said").exists() else []
    return [line for line in lines if line.startswith(command)]


def test_jobs_wait_for_each_other(submission, slurm):
    made = submission.submit()
    assert made.jobs == {"prepare": "11", "fold_0": "12_0", "fold_1": "12_1", "fold_2": "12_2", "best": "13"}
    first, second, third = said(slurm, "sbatch")
    assert "--dependency" not in first and "01_prepare.sh" in first
    assert "--dependency=afterok:11 " in second and "--kill-on-invalid-dep=yes" in second and "--array" not in second
    assert "--dependency=afterok:12 " in third
    assert Submission.load(made.folder) == made


def test_only_what_is_missing_is_submitted(submission, slurm, tmp_path):
    for name in ("prepare", "fold_1"):
        (tmp_path / f"{name}.txt").touch()
    made = submission.submit()
    assert made.jobs == {"fold_0": "11_0", "fold_2": "11_2", "best": "12"}
    assert "--array=0,2%2" in said(slurm, "sbatch")[0]


def test_a_refusal_leaves_nothing_half_submitted(submission, slurm, monkeypatch):
    monkeypatch.setenv("REFUSED", "03_best")
    with pytest.raises(SlurmError, match="sbatch refused 03_best.sh: invalid partition specified: 03_best"):
        submission.submit()
    assert said(slurm, "scancel") == ["scancel 11 12"]
    assert not Submission.exists(submission.folder)


def test_living_jobs_are_not_submitted_again(submission, slurm):
    made = submission.submit()
    (slurm / "squeue.out").write_text("12_1|RUNNING|None|node7|1:00:00\n13|PENDING|Dependency||\n")
    (slurm / "scontrol.out").write_text("JobId=12 JobState=RUNNING Restarts=3 Reason=None\n")
    with pytest.raises(ConfigurationError, match=r"fold_1 is running \(job 12_1\), best is pending"):
        made.refuse_if_alive()
    status = status_of(made)
    assert (status["fold_1"].state, status["fold_1"].node, status["fold_1"].restarts) == ("running", "node7", 3)
    assert (status["best"].state, status["best"].detail) == ("waiting", "Dependency")
    assert made.cancel() == 2 and said(slurm, "scancel") == ["scancel 12 13"]


def test_a_script_has_everything(submission, monkeypatch):
    text = submission.script("train").read_text()
    for words in (
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --gres=gpu:a100:2",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --array=0-2%2",
        "#SBATCH --time=1-00",
        "#SBATCH --qos=long",
        "#SBATCH --requeue",
        'srun --export=ALL --cpus-per-task="$SLURM_CPUS_PER_TASK" --ntasks=4 --wait=60',
        "trap : TERM HUP USR1 USR2",
        "HF_HUB_OFFLINE=1",
    ):
        assert words in text, words
    assert "1) step=fold_1; command=(train -f 1) ;;" in text
    monkeypatch.setenv("nnUNet_raw", "/data with blanks")
    text = group_script(submission.folder, submission.graph, "best", SlurmSettings(setup=Path("/set up.sh")), ())
    assert "export nnUNet_raw='/data with blanks'" in text and "source '/set up.sh' ||" in text


# -- what a job does as its last act ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ("JobState=RUNNING RunTime=00:10:00 TimeLimit=1-00:00:00", Verdict.AGAIN),
        ("JobState=COMPLETING Reason=TimeLimit RunTime=00:10:00 TimeLimit=1-00:00:00", Verdict.AGAIN),
        ("JobState=COMPLETING RunTime=01:00:01 TimeLimit=01:00:00", Verdict.AGAIN),
        ("JobState=COMPLETING RunTime=00:10:00 TimeLimit=01:00:00", Verdict.FAILED),
        ("JobState=COMPLETING RunTime=00:10:00 TimeLimit=UNLIMITED", Verdict.FAILED),
    ],
)
def test_an_interrupted_job_is_queued_again_unless_it_was_cancelled(submission, slurm, facts, verdict):
    submission.submit()
    (slurm / "scontrol.out").write_text(f"JobId=12 {facts} PreemptTime=None\n")
    assert after_round(submission.folder, "fold_0", 75, "12")[0] is verdict
    assert said(slurm, "scontrol requeue") == (["scontrol requeue 12"] if verdict is Verdict.AGAIN else [])


def test_nothing_of_a_cancelled_submission_comes_back(submission, slurm):
    made = submission.submit()
    (slurm / "scontrol.out").write_text("JobId=12 JobState=RUNNING\n")
    made.cancel()
    assert after_round(made.folder, "fold_0", 143, "12") == (Verdict.FAILED, "cancelled: not queued again")
    assert not said(slurm, "scontrol requeue")
    made.submit()
    assert after_round(made.folder, "fold_0", 143, "12")[0] is Verdict.AGAIN


def test_no_submission(tmp_path):
    with pytest.raises(ConfigurationError, match="has no submission"):
        Submission.load(tmp_path)
    (tmp_path / "jobs.json").write_text("{")
    with pytest.raises(ConfigurationError, match="is damaged"):
        Submission.load(tmp_path)
