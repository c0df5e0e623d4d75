"""The training of a fold: files, exact resuming, stopping, and what it refuses."""

import itertools
import json
import logging
import math
import multiprocessing
import signal
import time

import numpy as np
import pytest
import torch
from tiny_plans import CNN, PATCH, TRANSFORMER, changed

from nnssl_adapt.errors import (
    ConfigurationError,
    DatasetNotFound,
    DeviceUnavailable,
    NonFiniteLoss,
    NothingToResume,
    OutputError,
    TrainingError,
)
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.training import checkpointing, validation
from nnssl_adapt.training import trainer as trainer_module
from nnssl_adapt.training.checkpointing import RunIdentity, load_checkpoint, weights_on_cpu
from nnssl_adapt.training.optimizer import autocast_dtype, build_optimizer
from nnssl_adapt.training.recipe import Recipe
from nnssl_adapt.training.trainer import PretrainedTrainer
from nnssl_adapt.weights.architectures import Architecture


def trainer_of(plan, recipe, workers=0, **options):
    return PretrainedTrainer(plan, recipe=recipe, device="cpu", workers=workers, progress=False, **options)


def fold_of(model, fold=0):
    return model.path / f"fold_{fold}"


def interrupt(monkeypatch, step=None, judgement=None):
    """Make the process get SIGTERM in a training step or in a validation batch (counted from 1 over the whole run)."""
    for name, at in (("_step", step), ("_judge", judgement)):
        original, count = getattr(PretrainedTrainer, name), iter(range(1, 10**6))

        def counting(self, state, batch, original=original, count=count, at=at):
            if next(count) == at:
                signal.raise_signal(signal.SIGTERM)
            return original(self, state, batch)

        monkeypatch.setattr(PretrainedTrainer, name, counting)


# -- what a run leaves ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_nnunets_files(plan, recipe, package_log):
    trainer = trainer_of(plan, recipe)
    model = trainer.run()
    assert isinstance(model, ModelFolder) and model.folds == (0,)
    assert model.path.name == "Tiny_from_scratch__ptPlans__tiny__3d_fullres"
    assert json.loads((model.path / "plans.json").read_text()) == plan.content
    assert (model.path / "dataset.json").read_bytes() == (plan.dataset_folder / "dataset.json").read_bytes()
    fold = fold_of(model)
    names = {path.name for path in fold.iterdir() if not path.name.startswith("training_log_")}
    assert names == {
        "checkpoint_best.pth",
        "checkpoint_final.pth",
        "debug.json",
        "metrics.jsonl",
        "progress.png",
        "transfer_report.json",
        "validation",
        "validation_done.json",
    }
    assert {p.name for p in (fold / "validation").iterdir()} == {"case_00.nii.gz", "summary.json"}
    assert (fold / "progress.png").read_bytes().startswith(b"\x89PNG")
    log = next(fold.glob("training_log_*.txt")).read_text()
    for part in ("From scratch", "epoch 2/2", "pseudo-Dice", "lr 0.01", "s/epoch", "ETA", "mean foreground Dice"):
        assert part in log and part in package_log.text
    lines = [json.loads(line) for line in (fold / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and lines[1]["learning_rate"] == 0.01
    assert trainer.summary.foreground_mean_dice == model_summary(fold)["foreground_mean"]["Dice"]


def model_summary(fold):
    return json.loads((fold / "validation" / "summary.json").read_text())


def test_checkpoints_are_plain_and_slim(plan, recipe):
    model = trainer_of(plan, recipe).run()
    content = torch.load(fold_of(model) / "checkpoint_final.pth", weights_only=True)
    assert content["trainer_name"] == "nnUNetTrainer"
    assert content["init_args"] == {"configuration": "3d_fullres", "fold": 0}
    assert content["inference_allowed_mirroring_axes"] == (0, 1, 2)
    assert content["current_epoch"] == 2 and len(content["logging"]["train_losses"]) == 2
    assert content["optimizer_state"] is None and content["grad_scaler_state"] is None
    assert content["nnssl_adapt"]["recipe"] == {**recipe.to_dict(), "trainer_name": "Tiny_from_scratch"}
    names = set(content["network_weights"])
    assert any(".all_modules.0." in name for name in names) and any(".conv.weight" in name for name in names)
    assert names == set(ModelFolder.open(model.path).build_network().state_dict())


def test_the_numbers_stay_what_they_are(plan, recipe):
    trainer = trainer_of(plan, recipe.override(epochs=4, warmup_epochs=1, iterations_per_epoch=6))
    trainer.run()
    losses = trainer.history.train_losses
    assert losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(EXPECTED_LOSSES, abs=5e-3)


EXPECTED_LOSSES = [1.258, 0.659, 0.382, 0.273]


def test_the_callers_random_state_is_left_alone(plan, recipe):
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.uniform()
    torch.manual_seed(3)
    np.random.seed(3)
    trainer_of(plan, recipe).run()
    assert (torch.rand(1), np.random.uniform()) == expected
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    "dataset",
    [{"channels": 2}, {"ignore": True}, {"labels": 4, "regions": True}, {"labels": 4, "regions": True, "ignore": True}],
    ids=["2 channels", "ignore", "regions", "regions+ignore"],
)
def test_all_kinds_of_datasets(make_plan, recipe, dataset):
    trainer = trainer_of(make_plan(**dataset), recipe.override(epochs=1, warmup_epochs=0))
    model = trainer.run()
    assert math.isfinite(trainer.history.train_losses[0])
    assert set(model_summary(fold_of(model))["mean"]) == {str(entry) for entry in trainer.labels.foreground}


def test_fold_all_and_probabilities(plan, recipe):
    trainer = trainer_of(plan, recipe.override(epochs=1, warmup_epochs=0), fold="all")
    model = trainer.run(save_probabilities=True)
    assert model.folds == ("all",)
    names = {p.name for p in (fold_of(model, "all") / "validation").iterdir()}
    assert len(names) == 3 * 5 + 1 and "case_04.npz" in names


def test_without_checkpoints(plan, recipe):
    trainer = trainer_of(plan, recipe, disable_checkpointing=True)
    model = trainer.run()
    assert not list(model.path.rglob("*.pth"))
    assert (fold_of(model) / "validation" / "summary.json").is_file()


# -- resuming --------------------------------------------------------------------------------------------------------------


def assert_same_training(left, right):
    one, two = (load_checkpoint(fold_of(model) / "checkpoint_final.pth") for model in (left, right))
    for name, tensor in one["network_weights"].items():
        assert torch.equal(tensor, two["network_weights"][name]), name
    for key, values in one["logging"].items():
        if "timestamps" not in key:
            assert np.array_equal(values, two["logging"][key], equal_nan=True), key
    assert one["_best_ema"] == two["_best_ema"]


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
        with pytest.raises(TrainingError, match=r"stopped by SIGTERM in epoch \d after \d of 3 steps; .*--c"):
            trainer_of(plan, recipe, results_folder=tmp_path / "parts").run()
    model = trainer_of(plan, recipe, results_folder=tmp_path / "parts").run(resume=True)
    assert_same_training(whole, model)
    assert not (fold_of(model) / "checkpoint_latest.pth").exists()


def test_killed_and_resumed_from_an_epochs_end_with_a_worker(plan, recipe, tmp_path, monkeypatch):
    recipe = recipe.override(epochs=3, checkpoint_every=1)
    whole = trainer_of(plan, recipe, results_folder=tmp_path / "whole").run()

    class Killed(BaseException):
        pass

    def die(self, state, batch, original=PretrainedTrainer._step):
        if state.epoch == 2 and state.iteration == 1:
            raise Killed
        return original(self, state, batch)

    with monkeypatch.context() as patched:
        patched.setattr(PretrainedTrainer, "_step", die)
        with pytest.raises(Killed):
            trainer_of(plan, recipe, workers=1, results_folder=tmp_path / "parts").run()
    model = trainer_of(plan, recipe, workers=1, results_folder=tmp_path / "parts").run(resume=True)
    assert_same_training(whole, model)


def test_time_calls_for_a_checkpoint_too(plan, recipe, monkeypatch):
    written = []
    monkeypatch.setattr(checkpointing.CheckpointWriter, "latest", lambda self, state: written.append(state.iteration))
    trainer_of(plan, recipe.override(checkpoint_minutes=1e-9)).run()
    assert written == [1, 2, 3] * 2


def test_nothing_to_resume(plan, recipe):
    with pytest.raises(NothingToResume, match=r"has no checkpoint_latest\.pth .*leave --c out"):
        trainer_of(plan, recipe).run(resume=True)


def test_a_finished_run_is_only_validated(plan, recipe, monkeypatch):
    model = trainer_of(plan, recipe).run()
    before = (fold_of(model) / "checkpoint_final.pth").stat().st_mtime_ns
    monkeypatch.setattr(PretrainedTrainer, "_train", None)
    trainer_of(plan, recipe).run(resume=True)
    assert (fold_of(model) / "checkpoint_final.pth").stat().st_mtime_ns == before
    with pytest.raises(ConfigurationError, match="finished after 2 epochs and can't be prolonged to 5"):
        trainer_of(plan, recipe.override(epochs=5)).run(resume=True)


@pytest.fixture
def stopped(plan, recipe):
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, step=4)
        with pytest.raises(TrainingError):
            trainer_of(plan, recipe).run()


def test_resuming_what_makes_no_sense(plan, recipe, stopped):
    wider = Architecture("ResidualEncoderUNet", {**CNN.kwargs, "features_per_stage": [4, 6, 10]})
    other = changed(plan, architecture=wider.to_plans_dict(PATCH))
    with pytest.raises(ConfigurationError, match=r"another network.*; its optimizer was sgd, now adamw.*without --c"):
        trainer_of(other, recipe.override(optimizer="adamw")).run(resume=True)
    with pytest.raises(ConfigurationError, match="has another network"):
        trainer_of(other, recipe).run(resume=True)


def test_resuming_with_another_learning_rate_says_so(plan, recipe, stopped, package_log):
    trainer_of(plan, recipe.override(learning_rate=0.005)).run(resume=True)
    assert "another learning_rate than before: 0.005 instead of 0.01" in package_log.text


# -- stopping, failing ---------------------------------------------------------------------------------------------------------


def test_a_second_signal_stops_at_once(plan, recipe, monkeypatch):
    def twice(self, state, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(PretrainedTrainer, "_step", twice)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(plan, recipe).run()


def test_a_dead_worker_is_explained(plan, recipe, monkeypatch):
    def kill_workers(self, state, batch):
        for child in multiprocessing.active_children():
            child.kill()
        time.sleep(30)  # torch interrupts this when it learns of it

    monkeypatch.setattr(PretrainedTrainer, "_step", kill_workers)
    with pytest.raises(TrainingError, match=r"worker died \(.*killed by signal: Killed\).*/dev/shm.*fewer --workers"):
        trainer_of(plan, recipe, workers=1).run()


def test_validation_goes_on_where_it_stopped(plan, recipe, monkeypatch):
    predicted = []
    original = validation.FoldValidation._predict

    def recording(self, network, case, axes, after_tile):
        predicted.append(case)
        if len(predicted) == 3:
            signal.raise_signal(signal.SIGTERM)
        original(self, network, case, axes, after_tile)

    monkeypatch.setattr(validation.FoldValidation, "_predict", recording)
    recipe = recipe.override(epochs=1, warmup_epochs=0)
    with pytest.raises(TrainingError, match="stopped by SIGTERM in validation, 2 of 5 cases done; .*--val"):
        trainer_of(plan, recipe, fold="all").run()
    model = trainer_of(plan, recipe, fold="all").run(validate_only=True)
    assert predicted == [f"case_{number:02d}" for number in (0, 1, 2, 2, 3, 4)]  # the third was cut short
    assert len(model_summary(fold_of(model, "all"))["metric_per_case"]) == 5
    trainer_of(plan, recipe, fold="all").run(validate_only=True, checkpoint_for_validation="best")
    assert len(predicted) == 11  # other weights: nothing of before counts


def test_a_few_bad_steps_are_skipped(plan, recipe, monkeypatch, package_log):
    weights = []

    def sometimes_nan(self, image, target, original=None):
        loss = original(image, target)
        return loss * math.nan if 2 <= len(weights) <= 3 else loss

    def keeping_weights(self, state, batch, original=PretrainedTrainer._step):
        value = original(self, state, batch)
        weights.append(next(state.network.parameters()).detach().clone())
        return value

    trainer = trainer_of(plan, recipe)
    inner = trainer._loss
    trainer._loss = lambda logits, target: sometimes_nan(trainer, logits, target, inner)
    monkeypatch.setattr(PretrainedTrainer, "_step", keeping_weights)
    trainer.run()
    same = [torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert same == [False, True, True, False, False]
    assert package_log.text.count("not finite, skipped") == 2
    assert all(math.isfinite(loss) for loss in trainer.history.train_losses)


def test_many_bad_steps_end_the_run(plan, recipe):
    trainer = trainer_of(plan, recipe.override(iterations_per_epoch=30))
    inner = trainer._loss
    trainer._loss = lambda logits, target: inner(logits, target) / 0
    with pytest.raises(NonFiniteLoss, match=r"10 times in a row \(epoch 0, step 10\).*lower --lr"):
        trainer.run()


def test_a_checkpoint_that_could_not_be_written_leaves_the_old_one(plan, recipe, stopped, monkeypatch):
    path = trainer_of(plan, recipe).folder.path / "checkpoint_latest.pth"
    before = path.read_bytes()

    def full_disk(content, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing.torch, "save", full_disk)
    with pytest.raises(OutputError, match="no space left"):
        trainer_of(plan, recipe).run(resume=True)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".unfinished*"))


def test_a_damaged_checkpoint_is_no_crash(plan, recipe, stopped):
    path = trainer_of(plan, recipe).folder.path / "checkpoint_latest.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(checkpointing.UnreadableCheckpoint, match=r"checkpoint_latest\.pth can't be read"):
        trainer_of(plan, recipe).run(resume=True)


def test_an_earlier_run_is_set_aside(plan, recipe):
    model = trainer_of(plan, recipe).run()
    old = (fold_of(model) / "checkpoint_final.pth").read_bytes()
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, step=1)
        with pytest.raises(TrainingError):
            trainer_of(plan, recipe.override(seed=1)).run()
    aside = next(fold_of(model).glob("earlier_run_*"))
    assert (aside / "checkpoint_final.pth").read_bytes() == old
    assert (aside / "validation" / "summary.json").is_file()
    assert not (fold_of(model) / "checkpoint_final.pth").exists()


def test_folds_with_another_patch_need_another_folder(plan, recipe):
    trainer_of(plan, recipe).run()
    with pytest.raises(
        ConfigurationError, match=r"fold_0 trained with another patch_size: \[16, 16, 24\] there.*trainer_name"
    ):
        trainer_of(plan, recipe.override(patch_size=(16, 16, 16)), fold=1).run()


# -- what it refuses before any work ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_no_cuda(plan):
    with pytest.raises(DeviceUnavailable, match="-device cpu"):
        PretrainedTrainer(plan)


@pytest.mark.parametrize("fold", [5, -1, "every", 1.5])
def test_wrong_folds(plan, recipe, fold):
    with pytest.raises(ConfigurationError, match="the dataset's folds are 0, 1, 2, 3, 4, all"):
        trainer_of(plan, recipe, fold=fold)


def test_folds_may_be_text(plan, recipe):
    assert trainer_of(plan, recipe, fold="3").fold == 3


def test_cases_that_are_not_preprocessed(plan, recipe):
    trainer = trainer_of(plan, recipe)
    trainer.store.remove("case_02")
    with pytest.raises(DatasetNotFound, match="lacks 1 preprocessed case.*case_02"):
        trainer_of(plan, recipe)
    for identifier in trainer.store.identifiers:
        trainer.store.remove(identifier)
    with pytest.raises(ConfigurationError, match="no preprocessed cases: run nnUNetv2_preprocess_like_nnssl"):
        trainer_of(plan, recipe)


def test_negative_workers(plan, recipe):
    with pytest.raises(ConfigurationError, match="workers"):
        trainer_of(plan, recipe, workers=-1)


def test_patches_and_batches_of_the_recipe(plan, recipe, package_log):
    trainer = trainer_of(plan, recipe.override(patch_size=(18, 16, 64), batch_size=3))
    assert trainer.plan.patch_size == (16, 16, 24) and trainer.plan.batch_size == 3
    assert "patch 18 × 16 × 64 fitted to 16 × 16 × 24" in package_log.text
    assert plan.batch_size == 2


def test_the_familys_recipe_is_the_default(make_plan):
    plan = make_plan(TRANSFORMER)
    assert PretrainedTrainer(plan, device="cpu").recipe.name == "primus"


def test_from_scratch_has_a_folder_of_its_own(plan):
    names = [
        PretrainedTrainer(plan, device="cpu", from_scratch=scratch, recipe=recipe).folder.model.name.split("__")[0]
        for scratch, recipe in ((False, None), (True, None), (True, Recipe.load("from_scratch")))
    ]
    assert names == ["PretrainedTrainer", "PretrainedTrainer_from_scratch", "PretrainedTrainer_from_scratch"]


def test_an_unwritable_results_folder(plan, recipe, tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(OutputError, match="a file stands where a folder is needed"):
        trainer_of(plan, recipe, results_folder=tmp_path / "results").run()


# -- parts ---------------------------------------------------------------------------------------------------------------------


def test_precision():
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) is None and autocast_dtype("bf16", cpu) is torch.bfloat16
    with pytest.raises(ConfigurationError, match="fp16 needs a CUDA device"):
        autocast_dtype("fp16", cpu)


def test_bf16_trains_on_a_cpu(plan, recipe):
    trainer = trainer_of(plan, recipe.override(precision="bf16"))
    trainer.run()
    assert math.isfinite(trainer.history.train_losses[-1])


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch before 2.3 scales losses on CUDA only")
def test_loss_scaling_is_resumed_exactly(plan, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "autocast_dtype", lambda precision, device: torch.float16)
    monkeypatch.setattr(trainer_module, "grad_scaler", lambda: torch.amp.GradScaler("cpu", init_scale=2.0**40))
    whole = trainer_of(plan, recipe, results_folder=tmp_path / "whole").run()
    with monkeypatch.context() as patched:
        interrupt(patched, step=4)
        with pytest.raises(TrainingError):
            trainer_of(plan, recipe, results_folder=tmp_path / "parts").run()
    latest = next((tmp_path / "parts").rglob("checkpoint_latest.pth"))
    assert load_checkpoint(latest)["grad_scaler_state"]["scale"] < 2.0**40  # the first steps overflowed
    assert_same_training(whole, trainer_of(plan, recipe, results_folder=tmp_path / "parts").run(resume=True))


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["auto", "fp16", "bf16", "fp32"])
def test_all_precisions_on_cuda(plan, recipe, precision):
    trainer = PretrainedTrainer(plan, recipe=recipe.override(precision=precision), device="cuda", workers=0)
    trainer.run()
    assert trainer.history.train_losses[-1] < trainer.history.train_losses[0]


def test_optimisers():
    network = torch.nn.Linear(2, 3)
    sgd = build_optimizer(network, Recipe(), torch.device("cpu"))
    assert sgd.defaults["nesterov"] and (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.99, 3e-5)
    adamw = build_optimizer(network, Recipe.load("primus"), torch.device("cpu"))
    assert (adamw.defaults["betas"], adamw.defaults["weight_decay"]) == ((0.9, 0.98), 5e-2)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (CNN, "nnUNetTrainer"),
        (TRANSFORMER, "nnUNetTrainer"),
        (Architecture.named("ResEncL"), "nnUNetTrainer"),
        (Architecture.named("PrimusS"), "nnUNet_Primus_S_Trainer"),
        (Architecture("Primus", dict(Architecture.named("PrimusM").kwargs)), "nnUNet_Primus_M_Trainer"),
        (Architecture.named("PrimusM", eva_depth=3), "nnUNetTrainer"),
    ],
    ids=["cnn", "other primus", "ResEncL", "PrimusS", "PrimusM spelled out", "PrimusM changed"],
)
def test_the_stock_trainer_that_builds_the_same_network(architecture, expected):
    run = RunIdentity("3d_fullres", 0, architecture, (64, 64, 64), 1, 2, Recipe(), "0")
    assert run.stock_trainer == expected


def test_weights_with_two_names_are_held_once():
    inner = torch.nn.Conv3d(1, 2, 3)
    network = torch.nn.ModuleDict({"conv": inner, "all_modules": torch.nn.Sequential(inner)})
    weights = weights_on_cpu(network)
    assert set(weights) == {"conv.weight", "conv.bias", "all_modules.0.weight", "all_modules.0.bias"}
    assert weights["conv.weight"] is weights["all_modules.0.weight"]


def test_logging_is_put_back(plan, recipe):
    package = logging.getLogger("nnssl_adapt")
    before = list(package.handlers), package.level
    trainer_of(plan, recipe).run()
    assert (list(package.handlers), package.level) == before
