"""Reading weight files as data: nothing in them is run, and what they hold instead of weights is named.

Pickles are read by torch's restricted unpickler (``weights_only``); what needs code is refused.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import textwrap
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnssl_adapt.errors import UnreadableCheckpoint, UnsafeCheckpoint

WEIGHTS_KEY = "network_weights"


def read_weight_file(path: Path) -> dict[str, Any]:
    """Read a ``.pth`` or ``.safetensors`` file as data, on the CPU, mapped into memory where the format allows.

    Safetensors come back as ``{"network_weights": …, **metadata}``. Raises UnreadableCheckpoint or UnsafeCheckpoint.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _refuse_obvious_mistakes(path)
    mapped = zipfile.is_zipfile(path)
    try:
        with _numbers_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of files that are then refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from error
    except Exception as error:  # a damaged pickle can fail anywhere in the reader
        raise UnreadableCheckpoint(
            f"{path} is truncated or no PyTorch checkpoint ({_first_line(error)}): copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(
            f"{path} holds a {type(content).__name__}, expected a mapping with '{WEIGHTS_KEY}' (an nnssl checkpoint)"
        )
    return content


_NUMBERS: list[Any] = [
    # Trainers log NumPy scalars (best pseudo-Dice, losses): rebuilding them runs nothing but NumPy's constructors.
    np.float64(0).__reduce__()[0],  # numpy.core.multiarray.scalar, wherever this NumPy keeps it
    np.dtype,
    *{type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)},
]


def _numbers_allowed() -> AbstractContextManager[None]:
    """torch older than 2.5 has no such list, and then refuses files with NumPy scalars."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    return safe_globals(_NUMBERS) if safe_globals else nullcontext()


def _refuse_obvious_mistakes(path: Path) -> None:
    with open(path, "rb") as stream:
        start = stream.read(64)
    if not start:
        raise UnreadableCheckpoint(f"{path} is empty: copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UnreadableCheckpoint(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' where it is from")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UnreadableCheckpoint(f"{path} is a web page, not a checkpoint: download the file itself")


def _refusal(path: Path, message: str) -> UnsafeCheckpoint | UnreadableCheckpoint:
    """What torch's restricted unpickler objected to: a global outside of its list, or a pickle that isn't one."""
    match = _FOREIGN_GLOBAL.search(message)
    wanted = match.group(1) if match else _foreign_global(path)
    if wanted is None:
        reason = _UNPICKLER_ERROR.search(message)
        return UnreadableCheckpoint(
            f"{path} is truncated or no PyTorch checkpoint ({reason.group(1).strip() if reason else 'bad pickle'}): "
            "copy or download it again"
        )
    return UnsafeCheckpoint(
        f"{path} asks for {wanted} while it is loaded, which could run code; it was refused and nothing was run. "
        "Ask its author for a file of plain tensors (safetensors, or torch.save of a state dict)"
    )


_FOREIGN_GLOBAL = re.compile(
    r"(?:GLOBAL|Trying to (?:call reduce for|instantiate) unrecognized (?:function|class)) (\S+)"
)
_UNPICKLER_ERROR = re.compile(r"WeightsUnpickler error:\s*(.+)")


def _foreign_global(path: Path) -> str | None:
    """What a plain pickle (not made by torch.save) asks for, read off its opcodes without running them.

    The first global that no tensor explains, else the first at all, else None.
    """
    wanted: list[str] = []
    strings: list[str] = []
    try:
        with open(path, "rb") as stream:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    wanted.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    wanted.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except ValueError:  # it ends early, or is no pickle at all
        pass
    suspicious = [name for name in wanted if not name.startswith(("torch.", "collections.", "numpy."))]
    return next(iter(suspicious or wanted), None)


def _first_line(error: Exception) -> str:
    """The first sentence or so of a library's message, which may go on for pages."""
    line = (str(error) or type(error).__name__).splitlines()[0].strip()
    return textwrap.shorten(line.split(". ")[0], 120, placeholder=" …")


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
            metadata = stream.metadata() or {}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UnreadableCheckpoint(
            f"{path} is truncated or no safetensors file ({_first_line(error)}): copy or download it again"
        ) from error
    return {**{key: value for key, value in metadata.items() if key == "trainer_name"}, WEIGHTS_KEY: tensors}


def tensors_of(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint's content. Raises UnreadableCheckpoint naming the entry that doesn't belong."""
    if WEIGHTS_KEY in content:
        weights = content[WEIGHTS_KEY]
    elif content and all(isinstance(value, Tensor) for value in content.values()):
        weights = content  # a bare state dict
    else:
        keys = ", ".join(str(key) for key in list(content)[:8]) or "nothing"
        raise UnreadableCheckpoint(f"{path} has no '{WEIGHTS_KEY}' (it holds {keys}): it is no nnssl checkpoint")
    if not isinstance(weights, Mapping) or not weights:
        raise UnreadableCheckpoint(f"{path}: '{WEIGHTS_KEY}' is {_describe(weights)}, expected name → tensor")
    for name, value in weights.items():
        if not isinstance(name, str):
            raise UnreadableCheckpoint(f"{path}: '{WEIGHTS_KEY}' has the key {name!r}, expected text")
        if not isinstance(value, Tensor):
            raise UnreadableCheckpoint(
                f"{path}: '{WEIGHTS_KEY}' has {_describe(value)} under {name!r}, expected a tensor"
            )
    return dict(weights)


def _describe(value: Any) -> str:
    empty = isinstance(value, Mapping) and not value
    return "empty" if empty else f"a {type(value).__name__}"


def strip_wrappers(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without what torch.compile (``_orig_mod``) and DataParallel (a leading ``module``) put into them.

    A leading ``module`` goes only when every name has it. Raises UnreadableCheckpoint if two names become one.
    """
    stripped = {drop_compiled(name): tensor for name, tensor in tensors.items()}
    if all(name.startswith("module.") for name in stripped):
        stripped = {name.removeprefix("module."): tensor for name, tensor in stripped.items()}
    if len(stripped) != len(tensors):
        raise UnreadableCheckpoint(f"{path} holds the same tensors with and without the prefix '_orig_mod.'")
    return stripped


def drop_compiled(name: str) -> str:
    """A tensor's name without what torch.compile put into it."""
    return ".".join(word for word in name.split(".") if word != "_orig_mod")
