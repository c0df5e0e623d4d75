"""Runs on a card: batches from worker processes, going on after a stop, two processes on one card, too little memory."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from support.card import (
    LABELS,
    PATCH,
    RESENC,
    Training,
    assert_close,
    batch_of,
    memory_limited_to,
    network_of,
    recipe_of,
    relative_error,
)
from support.card_ranks import STEPS
from support.tiny_plans import identity_of

from nnssl_adapt.errors import TrainingError
from nnssl_adapt.inference.convolutions import exact_float32
from nnssl_adapt.inference.sliding_window import sliding_window_logits
from nnssl_adapt.training.optimise.out_of_memory import explained_memory_errors, explained_validation_memory
from nnssl_adapt.training.run.checkpointing import LATEST, CheckpointWriter, load_checkpoint, restore

# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder with two preprocessed cases."""
    pytest.importorskip("blosc2")
    from nnssl_adapt.data.store import CaseStore, PreprocessedCase

    store, random = CaseStore(tmp_path_factory.mktemp("store")), np.random.default_rng(0)
    store.begin({"digest": "test"})
    for number, shape in enumerate(((30, 40, 50), (36, 34, 44))):
        data = random.normal(size=(1, *shape)).astype(np.float32)
        seg = np.clip(data * 1.3 + 1, 0, 3).astype(np.int16)
        where = {label: np.argwhere(seg == label)[:1000] for label in range(1, 4)}
        store.write(f"case_{number}", PreprocessedCase(data, seg, {"class_locations": where}), PATCH, digest="test")
    return store.folder


@pytest.mark.parametrize("augmentation", ["default", "gpu"])
def test_workers_and_pinned_memory(store, augmentation, cuda_device):
    """Batches of two workers, pinned for a card, are those that are made here, and are trained on."""
    from nnssl_adapt.training.batches.ahead import prepared_ahead
    from nnssl_adapt.training.batches.augment import SpatialRange, training_transforms
    from nnssl_adapt.training.batches.augment_gpu import DeviceAugmentation, device_transforms
    from nnssl_adapt.training.batches.patches import (
        TRAINING,
        Batches,
        BatchSchedule,
        PatchSampler,
        PhaseData,
        iterate_batches,
    )

    pinned, spatial = cuda_device.type == "cuda", SpatialRange.of(PATCH)
    if augmentation == "gpu":
        chain = device_transforms(spatial, (0, 1, 2), LABELS)
    else:
        chain = training_transforms(PATCH, spatial, (0, 1, 2), (False,), LABELS)
    phase = PhaseData(("case_0", "case_1"), PatchSampler(spatial.read_size, PATCH), chain)
    batches = Batches(store, {TRAINING: phase}, 2, 0.33, 0)
    training = Training(cuda_device, recipe_of(augmentation=augmentation))
    images = {}
    several = 2 if pinned else 1  # each takes seconds to start
    for workers in (several, 0) if augmentation == "default" else (several if pinned else 0,):
        stream = iterate_batches(batches, BatchSchedule(1, 4, 0), workers, pinned)
        if augmentation == "gpu":
            stream = prepared_ahead(stream, DeviceAugmentation(LABELS, (False,)), cuda_device)
        with closing(stream):
            images[workers] = list(stream)
    if augmentation == "default":
        for one, other in zip(images[several], images[0], strict=True):
            assert one["image"].is_pinned() == pinned and torch.equal(one["image"], other["image"])
    losses = training.step(*next(iter(images.values())))
    assert len(losses) == 4 and np.isfinite(losses).all()


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "layouts"), [("sgd", (False, False)), ("adamw", (True, True)), ("sgd", (True, False))]
)
def test_ten_steps_are_five_and_five(optimizer, layouts, cuda_device, tmp_path):
    """Also where the second half runs in another memory layout."""
    rate = 0.02 if optimizer == "sgd" else 0.001
    batches = [batch_of(seed=seed) for seed in range(10)]

    def training_in(last):
        fields = {"ema_decay": 0.8, "optimizer": optimizer, "learning_rate": rate, "channels_last": last}
        return Training(cuda_device, recipe_of(**fields))

    with exact_float32(cuda_device):
        whole = training_in(layouts[0])
        whole.step(*batches)
        first = training_in(layouts[0])
        first.step(*batches[:5])
        identity = identity_of(RESENC, first.recipe, PATCH)
        with CheckpointWriter(tmp_path, identity) as checkpoints:
            checkpoints.latest(first.state)
        second = training_in(layouts[1])
        restore(second.state, load_checkpoint(tmp_path / LATEST), second.recipe)
        second.step(*batches[5:])
    assert second.state.iteration == 10 and second.state.losses == pytest.approx(whole.state.losses, rel=1e-3)
    assert relative_error(second.logits(), whole.logits()) < 1e-2
    if (
        optimizer == "sgd"
    ):  # Adam makes steps of full length of gradients that are noise, as those of biases before a norm
        assert_close(second.weights(), whole.weights(), rtol=1e-2, atol=2e-4)
        averages = [{n: t.cpu() for n, t in each.state.average.weights().items()} for each in (second, whole)]
        assert_close(*averages, rtol=1e-2, atol=2e-4)


# -- two processes -----------------------------------------------------------------------------------------------------


def test_two_processes_on_one_card_train_what_one_does(cuda_device, tmp_path):
    """Over gloo, which takes tensors of a card: NCCL wants a card for each."""
    program = Path(sys.modules["support.card_ranks"].__file__)
    arguments = [str(tmp_path / "meeting"), str(tmp_path / "rank"), "cuda:0" if cuda_device.type == "cuda" else "cpu"]
    processes = [
        subprocess.Popen([sys.executable, str(program), str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "".join(ends)[-2000:]
    alone = Training(cuda_device, recipe_of(batch_dice=True), batch_size=4)
    alone.step(*[batch_of(4, seed) for seed in range(STEPS)])
    found = [torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2)]
    assert_close(found[0]["weights"], found[1]["weights"], rtol=0, atol=0)
    assert_close(found[0]["weights"], alone.weights(), rtol=1e-2, atol=2e-4)
    assert found[0]["losses"] == pytest.approx(alone.state.losses, rel=1e-3)


# -- too little memory -------------------------------------------------------------------------------------------------


def test_a_step_without_memory_says_what_would_fit(cuda_device):
    """And the memory is free afterwards: a smaller step is taken."""
    recipe = recipe_of()
    plan = identity_of(RESENC, recipe, PATCH).plan
    training = Training(cuda_device, recipe)

    def forward(image):
        if cuda_device.type == "cpu":  # which has no limit
            raise torch.OutOfMemoryError("CUDA out of memory")
        return training.state.network(image)

    large = {key: value.repeat(64, 1, 4, 1, 1) for key, value in batch_of().items()}
    with (
        memory_limited_to(100 * 2**20, cuda_device),
        pytest.raises(TrainingError, match="too small for patch"),
        explained_memory_errors(plan, recipe, cuda_device),
    ):
        training.loop.step(training.state, [large], forward)
    assert len(training.step(batch_of())) == 1


@pytest.mark.parametrize("room", [70, 160])
def test_logits_that_don_t_fit(room, cuda_device, caplog):
    """Where the room (MiB) is too small for 220 MB of sums, they are in float16 or in main memory, and the labels stay."""
    heads, shape = 40, (96, 112, 128) if cuda_device.type == "cuda" else (10, 12, 20)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.LeakyReLU(), torch.nn.Conv3d(8, heads, 1)
    )
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    options = {"mirror_axes": (0, 1), "device": cuda_device, "autocast_dtype": None}
    expected = sliding_window_logits(network, image, PATCH, heads, **options)
    with memory_limited_to(room * 2**20, cuda_device):
        found = sliding_window_logits(network, image, PATCH, heads, **options)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    if cuda_device.type == "cuda":
        assert "GPU memory is too small" in caplog.text


def test_validation_without_memory_does_not_blame_the_batch(cuda_device):
    plan = identity_of(RESENC, recipe_of(), PATCH).plan
    with (
        memory_limited_to(2**20, cuda_device),
        pytest.raises(TrainingError, match="--val") as caught,
        explained_validation_memory(plan, cuda_device),
    ):
        if cuda_device.type == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        torch.empty(2**30, device=cuda_device)
    assert "--batch" not in str(caught.value)


# -- prediction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_large_windows_give_the_cpu_s_labels(precision, cuda_device):
    on_card = cuda_device.type == "cuda"
    image = torch.randn(1, *((100, 130, 150) if on_card else (12, 12, 20)), generator=torch.Generator().manual_seed(2))
    network, heads = network_of(), LABELS.num_heads
    expected = sliding_window_logits(network, image, PATCH, heads, mirror_axes=(2,), device="cpu")
    found = sliding_window_logits(
        network, image, PATCH, heads, mirror_axes=(2,), device=cuda_device, autocast_dtype=precision, keep=True
    )
    assert found.device.type == cuda_device.type
    differ = float((found.cpu().argmax(0) != expected.argmax(0)).double().mean())
    assert differ < (1e-4 if precision is None else 2e-2)
    error = float((found.cpu() - expected).norm() / expected.norm())
    assert error < (1e-4 if precision is None else 2e-2)
