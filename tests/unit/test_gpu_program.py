"""benchmarks/gpu.py: what it may publish, what it makes of its figures, and that all of its stages run."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = BENCHMARKS / "gpu.py"


@pytest.fixture(scope="module")
def program():
    """Its modules by name."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(BENCHMARKS))
        names = {
            "gpu": "gpu",
            **{
                name: f"gpu_program.{name}"
                for name in ("results", "setting", "step_time", "correctness", "networks", "machine")
            },
        }
        yield SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})


def row(name="5 classes", on_gpu=True, stage=2, value=81.25, **more):
    unit = "ms a step"
    return {"stage": stage, "name": name, "value": value, "unit": unit, "device": "Card X", "on_gpu": on_gpu, **more}


RUN = row("run", stage=0, value="", date="2026-11-28", commit="abc123def", command="python benchmarks/gpu.py -o FOLDER")


def write(folder, *rows):
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


# -- what may be published -----------------------------------------------------------------------------------------------


@pytest.fixture
def document(tmp_path, program):
    path = tmp_path / "docs" / "benchmarks.md"
    path.parent.mkdir()
    path.write_text(f"before\n{program.results.BEGIN}\nold\n{program.results.END}\nafter\n")
    return path


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([RUN], "no figures"),
        ([RUN, row(), row("step b", on_gpu=False)], "not measured on a GPU: step b"),
        ([RUN, row(), {**row("older"), "device": "Card Y"}], "different cards"),
        ([{**RUN, "commit": ""}, row()], "commit"),
        ([row()], "commit"),
        ([RUN, {**RUN, "stage": 2, "commit": "another"}, row()], "different commits"),
    ],
)
def test_what_is_not_published(rows, reason, program, tmp_path, document):
    write(tmp_path, *rows)
    text = document.read_text()
    assert reason in program.results.publish(tmp_path, document)
    assert document.read_text() == text


def test_what_a_gpu_measured_is_published(program, tmp_path, document):
    write(tmp_path, RUN, row(peak_gib=21.5, goal="at most 100", met=True), row("b", value="failed", error="no memory"))
    (tmp_path / "steps.png").write_bytes(b"picture")
    assert program.results.publish(tmp_path, document) is None
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (
        "| 5 classes | 81.25 | ms a step | 21.5 | at most 100: met |" in text and "| b | failed | no memory |" in text
    )
    assert "2026-11-28, commit `abc123def`, Card X: `python benchmarks/gpu.py -o FOLDER`" in text
    assert "images/gpu_steps.png" in text and (document.parent / "images" / "gpu_steps.png").is_file()
    write(tmp_path, RUN, row("again"))
    assert program.results.publish(tmp_path, document) is None and "5 classes" not in document.read_text()


def test_the_document_has_a_place_for_the_tables(program):
    text = program.gpu.DOCUMENT.read_text(encoding="utf-8")
    assert text.index(program.results.BEGIN) < text.index(program.results.END)


# -- figures -----------------------------------------------------------------------------------------------------------------


def test_of_figures_that_were_measured_again_the_last_counts_and_a_torn_line_is_left_out(program, tmp_path):
    write(tmp_path, row(value=1.0), row("b"), row(value=2.0))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"stage": 2, "na')
    found = program.results.read_rows(tmp_path)
    assert [(each["name"], each["value"]) for each in found] == [("b", 81.25), ("5 classes", 2.0)]


def test_goals_are_judged_and_failures_are_told(program, tmp_path, capsys):
    setting = program.setting.Setting(tmp_path, 2, rehearse=True)
    setting.judge("fast enough", 1.6, "times", at_least=1.5)
    setting.judge("too large", 1.3, "of the logits", at_most=1.2)
    setting.write("wrong labels", 0.99, passed=False)
    with setting.surviving("breaks down"):
        raise RuntimeError("CUDA error:\n  an illegal instruction")
    rows = program.results.read_rows(tmp_path)
    assert [each.get("met") for each in rows] == [True, False, None, None]
    assert rows[-1]["value"] == "failed" and rows[-1]["error"] == "RuntimeError: CUDA error: an illegal instruction"
    assert program.results.failures(rows) == ["wrong labels", "breaks down"]
    assert program.results.missed(rows) == []  # a rehearsal measures nothing
    (missed,) = program.results.missed([{**each, "on_gpu": True} for each in rows])
    assert missed.startswith("too large 1.3") and program.gpu.summarise(tmp_path) == 2


def test_waits_are_listed_by_where_they_are(program, tmp_path):
    setting = program.setting.Setting(tmp_path, 2, rehearse=True)
    with program.step_time.listed_waits(setting) as places:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert len(places) == 1 and places[0].startswith(f"{Path(__file__).name}:")


class Counted:
    """An event that counts the milliseconds between itself and others, one each."""

    number = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Counted.number += 1
        self.number = Counted.number

    def elapsed_time(self, other):
        return float(other.number - self.number)


@pytest.fixture
def pretended_card(program, tmp_path, monkeypatch):
    """A setting whose tensors are on the CPU and that asks torch.cuda for names, events and memory."""

    class Pretended(program.setting.Setting):
        on_gpu = True

    card = {
        "get_device_name": lambda: "Card X",
        "device_count": lambda: 1,
        "mem_get_info": lambda: (60 * 2**30, 80 * 2**30),
        "get_device_properties": lambda index: SimpleNamespace(major=9, minor=0, multi_processor_count=132),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 1000 + 2 * 2 * 30 * 16 * 16 * 24,  # a gradient as large as the logits
        "max_memory_reserved": lambda: 3 * 2**30,
        "set_sync_debug_mode": lambda mode: None,
        "Event": Counted,
    }
    for name, function in card.items():
        monkeypatch.setattr(f"torch.cuda.{name}", function)
    return Pretended(tmp_path, 2, rehearse=True)


def test_times_and_memory_of_a_card(program, pretended_card):
    setting, found = pretended_card, lambda name: {each["name"]: each for each in rows()}[name]

    def rows():
        return program.results.read_rows(setting.folder)

    assert setting.seconds(lambda: None) == [0.001]
    with setting.compiler():
        program.step_time.loss_alone(setting, 30)
        architecture = program.networks.architecture_of(setting, "ResEncL")
        program.step_time.steps(setting, "ResEnc-L", architecture, 5, "NCDHW", "off", only="as trained")
        program.step_time.waits_of_step(setting, architecture)
    memory = found("loss as trained, 30 classes, memory")
    assert (
        memory["value"] == pytest.approx(1) and memory["met"] and memory["goal"] == "at most 1.2" and memory["on_gpu"]
    )
    step = found(program.step_time.step_name("ResEnc-L", 5, "NCDHW", "off", "as trained"))
    assert step["value"] == pytest.approx(1) and step["peak_gib"] == 4  # with what the driver takes
    assert step["estimate_error"] == pytest.approx(step["estimate_gib"] / 4 - 1)
    program.machine.run(setting)
    assert found("of it free")["value"] == 60 and found("compute capability")["value"] == "9.0"
    assert set(program.results.failures(rows())) <= {"bandwidths"}  # memory can't be pinned here


def test_the_layout_of_stage_3_is_the_fastest_of_stage_2(program):
    name, fastest = program.step_time.step_name, program.step_time.fastest_layout
    times = {"NCDHW": 90.0, "NDHWC": 80.0, "NDHWC with fused norms": 70.0}
    rows = [row(name("ResEnc-L", 5, layout, "on", "as trained"), value=value) for layout, value in times.items()]
    assert fastest(rows) == "NDHWC with fused norms" and fastest([]) is None
    assert fastest([*rows[:2], {**rows[2], "value": "failed"}]) == "NDHWC"


def test_a_stage_that_takes_too_long_is_ended_and_the_others_go_on(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(program.gpu.SECONDS, 0, 0.2)
    assert program.gpu.run_stage(tmp_path, 0, ["--rehearse"]) is False
    assert "took more than" in capsys.readouterr().out


def test_tests_that_fail_are_rows(program, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.cuda.test_steps" name="test_a" time="1.5"/>'
        '<testcase classname="tests.cuda.test_steps" name="test_b" time="1"><failure message="off by 3"/></testcase>'
        '<testcase classname="tests.cuda.test_runs" name="test_c" time="0"><skipped message="no peft"/></testcase>'
        "</testsuite></testsuites>"
    )
    program.correctness.tell_tests(program.setting.Setting(tmp_path, 1, rehearse=True), report)
    rows = {each["name"]: each for each in program.results.read_rows(tmp_path)}
    assert rows["test_steps::test_b"]["error"] == "off by 3" and rows["test_runs::test_c"]["value"] == "skipped"
    assert rows["pytest -m cuda"]["value"] == "1 passed, 1 failed, 1 skipped" and not rows["pytest -m cuda"]["passed"]


# -- the rehearsal ---------------------------------------------------------------------------------------------------------------

_IMAGES = ("SimpleITK", "nibabel", "nnunetv2", "batchgenerators", "batchgeneratorsv2")
MISSING = {
    0: (*_IMAGES, "blosc2", "isal", "pydantic", "dynamic_network_architectures"),
    1: _IMAGES,
    2: (*_IMAGES, "blosc2"),
    3: (),
    4: (),
}
"""What a bare machine lacks and a stage does without; the program's text says what has to be carried there."""

FIGURES = {
    0: ("memory", "bf16 products", "/dev/shm free"),
    1: ("pytest -m cuda", "labels of a large case, resampled", "test_runs::test_workers_and_pinned_memory[gpu]"),
    2: (
        "loss as trained, 30 classes",
        "waits of a step",
        "ResEnc-L, 5 classes, NDHWC with fused norms, compiled, loss reference compiled",
        "Primus-M, 5 classes, NCDHW, compiled, loss as trained",
        "ResEnc-L, 5 classes, NDHWC, max-autotune, loss as trained",
    ),
    3: ("ours, 2 cores", "ours, augmented on the GPU, 2 cores"),
    4: ("tiles, mirrored", "labels made on the device, resampled", "logits to the CPU, same grid"),
}
PICTURES = {2: {"steps.png", "loss.png"}, 3: {"beside_nnunetv2.png"}, 4: {"prediction.png"}}


@pytest.mark.parametrize("stage", FIGURES)
def test_a_stage_is_rehearsed_on_the_cpu(stage, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {MISSING[stage]}: sys.modules[name] = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    folder = tmp_path / "figures"
    command = [sys.executable, str(PROGRAM), "-o", str(folder)]
    done = subprocess.run(
        [*command, "--rehearse", "--stage", str(stage)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {each["stage"] for each in rows} == {stage} and not any(each["on_gpu"] for each in rows)
    names = {each["name"] for each in rows}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    wanted = {name.replace("2 cores", f"{min(2, cores)} cores") for name in FIGURES[stage]}
    assert wanted <= names, names
    assert f"| {next(iter(wanted))} |" in (folder / "tables.md").read_text()
    assert {path.name for path in folder.glob("*.png")} == PICTURES.get(stage, set())
    if stage == 0:
        refused = subprocess.run([*command, "--publish"], capture_output=True, text=True)
        assert refused.returncode == 1 and "not measured on a GPU" in refused.stdout


# -- what is measured is what users run ----------------------------------------------------------------------------------


def test_exports_are_measured_on_float32_sums(program, monkeypatch, tmp_path):
    """As tiles leave them: float16 logits are faster, and nobody has them."""
    seen = []
    prediction = importlib.import_module("gpu_program.prediction")
    on_device = importlib.import_module("nnssl_adapt.geometry.logits_on_device")
    original = on_device.labels_on_device
    monkeypatch.setattr(
        on_device, "labels_on_device", lambda logits, *rest: seen.append(logits.dtype) or original(logits, *rest)
    )
    setting = SimpleNamespace(
        device=torch.device("cpu"),
        median=lambda run, *_: run() is None,
        once=lambda run: (0.0, run()),
        judge=lambda *_, **__: None,
        write=lambda *_, **__: None,
    )
    prediction.labels(setting, "resampled", (6, 8, 7), (8, 10, 9))
    assert set(seen) == {torch.float32}

    seen.clear()
    predict = importlib.import_module("predict")
    np.save(tmp_path / "small.npy", np.zeros((2, 3, 4, 5), np.float16))
    monkeypatch.setattr(
        predict, "our_export", lambda _, logits: lambda: seen.append(logits.dtype) or np.zeros((3, 4, 5), np.uint8)
    )
    monkeypatch.setattr(predict.Path, "write_text", lambda *_: None)  # of the kernel's high-water mark
    predict.measure_export("ours", tmp_path, "small", 1)
    assert seen[-1] == torch.float32
