"""A kind of network as data: how its arguments are read, what they mean for its size, and what can be done with it.

A new kind is one file with a :class:`NetworkKind` (``swin_unetr.py`` is one), and its name in ``other_kinds.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Arguments = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """What a file's tensors say about a network of a kind.

    Attributes:
        kwargs: its arguments.
        encoder: dotted prefix of its stages.
        channels: of the image.
        heads: outputs, None where there are none.
        guessed: arguments that the tensors don't tell.
    """

    kwargs: dict[str, Any]
    encoder: str
    channels: int
    heads: int | None = None
    guessed: tuple[str, ...] = ()


@dataclass(frozen=True)
class NetworkKind:
    """One class of networks.

    Attributes:
        module: where the class lies. It is imported when a network is built.
        spell_out: (class name, arguments as a file has them) → arguments, checked, complete and plain enough for JSON. Raises
            ArchitectureError.
        strides: of a spelled-out network: the down-sampling of each stage (Z, Y, X).
        size: what messages say of its size.
        blocks: of each stage of its encoder, where they are numbered; a transformer has the one stage None.
        stages: how many stages (blocks, of a Primus) can be frozen or get a learning rate of their own.
        recipe: with which it is trained unless another is requested.
        optimizer: of that recipe, for estimates of memory.
        is_resizable: whether weights can be fitted to one of other widths.
        has_attention: whether adapters (LoRA) find a place.
        has_deep_supervision: whether it can give an output at every resolution.
        has_symmetric_axes: whether turned kernels compute the same on turned images; else images are turned.
        may_lack: (pattern of names below the encoder, reason): parts that some files don't have at all.
        needs_pretraining: why it can't be trained from random weights; empty where it can.
        needs: (package, what to install) where it is built with more than the package itself needs.
        named_sizes: arguments that the name of a preset stands for; others follow the dataset.
        untold: arguments that leave no trace in the tensors and change what they compute.
        read: finds it among tensors that have our names, with hints for what they don't tell; None: they are another network's.
            Raises ArchitectureError for one that is damaged or can't be used.
    """

    module: str
    spell_out: Callable[[str, dict[str, Any]], dict[str, Any]]
    strides: Callable[[Arguments], Sequence[Sequence[int]]]
    size: Callable[[Arguments], str]
    blocks: Callable[[Arguments], Mapping[int | None, int]]
    stages: Callable[[Arguments], int]
    recipe: str = "default"
    optimizer: str = "sgd"
    is_resizable: bool = True
    has_attention: bool = False
    has_deep_supervision: bool = True
    has_symmetric_axes: bool = True
    may_lack: tuple[tuple[str, str], ...] = field(default=())
    needs_pretraining: Callable[[Arguments], str] = lambda kwargs: ""
    needs: tuple[str, str] | None = None
    named_sizes: tuple[str, ...] = ("features_per_stage", "n_blocks_per_stage", "strides")
    untold: tuple[str, ...] = ()
    read: Callable[[Tensors, Arguments], Reading | None] = lambda tensors, hints: None
