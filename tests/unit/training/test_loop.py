"""The loop: steps of one batch or several, precision, and steps that go wrong."""

import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from support.tiny_plans import CNN, PATCH, TRANSFORMER
from support.training_runs import assert_same_training, interrupt, trainer_of
from torch.nn.parallel import DistributedDataParallel

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import ConfigurationError, NonFiniteLoss, TrainingError
from nnssl_adapt.training import loop as loop_module
from nnssl_adapt.training import start as start_module
from nnssl_adapt.training import trainer as trainer_module
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.loop import TrainingLoop
from nnssl_adapt.training.optimise.ema import WeightAverage
from nnssl_adapt.training.optimise.losses import build_loss
from nnssl_adapt.training.optimise.optimizer import autocast_dtype, build_optimizer
from nnssl_adapt.training.optimise.schedule import prepare_epoch
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import TrainingState, load_checkpoint
from nnssl_adapt.training.starting_weights import StartingWeights
from nnssl_adapt.training.trainer import PretrainedTrainer
from nnssl_adapt.weights.network.architectures import build_network
from nnssl_adapt.weights.transfer.transfer import scratch_report


def test_a_few_bad_steps_are_skipped(plan, recipe, monkeypatch, package_log):
    weights = []

    def sometimes_nan(self, image, target, original=None):
        loss = original(image, target)
        return loss * math.nan if 2 <= len(weights) <= 3 else loss

    def keeping_weights(self, state, *arguments, original=TrainingLoop.step):
        value = original(self, state, *arguments)
        weights.append(next(state.network.parameters()).detach().clone())
        return value

    trainer = trainer_of(plan, recipe)
    inner = trainer.loss
    trainer.loss = lambda logits, target: sometimes_nan(trainer, logits, target, inner)
    monkeypatch.setattr(TrainingLoop, "step", keeping_weights)
    trainer.run()
    same = [torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert same == [False, True, True, False, False]
    assert package_log.text.count("not finite, skipped") == 2
    assert all(math.isfinite(loss) for loss in trainer.history.train_losses)


def test_many_bad_steps_end_the_run(plan, recipe):
    trainer = trainer_of(plan, recipe.override(iterations_per_epoch=30))
    inner = trainer.loss
    trainer.loss = lambda logits, target: inner(logits, target) / 0
    with pytest.raises(NonFiniteLoss, match=r"10 times in a row \(epoch 1, step 10\).*lower --lr"):
        trainer.run()


# -- a device that nobody waits for ------------------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch):
    """Optimisers are fused, as on a GPU: the CPU has such kernels too. Then figures are read one step late."""
    original = build_optimizer

    def build(*arguments):
        optimizer = original(*arguments)
        for group in optimizer.param_groups:
            group["fused"] = True
        optimizer._step_supports_amp_scaling = True  # what torch sets where it is told at the start
        return optimizer

    monkeypatch.setattr(start_module, "build_optimizer", build)
    return build


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_reading_late_changes_nothing(plan, recipe, fused, monkeypatch, tmp_path, optimizer, package_log):
    """Weights, average, losses and warnings, with steps that are not finite: the very first, and the last of an epoch."""
    recipe = recipe.override(optimizer=optimizer, ema_decay=0.8, epochs=2, iterations_per_epoch=4)
    bad, models, warnings = (1, 3, 4), [], []

    def read_at_once(self, state, *arguments, original=TrainingLoop.step):
        original(self, state, *arguments)
        self.settle(state)

    for number in range(2):
        if number:
            monkeypatch.setattr(TrainingLoop, "step", read_at_once)
        trainer = trainer_of(plan, recipe, results_folder=tmp_path / str(number))
        inner, calls = trainer.loss, itertools.count(1)
        trainer.loss = lambda logits, target, inner=inner, calls=calls: (
            inner(logits, target) * (math.nan if next(calls) in bad else 1)
        )
        package_log.clear()
        models.append(trainer.run())
        warnings.append([line for line in package_log.messages if "not finite, skipped" in line])
    assert_same_training(*models)
    assert warnings[0] == warnings[1]
    assert [line.split(":")[0] for line in warnings[0]] == [f"epoch 1, step {step}" for step in bad]


def test_an_epochs_validation_is_read_once(monkeypatch):
    """However many batches: what a batch gives stays on the device, losses and counts are read at the end."""
    loop = TrainingLoop(
        Recipe(validation_iterations=5), build_loss(LABELS, batch_dice=False), LABELS, 2, torch.device("cpu")
    )
    network = small_network()
    state = TrainingState(network, None, None)
    reads = []

    def counted(name):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args: reads.append(name) or original(self, *args))

    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
        counted(name)
    display = SimpleNamespace(step=lambda loss: reads.remove("__float__"))  # what it shows on a CPU
    stop = SimpleNamespace(asked=lambda: False)
    found = []
    for batches in (1, 5):
        reads.clear()
        loop.judge(network, batch_of(2))
        assert not reads
        judged = []
        monkeypatch.setattr(loop_module, "pseudo_dice", lambda counts, judged=judged: judged.append(reads.copy()))
        loop._judge_epoch(state, iter([batch_of(2)] * batches), network, display, stop)
        found += judged
    assert found == [["tolist", "cpu"]] * 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told_one_step_later(optimizer, package_log):
    network, cpu = small_network(), torch.device("cpu")
    recipe = Recipe(optimizer=optimizer, learning_rate=0.5, warmup_epochs=0, momentum=0.5)
    loop = TrainingLoop(recipe, build_loss(LABELS, batch_dice=False), LABELS, 2, cpu)
    state = TrainingState(network, build_optimizer(network, recipe, cpu), None)
    for group in state.optimizer.param_groups:
        group["fused"] = True
    prepare_epoch(network, state.optimizer, 0, recipe)
    good, bad = batch_of(2), batch_of(2)
    bad["image"][0] = math.inf

    def weights():
        return [weight.detach().clone() for weight in network.parameters()]

    before = weights()
    with deterministic_memory():  # memory without values is NaN: torch's first momentum of a skipped step
        assert loop.step(state, [bad], network) is None
        assert all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
        assert not package_log.messages and state.non_finite_in_a_row == 0  # nobody has looked yet
        assert math.isnan(loop.step(state, [good], network))
    assert package_log.messages == ["epoch 1, step 1: the loss or its gradient is not finite, skipped"]
    after = weights()
    assert all(torch.isfinite(w).all() for w in after) and not torch.equal(before[0], after[0])
    loop.settle(state)
    loop.settle(state)  # there is nothing left to read
    assert len(state.losses) == 1 and state.non_finite_in_a_row == 0


@contextlib.contextmanager
def deterministic_memory():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_checkpoint_between_two_steps_knows_the_last_one(plan, recipe, fused, tmp_path, monkeypatch):
    recipe = recipe.override(ema_decay=0.8)
    whole = trainer_of(plan, recipe, results_folder=tmp_path / "whole").run()
    with monkeypatch.context() as patched:
        interrupt(patched, step=5)
        with pytest.raises(TrainingError):
            trainer_of(plan, recipe, results_folder=tmp_path / "parts").run()
    latest = load_checkpoint(next((tmp_path / "parts").rglob("checkpoint_latest.pth")))["nnssl_adapt"]
    assert latest["iteration"] == len(latest["losses"]) == 2 and latest["average_state"]["updates"] == 5
    assert_same_training(whole, trainer_of(plan, recipe, results_folder=tmp_path / "parts").run(resume=True))


# -- precision ---------------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(start_module, "grad_scaler", lambda: torch.amp.GradScaler("cpu", init_scale=2.0**40))
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
def test_all_precisions_on_cuda(plan, recipe, precision, cuda_device):
    if cuda_device.type == "cpu" and precision == "fp16":
        pytest.skip("needs a card's loss scaling")
    recipe = recipe.override(precision=precision, compile="off", channels_last=False)
    trainer = PretrainedTrainer(plan, recipe=recipe, device=cuda_device, workers=0)
    trainer.run()
    assert trainer.history.train_losses[-1] < trainer.history.train_losses[0]


# -- steps of several batches ----------------------------------------------------------------------------------------------


def small_network():
    """A network that says where its encoder is, as all do that plans name."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 6, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv3d(6, 3, 1))
    network.key_to_encoder = network.key_to_stem = "0"
    return network


LABELS = LabelScheme.from_dataset_json({"labels": {"background": 0, "core": 1, "rim": 2}})


def batch_of(samples, seed=0):
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(samples, 1, 6, 8, 10, generator=random)
    return {"image": image, "target": torch.randint(0, 3, image.shape, generator=random).to(torch.int16)}


def weights_after(recipe, batch_size, batches):
    network = small_network()
    cpu = torch.device("cpu")
    loop = TrainingLoop(recipe, build_loss(LABELS, batch_dice=False), LABELS, batch_size, cpu)
    average = None if recipe.ema_decay is None else WeightAverage(network, recipe.ema_decay)
    state = TrainingState(network, build_optimizer(network, recipe, cpu), None, average)
    prepare_epoch(network, state.optimizer, 0, recipe)
    losses = [loop.step(state, step, network) for step in batches]
    return [weight.detach() for weight in network.parameters()], losses, state


def test_accumulated_batches_equal_one_larger_batch():
    recipe = Recipe(learning_rate=0.5, warmup_epochs=0, momentum=0.5, weight_decay=0.01, gradient_clip=0.3)
    whole = [batch_of(6, seed) for seed in range(3)]
    parts = [[{key: value[i : i + 2] for key, value in batch.items()} for i in (0, 2, 4)] for batch in whole]
    at_once, losses, _ = weights_after(recipe, 6, [[batch] for batch in whole])
    in_parts, losses_of_parts, _ = weights_after(recipe.override(accumulate=3), 2, parts)
    assert losses_of_parts == pytest.approx(losses, abs=1e-5)
    for one, other, start in zip(at_once, in_parts, small_network().parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6) and not torch.allclose(one, start, atol=1e-3)


def test_gradients_travel_with_the_last_batch_of_a_step_only(monkeypatch):
    kept = []

    class Wrapped(DistributedDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)

        @contextlib.contextmanager
        def no_sync(self):
            kept.append(True)
            yield
            kept.append(False)

    alone = TrainingLoop.__post_init__

    def together(self):
        alone(self)
        self._wrapped = (), Wrapped(), None

    def loss(output, target):
        during.append(bool(kept) and kept[-1])
        return build_loss(labels, False)(output, target)

    during = []
    monkeypatch.setattr(TrainingLoop, "__post_init__", together)
    labels = LabelScheme.from_dataset_json({"labels": {"background": 0, "a": 1}})
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    recipe = Recipe(accumulate=3, warmup_epochs=0)
    loop = TrainingLoop(recipe, loss, labels, 2, torch.device("cpu"))
    state = TrainingState(network, build_optimizer(network, recipe, torch.device("cpu")), None)
    batch = {"image": torch.randn(2, 1, 4, 6, 8), "target": torch.zeros(2, 1, 4, 6, 8, dtype=torch.int16)}
    loop.step(state, [batch] * 3, network)
    assert during == [True, True, False] and kept == [True, False, True, False]


def test_weights_without_a_gradient_are_looked_for_only_where_there_may_be_some():
    seen = []

    class Two(Ranks):
        def wrap(self, network, find_unused=True):
            seen.append(find_unused)
            return network

    network = build_network(CNN, 1, 2, PATCH)
    for deep in (False, True):
        recipe = Recipe(deep_supervision=deep, compile="off", channels_last=False)
        TrainingLoop(recipe, None, None, 2, torch.device("cpu"), ranks=Two())._forward(network)
    assert seen == [False, True]


def test_each_batch_of_a_step_is_another(plan, recipe):
    seen = []

    def recording(self, state, batches, forward, original=TrainingLoop.step):
        batches = list(batches)
        seen.append([batch["image"] for batch in batches])
        return original(self, state, batches, forward)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingLoop, "step", recording)
        trainer = trainer_of(plan, recipe.override(accumulate=2))
        trainer.run()
    assert [len(step) for step in seen] == [2] * 6
    images = [image for step in seen for image in step]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(images, 2))
    assert len(trainer.history) == 2


# -- averaged weights ------------------------------------------------------------------------------------------------------


def test_skipped_steps_do_not_count_for_the_average():
    recipe = Recipe(learning_rate=0.5, warmup_epochs=0, ema_decay=0.9)
    good, bad = batch_of(2), batch_of(2)
    bad["image"][0] = math.inf
    once = weights_after(recipe, 2, [[good]])[2]
    with_bad = weights_after(recipe, 2, [[bad], [good], [bad]])[2]
    for name, tensor in once.average.weights().items():
        assert torch.equal(tensor, with_bad.average.weights()[name])
    assert (with_bad.iteration, with_bad.non_finite_in_a_row, len(with_bad.losses)) == (3, 1, 1)


def test_the_average_predicts_and_the_weights_are_trained_on(plan, recipe, monkeypatch):
    judged = []

    def recording(self, forward, batch, original=TrainingLoop.judge):
        judged.append(next(forward.parameters()).detach().clone())
        return original(self, forward, batch)

    trained = []

    def keeping(self, state, *arguments, original=TrainingLoop.step):
        trained.append(next(state.network.parameters()).detach().clone())  # before the step
        return original(self, state, *arguments)

    monkeypatch.setattr(TrainingLoop, "judge", recording)
    monkeypatch.setattr(TrainingLoop, "step", keeping)
    plain = trainer_of(plan, recipe.override(trainer_name="Plain")).run()
    of_plain, judged[:] = list(trained), []
    trained.clear()
    model = trainer_of(plan, recipe.override(ema_decay=0.9)).run()
    assert all(torch.equal(one, other) for one, other in zip(of_plain, trained, strict=True))  # training is the same
    weights = model.load_weights(0).network_weights
    first = next(iter(weights))
    assert torch.equal(weights[first], judged[-1])
    assert not torch.equal(weights[first], plain.load_weights(0).network_weights[first])


def test_adapters_are_merged_in_what_is_saved(make_plan, recipe, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    plan = make_plan(TRANSFORMER)
    recipe = recipe.override(lora_rank=2, optimizer="adamw", ema_decay=0.8, from_scratch=False)
    # As if the network's own weights were the pre-trained ones.
    monkeypatch.setattr(
        start_module,
        "fill_with_starting_weights",
        lambda network, plan, *_: StartingWeights(scratch_report(network), plan),
    )
    whole = trainer_of(plan, recipe, results_folder=tmp_path / "whole").run()
    names = set(whole.load_weights(0).network_weights)
    assert names == set(whole.build_network().state_dict())
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, step=5)
        with pytest.raises(TrainingError):
            trainer_of(plan, recipe, results_folder=tmp_path / "parts").run()
    latest = load_checkpoint(next((tmp_path / "parts").rglob("checkpoint_latest.pth")))
    assert set(latest["network_weights"]) == names  # nnU-Net can predict with it
    assert any("lora" in name for name in latest["nnssl_adapt"]["training_weights"])
    assert_same_training(whole, trainer_of(plan, recipe, results_folder=tmp_path / "parts").run(resume=True))


def test_deep_supervision_trains_and_predicts(plan, recipe, tmp_path):
    recipe = recipe.override(deep_supervision=True)
    model = trainer_of(plan, recipe).run()
    assert (model.path / "fold_0" / "validation" / "summary.json").is_file()
    trainer = trainer_of(plan, recipe, disable_checkpointing=True, results_folder=tmp_path)
    trainer.run()
    assert trainer.summary is not None
