"""What a recipe's fields do to a whole run: which weights end where, and that a resumed run ends in the same place."""

import pytest
import torch
from support.tiny_plans import CNN, TRANSFORMER
from support.training_runs import assert_same_training, fold_of, interrupt, trainer_of

from nnssl_adapt.errors import TrainingStopped
from nnssl_adapt.training.optimise.schedule import learning_rate
from nnssl_adapt.training.run.checkpointing import load_checkpoint


@pytest.fixture
def pretrained(make_plan, recipe, tmp_path):
    """Call it with an architecture: a plan, and the folder of a model of it that has been trained for a step."""

    def make(architecture):
        plan = make_plan(architecture)
        short = recipe.override(epochs=1, iterations_per_epoch=1, warmup_epochs=0, trainer_name="Before")
        return plan, trainer_of(plan, short, results_folder=tmp_path / "before").run().path

    return make


def final(model):
    return load_checkpoint(fold_of(model) / "checkpoint_final.pth")["network_weights"]


def moved(before, after):
    assert list(before) == list(after)
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize(
    ("architecture", "fields", "learned"),
    [
        (CNN, {"freeze": "encoder"}, ("decoder.",)),
        (CNN, {"freeze": "all_but_head"}, ("decoder.seg_layers.1.",)),
        (
            CNN,
            {"freeze": "stages:2", "loss": "dice_focal", "class_weights": {"background": 0.5}},
            ("decoder.", "encoder.stages.2."),
        ),
        (
            TRANSFORMER,
            {"lora_rank": 2, "optimizer": "adam"},
            ("up_projection.", "eva.blocks.0.attn.", "eva.blocks.1.attn."),
        ),
        (CNN, {"layer_decay": 0.5, "ema_decay": 0.9, "decoder_warmup_epochs": 1}, ("decoder.", "encoder.")),
    ],
)
def test_only_what_should_learn_learns_and_resuming_changes_nothing(
    pretrained, recipe, tmp_path, architecture, fields, learned
):
    if "lora_rank" in fields:
        pytest.importorskip("peft")
    plan, source = pretrained(architecture)
    recipe = recipe.override(from_scratch=False, epochs=3, **fields)
    whole = trainer_of(plan, recipe, checkpoint=source, results_folder=tmp_path / "whole").run()
    before = load_checkpoint(source / "fold_0" / "checkpoint_final.pth")["network_weights"]
    changed = moved(before, final(whole))
    changed = {name for name in changed if not name.startswith("decoder.encoder.")}  # another name of the encoder
    assert changed and all(name.startswith(learned) for name in changed)
    assert all(any(name.startswith(part) for name in changed) for part in learned)

    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, step=5)
        with pytest.raises(TrainingStopped):
            trainer_of(plan, recipe, checkpoint=source, results_folder=tmp_path / "parts").run()
    model = trainer_of(plan, recipe, checkpoint=source, results_folder=tmp_path / "parts").run(resume=True)
    assert_same_training(whole, model)


def test_the_logged_rate_is_the_schedules(plan, recipe):
    recipe = recipe.override(
        epochs=9, iterations_per_epoch=1, validation_iterations=1, decoder_warmup_epochs=5, warmup_epochs=2
    )
    trainer = trainer_of(plan, recipe)
    trainer.run()
    expected = [learning_rate(epoch, recipe) for epoch in range(9)]
    assert trainer.history.lrs == expected and len(set(expected)) > 4
