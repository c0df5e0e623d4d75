"""A running average of a network's weights, which often predicts better than the last ones."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_adapt.errors import TrainingError

_Pairs = tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]


class WeightAverage:
    """Exponential moving average of all of a network's tensors. Call :meth:`update` after every step.

    The average of the first steps is shorter than ``decay`` says, ``(1 + n) / (10 + n)`` after n steps where that is less, or
    the weights that training started from would still be in it when a short one ends (the rule of TensorFlow's
    ``ExponentialMovingAverage``). Tensors that are no floating-point numbers are copied.

    Args:
        network: the plain network; its tensors are copied, on their device and in their memory format.
        decay: between 0 and 1; 0.999 averages over about a thousand steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        tensors = network.state_dict(keep_vars=True)
        self._followed: tuple[weakref.ref[nn.Module], _Pairs] | None = None
        firsts: dict[int, str] = {}
        self._first_name = {name: firsts.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        self._averages = {name: tensors[name].detach().clone() for name in firsts.values()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the network's present weights (changes the average, not the network)."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, weights, copies = self._pairs(network)
        torch._foreach_lerp_(averages, weights, 1 - decay)  # one pass over all of them on a GPU
        for average, tensor in copies:
            average.copy_(tensor)

    def _pairs(self, network: nn.Module) -> _Pairs:
        """Averages and the tensors that they follow, and those that are copied. Collected once for a network.

        Walking its hundreds of names takes longer than the averages. Its parameters and buffers stay the same objects
        whatever is loaded into them.
        """
        if self._followed is None or self._followed[0]() is not network:
            tensors = network.state_dict(keep_vars=True)
            pairs = [(average, tensors[name]) for name, average in self._averages.items()]
            floating = [pair for pair in pairs if pair[0].is_floating_point()]
            others = [pair for pair in pairs if not pair[0].is_floating_point()]
            self._followed = weakref.ref(network), ([a for a, _ in floating], [b for _, b in floating], others)
        return self._followed[1]

    def weights(self) -> dict[str, Tensor]:
        """The averages under all names of the network's state dict; a tensor with two names is one, as there."""
        return {name: self._averages[first] for name, first in self._first_name.items()}

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` goes on from, bit for bit: plain content for a checkpoint."""
        return {"decay": self.decay, "updates": self.updates, "weights": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave (changes the average); the decay stays this one's.

        Raises TrainingError when it is of another network.
        """
        theirs: Mapping[str, Tensor] = state["weights"]
        shapes = {name: tuple(tensor.shape) for name, tensor in self._averages.items()}
        if {name: tuple(tensor.shape) for name, tensor in theirs.items()} != shapes:
            wrong = next((n for n in {**shapes, **theirs} if n not in theirs or n not in shapes), "shapes differ")
            raise TrainingError(f"the averaged weights are of another network ({wrong}): start again without --c")
        for name, average in self._averages.items():
            average.copy_(theirs[name])
        self.updates = int(state["updates"])
