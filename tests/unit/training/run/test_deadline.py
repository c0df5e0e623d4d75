"""Until when a run has."""

import os
import time

import pytest

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.run.deadline import Deadline, end_of_job, find_deadline, read_time_limit


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1.5", 90),
        ("19:52", 1192),
        ("0:01:30", 90),
        ("23:30:00", 84600),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-01:00:05", 176405),
        ("0-0:0:1", 1),
    ],
)
def test_all_forms_of_slurm(text, seconds):
    assert read_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["0", "-5", "90:60", "1:2:3:4", "1h", "", "0:00:00", "1:60:00", "1-", "1-2:3:4:5"])
def test_wrong_time_limits(text):
    with pytest.raises(ConfigurationError, match=r"--time-limit .*: expected minutes above 0 .*23:30:00"):
        read_time_limit(text)


@pytest.mark.parametrize(
    ("limit", "slurm", "expected"),
    [
        (None, None, None),
        ("10", None, (1600, "the time limit of 10")),
        (None, "1900", (1900, "the end of the Slurm job")),
        ("10", "1900", (1600, "the time limit of 10")),
        ("60", "1900", (1900, "the end of the Slurm job")),
        ("none", "1900", None),
        ("UNLIMITED", "1900", None),
        ("infinite", "1900", None),
        (None, "900", None),
        (None, "Unknown", None),
    ],
)
def test_the_earliest_end_counts(limit, slurm, expected):
    environment = {} if slurm is None else {"SLURM_JOB_END_TIME": slurm}
    found = find_deadline(limit, started=1000, environment=environment)
    assert found == (None if expected is None else Deadline(*expected))


def test_where_the_environment_has_no_end_slurm_is_asked():
    asked = []

    def answer(job):
        asked.append(job)
        return 1700.0

    environment = {"SLURM_JOB_ID": "77_4"}
    assert find_deadline(None, 1000, environment, answer) == Deadline(1700, "the end of the Slurm job")
    environment["SLURM_JOB_END_TIME"] = "900"  # of a job that was extended
    assert find_deadline("2", 1000, environment, answer) == Deadline(1120, "the time limit of 2")
    assert asked == ["77_4"] * 2
    environment["SLURM_JOB_END_TIME"] = "1500"
    assert find_deadline(None, 1000, environment, answer) == Deadline(1500, "the end of the Slurm job")
    assert len(asked) == 2
    assert find_deadline(None, 1000, environment | {"SLURM_JOB_END_TIME": ""}, lambda job: None) is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [("2031-02-03T04:05:06", time.mktime((2031, 2, 3, 4, 5, 6, 0, 0, -1))), ("NONE", None), ("", None)],
)
def test_what_squeue_says(tmp_path, monkeypatch, said, expected):
    program = tmp_path / "squeue"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "{said}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert end_of_job("77") == expected
    assert "--jobs 77 --format %e" in (tmp_path / "asked").read_text()


def test_without_squeue_there_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert end_of_job("77") is None
