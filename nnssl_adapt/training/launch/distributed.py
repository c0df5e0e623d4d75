"""Several processes ("ranks") that train one network, each on its part of every batch.

They find each other through the environment that ``torchrun`` sets, or :mod:`nnssl_adapt.training.launch.launch`. All have the
same weights and take the same steps; one of them, the main one, writes files and talks. The combined batch is the plan's
batch size, whatever their number, and its samples are the ones that a single process would draw.

Networks of this package normalise within a sample (InstanceNorm, LayerNorm). So nothing has to be synchronised but
gradients, and the sums that the loss and the figures are made of. A network with BatchNorm would need more.
"""

from __future__ import annotations

import heapq
import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as torch_distributed
from torch.nn.parallel import DistributedDataParallel

from nnssl_adapt.errors import ConfigurationError, DeviceUnavailable, OtherRankFailed, TrainingStopped

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

STEP_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other within a step, and at the start: a first step compiles, a file system may stall."""

LONG_TIMEOUT = timedelta(days=2)
"""How long they wait where one may have hours more to do, as in validation. One that died is noticed at once anyway."""

_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")  # the second up to torch 2.11 or so
    if name in inspect.signature(DistributedDataParallel).parameters
)

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from one of them. ``Ranks()`` is a process on its own.

    Attributes:
        rank: of this process, from 0; 0 is the main one.
        size: how many there are, on all machines together.
        local_rank: of this process on its machine: which GPU it uses.
        local_size: how many there are on this machine.
        backend: what carries their messages, as torch names it; None for a single process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    backend: str | None = None
    _patient: Any = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """This rank's device: ``cuda`` becomes ``cuda:<local rank>``. ConfigurationError for a device they can't share."""
        if self.size == 1 or name == "cpu":
            return name
        if name != "cuda":
            raise ConfigurationError(
                f"-device {name}: with several processes each takes a GPU of its own; use -device cuda (or cpu), and "
                "CUDA_VISIBLE_DEVICES to choose among GPUs"
            )
        visible = torch.cuda.device_count()
        if visible == 1:  # a scheduler showed every process its own
            return "cuda:0"
        if self.local_rank >= visible:
            raise DeviceUnavailable(
                f"rank {self.rank} needs GPU {self.local_rank}, but this machine shows {visible} (counted from 0): start "
                f"{max(1, visible)} processes on it, or look at CUDA_VISIBLE_DEVICES"
            )
        return f"cuda:{self.local_rank}"

    # -- training ----------------------------------------------------------------------------------------------------

    def wrap(self, network: nn.Module, find_unused: bool = True) -> nn.Module:
        """What to call instead of ``network`` so that gradients come out averaged over the ranks.

        The network itself is not changed, and to be asked for its weights as ever. All ranks get the main one's weights.
        To be called again whenever other weights require gradients. Compile what this returns, not what it is given:
        only then does torch send gradients while it still computes others.

        ``find_unused``: whether weights that learn may get no gradient, which has to be looked for in every step.
        """
        if self.size == 1:
            return network
        buffers: dict[str, Any] = {_SYNC_BUFFERS: False}  # there are none that training changes
        devices = {weight.device for weight in network.parameters()}
        on_gpu = len(devices) == 1 and next(iter(devices)).type == "cuda"
        return DistributedDataParallel(
            network,
            device_ids=[next(iter(devices)).index] if on_gpu else None,
            find_unused_parameters=find_unused,
            **buffers,
        )

    def samples(self, batch_size: int) -> range:
        """Which samples of a combined batch of ``batch_size`` this rank makes: the first ranks make one more if need be.

        Raises ConfigurationError if there are fewer samples than ranks.
        """
        if batch_size < self.size:
            raise ConfigurationError(
                f"a batch of {batch_size} can't be shared by {self.size} processes, which make at least one sample each: "
                f"try --batch {self.size}, or {batch_size} processes"
            )
        each, rest = divmod(batch_size, self.size)
        start = self.rank * each + min(self.rank, rest)
        return range(start, start + each + (self.rank < rest))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, which have the same shape; on all ranks.

        Gradients flow through it: each rank's tensor gets the sum of the gradients that the ranks have for the result. So
        averaged over ranks they are those of the whole, as in nnU-Net's Dice over the batch of all GPUs.
        """
        return tensor if self.size == 1 else _Sum.apply(tensor)

    # -- agreeing ----------------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        raised = torch.tensor(int(flag))
        with explained_loss_of_ranks(self):
            torch_distributed.all_reduce(raised)
        return bool(raised)

    def from_main(self, value: Item) -> Item:
        """The main rank's value, on all of them: what has to be the same although each could find out for itself."""
        if self.size == 1:
            return value
        values = [value if self.is_main else None]
        with explained_loss_of_ranks(self):
            torch_distributed.broadcast_object_list(values, src=0, group=self._patient)
        return values[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait until all ranks are here, however long it takes."""
        if self.size > 1:
            with explained_loss_of_ranks(self):
                torch_distributed.all_reduce(torch.zeros(1), group=self._patient)

    def share_of(self, items: Sequence[Item], costs: Sequence[float] | None = None) -> list[Item]:
        """This rank's part of items that the ranks do between them, in their order; every item is one rank's.

        ``costs``: how much work each is, to make the ranks' sums alike (the most expensive first, always to the rank with
        the least so far). Without, they are dealt in turn.
        """
        weights = [1.0] * len(items) if costs is None else list(costs)
        loads = [(0.0, rank) for rank in range(self.size)]
        mine = []
        for index in sorted(range(len(items)), key=lambda i: (-weights[i], i)):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + weights[index], rank))
            if rank == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]


class _Sum(torch.autograd.Function):
    """The sum over ranks, of values on the way there and of gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    torch_distributed.all_reduce(total)
    return total


# -- finding each other ------------------------------------------------------------------------------------------------


@contextmanager
def distributed(device: str = "cuda") -> Iterator[Ranks]:
    """Join the other processes that the environment speaks of; inside, they can talk. Alone, this does nothing.

    The environment: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``, as ``torchrun`` sets
    them, and ``LOCAL_WORLD_SIZE`` if there is one.

    Args:
        device: what they compute on: gradients go through NCCL on GPUs, through gloo on CPUs.

    Raises:
        ConfigurationError: a variable is missing or wrong, or the device is none that processes can share.
        DeviceUnavailable: there are more processes than GPUs.
        OtherRankFailed: another process went away; raised where this one waits for it.
    """
    ranks = ranks_in(os.environ)
    if ranks.size == 1:
        yield ranks
        return
    own = torch.device(ranks.device(device))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    with explained_loss_of_ranks(ranks):
        torch_distributed.init_process_group(backend, rank=ranks.rank, world_size=ranks.size, timeout=STEP_TIMEOUT)
        patient = torch_distributed.new_group(backend="gloo", timeout=LONG_TIMEOUT)
    joined = Ranks(ranks.rank, ranks.size, ranks.local_rank, ranks.local_size, backend, patient)
    try:
        with explained_loss_of_ranks(joined):
            yield joined
    except TrainingStopped:  # all leave together
        torch_distributed.destroy_process_group()
        raise
    # After other errors the group is left as it is: taking leave of ranks that are busy or gone can take for ever, and
    # the process ends now.
    torch_distributed.destroy_process_group()


def ranks_in(environment: Mapping[str, str]) -> Ranks:
    """The ranks that an environment describes; a single process when it says nothing. Raises ConfigurationError."""
    if environment.get("WORLD_SIZE", "1") == "1":
        return Ranks()
    missing = [name for name in _VARIABLES if not environment.get(name)]
    if missing:
        raise ConfigurationError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} says that several processes train together, but {', '.join(missing)} "
            "is not set: start them with -num_gpus, srun and --ranks slurm, or torchrun, or unset WORLD_SIZE"
        )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = [environment.get(name) or environment["WORLD_SIZE"] for name in names]
    if not all(text.isdigit() for text in texts) or not int(texts[0]) < int(texts[1]):
        given = ", ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
        raise ConfigurationError(f"expected whole numbers, and RANK below WORLD_SIZE, got {given}")
    rank, size, local_rank, local_size = (int(text) for text in texts)
    return Ranks(rank, size, local_rank, local_size)


_SIGNS_OF_LOSS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "timed out waiting",
    "remote peer",
    "processgroupgloo",
    "processgroupnccl",
    "gloo/transport",
)


@contextmanager
def explained_loss_of_ranks(ranks: Ranks) -> Iterator[None]:
    """Turn what torch raises when another process is gone into OtherRankFailed."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        signs = [sign for sign in _SIGNS_OF_LOSS if sign in text.lower()]
        if ranks.size == 1 or not (signs or isinstance(error, torch_distributed.DistError)):
            raise
        raise OtherRankFailed(
            f"rank {ranks.rank} of {ranks.size} got no answer from the others any more ({signs[0] if signs else text[:200]}); "
            "look for the error of the one that ended first, then go on with --c"
        ) from error
