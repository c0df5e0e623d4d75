"""The arguments of networks, as files write them: checked, spelled out stage by stage, and plain enough for JSON.

Files name classes in several spellings (``torch.nn.LeakyReLU``, ``torch.nn.modules.activation.LeakyReLU``), give one
number or one a stage, and mix in what belongs to the dataset or to pre-training. Names are looked up in tables and never
imported, since a name in a downloaded file could be anything.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from torch import nn

from nnssl_adapt.errors import ArchitectureError

_OPERATIONS: dict[str, type[nn.Module]] = {
    operation.__name__: operation
    for operation in (
        *(nn.Conv3d, nn.InstanceNorm3d, nn.BatchNorm3d, nn.Dropout3d, nn.Dropout),
        *(nn.Conv2d, nn.InstanceNorm2d, nn.BatchNorm2d, nn.Dropout2d),
        *(nn.LeakyReLU, nn.ReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish),
    )
}
_BLOCKS: dict[str, type[nn.Module]] = {block.__name__: block for block in (BasicBlockD, BottleneckD)}

_OPERATION_KEYS = ("conv_op", "norm_op", "dropout_op", "nonlin")
CLASS_KEYS = (*_OPERATION_KEYS, "block")
"""Arguments of the CNNs whose value is a class."""

BLOCKS_PER_STAGE = {"ResidualEncoderUNet": "n_blocks_per_stage", "PlainConvUNet": "n_conv_per_stage"}

_CNN_OPTIONAL = {
    "ResidualEncoderUNet": {"block", "bottleneck_channels", "stem_channels"},
    "PlainConvUNet": {"nonlin_first"},
}

_GIVEN_WHEN_BUILT = {
    "input_channels",
    "num_input_channels",
    "num_classes",
    "output_channels",
    "num_output_channels",
} | {
    "input_shape",
    "deep_supervision",
}
"""Arguments that belong to the dataset or the run, not to the architecture; dropped wherever they turn up."""

_PRIMUS_DEFAULTS: dict[str, Any] = {
    "drop_path_rate": 0.0,
    "attn_drop_rate": 0.0,
    "proj_drop_rate": 0.0,
    "init_values": None,
    "scale_attn_inner": False,
    "mlp_ratio": 4 * 2 / 3,
    "use_rot_pos_emb": True,
    "use_abs_pos_embed": True,
    "rope_kwargs": None,
}
_PRIMUS_REQUIRED = ("embed_dim", "patch_embed_size", "eva_depth", "eva_numheads")
_PRIMUS_SPELLINGS = {
    "encoder_eva_depth": "eva_depth",
    "encoder_eva_numheads": "eva_numheads",
    "use_abs_pos_emb": "use_abs_pos_embed",
}
_PRIMUS_PRETRAINING_ONLY = {
    *("decoder_eva_depth", "decoder_eva_numheads", "decoder_norm", "decoder_act", "do_up_projection"),
    # Dropping patches makes the pre-training task; a network that segments needs all of them.
    *("patch_drop_rate", "patch_drop_module", "num_register_tokens", "drop_path_scale", "rope_impl"),
}


_MOST_OF_ANYTHING = 2**16
_MOST = {
    "n_stages": 32,
    "n_blocks_per_stage": 512,
    "n_conv_per_stage": 512,
    "n_conv_per_stage_decoder": 512,
    "eva_depth": 512,
}
"""No network is larger, and a damaged plan must not make us build one: layers take time and memory even without weights."""


def spell_out_cnn(class_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a U-Net with one entry a stage, in the order that nnU-Net writes them."""
    blocks_key = BLOCKS_PER_STAGE[class_name]
    always = ("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "n_conv_per_stage_decoder")
    optional = {*_OPERATION_KEYS, "conv_bias", "norm_op_kwargs", "dropout_op_kwargs", "nonlin_kwargs"}
    check_keys(class_name, kwargs, (*always, blocks_key), optional | _CNN_OPTIONAL[class_name])
    stages = positive_int(class_name, "n_stages", kwargs["n_stages"])

    def per_stage(key: str, count: int, read: Callable[[str, str, Any], Any]) -> list[Any]:
        value = kwargs[key]
        values = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if len(values) != count:
            raise ArchitectureError(
                f"{class_name}: {key} has {len(values)} entries, expected {count} ({stages} stages)"
            )
        return [read(class_name, key, entry) for entry in values]

    convolution = _operation_name(class_name, "conv_op", kwargs["conv_op"])
    size = _pair if is_planar({"conv_op": convolution}) else triple
    spelled = {
        "n_stages": stages,
        "features_per_stage": per_stage("features_per_stage", stages, positive_int),
        "conv_op": convolution,
        "kernel_sizes": per_stage("kernel_sizes", stages, size),
        "strides": per_stage("strides", stages, size),
        blocks_key: per_stage(blocks_key, stages, positive_int),
        "n_conv_per_stage_decoder": per_stage("n_conv_per_stage_decoder", stages - 1, positive_int),
        "conv_bias": flag(class_name, "conv_bias", kwargs.get("conv_bias", False)),
    }
    for key in ("norm_op", "dropout_op", "nonlin"):
        spelled[key] = _operation_name(class_name, key, kwargs.get(key))
        spelled[f"{key}_kwargs"] = _options(class_name, f"{key}_kwargs", kwargs.get(f"{key}_kwargs"))
    spelled.update(_spell_out_cnn_options(class_name, kwargs))
    axes = {name[-2:] for key in _OPERATION_KEYS if (name := str(spelled[key])).endswith(("2d", "3d"))}
    if len(axes) > 1:
        raise ArchitectureError(
            f"{class_name}: conv_op, norm_op and dropout_op are for different numbers of axes ({', '.join(sorted(axes))})"
        )
    return spelled


def is_planar(kwargs: Mapping[str, Any]) -> bool:
    """Whether these are the arguments of a 2D network."""
    return _last_name(kwargs.get("conv_op")) == nn.Conv2d.__name__


def _spell_out_cnn_options(class_name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The rarely used arguments, where they say something else than the default."""
    options: dict[str, Any] = {}
    if kwargs.get("nonlin_first"):
        options["nonlin_first"] = True
    if kwargs.get("stem_channels") is not None:
        options["stem_channels"] = positive_int(class_name, "stem_channels", kwargs["stem_channels"])
    if kwargs.get("bottleneck_channels") is not None:
        options["bottleneck_channels"] = copy.deepcopy(kwargs["bottleneck_channels"])
    block = kwargs.get("block")
    if block is not None and _last_name(block) != BasicBlockD.__name__:
        options["block"] = _dotted(_look_up(class_name, "block", block, _BLOCKS))
    return options


def spell_out_primus(class_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = {_PRIMUS_SPELLINGS.get(key, key): value for key, value in kwargs.items()}
    kwargs = {key: value for key, value in kwargs.items() if key not in _PRIMUS_PRETRAINING_ONLY}
    check_keys(class_name, kwargs, _PRIMUS_REQUIRED, set(_PRIMUS_DEFAULTS))
    values = {**_PRIMUS_DEFAULTS, **{key: value for key, value in kwargs.items() if value is not None}}
    width = positive_int(class_name, "embed_dim", values["embed_dim"])
    heads = positive_int(class_name, "eva_numheads", values["eva_numheads"])
    if width % heads or (width // heads) % 6:
        raise ArchitectureError(
            f"{class_name}: embed_dim {width} must be a multiple of 6 × eva_numheads ({heads}), "
            "so that each head holds sine-cosine pairs of three axes"
        )
    patch = triple(class_name, "patch_embed_size", values["patch_embed_size"])
    if class_name != "Primus" and patch != [8, 8, 8]:
        raise ArchitectureError(f"{class_name}: patch_embed_size is {patch}, and its tokenizer always makes steps of 8")
    init_values = values["init_values"]
    if isinstance(init_values, (list, tuple)):  # nnFoundationViT's plan has [0.1]
        init_values = init_values[0] if init_values else None
    spelled = {
        "embed_dim": width,
        "patch_embed_size": patch,
        "eva_depth": positive_int(class_name, "eva_depth", values["eva_depth"]),
        "eva_numheads": heads,
        "init_values": None if init_values is None else number(class_name, "init_values", init_values),
        "scale_attn_inner": flag(class_name, "scale_attn_inner", values["scale_attn_inner"]),
    }
    # What is left at its default stays out: stock trainers and older plans then compare equal.
    for key in ("drop_path_rate", "attn_drop_rate", "proj_drop_rate", "mlp_ratio"):
        number(class_name, key, values[key])
    for key, default in _PRIMUS_DEFAULTS.items():
        if key not in spelled and (key == "drop_path_rate" or (values[key] and values[key] != default)):
            spelled[key] = values[key]
    for key in ("use_rot_pos_emb", "use_abs_pos_embed"):
        if values[key] is False:
            spelled[key] = False
    return spelled


def check_keys(class_name: str, kwargs: dict[str, Any], required: Sequence[str], optional: set[str]) -> None:
    """Drop what is given when the network is built; raise for what is missing or unknown."""
    for key in _GIVEN_WHEN_BUILT & kwargs.keys():
        del kwargs[key]
    missing = [key for key in required if kwargs.get(key) is None]
    unknown = sorted(str(key) for key in set(kwargs) - set(required) - optional)
    if missing:
        raise ArchitectureError(f"{class_name}: missing {', '.join(missing)} in the architecture's arguments")
    if unknown:
        raise ArchitectureError(f"{class_name}: unknown architecture argument {', '.join(unknown)}")


def positive_int(class_name: str, key: str, value: Any) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 1:
        raise ArchitectureError(f"{class_name}: {key} has the entry {value!r}, expected a positive whole number")
    if value > _MOST.get(key, _MOST_OF_ANYTHING):
        raise ArchitectureError(
            f"{class_name}: {key} has the entry {value:.4g}, and no network is that large: the plan is damaged"
        )
    return int(value)


def triple(class_name: str, key: str, value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if len(values) != 3:
        raise ArchitectureError(
            f"{class_name}: {key} has the entry {value!r}, expected three numbers (only 3D networks)"
        )
    return [positive_int(class_name, key, entry) for entry in values]


def _pair(class_name: str, key: str, value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * 2
    if len(values) != 2:
        raise ArchitectureError(f"{class_name}: {key} has the entry {value!r}, expected two numbers (a 2D network)")
    return [positive_int(class_name, key, entry) for entry in values]


def _options(class_name: str, key: str, value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ArchitectureError(f"{class_name}: {key} is {value!r}, expected a mapping")
    for name, entry in value.items():
        if not isinstance(entry, (bool, int, float, type(None))) or (
            isinstance(entry, float) and not math.isfinite(entry)
        ):
            raise ArchitectureError(f"{class_name}: {key}.{name} is {entry!r}, expected a number or true or false")
    return dict(value)


def flag(class_name: str, key: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool) and value not in (0, 1):
        raise ArchitectureError(f"{class_name}: {key} is {value!r}, expected true or false")
    return bool(value)


def number(class_name: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e6:
        raise ArchitectureError(f"{class_name}: {key} is {value!r}, expected a number")
    return float(value)


def _operation_name(class_name: str, key: str, value: Any) -> str | None:
    return None if value is None else _dotted(_look_up(class_name, key, value, _OPERATIONS))


def _last_name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value).rpartition(".")[2]


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _look_up(class_name: str, key: str, value: Any, table: Mapping[str, type[nn.Module]]) -> type[nn.Module]:
    """The class meant by ``torch.nn.LeakyReLU``, ``torch.nn.modules.activation.LeakyReLU`` or ``LeakyReLU``."""
    name = _last_name(value)
    package = str(value).rpartition(".")[0] if isinstance(value, str) else ""
    home = "torch.nn" if table is _OPERATIONS else "dynamic_network_architectures"
    if name not in table or not (package == "" or package == home or package.startswith(f"{home}.")):
        raise ArchitectureError(f"{class_name}: {key} is {value!r}, which is none of {', '.join(table)}")
    return table[name]


CLASSES_BY_NAME = {_dotted(found): found for found in (*_OPERATIONS.values(), *_BLOCKS.values())}
"""Dotted name, as spelled-out arguments have it → the class."""
