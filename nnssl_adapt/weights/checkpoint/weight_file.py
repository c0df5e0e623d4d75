"""Reading weight files as data: nothing in them is run, and what they hold instead of weights is named.

Pickles are read by torch's restricted unpickler (``weights_only``); what needs code is refused. What a file claims to
hold is compared with what it can hold before memory is given to it.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from nnssl_adapt.errors import UnreadableCheckpoint, UnsafeCheckpoint
from nnssl_adapt.weights.sources.resolved import ResolvedSource

WEIGHTS_KEY = "network_weights"

PLAN_KEYS = ("nnssl_adaptation_plan", "adaptation_plan")
"""Where a checkpoint, or the metadata of safetensors (as JSON text), may keep its adaptation plan; the first counts."""


def read_contents(resolved: ResolvedSource) -> dict[Path, dict[str, Any]]:
    """Read the weights, and those of each further fold: file → content, as :func:`read_weight_file` gives it.

    Weights that are spread over several files are one content. Checksums are compared where no digest was recorded before.
    Raises UnreadableCheckpoint or UnsafeCheckpoint.
    """
    weights = (resolved.weights, *resolved.other_shards)
    contents = {resolved.weights: read_weight_file(weights[0]) if len(weights) == 1 else _read_shards(weights)}
    if resolved.origin.kind in ("file", "folder", "model_folder"):
        for path in (*weights, *resolved.other_folds):
            _check_sums(path)
    return contents | {path: read_weight_file(path) for path in resolved.other_folds}


def _read_shards(paths: Sequence[Path]) -> dict[str, Any]:
    """Weights that are spread over several files as one content; raises UnreadableCheckpoint for a tensor that is in two."""
    joined: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for path in paths:
        content = read_weight_file(path)
        own = content.pop(WEIGHTS_KEY, {})
        if twice := next((name for name in own if name in tensors), None):
            raise UnreadableCheckpoint(
                f"{path} holds {twice!r}, and so does another file of the same network: copy them again"
            )
        tensors |= own
        joined = {**content, **joined}
    return {**joined, WEIGHTS_KEY: tensors}


def _check_sums(path: Path) -> None:
    """Compare a zip's contents (a ``.pth`` since torch 1.6) with its checksums, for files whose digest nobody recorded.

    torch itself never does. Raises UnreadableCheckpoint naming the damaged part. Other formats have no checksums.
    """
    if _first_bytes(path)[:2] != b"PK":
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged zip fails in many ways
        raise _damaged(path, error) from error
    if damaged is not None:
        raise UnreadableCheckpoint(
            f"{path} is damaged: {damaged!r} in it does not agree with its checksum. Copy or download it again",
            path=path,
        )


def read_weight_file(path: Path) -> dict[str, Any]:
    """Read a ``.pth``, ``.ckpt`` or ``.safetensors`` file as data, on the CPU, mapped into memory where the format allows.

    Safetensors come back as ``{"network_weights": …, "nnssl_adaptation_plan": …, "citations": …, "trainer_name": …}``, as
    far as their metadata go. Raises UnreadableCheckpoint or UnsafeCheckpoint.
    """
    start = _first_bytes(path)
    if path.suffix.lower() == ".safetensors" or start[8:10] == b'{"':
        return _read_safetensors(path)
    archive = _checked_archive(path) if start.startswith(b"PK") else False
    try:
        with _numbers_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of files that are then refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive or None)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from error
    except Exception as error:  # a damaged pickle can fail anywhere in the reader
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(
            f"{path} holds a {type(content).__name__}, expected a mapping with '{WEIGHTS_KEY}' (an nnssl checkpoint)"
        )
    return content


def _first_bytes(path: Path) -> bytes:
    """The start of a file, which tells what is often mistaken for a checkpoint."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise UnreadableCheckpoint(f"can't read {path}: {error.strerror or error}") from error
    if not start:
        raise UnreadableCheckpoint(f"{path} is empty: copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UnreadableCheckpoint(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull' where it is from")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UnreadableCheckpoint(f"{path} is a web page, not a checkpoint: download the file itself")
    return start


def _damaged(path: Path, reason: BaseException | str, kind: str = "PyTorch checkpoint") -> UnreadableCheckpoint:
    text = reason if isinstance(reason, str) else _first_line(reason)
    return UnreadableCheckpoint(f"{path} is truncated or not a {kind} ({text}): copy or download it again")


def _first_line(error: BaseException) -> str:
    """The first sentence or so of a library's message, which may go on for pages."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    plain = "".join(letter if letter.isprintable() else "?" for letter in line)
    return textwrap.shorten(plain.split(". ")[0], 120, placeholder=" …")


# -- before anything is unpickled ------------------------------------------------------------------------------------


def _checked_archive(path: Path) -> bool:
    """Whether it is a zip as torch.save writes it: members once, uncompressed, and no larger than the file.

    Anything else that starts like a zip raises UnreadableCheckpoint, or UnsafeCheckpoint for what would fill the memory.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            pickles = [m for m in members if m.filename.endswith("data.pkl") and m.compress_type == zipfile.ZIP_STORED]
            code = b"".join(archive.read(m) for m in pickles if m.file_size <= size)
    except Exception as error:  # a damaged zip fails in many ways
        raise _damaged(path, error) from error
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UnreadableCheckpoint(f"{path} holds {twice!r} twice, which torch.save never writes: it was tampered with")
    if any(name.endswith("/constants.pkl") for name in names):
        raise UnsafeCheckpoint(
            f"{path} is a TorchScript program, which would be run; it was refused. Ask its author for the state dict"
        )
    claimed = sum(member.file_size for member in members)
    if claimed > size:
        raise UnreadableCheckpoint(
            f"{path} claims to hold {claimed:,} bytes and has {size:,}: it is damaged, or made to fill the memory"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UnreadableCheckpoint(
            f"{path} is a compressed zip, which torch.save never writes: unpack it if it is an archive with a checkpoint in it"
        )
    if _BYTEARRAY.search(code):
        raise UnsafeCheckpoint(
            f"{path} asks for builtins.bytearray while it is loaded, which could fill the memory; it was refused"
        )
    return True


_BYTEARRAY = re.compile(rb"c(builtins|__builtin__)\nbytearray\n")
"""The one thing on torch's list of harmless callables that takes as much memory as a file says."""


def _number(make: Callable[..., Any], module: str) -> Callable[..., Any]:
    """NumPy's constructor of scalars under its name in ``module``, for plain numbers only."""

    def scalar(dtype: Any, data: Any) -> Any:
        if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"a NumPy scalar of {str(dtype)[:40]!r}, expected a plain number")
        return make(dtype, data)

    scalar.__module__, scalar.__qualname__, scalar.__name__ = module, "scalar", "scalar"
    return scalar


_NUMBERS: list[Any] = [
    # Trainers log NumPy scalars (best pseudo-Dice, losses). NumPy 2 moved the function, and files name either place.
    *(_number(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)},
]


def _numbers_allowed() -> AbstractContextManager[None]:
    """torch older than 2.5 has no such list, and then refuses files with NumPy scalars."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    return safe_globals(_NUMBERS) if safe_globals else nullcontext()


# -- what was refused ------------------------------------------------------------------------------------------------


def _refusal(path: Path, message: str) -> UnsafeCheckpoint | UnreadableCheckpoint:
    """What torch's restricted unpickler objected to: a global outside of its list, or a pickle that isn't one."""
    match = _FOREIGN_GLOBAL.search(message)
    wanted = match.group(1) if match else _foreign_global(path)
    if wanted is None:
        reason = _UNPICKLER_ERROR.search(message)
        return _damaged(path, _first_line(Exception(reason.group(1))) if reason else "bad pickle")
    plain = "".join(letter if letter.isprintable() else "?" for letter in wanted[:120])
    return UnsafeCheckpoint(
        f"{path} asks for {plain} while it is loaded, which could run code; it was refused and nothing was run. "
        "Ask its author for a file of plain tensors (safetensors, or torch.save of a state dict)"
    )


_FOREIGN_GLOBAL = re.compile(
    r"(?:GLOBAL|Trying to (?:call reduce for|instantiate) unrecognized (?:function|class)) (\S+)"
)
_UNPICKLER_ERROR = re.compile(r"WeightsUnpickler error:\s*(.+)")

_SCANNED_BYTES, _SCANNED_OPCODES = 4_000_000, 200_000
"""How far into a foreign pickle is looked for what it asks for. What it asks for stands at its beginning."""


def _foreign_global(path: Path) -> str | None:
    """What a plain pickle (not made by torch.save) asks for, read off its opcodes without running them.

    The first global that no tensor explains, else the first at all, else None. Takes any bytes, never raises.
    """
    wanted: list[str] = []
    try:
        with open(path, "rb") as stream:
            # A claim of gigabytes can't get more out of this than there is in it.
            head = io.BytesIO(stream.read(_SCANNED_BYTES))
        wanted.extend(_globals_in(head))
    except Exception:  # it ends early, or is no pickle at all: whatever was found until then counts
        pass
    suspicious = [name for name in wanted if not name.startswith(("torch.", "collections.", "numpy."))]
    return next(iter(suspicious or wanted), None)


def _globals_in(stream: io.BytesIO) -> Iterator[str]:
    """Dotted names of the globals in a pickle, one by one until it ends or breaks off."""
    texts, memo, number = ["", ""], {}, 0
    opcodes = pickletools.genops(stream)
    for opcode, argument, _ in islice(opcodes, _SCANNED_OPCODES):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts)
        elif opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[number if argument is None else argument] = texts[-1]
            number += 1
        elif opcode.name in ("BINGET", "LONG_BINGET") and argument in memo:
            texts = [texts[-1], memo[argument]]
        elif isinstance(argument, str):
            texts = [texts[-1], argument]


# -- safetensors -----------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        _check_header(path)
        with safe_open(path, framework="pt", device="cpu") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
            metadata = stream.metadata() or {}
    except Exception as error:
        raise _damaged(path, error, "safetensors file") from error
    content: dict[str, Any] = {WEIGHTS_KEY: tensors}
    plan = next((metadata[key] for key in PLAN_KEYS if key in metadata), None)
    if plan is not None:
        content[PLAN_KEYS[0]] = _json_or_text(plan)
    if "citations" in metadata:
        content["citations"] = _json_or_text(metadata["citations"])
    if "trainer_name" in metadata:
        content["trainer_name"] = metadata["trainer_name"]
    return content


def _check_header(path: Path) -> None:
    """Raise ValueError when a name stands twice in the header; the library would take the last one without a word."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length <= path.stat().st_size:  # otherwise the library says what is wrong
            json.loads(stream.read(length), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return found


def _json_or_text(text: str) -> Any:
    """What a metadata entry (always text) says; text that is no JSON is left for the reader of the entry to refuse."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
