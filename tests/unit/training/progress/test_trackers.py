"""Where figures are sent: a W&B that only remembers, and the real TensorBoard where it is installed."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from support.training_runs import fold_of, trainer_of

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training.progress import trackers
from nnssl_adapt.training.progress.history import DeviceFigures, History
from nnssl_adapt.training.progress.trackers import TRACKERS, Trackers, check_trackers


def history_of(epochs):
    history = History()
    for epoch in range(epochs):
        device = DeviceFigures(0.9, 4.0)
        history.add(-0.1 * epoch, 0.5, [0.25, math.nan], 0.01, 100.0 * epoch, 100.0 * epoch + 60, device)
    return history


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.metrics, self.finished = options, [], [], False

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, figures):
        self.logged.append(figures)

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module ``wandb`` with the runs that were made by it."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    module.runs = []

    def init(**options):
        module.runs.append(FakeRun(**options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


# -- names -------------------------------------------------------------------------------------------------------------


def test_unknown_and_missing_ones_are_told_together(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError) as caught:
        check_trackers(["neptune", "wandb", "tensorboard"])
    message = str(caught.value)
    assert "--track neptune: expected some of tensorboard, wandb, mlflow, trackio" in message
    assert "pip install 'nnssl-adapt[wandb]'" in message and "pip install 'nnssl-adapt[tensorboard]'" in message


def test_each_counts_once(fake_wandb):
    assert check_trackers(["wandb", "wandb"]) == ("wandb",) and check_trackers([]) == ()


def test_every_tracker_is_an_extra():
    text = (Path(__file__).parents[4] / "pyproject.toml").read_text()
    assert all(f'\n{name} = ["{name}>=' in text for name in TRACKERS)


def test_a_trainer_refuses_them_before_it_starts(plan, recipe, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="wandb is not installed"):
        trainer_of(plan, recipe, trackers=["wandb"])


# -- W&B ---------------------------------------------------------------------------------------------------------------


def test_figures_reach_wandb(fake_wandb, tmp_path):
    with Trackers(["wandb"], tmp_path, "a run", {"seed": 3}, 0, ["liver", "tumour"]) as sent:
        sent.log(history_of(1))
        sent.log(history_of(2))
    (run,) = fake_wandb.runs
    assert run.options["name"] == "a run" and run.options["config"] == {"seed": 3} and run.finished
    assert run.options["project"] == "nnssl-adapt" and run.options["dir"] == str(tmp_path)
    first, second = run.logged
    assert first["epoch"] == 0 and second["epoch"] == 1 and second["train_loss"] == pytest.approx(-0.1)
    assert second["pseudo_dice/liver"] == 0.25 and "pseudo_dice/tumour" not in second  # NaN: never seen
    assert second["device_busy"] == 0.9 and "peak_memory_gib" not in second
    assert ("*", "epoch") in run.metrics


def test_a_resumed_training_goes_on_with_its_run_and_a_new_one_does_not(fake_wandb, tmp_path, monkeypatch):
    for epoch in (0, 3, 0):
        with Trackers(["wandb"], tmp_path, first_epoch=epoch):
            pass
    monkeypatch.setenv("WANDB_PROJECT", "livers")
    with Trackers(["wandb"], tmp_path, first_epoch=4):
        pass
    first, resumed, anew, last = (run.options["id"] for run in fake_wandb.runs)
    assert first == resumed != anew == last and len(first) == 12
    assert {run.options["resume"] for run in fake_wandb.runs} == {"allow"}
    assert fake_wandb.runs[-1].options["project"] == "livers"


def test_a_failing_service_is_left_out_with_a_warning(fake_wandb, tmp_path, caplog):
    with Trackers(["wandb"], tmp_path) as sent:
        (run,) = fake_wandb.runs

        def fail(figures):
            run.logged.append(figures)
            raise ConnectionError("no route\nto host")

        run.log = fail
        sent.log(history_of(1))
        sent.log(history_of(2))
    assert len(run.logged) == 1
    assert caplog.text.count("wandb failed (ConnectionError: no route to host)") == 1


def test_one_that_can_not_even_start(fake_wandb, tmp_path, caplog):
    def init(**options):
        raise PermissionError("log in first")

    fake_wandb.init = init
    with Trackers(["wandb"], tmp_path) as sent:
        sent.log(history_of(1))
    assert caplog.text.count("wandb failed (PermissionError: log in first)") == 1


def test_errors_of_the_training_end_the_run_and_come_through(fake_wandb, tmp_path):
    with pytest.raises(ZeroDivisionError), Trackers(["wandb"], tmp_path):
        raise ZeroDivisionError
    assert fake_wandb.runs[0].finished


def test_a_training_sends_each_epoch(plan, recipe, fake_wandb):
    trainer = trainer_of(plan, recipe, trackers=["wandb"])
    model = trainer.run()
    (run,) = fake_wandb.runs
    assert [figures["train_loss"] for figures in run.logged] == trainer.history.train_losses
    assert run.options["config"]["epochs"] == 2 and run.finished
    lines = (fold_of(model) / "metrics.jsonl").read_text().splitlines()
    assert [figures["device_busy"] for figures in run.logged] == [json.loads(line)["device_busy"] for line in lines]


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def scalars(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_figures_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with Trackers(["tensorboard"], tmp_path, "a run", {"seed": 3}, 0, ["grey matter", "b"]) as sent:
        for epochs in (1, 2, 3):
            sent.log(history_of(epochs))
    events, found = scalars(tmp_path)
    assert found["learning_rate"] == [(0, pytest.approx(0.01)), (1, pytest.approx(0.01)), (2, pytest.approx(0.01))]
    assert [value for _, value in found["train_loss"]] == pytest.approx([0, -0.1, -0.2])
    assert found["pseudo_dice/grey matter"] == [(0, 0.25), (1, 0.25), (2, 0.25)]
    assert "pseudo_dice/b" not in found
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "seed: 3" in text and "a run" in text


def test_epochs_that_are_trained_again_replace_the_old_ones(tmp_path):
    pytest.importorskip("tensorboard")
    with Trackers(["tensorboard"], tmp_path) as sent:
        for epochs in (1, 2, 3):
            sent.log(history_of(epochs))
    again = history_of(2)
    again.train_losses[1] = 7.0
    with Trackers(["tensorboard"], tmp_path, first_epoch=1) as sent:
        sent.log(again)
    assert scalars(tmp_path)[1]["train_loss"] == [(0, 0.0), (1, 7.0)]


# -- MLflow and Trackio ------------------------------------------------------------------------------------------------


def test_figures_reach_mlflow_and_a_resumed_training_continues_its_run(tmp_path, monkeypatch):
    """The real MLflow, with a database of its own in the run's folder."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    with Trackers(["mlflow"], tmp_path, "a run", {"seed": 3, "long": "x" * 9000}, 0, ["grey (matter)", "b"]) as sent:
        for epochs in (1, 2):
            sent.log(history_of(epochs))
    with Trackers(["mlflow"], tmp_path, "a run", {"seed": 3}, 2, ["grey (matter)", "b"]) as sent:
        sent.log(history_of(3))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("nnssl-adapt").experiment_id])
    assert run.info.run_name == "a run" and run.info.status == "FINISHED" and run.data.params["seed"] == "3"
    losses = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(one.step, one.value) for one in losses] == [(0, 0.0), (1, -0.1), (2, -0.2)]
    assert run.data.metrics["pseudo_dice/grey _matter_"] == 0.25 and "pseudo_dice/b" not in run.data.metrics


class FakeMlflowClient:
    """What is used of MLflow's client (2.9 to 3.18); it remembers the calls."""

    calls: list[tuple] = []

    def __init__(self, tracking_uri):
        self.calls.append(("client", tracking_uri))

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, *arguments, *options.values()))
            if name == "create_run":
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
            return None if name == "get_experiment_by_name" else "7"

        return call


def fake_module(monkeypatch, name, **content):
    module = types.ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_a_server_of_mlflow_by_its_own_variables(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeMlflowClient, "calls", [])
    fake_module(monkeypatch, "mlflow", MlflowClient=FakeMlflowClient)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://somewhere")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "livers")
    with Trackers(["mlflow"], tmp_path, "a run", {"seed": 3}) as sent:
        sent.log(history_of(1))
    with Trackers(["mlflow"], tmp_path, "a run", {"seed": 3}, 1):
        pass
    calls = FakeMlflowClient.calls
    assert calls[:4] == [
        ("client", "https://somewhere"),
        ("get_experiment_by_name", "livers"),
        ("create_experiment", "livers"),
        ("create_run", "7", "a run"),
    ]
    assert ("log_param", "r1", "seed", "3") in calls and ("log_metric", "r1", "learning_rate", 0.01, 0) in calls
    assert calls[-2:] == [("update_run", "r1", "RUNNING"), ("set_terminated", "r1")]


def test_figures_reach_trackio(tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.logged, self.finished = options, [], False
            runs.append(self)

        def log(self, metrics, step=None):
            self.logged.append((step, metrics))

        def finish(self):
            self.finished = True

    fake_module(monkeypatch, "trackio", init=Run)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    with Trackers(["trackio"], tmp_path, "a run", {"seed": 3}, 0, ["liver", "tumour"]) as sent:
        sent.log(history_of(1))
    for epoch in (1, 0):
        with Trackers(["trackio"], tmp_path, "a run", {}, epoch):
            pass
    first, resumed, anew = runs
    assert first.options["project"] == "nnssl-adapt" and first.options["config"] == {"seed": 3} and first.finished
    assert first.logged[0][0] == 0 and first.logged[0][1]["pseudo_dice/liver"] == 0.25
    assert first.options["name"] == resumed.options["name"] != anew.options["name"]


def test_the_real_trackio_keeps_them(tmp_path):
    """In a process of its own: it reads where to write when it is imported."""
    pytest.importorskip("trackio")
    script = """
import sys
from test_trackers import history_of, Trackers
with Trackers(["trackio"], sys.argv[1], "a run", {"seed": 3}) as sent:
    sent.log(history_of(1))
    sent.log(history_of(2))
import trackio
(run,) = trackio.Api().runs("nnssl-adapt")
assert run.name.startswith("a run "), run.name
"""
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parent), str(here.parents[4]), str(here.parents[3])])
    variables = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert any(tmp_path.glob("trackio/*.db")) and "failed" not in done.stderr
