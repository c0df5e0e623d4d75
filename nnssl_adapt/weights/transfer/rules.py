"""The rules by which one tensor of a checkpoint is made to fit one of a network, each with the words it has in the report.

Tensors go in and come out; where they are from, and what becomes of those that don't fit, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nnssl_adapt.weights.network import tensor_ops

Kernel = Literal["convolution", "patch embedding", "up-sampling"]


class DoesNotFit(Exception):
    """No rule makes the tensor fit; the message says which shapes they are."""


@dataclass(frozen=True)
class Fitted:
    """A tensor that fits.

    Attributes:
        value: in the network's shape, in any floating dtype.
        rules: what was done to it, in order; empty when it is the checkpoint's as it is.
        fresh_numbers: how many of its numbers are the network's own.
    """

    value: Tensor
    rules: tuple[str, ...] = ()
    fresh_numbers: int = 0


@dataclass(frozen=True)
class TensorFate:
    """What becomes of one tensor of a network.

    Attributes:
        fitted: its new value; None leaves it as it was initialised.
        reason: why it is fresh.
        names: of the tensor in the checkpoint, the one that is used first; empty where there is none.
        is_problem: it should have a value, and no rule says why it has none.
    """

    fitted: Fitted | None = None
    reason: str = ""
    names: tuple[str, ...] = ()
    is_problem: bool = False

    @classmethod
    def fresh(cls, reason: str, names: Sequence[str] = ()) -> TensorFate:
        return cls(reason=reason, names=tuple(names))

    @classmethod
    def problem(cls, reason: str, names: Sequence[str] = ()) -> TensorFate:
        return cls(reason=reason, names=tuple(names), is_problem=True)


@dataclass(frozen=True)
class Role:
    """What a tensor does in a network, as far as rules depend on it.

    Attributes:
        kernel: what kind of kernel it is, if it has axes beyond features.
        channels: the rule for image channels, None for a tensor that does not see the image.
        joined: it sees this many inputs of equal width, joined along its input axis (the network's side; how many the
            checkpoint's sees, its shape tells).
        features: axis of the features computed; of a positional embedding the last.
    """

    kernel: Kernel = "convolution"
    channels: str | tuple[int | None, ...] | None = None
    joined: int = 1
    features: int = 0


def in_full_precision(value: Tensor) -> Tensor:
    """Half-precision weights as float32, so that sums and interpolations of them lose nothing; others as they are."""
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value


def fit(value: Tensor, into: Tensor, role: Role) -> Fitted:
    """Return the checkpoint's ``value`` in the shape of the network's ``into``, which gives the numbers that are new.

    Raises DoesNotFit.
    """
    if value.ndim != into.ndim:
        raise DoesNotFit(f"{value.ndim} axes in the checkpoint, {into.ndim} in the network")
    rules: list[str] = []
    if value.ndim in (4, 5) and value.shape[2:] != into.shape[2:]:
        rules.append(_kernel_rule(value.shape[2:], into.shape[2:], role.kernel))
        value = _RESIZE[role.kernel](value, into.shape[2:])
    new_channels: list[int] = []
    if role.channels is not None and value.ndim > 1:
        before = value
        value, new_channels = _fit_channels(value, into.shape[1], role.channels)
        if value is not before:
            rules.append(_channels_rule(before.shape[1], into.shape[1], role.channels))
    fresh = 0
    if value.shape != into.shape:
        rules += _width_rules(value, into, role)
        value, fresh = _fit_width(value, into, role)
    if new_channels:
        value = value.to(torch.promote_types(value.dtype, into.dtype))
        value[:, new_channels] = into[:, new_channels].to(value)
        kept = into.numel() - fresh
        fresh = into.numel() - kept * (into.shape[1] - len(new_channels)) // into.shape[1]
    return Fitted(value, tuple(rules), fresh)


# -- kernels ---------------------------------------------------------------------------------------------------------

_RESIZE = {
    "convolution": tensor_ops.resize_kernel,
    "patch embedding": tensor_ops.resize_patch_embedding,
    "up-sampling": tensor_ops.resize_upsampling,
}


def _kernel_rule(old: Sequence[int], new: Sequence[int], kernel: Kernel) -> str:
    sizes = f"{times(old)} → {times(new)}"
    if kernel == "patch embedding":
        return f"patch embedding {sizes} (pseudo-inverse of resizing)"
    if kernel == "up-sampling":
        return f"up-sampling step {sizes} (resized by area)"
    grows = any(b > a for a, b in zip(old, new, strict=True))
    shrinks = any(b < a for a, b in zip(old, new, strict=True))
    how = " and ".join(word for word, true in (("zeros around it", grows), ("averaged", shrinks)) if true)
    return f"kernel {sizes} ({how})"


# -- image channels --------------------------------------------------------------------------------------------------


def _fit_channels(value: Tensor, channels: int, rule: str | tuple[int | None, ...]) -> tuple[Tensor, list[int]]:
    """The kernel for another number of channels, and which of them are the network's own."""
    old = value.shape[1]
    if not isinstance(rule, str):
        new = [index for index, channel in enumerate(rule) if channel is None]
        same = list(rule) == list(range(old))
        return (value if same else tensor_ops.map_input_channels(value, rule)), new
    # Averaging changes kernels even where the numbers agree; the other rules have nothing to do then.
    if old == channels and (rule != "mean" or old == 1):
        return value, []
    return tensor_ops.adapt_input_channels(value, channels, rule), []


def _channels_rule(old: int, new: int, rule: str | tuple[int | None, ...]) -> str:
    how = rule if isinstance(rule, str) else ", ".join("new" if c is None else str(c) for c in rule)
    return f"input channels {old} → {new} ({how})"


def check_channel_map(rule: str | tuple[int | None, ...], trained: int, channels: int) -> str | None:
    """What is wrong with a map from a network's channels to pre-training channels, or None."""
    if isinstance(rule, str):
        return None
    if len(rule) != channels:
        return f"the channel map has {len(rule)} entries, the network {channels} input channel(s): give one for each"
    beyond = [channel for channel in rule if channel is not None and channel >= trained]
    if beyond:
        return (
            f"the channel map names pre-training channel {beyond[0]}, the checkpoint has {trained} "
            f"(numbered from 0 to {trained - 1})"
        )
    return None


def unused_channels(rule: str | tuple[int | None, ...], trained: int, channels: int) -> list[int]:
    """Pre-training channels that a rule leaves out."""
    if rule == "zero":
        return list(range(channels, trained))
    if isinstance(rule, str):
        return []
    return [channel for channel in range(trained) if channel not in rule]


# -- widths ----------------------------------------------------------------------------------------------------------


def _width_rules(value: Tensor, into: Tensor, role: Role) -> list[str]:
    rules = []
    features = role.features
    old, new = value.shape[features], into.shape[features]
    if old != new:
        rules.append(f"features {old} → {new} (the leading {min(old, new)})")
    inputs = _input_axis(value, role)
    if inputs is not None and value.shape[inputs] != into.shape[inputs]:
        old, new = value.shape[inputs], into.shape[inputs]
        rules.append(f"inputs {old} → {new} ({'the leading ones' if new < old else 'new ones zero'})")
    return rules


def _input_axis(value: Tensor, role: Role) -> int | None:
    if value.ndim < 2 or role.features == value.ndim - 1 > 1:
        return None
    return 1 - role.features


def _fit_width(value: Tensor, into: Tensor, role: Role) -> tuple[Tensor, int]:
    features, inputs = role.features, _input_axis(value, role)
    others = [axis for axis in range(value.ndim) if axis not in (features, inputs)]
    if any(value.shape[axis] != into.shape[axis] for axis in others):
        raise DoesNotFit(f"{times(value.shape)} in the checkpoint, {times(into.shape)} in the network")
    parts = (1, role.joined)
    if inputs is not None and role.joined > 1:
        # A decoder without skips, as in NoSkip pre-training, has a single input.
        parts = (max(1, min(role.joined, value.shape[inputs] // value.shape[features])), role.joined)
    own = into.detach().to("cpu", torch.promote_types(value.dtype, into.dtype))
    result = tensor_ops.copy_leading(value, own, features, inputs, parts)
    new = max(0, into.shape[features] - value.shape[features])
    return result, new * into.numel() // into.shape[features]


def times(numbers: Iterable[int]) -> str:
    """``2×3×4``; the empty shape is a single number."""
    return "×".join(str(number) for number in numbers) or "1"


def numbers_in(shape: Sequence[int]) -> int:
    return math.prod(shape)
