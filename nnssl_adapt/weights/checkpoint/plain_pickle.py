"""Pickles of plain values, read as data: what nnU-Net version 1 wrote beside its weights (``.model.pkl``).

Mappings, lists, text and numbers come out; NumPy arrays as nested lists. A pickle that names anything else is refused by that
name, and nothing in it is run. No constructor that takes memory at a file's word is ever called.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.errors import UnreadableCheckpoint, UnsafeCheckpoint

_MOST_BYTES = 256 * 2**20
"""The largest such file seen has some megabytes: it names every case of its dataset."""


def read_plain_pickle(path: Path) -> Any:
    """The content of a pickle of plain values.

    Raises UnsafeCheckpoint for one that names anything that is no plain value, UnreadableCheckpoint for one that is damaged,
    or too large to be one.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UnreadableCheckpoint(
                f"{path} has {path.stat().st_size:,} bytes, and plans of nnU-Net version 1 have a few million at most",
                path=path,
            )
        with open(path, "rb") as stream:
            return _plain(_PlainUnpickler(stream).load(), {})
    except _Refused as error:
        raise UnsafeCheckpoint(
            f"{path} asks for {error} while it is loaded, which could run code; it was refused and nothing was run. Move it "
            "away to use the weights without it",
            path=path,
        ) from error
    except OSError as error:
        raise UnreadableCheckpoint(f"can't read {path}: {error.strerror or error}", path=path) from error
    except _DAMAGE as error:
        raise UnreadableCheckpoint(
            f"{path} is truncated or no pickle of nnU-Net's ({type(error).__name__}): copy it again, or move it away to use "
            "the weights without it",
            path=path,
        ) from error


class _Refused(Exception):
    """A name that stands for no plain value."""


_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(RecursionError, MemoryError, OverflowError),
)
"""What Python's unpickler raises for bytes that are no whole pickle."""


class _Type:
    """Stands for ``numpy.dtype``: the type of an array's numbers or text; of no objects and no records."""

    def __init__(self, name: object = "", align: object = False, copy: object = True) -> None:
        if not isinstance(name, str) or name[:1] not in tuple("biufSU"):
            raise _Refused(f"a NumPy array of {str(name)[:40]!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for ``numpy.ndarray``, which would take memory at a file's word: its numbers are read from what is there."""

    values: Any = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, data = state
        self.fill(data, kind, shape, "F" if is_fortran else "C")

    def fill(self, data: object, kind: object, shape: Any, order: Any) -> None:
        if not isinstance(kind, _Type) or not isinstance(data, (bytes, bytearray)):
            raise _Refused("a NumPy array that is no plain one")
        self.values = np.frombuffer(data, kind.dtype).reshape(shape, order=order).tolist()


def _from_buffer(data: object, kind: object, shape: object, order: object = "C") -> _Array:
    """How pickles of protocol 5 write arrays."""
    array = _Array()
    array.fill(data, kind, shape, "F" if order == "F" else "C")
    return array


def _scalar(kind: object, data: object) -> Any:
    if not isinstance(kind, _Type) or not isinstance(data, bytes):
        raise _Refused("a NumPy scalar that is no plain number")
    return np.frombuffer(data, kind.dtype)[0].item()


def _encoded(text: object, encoding: object) -> bytes:
    """How pickles of protocol 2 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("_codecs.encode")
    return text.encode("latin1")


_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encoded,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    # NumPy 2 moved these, and files name either place.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


def _plain(value: Any, done: dict[int, Any], depth: int = 0) -> Any:
    """Arrays as nested lists, everything in them and around them as plain values.

    ``done`` has what was seen, by identity: a pickle may name one list a billion times.
    """
    if id(value) in done:
        return done[id(value)]
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(value, _Array):
        found: Any = value.values
    elif isinstance(value, dict):
        found = {_plain(k, done, depth + 1): _plain(v, done, depth + 1) for k, v in value.items()}
    elif isinstance(value, (list, tuple)):
        found = type(value)(_plain(entry, done, depth + 1) for entry in value)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        return value
    else:
        raise _Refused(f"{type(value).__name__} as a value")
    done[id(value)] = found
    return found


_DEEPEST = 50


class _PlainUnpickler(pickle.Unpickler):
    """Python's unpickler with a short list of names; all else that a file asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PLAIN[module, name]
        except KeyError:
            plain = "".join(letter if letter.isprintable() else "?" for letter in f"{module}.{name}"[:120])
            raise _Refused(plain) from None

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("an object that lies elsewhere")
