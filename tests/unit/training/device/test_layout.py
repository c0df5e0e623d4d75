"""The faster memory layout is measured once, and remembered for the card and the network."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from support.tiny_plans import CNN, PATCH, TRANSFORMER
from support.training_runs import trainer_of

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.training import setup
from nnssl_adapt.training import trainer as trainer_module
from nnssl_adapt.training.device import layout as layout_module
from nnssl_adapt.training.device.layout import Layout, LayoutTrial, faster_layout, possible_layouts
from nnssl_adapt.training.fused import norm
from nnssl_adapt.training.fused.modules import FusedNorm
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.optimise.losses import alone, build_loss
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import load_checkpoint
from nnssl_adapt.weights.network.architectures import build_network

LABELS = LabelScheme.from_dataset_json({"labels": {"background": 0, "core": 1, "rim": 2}})


FIRST, LAST, FUSED = Layout(), Layout(True), Layout(True, True)
ALL = (FIRST, LAST, FUSED)


def test_the_fastest_is_taken_and_remembered_for_its_key(tmp_path, package_log):
    tried, seconds = [], {FIRST: 0.08, LAST: 0.05, FUSED: 0.04}

    def trial(layout):
        tried.append(layout)
        return seconds[layout]

    memory, key = tmp_path / "layouts.json", {"card": "X", "patch": [16, 24, 32]}
    assert faster_layout(ALL, trial, memory, key) == FUSED and tried == list(ALL)
    assert "channels first 80.0 ms, channels last 50.0 ms, channels last with fused norms 40.0 ms" in package_log.text
    assert faster_layout(ALL, lambda layout: pytest.fail("measured again"), memory, dict(key)) == FUSED
    assert (
        faster_layout(ALL[:2], lambda layout: 0.05 if layout == LAST else 0.01, memory, {**key, "card": "Y"}) == FIRST
    )
    assert {entry["card"] for entry in json.loads(memory.read_text()).values()} == {"X", "Y"}
    for damaged in (
        "damaged",
        json.dumps({digest: {"channels_last": True} for digest in json.loads(memory.read_text())}),
    ):
        tried.clear()
        memory.write_text(damaged)
        assert faster_layout(ALL, trial, memory, key) == FUSED and len(tried) == 3


def test_too_little_memory_for_all_is_not_remembered(tmp_path, package_log):
    memory = tmp_path / "layouts.json"
    assert faster_layout(ALL, lambda layout: math.inf, memory, {}) == FIRST and not memory.exists()
    assert "too small" in package_log.text
    assert faster_layout(ALL, lambda layout: 0.1 if layout == LAST else math.inf, memory, {}) == LAST


def test_what_a_recipe_leaves_open(monkeypatch, package_log):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for kernels in (True, False):
        monkeypatch.setattr(layout_module, "has_kernels", lambda kernels=kernels: kernels)
        with_fused = [FUSED] * kernels
        assert possible_layouts(Recipe(), cuda) == [FIRST, LAST, *with_fused]
        assert possible_layouts(Recipe(channels_last=True), cuda) == [LAST, *with_fused]
        assert possible_layouts(Recipe(channels_last=False), cuda) == [FIRST]
        assert possible_layouts(Recipe(fused_norm="off"), cuda) == [FIRST, LAST]
        assert (
            possible_layouts(Recipe(fused_norm="on"), cuda) == [FUSED] == possible_layouts(Recipe(fused_norm="on"), cpu)
        )
        assert possible_layouts(Recipe(), cpu) == [FIRST] and possible_layouts(Recipe(channels_last=True), cpu) == [
            LAST
        ]
    assert package_log.text.count("Triton is not installed") == 1
    with pytest.raises(ConfigurationError, match="channels last"):
        Recipe(fused_norm="on", channels_last=False)


def trial_of(loss, architecture=CNN):
    networks = []

    def build():
        torch.manual_seed(0)
        networks.append(build_network(architecture, 2, 3, PATCH))
        return networks[-1]

    image = torch.randn(1, 2, *PATCH, generator=torch.Generator().manual_seed(1))
    target = torch.zeros(1, 1, *PATCH, dtype=torch.int16)
    return LayoutTrial(Recipe(), torch.device("cpu"), None, build, loss, image, target), networks


def test_a_trial_takes_steps_in_each_layout_and_a_full_card_makes_it_infinite():
    seen, full = [], False
    original = build_loss(LABELS, False)

    def loss(output, target):
        network = networks[-1]
        last = network.encoder.stem.convs[0].conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
        seen.append((last, any(isinstance(module, FusedNorm) for module in network.modules())))
        if full:
            raise torch.OutOfMemoryError("no memory")
        return original(output, target)

    trial, networks = trial_of(loss)
    for layout, expected in ((FIRST, (False, False)), (LAST, (True, False)), (FUSED, (True, True))):
        seen.clear()
        assert 0 < trial.seconds(layout) < 60 and set(seen) == {expected}
    assert len(networks) == 3
    full = True
    assert trial.seconds(LAST) == math.inf


def test_fused_norms_that_fail_or_differ_or_do_not_occur_are_not_used(monkeypatch, package_log):
    trial, _ = trial_of(build_loss(LABELS, False))
    assert math.isfinite(trial.seconds(LAST))
    original = norm._norm_act_backward

    def wrong(gradient, *arguments):
        return original(3 * gradient, *arguments)

    monkeypatch.setattr(norm, "_norm_act_backward", wrong)
    assert trial.seconds(FUSED) == math.inf and "norm of the gradient" in package_log.text

    def failing(*arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(norm, "_norm_act_backward", failing)
    assert trial.seconds(FUSED) == math.inf and "no such kernel" in package_log.text
    transformer, _ = trial_of(build_loss(LABELS, False), TRANSFORMER)
    assert transformer.seconds(FUSED) == math.inf


@pytest.mark.parametrize("layout", ALL, ids=str)
def test_a_run_uses_what_was_chosen_and_records_what_was_asked(plan, recipe, monkeypatch, layout):
    monkeypatch.setattr(trainer_module, "layout_of_run", lambda *arguments: layout)
    layouts = []

    def describe(identity, recipe, network, *arguments, **named):
        block = network.encoder.stages[0].blocks[0]
        last = block.conv1.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
        layouts.append(Layout(last, isinstance(block.conv1.norm, FusedNorm)))

    monkeypatch.setattr(trainer_module, "describe_run", describe)
    trainer = trainer_of(plan, recipe)
    model = trainer.run()
    assert layouts == [layout]
    kept = load_checkpoint(model.path / "fold_0/checkpoint_final.pth")["nnssl_adapt"]["recipe"]
    assert kept["channels_last"] is None and kept["fused_norm"] == "auto"


def test_ranks_do_not_wait_for_each_other_in_a_trial(plan, recipe, monkeypatch):
    """One of them may have the answer from an earlier run, and the others would wait for it for ever."""
    losses = []

    def chosen(identity, device, dtype, loss, ranks):
        losses.append(loss)
        return FIRST

    monkeypatch.setattr(trainer_module, "layout_of_run", chosen)
    trainer = trainer_of(plan, recipe)
    trainer.run()
    assert losses[0].reduce is alone and trainer.loss.reduce == trainer.ranks.sum


def test_a_run_with_fused_norms_gives_the_weights_of_one_without(plan, recipe):
    found = []
    for fused in ("on", "off"):
        model = trainer_of(plan, recipe.override(fused_norm=fused, trainer_name=f"Fused_{fused}")).run()
        found.append(load_checkpoint(model.path / "fold_0/checkpoint_final.pth")["network_weights"])
    assert list(found[0]) == list(found[1])
    for name, weight in found[0].items():
        assert torch.allclose(weight, found[1][name], atol=1e-4), name


@pytest.mark.cuda
def test_a_trial_on_a_gpu(plan, recipe, tmp_path, own_cache, package_log, cuda_device):
    trainer = trainer_module.PretrainedTrainer(
        plan, recipe=recipe.override(compile="off"), device=cuda_device, workers=0, progress=False
    )
    trainer.run()
    if cuda_device.type == "cuda":
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
