"""A run that was stopped or killed, and gone on with, equals one that was not, bit for bit."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import training_runs
from support.tiny_plans import CNN, PATCH, TRANSFORMER, changed, plan_content
from support.training_runs import Killed, assert_same_training, at, fold_of, interrupt, trainer_of

from nnssl_adapt.errors import ConfigurationError, NothingToResume, TrainingStopped, UnreadableCheckpoint
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.training import validation
from nnssl_adapt.training.loop import TrainingLoop
from nnssl_adapt.training.run.checkpointing import load_checkpoint
from nnssl_adapt.weights.network.architectures import Architecture


@pytest.mark.parametrize(
    ("architecture", "where"),
    [
        (CNN, {"step": 1}),
        (CNN, {"step": 7}),
        (TRANSFORMER, {"step": 5}),  # its layers are dropped at random
        (TRANSFORMER, {"judgement": 1}),
    ],
    ids=["first step", "an epoch's first step", "middle of an epoch", "validation batch"],
)
def test_stopped_and_resumed_equals_uninterrupted(make_plan, recipe, tmp_path, architecture, where):
    plan = make_plan(architecture)
    recipe = recipe.override(epochs=3, optimizer="adamw" if architecture is TRANSFORMER else "sgd")
    whole = trainer_of(plan, recipe, results_folder=tmp_path / "whole").run()
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, **where)
        with pytest.raises(TrainingStopped, match=r"SIGTERM in epoch \d after \d of 3.*--c"):
            trainer_of(plan, recipe, results_folder=tmp_path / "parts").run()
    model = trainer_of(plan, recipe, results_folder=tmp_path / "parts").run(resume=True)
    assert_same_training(whole, model)
    assert not (fold_of(model) / "checkpoint_latest.pth").exists()


KILLED_AT = [
    "middle of an epoch",
    "validation batch",
    "writing a checkpoint",
    "end of an epoch",
    "before the last checkpoint",
    "validation",
]


@pytest.fixture(scope="module")
def hard(recipe):
    """Everything that has a state of its own: averaged weights, steps of several batches, a checkpoint after each step."""
    return recipe.override(epochs=3, ema_decay=0.9, accumulate=2, checkpoint_minutes=1e-9, checkpoint_every=1)


@pytest.fixture(scope="module")
def killed(prepared, hard, tmp_path_factory):
    """A plan, its model of an uninterrupted run, and the folders where others were killed at all places."""
    root = tmp_path_factory.mktemp("killed")
    shutil.copytree(prepared(1), root, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as environment:
        for part in ("raw", "preprocessed", "results"):
            environment.setenv(f"nnUNet_{part}", str(root / f"nnUNet_{part}"))
        environment.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        environment.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        plan = FinetunePlan.load(FinetunePlan(plan_content(CNN)).save())
        script = Path(training_runs.__file__).with_name("killed_training.py")
        words = [plan.plans_name, json.dumps(hard.to_dict()), str(root / "parts"), *KILLED_AT]
        done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        whole = trainer_of(plan, hard, results_folder=root / "whole").run()
        yield SimpleNamespace(plan=plan, whole=whole, parts=root / "parts")


@pytest.mark.parametrize("place", KILLED_AT)
def test_killed_and_resumed_equals_uninterrupted(killed, hard, place):
    (fold,) = (killed.parts / place).glob("*/*/fold_0")
    left = "checkpoint_final.pth" if place == "validation" else "checkpoint_latest.pth"
    assert (fold / left).is_file()
    assert place != "writing a checkpoint" or list(fold.glob(".unfinished-*-checkpoint_*"))

    model = trainer_of(killed.plan, hard, results_folder=killed.parts / place).run(resume=True)
    assert_same_training(killed.whole, model)
    assert not list(fold.glob(".unfinished*")) and not (fold / "checkpoint_latest.pth").exists()


def test_killed_and_resumed_with_a_worker(killed, hard, tmp_path):
    def die():
        raise Killed

    with pytest.MonkeyPatch.context() as patched:
        at(patched, die, step=8)
        with pytest.raises(Killed):
            trainer_of(killed.plan, hard, workers=1, results_folder=tmp_path / "parts").run()
    model = trainer_of(killed.plan, hard, workers=1, results_folder=tmp_path / "parts").run(resume=True)
    assert_same_training(killed.whole, model)


def test_killed_between_the_last_checkpoint_and_tidying_up(plan, recipe, monkeypatch):
    recipe = recipe.override(checkpoint_every=1)
    model = trainer_of(plan, recipe).run()
    final = fold_of(model) / "checkpoint_final.pth"
    (fold_of(model) / "checkpoint_latest.pth").write_bytes(b"of the epoch before")
    monkeypatch.setattr(TrainingLoop, "run", None)
    before = final.read_bytes()
    trainer_of(plan, recipe).run(resume=True)
    assert final.read_bytes() == before


def test_auto_starts_or_goes_on_or_stays_finished(plan, recipe, tmp_path, package_log):
    whole = trainer_of(plan, recipe, results_folder=tmp_path / "whole").run()
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, step=4)
        with pytest.raises(TrainingStopped):
            trainer_of(plan, recipe).run(resume="auto")
    package_log.clear()
    model = trainer_of(plan, recipe).run(resume="auto")
    assert "going on from" in package_log.text
    assert_same_training(whole, model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingLoop, "run", None)
        trainer_of(plan, recipe).run(resume="auto")


def test_nothing_to_resume(plan, recipe):
    with pytest.raises(NothingToResume, match=r"checkpoint_latest\.pth.*--c"):
        trainer_of(plan, recipe).run(resume=True)


def test_a_finished_run_is_only_validated(plan, recipe, monkeypatch):
    model = trainer_of(plan, recipe).run()
    before = (fold_of(model) / "checkpoint_final.pth").stat().st_mtime_ns
    monkeypatch.setattr(TrainingLoop, "run", None)
    trainer_of(plan, recipe).run(resume=True)
    assert (fold_of(model) / "checkpoint_final.pth").stat().st_mtime_ns == before


@pytest.fixture
def stopped(plan, recipe):
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, step=4)
        with pytest.raises(TrainingStopped):
            trainer_of(plan, recipe).run()


def test_nothing_to_validate(plan, recipe):
    trainer = trainer_of(plan, recipe)
    with pytest.raises(NothingToResume, match=r"checkpoint_final\.pth.*train"):
        trainer.run(validate_only=True)
    assert not trainer.folder.model.exists()


def test_validating_what_is_not_finished(plan, recipe, stopped):
    with pytest.raises(NothingToResume, match=r"checkpoint_final\.pth.*--c.*--val_best"):
        trainer_of(plan, recipe).run(validate_only=True)
    trainer_of(plan, recipe).run(validate_only=True, checkpoint_for_validation="best")


def test_resuming_what_makes_no_sense(plan, recipe, stopped):
    wider = Architecture("ResidualEncoderUNet", {**CNN.kwargs, "features_per_stage": [4, 6, 10]})
    other = changed(plan, architecture=wider.to_plans_dict(PATCH))
    with pytest.raises(ConfigurationError) as refused:
        trainer_of(other, recipe.override(optimizer="adamw")).run(resume=True)
    network, optimizer = refused.value.mistakes
    assert "features_per_stage [4, 6, 8] then, [4, 6, 10] now" in network
    assert optimizer == "optimizer: sgd then, adamw now"
    assert refused.value.path == trainer_of(plan, recipe).folder.path / "checkpoint_latest.pth"
    assert "--restart" in str(refused.value)


def test_resuming_with_another_learning_rate_says_so(plan, recipe, stopped, package_log):
    trainer_of(plan, recipe.override(learning_rate=0.005)).run(resume=True)
    assert "another learning_rate than before: 0.005 instead of 0.01" in package_log.text


@pytest.fixture
def split_of(plan):
    """Call it with training and validation cases: they become fold 0."""

    def write(training, validation):
        names = [{"train": [f"case_{n:02d}" for n in training], "val": [f"case_{n:02d}" for n in validation]}]
        (plan.dataset_folder / "splits_final.json").write_text(json.dumps(names))

    return write


def without_identity(path):
    """What versions before wrote: the checkpoint itself doesn't say what its run was made of."""
    content = torch.load(path, weights_only=True)
    del content["nnssl_adapt"]["identity"]
    torch.save(content, path)


@pytest.mark.parametrize("older", [False, True], ids=["checkpoint", "debug.json"])
def test_other_cases_make_another_model(plan, recipe, split_of, older, package_log):
    split_of((0, 1, 2), (3, 4))
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, step=4)
        with pytest.raises(TrainingStopped):
            trainer_of(plan, recipe).run()
    if older:
        without_identity(trainer_of(plan, recipe).folder.path / "checkpoint_latest.pth")
    split_of((2, 3, 4), (0, 1))
    with pytest.raises(ConfigurationError) as refused:
        trainer_of(plan, recipe).run(resume=True)
    assert refused.value.mistakes == (
        "training cases: case_00, case_01, case_02 then, case_02, case_03, case_04 now",
        "validation cases: case_03, case_04 then, case_00, case_01 now",
    )
    assert "--accept-changed splits" in str(refused.value)
    package_log.clear()
    model = trainer_of(plan, recipe).run(resume=True, accept_changed=["splits"])
    assert "accepted as changed: training cases" in package_log.text
    identity = torch.load(fold_of(model) / "checkpoint_final.pth", weights_only=True)["nnssl_adapt"]["identity"]
    assert identity["training_cases"] == ["case_02", "case_03", "case_04"]
    assert identity["seen_before"] == ["case_00", "case_01"]


@pytest.mark.parametrize("older", [False, True], ids=["checkpoint", "debug.json"])
def test_validation_is_of_cases_that_the_model_has_not_seen(plan, recipe, split_of, older):
    split_of((0, 1, 2), (3, 4))
    model = trainer_of(plan, recipe).run()
    if older:
        without_identity(fold_of(model) / "checkpoint_final.pth")
    done = {path.name for path in (fold_of(model) / "validation").iterdir()}
    assert done == {"case_03.nii.gz", "case_04.nii.gz", "summary.json"}
    split_of((2, 3, 4), (0, 1))
    for how in ({"validate_only": True}, {"resume": True}):
        with pytest.raises(ConfigurationError) as refused:
            trainer_of(plan, recipe).run(**how)
        (mistake,) = refused.value.mistakes
        assert "case_00, case_01" in mistake
    assert {path.name for path in (fold_of(model) / "validation").iterdir()} == done
    trainer_of(plan, recipe).run(validate_only=True, accept_changed=["splits"])
    left = {path.name for path in (fold_of(model) / "validation").iterdir()}
    assert left == {"case_00.nii.gz", "case_01.nii.gz", "summary.json"}


def test_fewer_validation_cases_are_only_mentioned(plan, recipe, split_of, package_log):
    split_of((0, 1, 2), (3, 4))
    trainer_of(plan, recipe).run()
    split_of((0, 1, 2), (4,))
    package_log.clear()
    trainer_of(plan, recipe).run(validate_only=True)
    assert "validation cases: case_03, case_04 then, case_04 now" in package_log.text


@pytest.mark.parametrize("older", [False, True], ids=["checkpoint", "plans.json"])
def test_a_plan_of_the_same_name_that_was_made_again(plan, recipe, stopped, older):
    if older:
        without_identity(trainer_of(plan, recipe).folder.path / "checkpoint_latest.pth")
    other = changed(plan, spacing=[2.0, 2.0, 2.0], normalization_schemes=["NoNormalization"])
    with pytest.raises(ConfigurationError) as refused:
        trainer_of(other, recipe).run(resume=True, accept_changed=["splits", "data"])
    assert set(refused.value.mistakes) == {
        "spacing (mm): [2.0, 1.0, 1.3] then, [2.0, 2.0, 2.0] now",
        'normalisation: ["ZScoreNormalization"] then, ["NoNormalization"] now',
    }
    assert "--accept-changed" not in str(refused.value)


def test_a_finished_run_gets_more_epochs(plan, recipe, package_log):
    """Its weights and figures go on; that its momentum was not kept is said. Stopped in between, it goes on from there."""
    model = trainer_of(plan, recipe).run()
    figures = load_checkpoint(fold_of(model) / "checkpoint_final.pth")["logging"]["train_losses"]
    longer = recipe.override(epochs=4)
    package_log.clear()
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, step=5)
        with pytest.raises(TrainingStopped, match="in epoch 4 after 2 of 3 steps"):
            trainer_of(plan, longer).run(resume=True)
    assert "momentum" in package_log.text and "finished run of 2 epochs" in package_log.text
    trainer_of(plan, longer).run(resume=True)
    assert "epoch 4 after 2 steps" in package_log.text
    content = load_checkpoint(fold_of(model) / "checkpoint_final.pth")
    assert content["current_epoch"] == 4
    assert content["logging"]["train_losses"][:2] == figures and len(content["logging"]["train_losses"]) == 4


def test_a_damaged_checkpoint_is_no_crash(plan, recipe, stopped):
    path = trainer_of(plan, recipe).folder.path / "checkpoint_latest.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnreadableCheckpoint, match=r"checkpoint_latest\.pth can't be read"):
        trainer_of(plan, recipe).run(resume=True)


def test_validation_goes_on_where_it_stopped(plan, recipe, monkeypatch, caplog):
    original, calls = validation.logits_by_tiles, []

    def stopping(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **options)

    def predicted():
        return [record.args[0] for record in caplog.records if record.msg.startswith("validating ")]

    caplog.set_level(logging.INFO, "nnssl_adapt")
    monkeypatch.setattr(validation, "logits_by_tiles", stopping)
    recipe = recipe.override(epochs=1, warmup_epochs=0)
    with pytest.raises(TrainingStopped, match="SIGTERM in validation, [12] of 5.*--val"):
        trainer_of(plan, recipe, fold="all").run()
    model = trainer_of(plan, recipe, fold="all").run(validate_only=True)
    names = [f"case_{number:02d}" for number in range(5)]
    again = predicted()[3:]  # the third was cut short, the second may have waited for its export
    assert predicted()[:3] == names[:3] and again in (names[1:], names[2:])
    summary = json.loads((fold_of(model, "all") / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 5
    trainer_of(plan, recipe, fold="all").run(validate_only=True, checkpoint_for_validation="best")
    assert predicted()[3 + len(again) :] == names  # other weights: nothing of before counts
