"""Submissions to a Slurm of a few lines of shell: what is submitted, refused, cancelled, and queued again."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import nnssl_adapt
from nnssl_adapt.cluster import slurm as slurm_commands
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
    with pytest.raises(SlurmError, match="03_best.sh.*invalid partition specified"):
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


# -- what Slurm says of jobs that are over ----------------------------------------------------------------------------------


@pytest.fixture
def forgotten(slurm):
    """A Slurm that remembers no job that is over."""
    (slurm / "scontrol").write_text("#!/bin/bash\necho 'slurm_load_jobs error: Invalid job id' >&2\nexit 1\n")
    return slurm


@pytest.mark.parametrize(
    ("answer", "state", "detail"),
    [
        ("CANCELLED by 1000\n", "cancelled", ""),
        ("OUT_OF_MEMORY\n", "failed", "out of memory"),
        ("", "failed", "without a result"),
    ],
)
def test_accounting_is_asked_where_there_is_one(submission, forgotten, answer, state, detail):
    (forgotten / "sacct").write_text(OTHERS)
    (forgotten / "sacct").chmod(0o755)
    (forgotten / "sacct.out").write_text(answer)
    status = status_of(submission.submit())["prepare"]
    assert status.state == state and detail in status.detail
    assert "--jobs 11" in said(forgotten, "sacct")[0]


def test_without_accounting_a_job_that_left_no_result_has_failed(submission, forgotten, monkeypatch):
    monkeypatch.setenv("PATH", f"{forgotten}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_commands.shutil, "which", lambda name: None)
    status = status_of(submission.submit())["prepare"]
    assert (status.state, status.detail) == ("failed", "its job ended without a result")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("Invalid account or account/partition combination specified", "sacctmgr show associations user=$USER"),
        ("invalid partition specified: gpux", "sinfo --summarize"),
        ("Invalid generic resource (gres) specification", "sinfo --format='%P %G'"),
        ("something else", None),
    ],
)
def test_a_refusal_names_the_command_that_lists_what_is_known(submission, slurm, words, command):
    (slurm / "sbatch").write_text(f"#!/bin/bash\necho 'sbatch: error: {words}' >&2\nexit 1\n")
    with pytest.raises(SlurmError, match=re.escape(words)) as error:
        submission.submit()
    assert error.value.next_command == command
    assert (command or "sbatch refused") in str(error.value)


# -- on a terminal ----------------------------------------------------------------------------------------------------------


class Terminal:
    """A command on a terminal of its own, and what it shows there."""

    def __init__(self, *words, **environment):
        self.reader, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCHING, *words],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "PYTHONPATH": str(Path(nnssl_adapt.__file__).parents[1]), **environment},
            start_new_session=True,
        )
        os.close(terminal)
        self.shown = ""

    def wait_for(self, words, times=1):
        while self.shown.count(words) < times:
            self.read()

    def read(self):
        assert select.select([self.reader], [], [], 60)[0], self.shown
        self.shown += os.read(self.reader, 65536).decode()

    def end(self):
        with suppress(OSError):  # so a terminal ends
            while True:
                self.read()
        os.close(self.reader)
        return self.process.wait(60)


WATCHING = """
import sys
from nnssl_adapt.cli import main, submit
submit._RENEWED_EVERY = 0.1
sys.exit(main.main(sys.argv[1:]))
"""
CLEARED = "\x1b[2J\x1b[H"


@pytest.fixture
def watched(submission, slurm, tmp_path, monkeypatch):
    """The words of ``--watch`` for a submission whose first job runs."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    (tmp_path / "raw" / "Dataset991_Tiny").mkdir(parents=True)
    (tmp_path / "results" / "Dataset991_Tiny" / "model").mkdir(parents=True)
    moved = replace(submission, folder=tmp_path / "results" / "Dataset991_Tiny" / "model" / "submission")
    moved.write_scripts(SlurmSettings())
    moved.submit()
    (slurm / "squeue.out").write_text("11|RUNNING|None|node7|1:00:00\n12_0|PENDING|Dependency||1:00\n")
    return ["submit", "-d", "991", "-n", "mae", "--watch"]


def test_watching_renews_the_table_until_all_is_over(watched, slurm, tmp_path):
    terminal = Terminal(*watched)
    terminal.wait_for(CLEARED, 3)
    assert "node7" in terminal.shown and "0 of 5 steps are done" in terminal.shown
    good = (slurm / "squeue").read_text()
    (slurm / "squeue").write_text("#!/bin/bash\necho 'slurm_load_jobs error: Unable to contact' >&2\nexit 1\n")
    terminal.wait_for("asked again")
    for name in ("prepare", "fold_0", "fold_1", "fold_2", "best"):
        (tmp_path / f"{name}.txt").touch()
    (slurm / "squeue.out").write_text("")
    (slurm / "squeue").write_text(good)
    assert terminal.end() == 0
    assert "5 of 5 steps are done" in terminal.shown.split(CLEARED)[-1]


def test_ctrl_c_ends_the_watching_and_nothing_else(watched, slurm):
    terminal = Terminal(*watched)
    terminal.wait_for("node7")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "the jobs go on" in terminal.shown and "Traceback" not in terminal.shown
    assert not said(slurm, "scancel")
