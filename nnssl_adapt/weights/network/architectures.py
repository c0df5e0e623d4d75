"""What network a checkpoint is for: described by plain data, built from an allow-list of parts.

An :class:`Architecture` is what plans files and adaptation plans say about a network, without what depends on the
dataset (channels, classes, patch). Names of modules in files are looked up in a table and never imported, since a
name in a downloaded file could be anything.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nnssl_adapt.errors import ArchitectureError, ConfigurationError
from nnssl_adapt.weights.network.arguments import (
    BLOCKS_PER_STAGE,
    CLASS_KEYS,
    CLASSES_BY_NAME,
    is_planar,
    spell_out_cnn,
    spell_out_primus,
)
from nnssl_adapt.weights.network.kinds import NetworkKind
from nnssl_adapt.weights.network.other_kinds import OTHER_KINDS
from nnssl_adapt.weights.network.presets import PRESETS

Shape = tuple[int, int, int]


def _dashed(numbers: Sequence[Any]) -> str:
    return "-".join(str(number) for number in numbers)


def _unet(class_name: str) -> NetworkKind:
    blocks = BLOCKS_PER_STAGE[class_name]
    return NetworkKind(
        module="dynamic_network_architectures.architectures.unet",
        spell_out=spell_out_cnn,
        strides=lambda kwargs: kwargs["strides"],
        size=lambda kwargs: f"features {_dashed(kwargs['features_per_stage'])}, blocks {_dashed(kwargs[blocks])}",
        blocks=lambda kwargs: dict(enumerate(kwargs[blocks])),
        stages=lambda kwargs: len(kwargs["strides"]),
    )


_PRIMUS = NetworkKind(
    # It brings timm and torchvision with it, which takes seconds: it is imported where it is built.
    module="dynamic_network_architectures.architectures.primus",
    spell_out=spell_out_primus,
    strides=lambda kwargs: [kwargs["patch_embed_size"]],
    size=lambda kwargs: f"{kwargs['eva_depth']} blocks, {kwargs['embed_dim']} wide, {kwargs['eva_numheads']} heads",
    blocks=lambda kwargs: {None: int(kwargs["eva_depth"])},
    stages=lambda kwargs: int(kwargs["eva_depth"]),
    recipe="primus",
    optimizer="adamw",
    has_attention=True,
    has_deep_supervision=False,
    has_symmetric_axes=False,
    named_sizes=("embed_dim", "eva_depth", "eva_numheads", "patch_embed_size"),
)

KINDS: dict[str, NetworkKind] = {
    **{name: _unet(name) for name in BLOCKS_PER_STAGE},
    **dict.fromkeys(("Primus", "PrimusV2", "PrimusV3"), _PRIMUS),
    **OTHER_KINDS,
}
"""Networks that can be built: name of the class → what there is to know of it."""

CLASSES = tuple(KINDS)


@dataclass(frozen=True)
class Architecture:
    """A network up to its number of channels, classes and its patch.

    Attributes:
        class_name: one of :data:`CLASSES`.
        kwargs: its arguments, spelled out stage by stage and plain enough for JSON; classes are dotted names.
            Triples are in array order (Z, Y, X), pairs of a 2D network in (Y, X).
        preset: the name it is known by (``ResEncL``, ``PrimusM``, …), if any.

    Raises ArchitectureError when the class is unknown or an argument is missing, unknown or malformed.
    """

    class_name: str
    kwargs: Mapping[str, Any]
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.class_name not in KINDS:
            raise ArchitectureError(
                f"unknown network {self.class_name!r}; known are {', '.join(KINDS)} and the presets {', '.join(PRESETS)}"
            )
        object.__setattr__(self, "kwargs", self.kind.spell_out(self.class_name, dict(self.kwargs)))

    @classmethod
    def named(cls, preset: str, **overrides: Any) -> Architecture:
        """The preset of this name (one of :data:`PRESETS`), with some arguments replaced."""
        if preset not in PRESETS:
            raise ArchitectureError(f"unknown architecture {preset!r}; the presets are {', '.join(PRESETS)}")
        class_name, kwargs = PRESETS[preset]
        return cls(class_name, {**kwargs, **overrides}, preset)

    @classmethod
    def from_adaptation(cls, architecture_plans: Mapping[str, Any]) -> Architecture:
        """Read ``architecture_plans`` of an nnssl adaptation plan: ``{arch_class_name, arch_kwargs, …}``."""
        name = architecture_plans.get("arch_class_name")
        kwargs = architecture_plans.get("arch_kwargs")
        if not isinstance(name, str) or not isinstance(kwargs, (Mapping, type(None))):
            raise ArchitectureError("architecture_plans needs arch_class_name (text) and arch_kwargs (mapping or null)")
        short_name = name.rpartition(".")[2]
        if short_name in PRESETS:
            return cls.named(short_name, **{key: value for key, value in (kwargs or {}).items() if value is not None})
        # "PrimusX" is nnssl's name for a Primus of free size.
        return cls("Primus" if short_name == "PrimusX" else short_name, kwargs or {})

    @classmethod
    def from_plans_dict(cls, plans: Mapping[str, Any], preset: str | None = None) -> Architecture:
        """Read the ``architecture`` entry of an nnU-Net configuration: ``{network_class_name, arch_kwargs, …}``."""
        name = plans.get("network_class_name")
        kwargs = plans.get("arch_kwargs")
        if not isinstance(name, str) or not isinstance(kwargs, Mapping):
            raise ArchitectureError("the plan's architecture needs network_class_name (text) and arch_kwargs (mapping)")
        return cls(name.rpartition(".")[2], kwargs, preset)

    def to_plans_dict(self, patch_size: Sequence[int]) -> dict[str, Any]:
        """The ``architecture`` entry of an nnU-Net plans file, from which nnU-Net builds the same network.

        ``patch_size`` (Z, Y, X) in voxels matters to transformers, whose positions are fixed by it; nnU-Net must be
        asked for those without its ``deep_supervision`` argument, which Primus does not have.
        """
        kwargs = copy.deepcopy(dict(self.kwargs))
        if self.is_transformer:
            kwargs["input_shape"] = [int(n) for n in patch_size]
            return {"network_class_name": self.network_class_name, "arch_kwargs": kwargs, "_kw_requires_import": []}
        classes = [key for key in CLASS_KEYS if key in kwargs]
        return {"network_class_name": self.network_class_name, "arch_kwargs": kwargs, "_kw_requires_import": classes}

    @property
    def kind(self) -> NetworkKind:
        """What there is to know of networks of this class."""
        return KINDS[self.class_name]

    @property
    def network_class(self) -> type[nn.Module]:
        """The class that is built.

        Raises ConfigurationError, naming what to install, when a package that it is made of is missing.
        """
        needs = self.kind.needs
        try:
            network: type[nn.Module] = getattr(importlib.import_module(self.kind.module), self.class_name)
        except ImportError as error:
            if needs is None:
                raise
            raise ConfigurationError(
                f"a {self.class_name} is built with {needs[0]}, which can't be imported here ({error}): install {needs[1]}",
                next_command=f"pip install '{needs[1]}'",
            ) from error
        return network

    @property
    def network_class_name(self) -> str:
        """Its full dotted name, as plans files have it."""
        return f"{self.kind.module}.{self.class_name}"

    @property
    def is_transformer(self) -> bool:
        """Whether it is a Primus: a transformer over the whole patch, whose positions are those of one patch."""
        return self.class_name.startswith("Primus")

    @property
    def is_planar(self) -> bool:
        """Whether it is a 2D network, which takes images slice by slice; its patches are one voxel thick."""
        return is_planar(self.kwargs)

    @property
    def strides(self) -> tuple[Shape, ...]:
        """Downsampling step of each stage (Z, Y, X); a Primus has one, its patch embedding. A 2D network leaves Z as it is."""
        above = (1,) if self.is_planar else ()
        return tuple(
            (int(z), int(y), int(x)) for z, y, x in ((*above, *step) for step in self.kind.strides(self.kwargs))
        )

    @property
    def total_stride(self) -> Shape:
        """What each axis (Z, Y, X) of a patch must be divisible by."""
        z, y, x = (math.prod(step[axis] for step in self.strides) for axis in range(3))
        return z, y, x

    def __str__(self) -> str:
        size = self.kind.size(self.kwargs)
        return f"{self.preset} ({self.class_name}, {size})" if self.preset else f"{self.class_name} ({size})"


def check_patch(architecture: Architecture, patch_size: Sequence[int]) -> Shape:
    """Return the patch (Z, Y, X) in voxels; raise ArchitectureError with the nearest good one when it doesn't fit."""
    patch = tuple(int(n) for n in patch_size)
    stride = architecture.total_stride
    if len(patch) != 3:
        raise ArchitectureError(f"patch size {list(patch_size)} has {len(patch)} axes, expected 3 (Z, Y, X)")
    divisible = all(n > 0 and n % s == 0 for n, s in zip(patch, stride, strict=True))
    # Instance normalisation of a single voxel is undefined, and torch refuses it in training.
    enough = architecture.is_transformer or math.prod(patch) > math.prod(stride)
    if architecture.is_planar and patch[0] != 1:
        raise ArchitectureError(
            f"patch size {_times(patch)}: a 2D network takes one slice: use {_times((1, *patch[1:]))}"
        )
    if divisible and enough:
        return patch
    nearest = nearest_patch(architecture, patch)
    problem = (
        f"is not divisible by the network's total stride {_times(stride)}"
        if not divisible
        else "leaves a single voxel at the bottom of the network"
    )
    raise ArchitectureError(f"patch size {_times(patch)} {problem}: use {_times(nearest)}")


def nearest_patch(architecture: Architecture, patch_size: Sequence[int]) -> Shape:
    """The patch (Z, Y, X) closest to ``patch_size`` that the network can take."""
    stride = architecture.total_stride
    steps = [max(1, math.floor(n / s + 0.5)) for n, s in zip(patch_size, stride, strict=True)]
    if not architecture.is_transformer and math.prod(steps) == 1:
        steps[stride.index(min(stride))] = 2
    if architecture.is_planar:
        steps[0] = 1
        if math.prod(steps) == 1:
            steps[2] = 2
    z, y, x = (n * s for n, s in zip(steps, stride, strict=True))
    return z, y, x


def _times(numbers: Sequence[int]) -> str:
    return "×".join(str(number) for number in numbers)


def build_network(
    architecture: Architecture,
    in_channels: int,
    num_classes: int,
    patch_size: Sequence[int],
    deep_supervision: bool = False,
) -> nn.Module:
    """Build a freshly initialised network: (B, in_channels, Z, Y, X) → logits (B, num_classes, Z, Y, X).

    A 2D network takes slices, as volumes that are one voxel thick: Z is 1.

    Args:
        architecture: what to build, for instance ``checkpoint.architecture`` or ``Architecture.named("ResEncL")``.
        in_channels: image channels.
        num_classes: segmentation heads (labels with background, or regions).
        patch_size: (Z, Y, X) in voxels; each axis divisible by ``architecture.total_stride``. A transformer works on
            this patch only, a CNN on any that divides.
        deep_supervision: return a list of logits, finest first (CNNs only).

    The result is float32, on the CPU, initialised as nnU-Net (of our own networks: as their authors) does.
    Raises ArchitectureError when the patch doesn't fit (with the nearest that does) or the description can't be built.
    """
    patch = check_patch(architecture, patch_size)
    if in_channels < 1 or num_classes < 1:
        raise ArchitectureError(f"a network needs channels and classes, got {in_channels} and {num_classes}")
    network_class = architecture.network_class
    kwargs = _with_classes(architecture.kwargs)
    if deep_supervision and not architecture.kind.has_deep_supervision:
        raise ArchitectureError(f"{architecture.class_name} has a single output: train it without deep supervision")
    if architecture.is_transformer:
        kwargs["input_shape"] = patch
    else:
        kwargs["deep_supervision"] = deep_supervision
    try:
        network = network_class(input_channels=in_channels, num_classes=num_classes, **kwargs)
        if architecture.class_name in BLOCKS_PER_STAGE:  # the others initialise themselves
            initialise: Any = network.initialize
            network.apply(initialise)
    except (TypeError, ValueError, AssertionError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise ArchitectureError(f"{architecture} can't be built: {reason}") from error
    if architecture.is_planar:
        network.register_forward_pre_hook(_slice_of_volume)
        network.register_forward_hook(_volume_of_slice)
    return network


def _with_classes(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of spelled-out arguments with the classes in place of their names."""
    classes = {key: CLASSES_BY_NAME[kwargs[key]] for key in CLASS_KEYS if kwargs.get(key) is not None}
    return {**copy.deepcopy(dict(kwargs)), **classes}


def _slice_of_volume(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """(B, C, 1, Y, X) → (B, C, Y, X), which a 2D network computes with."""
    image, *others = inputs
    return (image.squeeze(2), *others)


def _volume_of_slice(network: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """The way back, for each of the outputs."""
    return [each.unsqueeze(2) for each in output] if isinstance(output, (list, tuple)) else output.unsqueeze(2)


def outline(architecture: Architecture, in_channels: int, patch_size: Sequence[int]) -> nn.Module:
    """The same network without memory behind it (torch's meta device), to compare names and shapes with a file."""
    with without_memory(architecture):
        return build_network(architecture, in_channels, 1, patch_size)


@contextmanager
def without_memory(architecture: Architecture) -> Iterator[None]:
    """A network of this architecture that is built in this block has tensors without numbers (torch's meta device)."""
    # Its module is loaded before: timm loads torch's compiler, which makes tensors of its own (seen with torch 2.6).
    _ = architecture.network_class
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Skips the drawing of random numbers. On the meta device there is nothing to draw into, and torch would import its compiler
    for it (``torch._dynamo``, seconds) to find out that there is nothing to do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWING:
            return args[0]
        return func(*args, **(kwargs or {}))


_DRAWING = (torch.Tensor.normal_, torch.Tensor.uniform_)
