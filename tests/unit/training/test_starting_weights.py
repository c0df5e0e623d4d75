"""Pre-trained weights are found by what they are, not by where they lay; and they arrive in the network."""

import copy
import json
import shutil

import pytest
import torch
from synthetic import make_dataset

from nnssl_adapt.errors import ConfigurationError, DigestMismatch, SourceNotFound
from nnssl_adapt.planning.make import make_plan
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.prepare import preprocess_dataset
from nnssl_adapt.training.starting_weights import build_initial_network, fill_with_starting_weights, find_checkpoint
from nnssl_adapt.training.trainer import PretrainedTrainer
from nnssl_adapt.weights.checkpoint import open_checkpoint


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
    assert find_checkpoint(plan).origin.sha256 == plan.provenance["source"]["sha256"]


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
    with pytest.raises(DigestMismatch, match="is not the checkpoint that plan ptPlans__small.* was made for"):
        find_checkpoint(plan, small_resenc.parent / "small_resenc_noresample")


def test_nnunets_own_nnssl_plans_have_only_the_hint(plan):
    assert find_checkpoint(without(plan, "nnssl_adapt")).tensors


def test_plans_without_weights_need_from_scratch(plan):
    bare = without(plan, "nnssl_adapt", "pretrain_info")
    with pytest.raises(ConfigurationError, match="names no pre-trained weights: train with --from_scratch"):
        find_checkpoint(bare)
    network = build_initial_network(bare, 3, seed=1)
    assert fill_with_starting_weights(network, bare, None, from_scratch=True).coverage == 0


def test_random_weights_follow_the_seed(plan):
    networks = [build_initial_network(plan, 3, seed) for seed in (1, 1, 2)]
    first, same, other = (next(n.parameters()) for n in networks)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_training_starts_from_them_and_resuming_does_not_need_them(plan, weights, recipe):
    preprocess_dataset(plan, workers=1, progress=False)
    recipe = recipe.override(from_scratch=False, epochs=1, warmup_epochs=0, learning_rate=1e-9, weight_decay=0)
    model = PretrainedTrainer(plan, recipe=recipe, device="cpu", workers=0).run()
    report = json.loads((model.path / "fold_0" / "transfer_report.json").read_text())
    assert report["coverage"] == 1 and report["origin"]["sha256"] == plan.provenance["source"]["sha256"]
    source = open_checkpoint(weights).tensors
    trained = model.load_weights(0).network_weights
    shared = [name for name in trained if name.startswith("encoder.") and name in source]
    assert len(shared) > 20
    assert all(torch.allclose(trained[name], source[name], atol=1e-6) for name in shared)
    shutil.rmtree(weights)
    PretrainedTrainer(plan, recipe=recipe, device="cpu", workers=0).run(resume=True)
