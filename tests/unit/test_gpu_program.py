"""benchmarks/gpu.py: what it may publish, and that it runs. CI rehearses all of its stages."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("gpu_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_program"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_program"]


def row(on_gpu, name="5 classes", stage=2):
    return {"stage": stage, "name": name, "value": 81.25, "unit": "ms a step", "device": "Card X", "on_gpu": on_gpu}


def test_only_what_a_gpu_measured_is_published(program, tmp_path):
    document = tmp_path / "benchmarks.md"
    text = f"before\n{program.BEGIN}\nold\n{program.END}\nafter\n"
    document.write_text(text)
    assert "not measured on a GPU: step b" in program.publish([row(True), row(False, "step b")], document)
    assert "no figures" in program.publish([], document)
    assert document.read_text() == text
    assert program.publish([row(True)], document) is None
    published = document.read_text()
    assert published.startswith("before\n") and published.endswith("after\n") and "old" not in published
    assert "| 5 classes | 81.25 | ms a step |" in published and "Card X" in published
    assert program.publish([row(True, "again")], document) is None and "5 classes" not in document.read_text()


def test_the_document_has_a_place_for_the_tables(program):
    text = program.DOCUMENT.read_text(encoding="utf-8")
    assert text.index(program.BEGIN) < text.index(program.END)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_stage_is_rehearsed_on_the_cpu(stage, tmp_path):
    command = [sys.executable, str(PROGRAM), "-o", str(tmp_path), "--rehearse", "--stage", str(stage)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) >= 3 and {row["stage"] for row in rows} == {stage} and not any(row["on_gpu"] for row in rows)
    refused = subprocess.run(
        [sys.executable, str(PROGRAM), "-o", str(tmp_path), "--publish"], capture_output=True, text=True
    )
    assert refused.returncode == 1 and "not measured on a GPU" in refused.stdout
