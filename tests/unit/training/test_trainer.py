"""What a run of a fold leaves, and what is refused."""

import json
import logging
import math
import signal

import numpy as np
import pytest
import torch
from support.tiny_plans import TRANSFORMER
from support.training_runs import fold_of, interrupt, trainer_of

from nnssl_adapt.errors import (
    ConfigurationError,
    DatasetNotFound,
    DeviceUnavailable,
    OutputError,
    TrainingError,
)
from nnssl_adapt.inference.model_folder import ModelFolder
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.trainer import PretrainedTrainer

# -- what a run leaves ---------------------------------------------------------------------------------------------------


@pytest.mark.pictures
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
        ".lock",
        "checkpoint_best.pth",
        "checkpoint_final.pth",
        "debug.json",
        "metrics.csv",
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


EXPECTED_LOSSES = [1.273, 0.653, 0.382, 0.278]


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


def test_without_checkpoints_a_model_that_is_there_stays(plan, recipe):
    recipe = recipe.override(epochs=1, warmup_epochs=0)
    model = trainer_of(plan, recipe).run()
    before = (fold_of(model) / "checkpoint_final.pth").read_bytes()
    with pytest.raises(ConfigurationError, match="trainer_name=NAME"):
        trainer_of(plan, recipe.override(seed=1), disable_checkpointing=True).run()
    assert (fold_of(model) / "checkpoint_final.pth").read_bytes() == before


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
    with pytest.raises(ConfigurationError, match=r"fold_0.*patch_size.*\[16, 16, 24\].*trainer_name"):
        trainer_of(plan, recipe.override(patch_size=(16, 16, 16)), fold=1).run()


# -- what it refuses before any work ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_no_cuda(plan):
    with pytest.raises(DeviceUnavailable, match="-device cpu"):
        PretrainedTrainer(plan)


@pytest.mark.parametrize("fold", [5, -1, "every", 1.5])
def test_wrong_folds(plan, recipe, fold):
    with pytest.raises(ConfigurationError, match="has the folds 0 to 4, and all"):
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
    with pytest.raises(ConfigurationError, match="nnUNetv2_preprocess_like_nnssl"):
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


def test_logging_is_put_back(plan, recipe):
    package = logging.getLogger("nnssl_adapt")
    before = list(package.handlers), package.level
    trainer_of(plan, recipe).run()
    assert (list(package.handlers), package.level) == before
