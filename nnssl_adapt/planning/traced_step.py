"""A training step traced on torch's meta device: which tensors it keeps, and when, without memory behind them.

The network itself is run, forward and backward, so that nothing has to be known about its layers. What the meta device does
not do as a GPU would is imitated: autocast's choice of precision, and attention that never stores its matrix.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


def is_recomputed(module: nn.Module) -> bool:
    """Whether it is a block whose inside activation checkpointing computes again instead of keeping."""
    if getattr(module, "recomputed_as_one", False):  # networks of ours
        return True
    eva = sys.modules.get("timm.models.eva")  # takes seconds to import; where it is not, there are no such blocks
    return isinstance(module, (BasicBlockD, BottleneckD, StackedConvBlocks, *((eva.EvaBlock,) if eva else ())))


@dataclass(frozen=True)
class TracedStep:
    """Bytes of one training step, weights and optimiser aside.

    Attributes:
        kept: what lives at the end of the forward pass and the loss: activations, batch, loss.
        peak: the most that ever lives, gradients included.
        gradients_at_peak: of those, gradients of weights that are there already at that moment.
        gradients: of all weights, at the end.
        convolution: input and output of the largest convolution.
    """

    kept: int
    peak: int
    gradients_at_peak: int
    gradients: int
    convolution: int


def trace_step(
    network: nn.Module,
    channels: int,
    patch_size: Sequence[int],
    batch_size: int,
    half: torch.dtype | None = None,
    recompute: bool = False,
    fused_attention: Callable[[Tensor], bool] = lambda query: True,
    one_pass_loss: bool = False,
) -> TracedStep:
    """Trace forward, loss and backward of ``network``, which lies on the meta device, in training mode.

    Args:
        network: (B, channels, Z, Y, X) → logits, or a list of them, finest first.
        channels: of the image.
        patch_size: voxels (Z, Y, X).
        batch_size: samples.
        half: precision of autocast, None for float32.
        recompute: activation checkpointing of blocks.
        fused_attention: whether attention with a query of this shape and precision has a kernel that stores no matrix.
        one_pass_loss: whether the loss is made without copies of the logits.
    """
    if recompute:
        _recompute_blocks(network, lambda: _LikeAutocast(half, fused_attention))
    ledger = _Ledger()
    with ledger:
        image = torch.empty(batch_size, channels, *patch_size, device="meta")
        labels = torch.empty(batch_size, 1, *patch_size, dtype=torch.int16, device="meta")
        with _LikeAutocast(half, fused_attention):
            logits = [network(image)]
        judge = _one_pass_loss if one_pass_loss else _loss
        loss = judge(logits.pop(), labels)  # nobody else holds them: they go as soon as the loss is known
        kept = ledger.live
        loss.backward()
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    return TracedStep(
        kept=kept,
        peak=ledger.peak,
        gradients_at_peak=sum(_nbytes(g) for g in gradients if ledger.made_before_peak(g)),
        gradients=sum(_nbytes(g) for g in gradients),
        convolution=ledger.largest_convolution,
    )


def _loss(outputs: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """Dice and cross-entropy as training has them, of every output."""
    total = torch.zeros((), device=labels.device)
    for logits in [outputs] if isinstance(outputs, Tensor) else outputs:
        steps = [full // part for full, part in zip(labels.shape[2:], logits.shape[2:], strict=True)]
        target = labels[:, :, :: steps[0], :: steps[1], :: steps[2]].contiguous()
        classes = torch.arange(1, logits.shape[1], device=labels.device).view(1, -1, 1, 1, 1)
        probabilities = torch.softmax(logits.float(), dim=1)[:, 1:]
        dice = (probabilities * (target == classes)).sum() / probabilities.sum()
        total = total + functional.cross_entropy(logits.float(), target[:, 0].long()) - dice
    return total


def _one_pass_loss(outputs: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """As :mod:`nnssl_adapt.training.optimise.one_pass` makes it, of every output."""
    total = torch.zeros((), device=labels.device)
    for logits in [outputs] if isinstance(outputs, Tensor) else outputs:
        total = total + _OnePass.apply(logits)
    return total


class _OnePass(torch.autograd.Function):
    """Memory only: the logits are kept, and the gradient is as large; a slab in float32 is small beside them."""

    @staticmethod
    def forward(context: Any, logits: Tensor) -> Tensor:
        context.save_for_backward(logits)
        return torch.zeros((), device=logits.device)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (logits,) = context.saved_tensors
        slab = torch.empty(
            _SLAB_TENSORS * min(logits.numel(), max(_SMALL_SLAB, logits.numel() // 128)), device=logits.device
        )
        result = torch.empty_like(logits)
        del slab
        return result


_SLAB_TENSORS, _SMALL_SLAB = 4, 1 << 22
"""Float32 tensors of a slab that are alive together, and how many numbers a slab has at least."""


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Ledger(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, and takes them off when the storages go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.largest_convolution = 0
        self._entries: dict[int, tuple[int, int]] = {}  # storage → its bytes, and how many came before it
        self._made = 0
        self._made_at_peak = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._enter(tensor)
        if operation is torch.ops.aten.convolution.default:
            self.largest_convolution = max(self.largest_convolution, _nbytes(args[0]) + _nbytes(result))
        return result

    def made_before_peak(self, tensor: Tensor) -> bool:
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return entry is not None and entry[1] < self._made_at_peak

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:  # a view, or a result in place
            return
        size = storage.nbytes()
        self._entries[key] = size, self._made
        self._made += 1
        self.live += size
        if self.live > self.peak:
            self.peak, self._made_at_peak = self.live, self._made
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self._entries.pop(key)[0]


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for item in result:
            yield from _tensors(item)


# -- what a GPU does otherwise -------------------------------------------------------------------------------------------

_IN_HALF: frozenset[Any] = frozenset(
    (
        *(torch.conv3d, torch.conv_transpose3d, functional.linear),
        *(torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__),
        functional.scaled_dot_product_attention,
    )
)
_IN_FLOAT: frozenset[Any] = frozenset(
    (
        *(functional.layer_norm, torch.layer_norm, functional.group_norm, torch.group_norm),
        *(functional.softmax, torch.softmax, torch.Tensor.softmax, torch.rsqrt),
        *(torch.pow, torch.Tensor.pow, torch.Tensor.__pow__),
    )
)
"""Operations that autocast on CUDA does in half precision and in float32, as far as these networks have them (PyTorch's
page on automatic mixed precision lists them). Others work in whatever they are given."""


class _LikeAutocast(TorchFunctionMode):
    """Autocast for the meta device, which torch.autocast passes over, and attention that stores no matrix."""

    def __init__(self, half: torch.dtype | None, fused_attention: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._half = half
        self._fused_attention = fused_attention

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._half is not None and (function in _IN_HALF or function in _IN_FLOAT):
            wanted = self._half if function in _IN_HALF else torch.float32
            args = [_cast(argument, wanted) for argument in args]
            kwargs = {name: _cast(argument, wanted) for name, argument in kwargs.items()}
        if function is functional.scaled_dot_product_attention and self._fused_attention(args[0]):
            return _attend(*args[:3])
        return function(*args, **kwargs)


def _cast(argument: Any, wanted: torch.dtype) -> Any:
    return argument.to(wanted) if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Half-precision kernels want heads of a multiple of 8 features, for which torch pads them."""
    width = query.shape[-1]
    missing = -width % 8 if query.element_size() == 2 else 0
    if missing:
        query, key, value = (functional.pad(tensor, (0, missing)) for tensor in (query, key, value))
    found: Tensor = _FusedAttention.apply(query, key, value)[..., :width]
    return found


class _FusedAttention(torch.autograd.Function):
    """Shapes only. Keeps what fused kernels keep: their inputs, the result, and a number for each query."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        log_sum = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        context.save_for_backward(query, key, value, result, log_sum)
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _recompute_blocks(network: nn.Module, precision: Callable[[], TorchFunctionMode]) -> None:
    """Make the outermost blocks of ``network`` keep only their input, and compute again in the same ``precision``."""
    for child in network.children():
        if is_recomputed(child):
            child.forward = _recomputing(child.forward, precision)  # type: ignore[method-assign]
        else:
            _recompute_blocks(child, precision)


def _recomputing(forward: Callable[..., Tensor], precision: Callable[[], TorchFunctionMode]) -> Callable[..., Tensor]:
    # Random numbers need no care: on the meta device there are none.
    return partial(
        checkpoint,
        forward,
        use_reentrant=False,
        preserve_rng_state=False,
        determinism_check="none",
        context_fn=lambda: (nullcontext(), precision()),
    )
