"""Pre-trained weights are found by what they are, not by where they lay; and they arrive in the network."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from support.model_folders import write_model_folder
from support.synthetic import make_dataset

from nnssl_adapt.errors import ConfigurationError, DigestMismatch, SourceNotFound
from nnssl_adapt.evaluation.report.content import gather_folds
from nnssl_adapt.evaluation.report.report import commands, make_report
from nnssl_adapt.planning.make import make_plan
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.preprocess_dataset import preprocess_dataset
from nnssl_adapt.planning.provenance import NOT_LOADED, WeightsRecord
from nnssl_adapt.training import starting_weights
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import load_checkpoint
from nnssl_adapt.training.run.folder import RunFolder
from nnssl_adapt.training.starting_weights import (
    build_initial_network,
    describe_citations,
    fill_with_starting_weights,
    find_checkpoint,
    freezing_warnings,
)
from nnssl_adapt.training.trainer import PretrainedTrainer
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.transfer.report import TransferReport
from nnssl_adapt.weights.transfer.rows import TargetRow


@pytest.fixture
def weights(small_resenc, tmp_path):
    """A copy of the small checkpoint that tests may move."""
    return shutil.copytree(small_resenc, tmp_path / "weights")


@pytest.fixture
def plan(nnunet_folders, weights):
    make_dataset(nnunet_folders / "nnUNet_raw", spacing=(1.0, 1.0, 1.0))
    return make_plan(991, open_checkpoint(weights), name="small", workers=1)


def without(plan, *keys):
    content = copy.deepcopy(plan.content)
    for key in keys:
        content.pop(key)
    return FinetunePlan(content, plan.configuration, plan.path)


def test_found_where_the_plan_says(plan, weights):
    assert find_checkpoint(plan).origin.sha256 == plan.provenance.source.sha256


def test_found_elsewhere_when_told(plan, weights, tmp_path):
    moved = weights.rename(tmp_path / "moved")
    with pytest.raises(SourceNotFound):
        find_checkpoint(plan)
    assert find_checkpoint(plan, moved).tensors
    assert find_checkpoint(plan, open_checkpoint(moved)).tensors


def test_a_relative_source_is_found_by_the_hint(plan):
    content = copy.deepcopy(plan.content)
    content["nnssl_adapt"]["source"]["source"] = "typed/in/another/folder"
    assert find_checkpoint(FinetunePlan(content)).tensors


def test_other_weights_are_refused(plan, small_resenc):
    with pytest.raises(DigestMismatch, match="ptPlans__small"):
        find_checkpoint(plan, small_resenc.parent / "small_resenc_noresample")


def test_nnunets_own_nnssl_plans_have_only_the_hint(plan):
    assert find_checkpoint(without(plan, "nnssl_adapt")).tensors


def test_plans_without_weights_need_from_scratch(plan):
    bare = without(plan, "nnssl_adapt", "pretrain_info")
    with pytest.raises(ConfigurationError, match="-pretrained_weights.*--from"):
        find_checkpoint(bare)
    network = build_initial_network(bare, 3, seed=1)
    assert fill_with_starting_weights(network, bare, None, from_scratch=True).report.coverage == 0


def test_weights_for_a_plan_that_names_none(plan, weights):
    bare = without(plan, "nnssl_adapt", "pretrain_info")
    network = build_initial_network(bare, 3, seed=1)
    preprocess_dataset(plan, workers=1, progress=False)  # for dataset.json, which names the heads
    report = fill_with_starting_weights(network, bare, weights, from_scratch=False).report
    assert report.coverage == 1
    assert report.origin["sha256"] == plan.provenance.source.sha256


def test_a_plan_from_a_model_folder_takes_the_file_itself(nnunet_folders, tmp_path):
    make_dataset(nnunet_folders / "nnUNet_raw", spacing=(1.0, 1.0, 1.0), cases=5)
    folder = write_model_folder(tmp_path / "models", folds=(0, 3))
    plan = make_plan(991, open_checkpoint(folder, fold="3"), name="supervised", workers=1)
    assert plan.provenance.source_choices == {"fold": "3"}
    moved = shutil.copy(folder / "fold_3" / "checkpoint_final.pth", tmp_path / "alone.pth")
    assert find_checkpoint(plan, moved).origin.sha256 == plan.provenance.source.sha256
    assert find_checkpoint(plan).origin.fold == "3"
    with pytest.raises(DigestMismatch):
        find_checkpoint(plan, folder / "fold_0" / "checkpoint_final.pth")


@pytest.fixture
def bare(plan):
    """A plan that somebody made by hand, its dataset at hand; its images are RAI."""
    preprocess_dataset(plan, workers=1, progress=False)
    return without(plan, "nnssl_adapt", "pretrain_info")


def told(checkpoint, **entries):
    return replace(checkpoint, plan=checkpoint.plan.model_copy(update={"supervised": True, **entries}))


def test_other_axes_than_the_weights_know_are_worth_a_word(bare, plan, weights, caplog):
    checkpoint = open_checkpoint(weights)

    def words(plan, **entries):
        caplog.clear()
        fill_with_starting_weights(build_initial_network(plan, 3, seed=1), plan, told(checkpoint, **entries), False)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    (said,) = words(bare, orientation="RPI")
    assert (
        "trained on RPI images, but 10 files of Dataset991_Tiny are not (imagesTr/case_00_0000.nii.gz: RAI, …)" in said
    )
    assert "--reorient" in said
    assert not words(bare, orientation="RAI")
    (said,) = words(bare, transpose_forward=(2, 0, 1))
    assert "in the order [0, 1, 2], the weights were trained with [2, 0, 1]" in said
    assert not words(plan, orientation="RPI")  # planning has asked already


def test_images_that_are_not_there_can_not_be_checked(bare, weights, caplog, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "empty"))
    checkpoint = told(open_checkpoint(weights), orientation="RPI")
    fill_with_starting_weights(build_initial_network(bare, 3, seed=1), bare, checkpoint, False)
    assert any("whether these are can't be checked" in message for message in caplog.messages)


def test_random_weights_follow_the_seed(plan):
    networks = [build_initial_network(plan, 3, seed) for seed in (1, 1, 2)]
    first, same, other = (next(n.parameters()) for n in networks)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_training_starts_from_them_and_resuming_does_not_need_them(plan, weights, recipe):
    preprocess_dataset(plan, workers=1, progress=False)
    recipe = recipe.override(from_scratch=False, epochs=1, warmup_epochs=0, learning_rate=1e-9, weight_decay=0)
    model = PretrainedTrainer(plan, recipe=recipe, device="cpu", workers=0).run()
    report = json.loads((model.path / "fold_0" / "transfer_report.json").read_text())
    assert report["coverage"] == 1 and report["origin"]["sha256"] == plan.provenance.source.sha256
    source = open_checkpoint(weights).tensors
    trained = model.load_weights(0).network_weights
    shared = [name for name in trained if name.startswith("encoder.") and name in source]
    assert len(shared) > 20
    assert all(torch.allclose(trained[name], source[name], atol=1e-6) for name in shared)
    shutil.rmtree(weights)
    PretrainedTrainer(plan, recipe=recipe, device="cpu", workers=0).run(resume=True)


def test_what_to_cite_is_said_in_full_where_it_is_text():
    citations = [
        {
            "type": "Architecture",
            "name": "ResEncL",
            "apa_citations": ["Somebody, A. (2024). On encoders.", "Other, B. (2023)."],
        },
        {"type": "Dataset", "name": "OpenMind", "bibtex_citations": ["@article{…}"]},
    ]
    assert describe_citations(citations).splitlines()[1:] == [
        "  Architecture: ResEncL: Somebody, A. (2024). On encoders.",
        "  Architecture: ResEncL: Other, B. (2023).",
        "  Dataset: OpenMind",
    ]
    assert describe_citations([]) == ""


def test_citations_of_weights_that_the_plan_does_not_name(bare, weights, recipe, package_log):
    checkpoint = replace(open_checkpoint(weights), citations=({"type": "Dataset", "name": "Named nowhere else"},))
    recipe = recipe.override(from_scratch=False, epochs=1, warmup_epochs=0)
    trainer = PretrainedTrainer(bare, recipe=recipe, device="cpu", workers=0, checkpoint=checkpoint)
    fold = trainer.run().path / "fold_0"
    assert "please cite" in package_log.text and "Dataset: Named nowhere else" in package_log.text
    assert json.loads((fold / "debug.json").read_text())["citations"] == list(checkpoint.citations)
    content = load_checkpoint(fold / "checkpoint_final.pth")
    assert content["nnssl_adapt"]["citations"] == list(checkpoint.citations)


def test_options_go_before_what_the_plan_records(plan, monkeypatch):
    opened = []

    def recording(source, **options):
        opened.append((str(source), options))
        return open_checkpoint(source)

    monkeypatch.setattr(starting_weights, "open_checkpoint", recording)
    content = copy.deepcopy(plan.content)
    content["nnssl_adapt"]["source_choices"] = {"fold": "1", "stem": "2"}
    find_checkpoint(FinetunePlan(content), options={"fold": "mean", "cache_dir": "/here"})
    ((_, options),) = opened
    assert options == {"revision": None, "fold": "mean", "stem": "2", "cache_dir": "/here"}


def test_weights_given_to_the_training_are_on_record(plan, weights):
    """As for a plan of nnU-Net's: what was loaded is named by the model, its checkpoint, debug.json and the report's commands."""
    content = {key: value for key, value in plan.content.items() if key not in ("pretrain_info", "nnssl_adapt")}
    bare = FinetunePlan(content, plan.configuration, plan.path)
    preprocess_dataset(bare, workers=1, progress=False)
    recipe = Recipe(trainer_name="Given", epochs=1, iterations_per_epoch=1, validation_iterations=1, warmup_epochs=0)
    checkpoint = open_checkpoint(weights)
    model = PretrainedTrainer(bare, recipe=recipe, device="cpu", workers=0, checkpoint=str(weights)).run()
    source = model.plan.provenance.source
    assert source == WeightsRecord(**checkpoint.origin.to_dict(), licence=checkpoint.licence)
    assert model.plan.pretrain_info["citations"] == list(checkpoint.citations)
    identity = load_checkpoint(model.path / "fold_0/checkpoint_final.pth")["nnssl_adapt"]["identity"]
    debug = json.loads((model.path / "fold_0/debug.json").read_text())
    assert identity["weights"] == debug["pretrained_weights"]
    assert identity["weights"]["sha256"] == checkpoint.origin.sha256
    again = next(line for line in commands(model, gather_folds(model), None) if "train" in line)
    assert f"-pretrained_weights {weights}" in again
    with pytest.raises(ConfigurationError, match="other weights"):  # another fold of this model, from others
        other = replace(model.plan.provenance, source=replace(source, sha256="0" * 64))
        aside = {**model.plan.content, "nnssl_adapt": other.to_dict()}
        RunFolder(model.path, 1).refuse_other_model(FinetunePlan(aside))


def test_a_baseline_does_not_name_weights_that_it_did_not_load(plan, weights):
    preprocess_dataset(plan, workers=1, progress=False)
    recipe = Recipe(epochs=2, iterations_per_epoch=1, validation_iterations=1, warmup_epochs=0, from_scratch=True)
    trainer = PretrainedTrainer(plan, recipe=recipe.override(epochs=1), device="cpu", workers=0)
    model = trainer.run()
    assert model.plan.provenance.given == NOT_LOADED
    assert trainer.identity.weights is None
    longer = PretrainedTrainer(plan, recipe=recipe, device="cpu", workers=0)
    assert longer.run(resume=True).plan.provenance.given == NOT_LOADED and longer.identity.weights is None
    assert "trained from random weights" in make_report(model, overlays=False).html


def report_of(**fates):
    parts = {"encoder.stages.0.w": "encoder", "encoder.stages.1.w": "encoder", "decoder.stages.0.w": "rest"}
    rows = [
        TargetRow(name, fates.get(name.split(".")[0] + name[-3], "copied"), "", None, None, (3, 2), part)
        for name, part in parts.items()
    ]
    return TransferReport(tuple(rows))


def test_frozen_weights_that_are_random_are_warned_of():
    complete, half = report_of(), report_of(encoder1="fresh")
    for recipe in (Recipe(), Recipe(freeze="encoder"), Recipe(freeze="all_but_head"), Recipe(lora_rank=4)):
        assert freezing_warnings(recipe, complete) == []
    assert freezing_warnings(Recipe(), half) == []
    for recipe in (Recipe(freeze="encoder"), Recipe(lora_rank=4)):
        (warning,) = freezing_warnings(recipe, half)
        assert "50.0% of it is not pre-trained (encoder.stages.1.w, …)" in warning
    fresh_decoder = report_of(decoder0="fresh")
    assert freezing_warnings(Recipe(freeze="encoder"), fresh_decoder) == []
    (warning,) = freezing_warnings(Recipe(freeze="all_but_head"), fresh_decoder)
    assert "100.0% of the decoder under it is not pre-trained" in warning and "--freeze encoder" in warning
