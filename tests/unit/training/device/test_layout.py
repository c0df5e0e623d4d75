"""The faster memory layout is measured once, and remembered for the card and the network."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.tiny_plans import CNN, PATCH
from support.training_runs import trainer_of

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.training import setup
from nnssl_adapt.training import trainer as trainer_module
from nnssl_adapt.training.device.layout import LayoutTrial, faster_layout
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.optimise.losses import build_loss
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import load_checkpoint
from nnssl_adapt.weights.network.architectures import build_network

LABELS = LabelScheme.from_dataset_json({"labels": {"background": 0, "core": 1, "rim": 2}})


def test_the_faster_one_is_taken_and_remembered_for_its_key(tmp_path, package_log):
    tried = []

    def trial(last):
        tried.append(last)
        return 0.05 if last else 0.08

    memory, key = tmp_path / "layouts.json", {"card": "X", "patch": [16, 24, 32]}
    assert faster_layout(trial, memory, key) is True and tried == [False, True]
    assert "channels first 80.0 ms, channels last 50.0 ms" in package_log.text
    assert faster_layout(lambda last: pytest.fail("measured again"), memory, dict(key)) is True
    assert faster_layout(lambda last: 0.05 if last else 0.01, memory, {**key, "card": "Y"}) is False
    assert {entry["card"] for entry in json.loads(memory.read_text()).values()} == {"X", "Y"}
    memory.write_text("damaged")
    assert faster_layout(trial, memory, key) is True and len(tried) == 4


def test_too_little_memory_for_both_is_not_remembered(tmp_path):
    memory = tmp_path / "layouts.json"
    assert faster_layout(lambda last: math.inf, memory, {}) is False and not memory.exists()
    assert faster_layout(lambda last: 0.1 if last else math.inf, memory, {}) is True


def test_a_trial_takes_steps_in_both_layouts_and_a_full_card_makes_it_infinite():
    seen = []

    original = build_loss(LABELS, False)

    def loss(output, target):
        seen.append(network[-1].encoder.stem.convs[0].conv.weight.is_contiguous(memory_format=torch.channels_last_3d))
        if full:
            raise torch.OutOfMemoryError("no memory")
        return original(output, target)

    network, full = [], False

    def build():
        network.append(build_network(CNN, 2, 3, PATCH))
        return network[-1]

    image, target = torch.randn(1, 2, *PATCH), torch.zeros(1, 1, *PATCH, dtype=torch.int16)
    trial = LayoutTrial(Recipe(), torch.device("cpu"), None, build, loss, image, target)
    assert 0 < trial.seconds(False) < 60 and set(seen) == {False}
    seen.clear()
    assert 0 < trial.seconds(True) < 60 and set(seen) == {True} and len(network) == 2
    full = True
    assert replace(trial).seconds(True) == math.inf


@pytest.mark.parametrize("last", [True, False])
def test_a_run_uses_what_was_chosen_and_records_what_was_asked(plan, recipe, monkeypatch, last):
    monkeypatch.setattr(trainer_module, "layout_of_run", lambda *arguments: last)
    layouts = []

    def describe(self, state, stop):
        weight = state.network.encoder.stages[0].blocks[0].conv1.conv.weight
        layouts.append(weight.is_contiguous(memory_format=torch.channels_last_3d))

    monkeypatch.setattr(trainer_module.PretrainedTrainer, "_describe", describe)
    trainer = trainer_of(plan, recipe)
    model = trainer.run()
    assert layouts == [last]
    kept = load_checkpoint(model.path / "fold_0/checkpoint_final.pth")["nnssl_adapt"]["recipe"]
    assert kept["channels_last"] is None


@pytest.mark.cuda
def test_a_trial_on_a_gpu(plan, recipe, tmp_path, own_cache, package_log):
    trainer = trainer_module.PretrainedTrainer(plan, recipe=recipe, device="cuda", workers=0, progress=False)
    trainer.run()
    assert (own_cache / "layouts.json").is_file() and "memory layout: channels" in package_log.text


def test_a_cascade_is_measured_with_the_channels_of_its_first_stage(monkeypatch):
    """The network that is tried has them; without them the measurement fails, and with it the training on a GPU."""
    tried = []
    monkeypatch.setattr(
        setup, "LayoutTrial", lambda **parts: tried.append(parts["image"]) or SimpleNamespace(seconds=0)
    )
    monkeypatch.setattr(setup, "faster_layout", lambda *arguments: False)
    monkeypatch.setattr(setup.torch.cuda, "get_device_name", lambda device: "card")
    plan = SimpleNamespace(
        labels=LABELS,
        num_channels=2, patch_size=(8, 12, 16), batch_size=3, stage_channels=lambda labels: labels.foreground_labels,
    )  # fmt: skip
    identity = SimpleNamespace(plan=plan, recipe=Recipe(), network="tiny")
    setup.layout_of_run(identity, torch.device("cuda"), None, None, Ranks())
    assert [tuple(image.shape) for image in tried] == [(3, 2 + 2, 8, 12, 16)]
