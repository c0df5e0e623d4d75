"""How a network runs while it is trained: where, in which memory layout, compiled, with what it keeps for the gradient.

None of this changes the network's tensors or their names: checkpoints are the same whatever was chosen here.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.planning.traced_step import is_recomputed
from nnssl_adapt.training.fused.failures import BACKEND_FAILURES
from nnssl_adapt.training.fused.modules import fuse_norms
from nnssl_adapt.training.recipe.recipe import Recipe

logger = logging.getLogger(__name__)

_YES = ("true", "1", "t")


def to_device(network: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """Prepare ``network`` for training as the recipe says, and move it. Changes it, and returns it.

    Sets whether it gives an output at every resolution, what is computed in one operation, which of its activations are kept,
    the memory layout and the device.
    Build the optimiser after this: it keeps the layout of the weights that it meets.

    Raises ConfigurationError when the recipe wants what this network does not have.
    """
    if recipe.deep_supervision:
        set_deep_supervision(network, True)
    # Before blocks are wrapped, which keeps what they did until then.
    if recipe.fused_norm == "on" and not fuse_norms(network):
        logger.warning("fused_norm on: this network has no instance normalisations (InstanceNorm3d); nothing is fused")
    if recipe.activation_checkpointing:
        recompute_activations(network)
    network = network.to(device)
    return channels_last(network) if recipe.channels_last else network


def training_forward(network: nn.Module, recipe: Recipe, device: torch.device) -> Callable[[Tensor], Any]:
    """Return what to call in place of ``network``: its compiled twin where the recipe wants that, or itself.

    The twin shares the network's weights and follows its ``train()`` and ``eval()``.
    """
    forward: Callable[[Tensor], Any] = CompiledForward(network) if wants_compiling(recipe, device) else network
    if not recipe.channels_last:
        return forward
    return lambda image: forward(image.contiguous(memory_format=torch.channels_last_3d))


# -- deep supervision --------------------------------------------------------------------------------------------------


def set_deep_supervision(network: nn.Module, enabled: bool) -> None:
    """Let a U-Net return logits at every resolution, as a list, finest first; or the finest alone. Changes the network.

    Raises ConfigurationError: a network without such outputs is asked for them.
    """
    decoder = getattr(network, "decoder", None)
    if hasattr(decoder, "deep_supervision"):
        decoder.deep_supervision = enabled  # type: ignore[union-attr]
    elif enabled:
        raise ConfigurationError(
            f"deep_supervision: {type(network).__name__} has a single output, no decoder with one at every resolution; set "
            "deep_supervision=false"
        )


# -- memory ------------------------------------------------------------------------------------------------------------


def channels_last(network: nn.Module) -> nn.Module:
    """Lay the weights of 3D convolutions out with channels last (torch's ``channels_last_3d``). Changes the network."""
    for parameter in network.parameters():  # not Module.to(memory_format=…), which fails on weights of four axes
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return network


def recompute_activations(network: nn.Module) -> int:
    """Let each block keep its input only, and run again in the backward pass. Changes the network; returns how many blocks.

    Blocks are the residual and convolution blocks of U-Nets, and the attention blocks of transformers. Gradients stay what
    they were, dropped paths included: the random state is put back for the second run.

    Raises ConfigurationError when the network has no such blocks.
    """
    blocks = list(_blocks(network))
    if not blocks:
        raise ConfigurationError(
            f"activation_checkpointing: {type(network).__name__} has no blocks that are known to this package; set "
            "activation_checkpointing=false"
        )
    for block in blocks:
        block.forward = functools.partial(
            _recomputed, block.forward
        )  # the module stays, and with it its tensors' names
    return len(blocks)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks of a network, those that are not wrapped yet."""
    for child in network.children():
        if not is_recomputed(child):
            yield from _blocks(child)
        elif "forward" not in vars(child):
            yield child


def _recomputed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, **options)


# -- compiling ---------------------------------------------------------------------------------------------------------


def wants_compiling(recipe: Recipe, device: torch.device) -> bool:
    """Whether to compile: as the recipe says; ``auto`` is nnU-Net's rule.

    That is: on CUDA devices, except on Windows (no Triton there), and where the environment has ``nnUNet_compile`` set to
    something else than ``true``, ``t`` or ``1``.
    """
    if recipe.compile != "auto":
        return recipe.compile == "on"
    return device.type == "cuda" and os.name != "nt" and os.environ.get("nnUNet_compile", "t").lower() in _YES


class CompiledForward:
    """A network's compiled twin, and the network itself from the moment that compiling turns out not to work here.

    The first call that wants gradients is tried before: forward and backward, on the same image, without leaving gradients
    behind. For the backward pass is compiled apart, and a failure there would otherwise end the run.

    Args:
        network: (B, C, Z, Y, X) → logits; it is not changed, and has the same weights as its twin.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._backward_works = False
        self._compiled: Callable[[Tensor], Any] | None = None
        try:
            self._compiled = torch.compile(network)
        except RuntimeError as error:  # this Python or this system is none that it knows
            self._give_up(error)

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def __call__(self, image: Tensor) -> Any:
        if self._compiled is not None and torch.is_grad_enabled() and not self._backward_works:
            self._try_backward(self._compiled, image)
        if self._compiled is None:
            return self.network(image)
        try:
            return self._compiled(image)
        except _failures() as error:  # the first call compiles, and later ones with a new mode or shape
            self._give_up(error)
        return self.network(image)

    def _try_backward(self, compiled: Callable[[Tensor], Any], image: Tensor) -> None:
        """One pass each way, gradients thrown away; the random state stays as it was."""
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        # Gradients that are thrown away must not be sent to other processes, nor be waited for.
        alone = self.network.no_sync() if isinstance(self.network, DistributedDataParallel) else nullcontext()
        devices = [image.device] if image.device.type == "cuda" else []
        failure: Exception | None = None
        with alone, torch.random.fork_rng(devices=devices):
            try:
                outputs = compiled(image)
                outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
                ends = [output.float().sum() for output in outputs if output.requires_grad]
                if ends and weights:
                    torch.autograd.grad(ends, weights, allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except BACKEND_FAILURES as error:
                failure = error
        self._backward_works = True
        if failure is not None:
            self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        logger.warning(
            "torch.compile does not work here (%s: %s); training goes on without, slower. --compile off (or "
            "nnUNet_compile=f) spares the attempt",
            type(error).__name__,
            reason,
        )
        self._compiled = None


def _failures() -> tuple[type[Exception], ...]:
    """What a failed compilation raises. Errors of the network itself (memory, shapes) are none of it."""
    from torch._dynamo import exc

    return (exc.TorchDynamoException,)
