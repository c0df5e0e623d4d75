"""A short test of what training asks of a GPU: does it compute what a CPU does, and is the machine around it fit for it?"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import NnsslAdaptError, OtherRankFailed
from nnssl_adapt.geometry.logits import logits_to_labels
from nnssl_adapt.geometry.logits_on_device import labels_on_device
from nnssl_adapt.inference.convolutions import exact_float32
from nnssl_adapt.inference.sliding_window import sliding_window_logits
from nnssl_adapt.machine.resources import Resources
from nnssl_adapt.text import size_text
from nnssl_adapt.training.fused.check import norm_error
from nnssl_adapt.training.launch.meeting import processes_talk
from nnssl_adapt.training.loop import TrainingLoop
from nnssl_adapt.training.optimise.losses import build_loss
from nnssl_adapt.training.optimise.network_options import CompiledForward, to_device, training_forward
from nnssl_adapt.training.optimise.one_pass import in_one_pass
from nnssl_adapt.training.optimise.optimizer import autocast_dtype, build_optimizer, grad_scaler
from nnssl_adapt.training.optimise.schedule import prepare_epoch
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.run.checkpointing import TrainingState
from nnssl_adapt.weights.network.architectures import Architecture, build_network

_ERRORS: tuple[type[Exception], ...] = (
    *(NnsslAdaptError, RuntimeError, ValueError, TypeError, ImportError, OSError, LookupError, AssertionError),
    AttributeError,
)
"""What a part that does not work raises: each becomes a line, and the test goes on."""

_TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}
"""Largest relative error of a gradient, as a whole, against float64."""

_SLOWEST_COPY = 2.0
"""GB/s from pinned memory to the card, below which the card is not well connected. PCI Express 3.0 with four lanes has 3."""

_SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm below which worker processes can hand over few batches of usual patches."""

_LABELS = LabelScheme.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2, "c": 3}})
_PATCH = (16, 24, 32)


@dataclass(frozen=True)
class Finding:
    """What one part of the test found.

    Attributes:
        name: of the part.
        text: what was measured, or what is wrong.
        passed: whether training can rely on it.
    """

    name: str
    text: str
    passed: bool

    def __str__(self) -> str:
        return f"{'ok   ' if self.passed else 'WRONG'}  {self.name}: {self.text}"


@dataclass(frozen=True)
class SelfTest:
    """The findings. ``print`` its :attr:`verdict` for one line."""

    findings: tuple[Finding, ...]

    @property
    def is_ready(self) -> bool:
        return all(finding.passed for finding in self.findings)

    @property
    def verdict(self) -> str:
        """``ready``, or what is wrong."""
        wrong = [f"{finding.name} ({finding.text})" for finding in self.findings if not finding.passed]
        return f"not ready: {'; '.join(wrong)}" if wrong else "ready"


class Problem(Exception):
    """A part of the test found that something is wrong; its text says what."""


def self_test(device: torch.device, tell: Callable[[Finding], None] = lambda finding: None) -> SelfTest:
    """Test a device in about two minutes; ``tell`` hears of each part when it is done. Nothing is left on disk.

    On a CPU the parts that only a card has are left out, by the same code.
    """
    findings = []
    for name, part in _parts(device):
        try:
            finding = Finding(name, part(), True)
        except Problem as problem:
            finding = Finding(name, str(problem), False)
        except _ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            finding = Finding(name, f"{type(error).__name__}: {reason}", False)
        tell(finding)
        findings.append(finding)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return SelfTest(tuple(findings))


def _parts(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    on_cuda = device.type == "cuda"
    if on_cuda:
        yield "card", lambda: _card(device)
    yield "bandwidths", lambda: _bandwidths(device)
    for precision in ("fp32", "bf16", *(("fp16",) if on_cuda else ())):
        yield f"gradients in {precision}", lambda precision=precision: _gradients(device, precision)  # type: ignore[misc]
    yield "loss in one pass", lambda: _one_pass(device)
    yield "fused norms", lambda: _fused_norms(device)
    if on_cuda:
        yield "torch.compile", lambda: _compiled(device)
    yield "training steps", lambda: _steps(device)
    yield "sliding window", lambda: _window(device)
    yield "labels", lambda: _labels(device)
    yield "/dev/shm", _shared_memory
    cards = torch.cuda.device_count() if on_cuda else 2
    if cards > 1:
        yield ("NCCL between the cards" if on_cuda else "processes"), lambda: _processes(cards, device)


# -- the machine -----------------------------------------------------------------------------------------------------------


def _card(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    text = (
        f"{properties.name}, {size_text(total)}, {size_text(free)} free, compute capability {properties.major}."
        f"{properties.minor}, CUDA {torch.version.cuda or torch.version.hip}, cuDNN {torch.backends.cudnn.version()}"
    )
    if free < total / 2:
        raise Problem(f"{text}: another process uses more than half of its memory (nvidia-smi shows which)")
    return text


def _bandwidths(device: torch.device) -> str:
    on_cuda = device.type == "cuda"
    size = 1 << (28 if on_cuda else 18)
    source, host = torch.zeros(size, device=device), torch.zeros(size // 4, pin_memory=on_cuda)
    copy, there = torch.empty_like(source), torch.empty(size // 4, device=device)
    memory = 2 * source.nbytes / _seconds(lambda: copy.copy_(source), device) / 1e9
    upload = host.nbytes / _seconds(lambda: there.copy_(host, non_blocking=True), device) / 1e9
    download = host.nbytes / _seconds(lambda: host.copy_(there, non_blocking=True), device) / 1e9
    n = 8192 if on_cuda else 64
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    products = 2 * n**3 / _seconds(lambda: a @ a, device) / 1e12
    ways = f"from the host {upload:.1f} GB/s, back {download:.1f} GB/s"
    text = f"memory {memory:.0f} GB/s, {ways}, bf16 products {products:.2g} TFLOP/s"
    if on_cuda and min(upload, download) < _SLOWEST_COPY:
        raise Problem(
            f"{text}: the way between the host and the card is too slow (is the card in a slot with few lanes?)"
        )
    return text


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    return statistics.median(once() for _ in range(repeats))


def _shared_memory() -> str:
    shared = Resources.here().shared_memory
    if shared is None:
        return "this system has none and needs none"
    free = shutil.disk_usage("/dev/shm").free
    if free < _SHARED_MEMORY:
        raise Problem(
            f"{size_text(free)} free: worker processes hand over batches through it. Start the container with "
            "--shm-size=8g or --ipc=host, or train with --workers 0"
        )
    return f"{size_text(free)} free"


# -- what is computed --------------------------------------------------------------------------------------------------------


def _network() -> nn.Module:
    """A residual encoder U-Net of three stages; the same each time."""
    architecture = Architecture.named(
        "ResEncL",
        n_stages=3,
        features_per_stage=[8, 16, 32],
        kernel_sizes=[[3, 3, 3]] * 3,
        strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        n_blocks_per_stage=[1, 2, 2],
        n_conv_per_stage_decoder=[1, 1],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_network(architecture, 1, _LABELS.num_heads, _PATCH)


def _batch() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    image = torch.randn(2, 1, *_PATCH, generator=random)
    return image, (image * 1.3 + 1).clamp(0, 3).to(torch.int16)


def _gradients(device: torch.device, precision: str) -> str:
    """A whole gradient in this precision, against float64 on the CPU."""
    image, target = _batch()
    exact = _network().double()
    build_loss(_LABELS, False)(exact(image.double()), target).backward()
    network = to_device(_network(), Recipe(channels_last=False), device)
    half = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scale = 1024 if precision == "fp16" else 1
    with exact_float32(device):
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            loss = build_loss(_LABELS, False)(network(image.to(device)), target.to(device))
        (loss * scale).backward()
    error = relative_error(_flat(network).cpu() / scale, _flat(exact))
    text = f"off by {error:.1e} of float64"
    if not error < _TOLERANCES[precision]:
        raise Problem(f"{text}, at most {_TOLERANCES[precision]:.0e} is right: driver, cuDNN or card are at fault")
    return text


def _flat(network: nn.Module) -> Tensor:
    return torch.cat([w.grad.flatten() for w in network.parameters() if w.grad is not None]).double()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Size of the difference, as a part of what is expected; infinite where something is not finite."""
    error = float((found - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf


def _one_pass(device: torch.device) -> str:
    """Value and gradient of the loss that trains, against the readable one in float64."""
    classes = 30
    labels = LabelScheme.from_dataset_json({"labels": {"background": 0, **{str(n): n for n in range(1, classes)}}})
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(2, classes, *_PATCH, generator=random)
    target = torch.randint(0, classes, (2, 1, *_PATCH), generator=random)
    results = []
    for loss, kind, where in (
        (build_loss(labels, False), torch.float64, "cpu"),
        (in_one_pass(build_loss(labels, False)), torch.float32, device),
    ):
        leaf = logits.to(where, kind).requires_grad_()
        value = loss(leaf, target.to(where))
        value.backward()
        assert leaf.grad is not None
        results.append((float(value.detach()), leaf.grad.double().cpu()))
    (expected, slope), (value, gradient) = results
    error = max(abs(value - expected) / abs(expected), relative_error(gradient, slope))
    if error > 1e-4:
        raise Problem(f"value or gradient off by {error:.1e}")
    return f"off by {error:.1e} of float64"


def _fused_norms(device: torch.device) -> str:
    single, half = (norm_error(device, kind) for kind in (torch.float32, torch.bfloat16))
    if single > 1e-4 or half > 2e-2:
        raise Problem(f"off by {max(single, half):.1e} of float64; --fused-norm off avoids them")
    return f"off by {single:.1e} of float64"


def _compiled(device: torch.device) -> str:
    """A compiled network has the gradient of the same network as it is."""
    image, target = (tensor.to(device) for tensor in _batch())
    gradients, started = [], time.perf_counter()
    for compile in ("off", "on"):
        recipe = Recipe(compile=compile, channels_last=False)
        network = to_device(_network(), recipe, device)
        forward = training_forward(network, recipe, device)
        with exact_float32(device):
            build_loss(_LABELS, False)(forward(image), target).backward()
        gradients.append(_flat(network).cpu())
        if isinstance(forward, CompiledForward) and not forward.is_compiled:
            raise Problem(
                "does not work here (the log says why): training is slower without; --compile off avoids the try"
            )
    error = relative_error(gradients[1], gradients[0])
    if error > _TOLERANCES["fp32"]:
        raise Problem(f"gradients are off by {error:.1e} of those without it: use --compile off")
    return f"off by {error:.1e} of the network without it, {time.perf_counter() - started:.0f} s for a small network"


def _steps(device: torch.device) -> str:
    """Real steps as training takes them: the loss falls, and a step that is not finite changes nothing."""
    recipe = Recipe(learning_rate=0.02, warmup_epochs=0, momentum=0.9, compile="off", channels_last=False)
    network = to_device(_network(), recipe, device)
    half = autocast_dtype("auto", device)
    scaler = grad_scaler() if half is torch.float16 else None
    state = TrainingState(network, build_optimizer(network, recipe, device), scaler)
    prepare_epoch(network, state.optimizer, 0, recipe)
    loop = TrainingLoop(recipe, in_one_pass(build_loss(_LABELS, False)), _LABELS, 2, device, half)
    image, target = _batch()
    for _ in range(12):
        loop.step(state, [{"image": image, "target": target}], network)
    loop.settle(state)
    before = [weight.detach().clone() for weight in network.parameters()]
    with _quiet(logging.getLogger(TrainingLoop.__module__)):  # its warning is what is wanted here
        loop.step(state, [{"image": image * math.inf, "target": target}], network)
        loop.settle(state)
    if not all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)):
        raise Problem("a step whose loss was not finite changed the weights")
    first, last = state.losses[0], state.losses[-1]
    if not last < first:
        raise Problem(f"the loss did not fall: from {first:.3f} to {last:.3f} in {len(state.losses)} steps")
    return f"the loss falls from {first:.3f} to {last:.3f}; a step that is not finite is skipped"


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _window(device: torch.device) -> str:
    """Logits of an image larger than a patch, against the CPU's."""
    network, image = _network(), torch.randn(1, 20, 30, 40, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"mirror_axes": (0,), "autocast_dtype": None}
    expected = sliding_window_logits(network, image, _PATCH, _LABELS.num_heads, device="cpu", **options)
    found = sliding_window_logits(network, image, _PATCH, _LABELS.num_heads, device=device, **options)
    error = relative_error(found.double(), expected.double())
    if error > 1e-3:
        raise Problem(f"logits are off by {error:.1e} of the CPU's")
    return f"off by {error:.1e} of the CPU's logits"


def _labels(device: torch.device) -> str:
    """Labels made on the device, of logits on another grid, against the CPU's: each voxel."""
    logits = torch.randn(7, 30, 40, 50, generator=torch.Generator().manual_seed(3))
    shape, spacing = (37, 44, 61), (1.0, 1.0, 1.0)
    found = labels_on_device(logits.to(device), shape, spacing, spacing).cpu().numpy()
    differ = int((found != logits_to_labels(logits, shape, spacing, spacing)).sum())
    if differ:
        raise Problem(f"{differ} of {found.size} voxels differ from the CPU's")
    return f"all of {found.size} voxels are the CPU's"


def _processes(count: int, device: torch.device) -> str:
    try:
        slowest = processes_talk(count, device.type)
    except OtherRankFailed as error:
        raise Problem(f"{error}; training with -num_gpus needs it") from None
    return f"{count} processes add up tensors, {slowest:.2g} GB/s"
