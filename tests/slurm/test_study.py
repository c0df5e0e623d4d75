"""``nnssl-adapt study --cluster slurm``: the same answer as on one machine."""

import csv
import subprocess
import sys

import pytest
import yaml
from support.slurm import eventually
from support.slurm_folders import SOURCE

from nnssl_adapt.studies.study import Study

pytestmark = pytest.mark.slurm


def test_slurm_and_this_machine_give_the_same_table(folders, slurm, tmp_path, monkeypatch):
    path = tmp_path / "tiny.yaml"
    content = {
        "dataset": 991,
        "device": "cpu",
        "fractions": [0.5],
        "reference": "scratch",
        "recipe": "tiny_cpu",
        "set": {"epochs": 2, "iterations_per_epoch": 1, "validation_iterations": 1, "warmup_epochs": 0},
        "arms": {"pretrained": {"weights": str(SOURCE)}, "scratch": {"weights": "scratch"}},
    }
    content["set"]["patch_size"] = "16,16,16"
    path.write_text(yaml.safe_dump(content))
    said = study(path, "--cluster", "slurm", "--partition", "low", "--cpus", "1")
    assert "4 steps" in said
    by_slurm = Study.load(path)
    page = by_slurm.folder / "study.html"

    def done():
        slurm.hurry()
        return page.exists() and not slurm.run("squeue", "-h")

    eventually(done, "for the study", 600)
    assert "2 of 2 runs finished" in study(path, "--status")
    answer = rows(by_slurm)

    monkeypatch.setenv("nnUNet_results", str(tmp_path / "here"))
    study(path)
    assert rows(Study.load(path)) == answer


def study(path, *words):
    command = [sys.executable, "-m", "nnssl_adapt.cli.main", "study", str(path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(of):
    with open(of.folder / "study.csv", newline="") as stream:
        return [{name: value for name, value in row.items() if name != "gpu_hours"} for row in csv.DictReader(stream)]
