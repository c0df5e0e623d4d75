"""Whether every entry of a plans file that is read here has the type and the size that it should have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

Check = tuple[Callable[[Any], bool], str]
"""A test of a value, and what it expects, in words."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(test: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        right = isinstance(value, (list, tuple)) and all(test(entry) for entry in value)
        return right and (length is None or len(value) == length)

    return check


def _two_or_three(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: _list_of(test, 2)(value) or _list_of(test, 3)(value)


def _is_order_of_axes(value: Any) -> bool:
    return _list_of(_is_whole)(value) and sorted(value) in ([0, 1, 2], [0, 1])


def _is_rule(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(_is_whole(value[key]) and 0 <= value[key] <= 5 for key in ("order", "order_z") if key in value)
        and isinstance(value.get("force_separate_z"), (bool, type(None)))
    )


def _is_statistics(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(channel, Mapping) and all(isinstance(number, Real) for number in channel.values())
        for channel in value.values()
    )


def _is_nothing_or(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


_TEXT: Check = (_is_text, "text")
_MAPPING: Check = (_is_mapping, "an object with keys")
_RULE: Check = (_is_rule, "order and order_z (0 to 5) and force_separate_z (true, false or null)")
_FLAGS: Check = (_list_of(lambda flag: isinstance(flag, bool)), "a list of true and false")

NEEDED: dict[str, Check] = {
    "dataset_name": _TEXT,
    "plans_name": _TEXT,
    "transpose_forward": (_is_order_of_axes, "the axes 0, 1, 2 in some order"),
    "transpose_backward": (_is_order_of_axes, "the axes 0, 1, 2 in some order"),
    "configurations": _MAPPING,
}
_OPTIONAL: dict[str, Check] = {
    "image_reader_writer": _TEXT,
    "pretrain_info": _MAPPING,
    "foreground_intensity_properties_per_channel": (_is_statistics, "numbers for each channel"),
    "foreground_intensity_properties_by_modality": (_is_statistics, "numbers for each channel"),
}
NEEDED_IN_CONFIGURATION: dict[str, Check] = {
    "data_identifier": (lambda name: _is_text(name) and not set(name) & set("/\\"), "the name of a folder"),
    "patch_size": (_two_or_three(lambda n: _is_whole(n) and n > 0), "three whole numbers above 0 (2d: two)"),
    "batch_size": (lambda size: _is_whole(size) and size > 0, "a whole number above 0"),
    "spacing": (_two_or_three(lambda mm: _is_number(mm) and mm > 0), "three numbers (mm) above 0 (2d: two)"),
    "normalization_schemes": (lambda names: bool(names) and _list_of(_is_text)(names), "a list of names"),
    "use_mask_for_norm": _FLAGS,
    "resampling_fn_data": _TEXT,
    "architecture": _MAPPING,
}
_OPTIONAL_IN_CONFIGURATION: dict[str, Check] = {
    "resampling_fn_seg": _TEXT,
    "resampling_fn_probabilities": _TEXT,
    **dict.fromkeys((f"resampling_fn_{what}_kwargs" for what in ("data", "seg", "probabilities")), _RULE),
    "previous_stage": (_is_nothing_or(_is_text), "the name of a configuration"),
    "next_stage": (
        lambda value: _is_nothing_or(_is_text)(value) or _list_of(_is_text)(value),
        "names of configurations",
    ),
    "batch_dice": (lambda value: isinstance(value, bool), "true or false"),
    "median_image_size_in_voxels": (_is_nothing_or(_list_of(_is_number)), "a list of numbers"),
}
_OPTIONAL_IN_PRETRAINING: dict[str, Check] = {
    "checkpoint_path": (_is_nothing_or(_is_text), "text"),
    "citations": (_is_nothing_or(lambda value: isinstance(value, list)), "a list"),
}


def mistakes_of_plan(content: Mapping[str, Any]) -> Iterator[str]:
    """What is missing or wrong in a plans file outside its configurations, a sentence each."""
    yield from _mistakes(content, NEEDED, _OPTIONAL, "")
    configurations, info = content.get("configurations"), content.get("pretrain_info")
    if isinstance(configurations, Mapping):
        for name, entries in configurations.items():
            if not isinstance(entries, Mapping):
                yield _wrong(f"configurations.{name}", entries, _MAPPING[1])
            elif not isinstance(entries.get("inherits_from"), (str, type(None))):
                yield _wrong(f"configurations.{name}.inherits_from", entries["inherits_from"], "a configuration's name")
    if isinstance(info, Mapping):
        yield from _mistakes(info, {}, _OPTIONAL_IN_PRETRAINING, "pretrain_info.")


def mistakes_of_configuration(chosen: Mapping[str, Any], name: str) -> Iterator[str]:
    """What is missing or wrong in one configuration, with the entries that it inherits, a sentence each."""
    if "architecture" not in chosen and "UNet_class_name" in chosen:
        yield (
            "it is in the format before nnU-Net 2.3 and does not describe its network completely; run "
            "nnUNetv2_plan_experiment of a newer nnU-Net again"
        )
        return
    patch = chosen.get("patch_size")
    if isinstance(patch, (list, tuple)) and _list_of(_is_whole)(patch) and len(patch) not in (2, 3):
        yield f"configuration {name!r} is neither 3D nor 2D (patch {patch})"
        return
    spacing = chosen.get("spacing")
    if isinstance(patch, (list, tuple)) and isinstance(spacing, (list, tuple)) and len(patch) != len(spacing):
        yield f"configuration {name!r} has a patch of {len(patch)} axes and a spacing of {len(spacing)}"
    if isinstance(patch, (list, tuple)) and (axes := _axes_of_network(chosen)) not in (None, len(patch)):
        yield f"configuration {name!r} has a patch of {len(patch)} axes and a network of {axes}"
    yield from _mistakes(chosen, NEEDED_IN_CONFIGURATION, _OPTIONAL_IN_CONFIGURATION, f"configurations.{name}.")


def _axes_of_network(chosen: Mapping[str, Any]) -> int | None:
    """Axes that a CNN's kernels have; None where the plan does not say."""
    network = chosen.get("architecture")
    arguments = network.get("arch_kwargs") if isinstance(network, Mapping) else None
    convolution = arguments.get("conv_op") if isinstance(arguments, Mapping) else None
    return {"Conv2d": 2, "Conv3d": 3}.get(str(convolution).rpartition(".")[2])


def _mistakes(
    content: Mapping[str, Any], needed: Mapping[str, Check], optional: Mapping[str, Check], prefix: str
) -> Iterator[str]:
    for key, (test, expected) in {**needed, **optional}.items():
        if key not in content:
            if key in needed:
                yield f"key {prefix + key!r} is missing"
        elif not test(content[key]):
            yield _wrong(prefix + key, content[key], expected)


def _wrong(key: str, value: Any, expected: str) -> str:
    shown = " ".join(repr(value).split())
    return f"{key} is {shown[:60]}{' …' if len(shown) > 60 else ''}, expected {expected}"
