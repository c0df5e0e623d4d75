"""A study from the command line: stopped in the middle, gone on with, and its answer."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nnssl_adapt.cli.main import main
from nnssl_adapt.studies.study import Study

CHECKPOINT = Path(__file__).parents[1] / "data" / "nnssl_checkpoints" / "small_resenc"
TINY = {
    "epochs": 2,
    "iterations_per_epoch": 1,
    "validation_iterations": 1,
    "warmup_epochs": 0,
    "patch_size": "16,16,16",
}


@pytest.fixture
def study_file(tiny_dataset, tmp_path):
    tiny_dataset(name="Dataset990_Study", cases=5, shape=(18, 20, 22))
    path = tmp_path / "tiny.yaml"
    content = {
        "dataset": 990,
        "device": "cpu",
        "fractions": [0.5],
        "metrics": ["Dice", "LesionF1"],
        "reference": "scratch",
        "recipe": "tiny_cpu",
        "set": TINY,
        "arms": {"pretrained": {"weights": str(CHECKPOINT)}, "scratch": {"weights": "scratch"}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_stopped_and_gone_on_with_and_answered(study_file, capsys):
    words = [sys.executable, "-m", "nnssl_adapt.cli.main", "study", str(study_file)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ))
    study = Study.load(study_file)
    first = study.runs[0]
    while process.poll() is None and not first.fold_folder.is_dir():  # the first training has begun
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75 and not all(run.is_done for run in study.runs)

    assert main(["study", str(study_file), "--status"]) == 0
    assert f"of {len(study.runs)} runs finished" in capsys.readouterr().out
    assert main(["study", str(study_file)]) == 0
    shown = capsys.readouterr().out
    assert "Dice, compared with scratch" in shown and "LesionF1" in shown
    assert all(run.is_done for run in study.runs)
    sizes = [len(json.loads((run.fold_folder / "debug.json").read_text())["training_cases"]) for run in study.runs]
    assert sizes == [2, 2]
    with open(study.folder / "study.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["arm"], row["runs_done"]) for row in rows[:2]] == [("pretrained", "1"), ("scratch", "1")]
    assert rows[0]["difference"] and not rows[1]["difference"]
    page = (study.folder / "study.html").read_text()
    assert "nnssl-adapt train" in page and "Wilcoxon" in page and str(CHECKPOINT) in page

    # Another study of the same dataset uses runs with the same settings, and makes none again.
    content = yaml.safe_load(study_file.read_text())
    other = study_file.with_name("other.yaml")
    other.write_text(yaml.safe_dump({**content, "name": "other", "reference": "pretrained"}))
    before = {run.results: run.results.stat().st_mtime_ns for run in study.runs}
    assert main(["study", str(other), "--table"]) == 0
    again = Study.load(other)
    assert all(run.is_done for run in again.runs) and {run.results for run in again.runs} <= before.keys()
