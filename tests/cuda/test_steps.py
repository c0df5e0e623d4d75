"""A training step on a card computes what float64 on a CPU computes, however the network is run."""

import pytest
import torch
from support.card import LABELS, PRIMUS, RESENC, Training, assert_close, batch_of, network_of, recipe_of, relative_error

from nnssl_adapt.inference.convolutions import exact_float32
from nnssl_adapt.training.optimise.losses import build_loss

HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}
LAYOUTS = {
    "first": {"channels_last": False},
    "last": {"channels_last": True},
    "fused": {"channels_last": True, "fused_norm": "on"},
}
NO_COMPILER = "torch.compile does not work here"


def half_on(device, precision):
    """CPUs compute in bf16 where a card does in fp16, which takes them minutes."""
    return torch.bfloat16 if device.type == "cpu" and precision == "fp16" else HALF[precision]


@pytest.fixture(scope="module")
def exact():
    """The gradient of a step in float64, as one vector, by architecture."""
    found = {}
    for architecture in (RESENC, PRIMUS):
        network, batch = network_of(architecture).double(), batch_of()
        build_loss(LABELS, False)(network(batch["image"].double()), batch["target"]).backward()
        found[architecture.class_name] = gradient_of(network)
    return found


def gradient_of(network):
    return torch.cat([w.grad.flatten() for w in network.parameters() if w.grad is not None]).double().cpu()


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", HALF)
def test_gradients(precision, layout, compile, exact, cuda_device, caplog):
    check_gradients(RESENC, precision, layout, compile, exact, cuda_device)
    assert NO_COMPILER not in caplog.text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_a_transformer(precision, exact, cuda_device, caplog):
    check_gradients(PRIMUS, precision, "first", "on", exact, cuda_device)
    assert NO_COMPILER not in caplog.text


def check_gradients(architecture, precision, layout, compile, exact, device):
    training = Training(device, recipe_of(**LAYOUTS[layout], compile=compile), architecture)
    batch = {key: value.to(device) for key, value in batch_of().items()}
    half, scale = half_on(device, precision), 1024 if precision == "fp16" else 1
    with exact_float32(device):
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            loss = training.loop.loss(training.forward(batch["image"]), batch["target"])
        (loss * scale).backward()
    error = relative_error(gradient_of(training.state.network) / scale, exact[architecture.class_name])
    assert error < TOLERANCES["bf16" if half is torch.bfloat16 else precision]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fp16_steps_that_overflow_are_skipped_until_the_scale_fits(optimizer, cuda_device):
    scale = 2.0**40 if cuda_device.type == "cuda" else 2.0**127  # bf16 has the range of float32
    scaler = torch.amp.GradScaler(cuda_device.type, init_scale=scale)
    rate = 0.02 if optimizer == "sgd" else 0.002
    training = Training(
        cuda_device,
        recipe_of(optimizer=optimizer, learning_rate=rate),
        half=half_on(cuda_device, "fp16"),
        scaler=scaler,
    )
    inner = training.loop.loss
    training.loop.loss = lambda logits, target: 4 * inner(logits, target)
    before = training.weights()
    training.step(batch_of())
    assert scaler.get_scale() < scale
    assert_close(training.weights(), before, rtol=0, atol=0)
    losses = training.step(*[batch_of()] * (60 if cuda_device.type == "cuda" else 12))
    assert all(torch.isfinite(w).all() for w in training.weights().values()) and losses[-1] < losses[0]


def test_a_step_that_is_not_finite_changes_nothing(cuda_device, caplog):
    training = Training(cuda_device, recipe_of(ema_decay=0.9), half=torch.bfloat16)
    training.step(batch_of())
    before, average = training.weights(), {n: t.clone() for n, t in training.state.average.weights().items()}
    bad = batch_of()
    bad["image"][0, 0, 0, 0, 0] = float("nan")
    training.step(bad)
    assert_close(training.weights(), before, rtol=0, atol=0)
    assert_close(training.state.average.weights(), average, rtol=0, atol=0)
    assert "not finite, skipped" in caplog.text and len(training.state.losses) == 1


OPTIONS = {
    "ema": (RESENC, {"ema_decay": 0.9}),
    "frozen": (RESENC, {"freeze": "encoder"}),
    "lora": (PRIMUS, {"lora_rank": 2, "optimizer": "adamw", "learning_rate": 0.001}),
    "recomputed": (RESENC, {"activation_checkpointing": True}),
    "fused": (RESENC, {"channels_last": True, "fused_norm": "on", "ema_decay": 0.9, "freeze": "encoder"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_under_the_compiler(option, cuda_device, caplog):
    """Four compiled steps end where four eager ones do; what does not learn stays as it was."""
    if option == "lora":
        pytest.importorskip("peft")
    architecture, fields = OPTIONS[option]
    batches = [batch_of(seed=seed) for seed in range(4)]
    ends, averages, logits = [], [], []
    for compile in ("off", "on"):
        training = Training(cuda_device, recipe_of(compile=compile, **fields), architecture)
        before = training.weights()
        with exact_float32(cuda_device):
            training.step(*batches)
        ends.append(training.weights())
        logits.append(training.logits())
        averages.append(training.state.average and training.state.average.weights())
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, ends[-1][name])}
        if fields.get("freeze"):
            assert changed and not [name for name in changed if name.startswith(training.state.network.key_to_encoder)]
        if option == "lora":
            assert any("lora_" in name for name in changed) and not [name for name in changed if "base_layer" in name]
    assert NO_COMPILER not in caplog.text
    assert relative_error(logits[1], logits[0]) < 1e-2
    if option != "lora":  # AdamW, see test_ten_steps_are_five_and_five
        assert_close(ends[1], ends[0], rtol=1e-2, atol=2e-4)
    if fields.get("ema_decay"):
        assert_close(
            *({name: tensor.cpu() for name, tensor in average.items()} for average in reversed(averages)),
            rtol=1e-2,
            atol=2e-4,
        )


def test_layouts_end_at_the_same_weights(cuda_device):
    batches = [batch_of(seed=seed) for seed in range(4)]
    ends = []
    for fields in LAYOUTS.values():
        training = Training(cuda_device, recipe_of(**fields))
        with exact_float32(cuda_device):
            training.step(*batches)
        ends.append(training.weights())
    for end in ends[1:]:
        assert_close(end, ends[0], rtol=1e-2, atol=2e-4)
