"""The state dict in a checkpoint's content: found under the names that programs give it, checked, its wrappers taken off.

Those of several folds of one trained model are averaged.
Names are changed by whole dotted words only, and a prefix goes only when every tensor that it is about has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl_adapt.errors import CheckpointError, UnreadableCheckpoint
from nnssl_adapt.weights.checkpoint.weight_file import WEIGHTS_KEY

LIGHTNING_KEY = "state_dict"
STATE_DICT_KEYS = (WEIGHTS_KEY, LIGHTNING_KEY, "model_state_dict", "model", "net", "student")
"""Where programs keep a state dict, the first that is there counts: nnssl and nnU-Net, Lightning and MONAI, others."""

_WRAPPERS = ("module", "_orig_mod")
_MODULE_NAMES = ("net", "model", "network")
"""What a Lightning module usually calls the network in it."""

_NETWORK_PARTS = ("encoder", "decoder", "eva", "down_projection", "up_projection")
"""First words of the names in a network of ours; in a Lightning file they stand behind the network's own name."""


@dataclass(frozen=True)
class StateDict:
    """Tensors of a checkpoint.

    Attributes:
        tensors: name → tensor, wrappers' prefixes stripped.
        key: where they lay in the file (one of :data:`STATE_DICT_KEYS`), None for a bare state dict.
        notes: what was stripped.
        trained_until: day of the last epoch, where nnU-Net's file says it or a log beside it.
    """

    tensors: dict[str, Tensor]
    key: str | None
    notes: tuple[str, ...] = ()
    trained_until: date | None = None


def state_dict_of(contents: Mapping[Path, Mapping[str, Any]]) -> StateDict:
    """Find, check and unwrap the state dict in a checkpoint's content; of several folds the average.

    ``contents`` maps the file of each fold to its content; all but the tensors is that of the first. Raises UnreadableCheckpoint
    naming the entry that doesn't belong, CheckpointError for folds that can't be averaged.
    """
    states = {path: _state_dict_in(content, path) for path, content in contents.items()}
    first = next(iter(states.values()))
    if len(states) == 1:
        return first
    return replace(first, tensors=average_folds([(path, state.tensors) for path, state in states.items()]))


def _state_dict_in(content: Mapping[str, Any], path: Path) -> StateDict:
    key = next((key for key in STATE_DICT_KEYS if isinstance(content.get(key), Mapping)), None)
    tensors = tensors_of(content, path)
    stripped, notes = unwrap(tensors, path, lightning=key != WEIGHTS_KEY)
    return StateDict(stripped, key, notes, training_ended(content, path.parent))


def tensors_of(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint's content, names as they are. Raises UnreadableCheckpoint naming the bad entry."""
    key = next((key for key in STATE_DICT_KEYS if isinstance(content.get(key), Mapping)), None)
    if key is None and WEIGHTS_KEY in content:
        key = WEIGHTS_KEY
    if key is not None:
        weights = content[key]
    elif content and all(isinstance(value, Tensor) for value in content.values()):
        weights = content  # a bare state dict
    else:
        keys = ", ".join(_shown(key) for key in list(content)[:8]) or "nothing"
        raise UnreadableCheckpoint(f"{path} has no '{WEIGHTS_KEY}' (it holds {keys}): it is not an nnssl checkpoint")
    where = f"{path}: '{key}'" if key is not None else f"{path}"
    if not isinstance(weights, Mapping) or not weights:
        raise UnreadableCheckpoint(f"{where} is {_describe(weights)}, expected name → tensor")
    for name, value in weights.items():
        if not isinstance(name, str):
            raise UnreadableCheckpoint(f"{where} has the key {_shown(name)}, expected text")
        if not isinstance(value, Tensor):
            raise UnreadableCheckpoint(f"{where} has {_describe(value)} under {_shown(name)}, expected a tensor")
        problem = _problem(value)
        if problem is not None:
            raise UnreadableCheckpoint(f"{where} has {problem} under {_shown(name)}, expected plain numbers")
    _check_memory(weights, path)
    return dict(weights)


def _describe(value: Any) -> str:
    empty = isinstance(value, Mapping) and not value
    return "empty" if empty else f"a {type(value).__name__}"


def _shown(name: Any) -> str:
    """A key of a file that anyone may have written, in one short line."""
    text = name if isinstance(name, str) and name.isprintable() else repr(name)
    text = text if len(text) <= 80 else f"{text[:80]}…"
    return repr(text) if isinstance(name, str) and name.isprintable() else text


_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
_READABLE_TOO = (torch.int16, torch.int8, torch.uint8, torch.bool)


def _problem(tensor: Tensor) -> str | None:
    """What makes a tensor no plain array of numbers, or None."""
    if tensor.is_meta:
        return "a tensor without its numbers (meta device)"
    if tensor.is_quantized:
        return "a quantized tensor"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.dtype not in (*_READABLE, *_READABLE_TOO):
        return f"a tensor of {tensor.dtype}"
    return None


def _check_memory(weights: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor's numbers must lie in the file, and each in a place of its own unless it is the same tensor again."""
    try:
        size = path.stat().st_size
    except OSError:
        return
    places: dict[tuple[int, int], str] = {}
    for name, tensor in weights.items():
        claimed = tensor.numel() * tensor.element_size()
        if claimed > size:
            raise UnreadableCheckpoint(
                f"{path}: {_shown(name)} claims {claimed:,} bytes, the file has {size:,}: it is damaged, or made to fill "
                "the memory"
            )
        storage = tensor.untyped_storage()
        if storage.nbytes():
            places.setdefault((storage.data_ptr(), storage.nbytes()), name)
    ordered = sorted(places)
    for (start, length), (following, _) in pairwise(ordered):
        if start + length > following:
            names = f"{_shown(places[start, length])} and another tensor"
            raise UnreadableCheckpoint(f"{path}: {names} claim the same bytes of the file: it is damaged")


# -- names -----------------------------------------------------------------------------------------------------------


def strip_wrappers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without what torch.compile (``_orig_mod``) and DataParallel (a leading ``module``) put into them.

    They may be nested in any order; a leading ``module`` goes only when every name has it. Raises UnreadableCheckpoint
    if two names become one.
    """
    return unwrap(tensors, path, lightning=False)[0]


def unwrap(tensors: Mapping[str, Tensor], path: Path, lightning: bool) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """As :func:`strip_wrappers`, with notes; ``lightning`` also takes off the name of the network in a Lightning module.

    That one (``net``, ``model`` or ``network``) goes when the network's tensors all have it; a loss's own tensors need not.
    """
    names = {name: drop_compiled(name) for name in tensors}
    stripped = [*_WRAPPERS[1:]] if any(names[name] != name for name in names) else []
    while True:
        prefix = _shared_prefix(names.values(), lightning)
        if prefix is None:
            break
        names = {name: _without(short, prefix) for name, short in names.items()}
        stripped.append(prefix)
    found: dict[str, str] = {}
    for name, short in names.items():
        if short in found:
            raise UnreadableCheckpoint(
                f"{path} holds {_shown(short)} twice, with and without a wrapper's prefix ({_shown(found[short])} and "
                f"{_shown(name)}): it is not clear which one was trained"
            )
        found[short] = name
    words = list(dict.fromkeys(stripped))
    notes = (f"taken off its tensors' names: {', '.join(f'{word}.' for word in words)}",) if words else ()
    return {short: tensors[name] for short, name in found.items()}, notes


def _shared_prefix(names: Any, lightning: bool) -> str | None:
    """A word that every name starts with, or every name of the network; None when there is none to take off."""
    words = [name.split(".") for name in names]
    first = {word[0] for word in words if len(word) > 1}
    if all(len(word) > 1 for word in words) and len(first) == 1 and first <= set(_WRAPPERS):
        found: str | None = first.pop()
        return found
    if not lightning or any(word[0] in _NETWORK_PARTS for word in words):
        return None
    inside = {word[0] for word in words if len(word) > 2 and set(word[1:3]) & set(_NETWORK_PARTS)}
    return inside.pop() if len(inside) == 1 and inside <= {*_MODULE_NAMES, *_WRAPPERS} else None


def _without(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.")


def drop_compiled(name: str) -> str:
    """A tensor's name without what torch.compile put into it."""
    return ".".join(word for word in name.split(".") if word != "_orig_mod")


def unwrapped_name(name: str) -> str:
    """A name in a plan without what wrappers put into it, as the tensors' names are without them."""
    name = drop_compiled(name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


# -- several folds ---------------------------------------------------------------------------------------------------


def average_folds(folds: Sequence[tuple[Path, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The mean of the same network's weights from several files, in float32 (or better).

    Whole numbers (counters) are taken from the first file. A tensor with two names stays one tensor. Raises CheckpointError
    naming file and tensor when names or shapes differ.
    """
    path, first = folds[0]
    for other, tensors in folds[1:]:
        _check_alike(path, first, other, tensors)
    known: dict[tuple[tuple[object, ...], ...], Tensor] = {}
    averaged: dict[str, Tensor] = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            averaged[name] = tensor
            continue
        members = [tensors[name] for _, tensors in folds]
        key = tuple((member.data_ptr(), tuple(member.shape), member.stride()) for member in members)
        if key not in known:
            exact = torch.promote_types(tensor.dtype, torch.float32)
            total = members[0].to(exact, copy=True)
            for member in members[1:]:
                total += member.to(exact)
            known[key] = total / len(members)
        averaged[name] = known[key]
    return averaged


def _check_alike(path: Path, first: Mapping[str, Tensor], other: Path, tensors: Mapping[str, Tensor]) -> None:
    only = sorted(first.keys() ^ tensors.keys())
    if only:
        holder, lacking = (path, other) if only[0] in first else (other, path)
        raise CheckpointError(
            f"these folds can't be averaged: {holder} has {only[0]!r}, {lacking} has not. Choose one fold (--fold)"
        )
    for name, tensor in first.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"these folds can't be averaged: {name!r} is {list(tensor.shape)} in {path} and "
                f"{list(tensors[name].shape)} in {other}. Choose one fold (--fold)"
            )


_LOG = re.compile(r"training_log_(\d{4})_(\d{1,2})_(\d{1,2})_.*\.txt")


def training_ended(content: Mapping[str, Any], fold_folder: Path | None = None) -> date | None:
    """The day (UTC) of the last epoch that a checkpoint of nnU-Net's notes; else that of the last log beside it; else None."""
    logged = content.get("logging")
    times = logged.get("epoch_end_timestamps") if isinstance(logged, Mapping) else None
    last = times[-1] if isinstance(times, (list, tuple)) and times else None
    # Plausible seconds only: a damaged file may hold anything.
    if isinstance(last, (int, float)) and not isinstance(last, bool) and math.isfinite(last) and 1e9 < last < 1e10:
        return datetime.fromtimestamp(last, timezone.utc).date()
    found = map(_LOG.fullmatch, (path.name for path in fold_folder.glob("training_log_*.txt")) if fold_folder else ())
    return max(filter(None, (_day(match) for match in found if match)), default=None)


def _day(match: re.Match[str]) -> date | None:
    try:
        return date(int(match[1]), int(match[2]), int(match[3]))
    except ValueError:
        return None
