"""The properties of a preprocessed case: nnU-Net's pickle, read without running what it names."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_adapt.errors import CaseError

_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
}
"""What a case's pickle may name: containers and arrays. NumPy's private rebuilders are added from a sample pickle, since
their module differs between NumPy 1 (``numpy.core``) and 2 (``numpy._core``)."""


class _PropertiesUnpickler(pickle.Unpickler):
    """Unpickler for plain data: a pickle that names anything else could run code, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        key = (_current_module(module), name)
        if key in _ALLOWED_GLOBALS:
            return _ALLOWED_GLOBALS[key]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _current_module(name: str) -> str:
    """Today's name of a module: pickles of NumPy 1, and those of protocol 2 and below, name older ones."""
    if name == "__builtin__":
        return "builtins"
    return name.replace("numpy.core", "numpy._core")


def _allow_numpy_rebuilders() -> None:
    for sample, protocol in ((np.zeros(1), 2), (np.float64(0), 2), (np.zeros(1), 5)):
        function: Any = sample.__reduce_ex__(protocol)[0]
        _ALLOWED_GLOBALS[(_current_module(function.__module__), function.__name__)] = function
    _ALLOWED_GLOBALS[("_codecs", "encode")] = _latin1_bytes


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """What protocol 2 calls to rebuild bytes, for its one encoding only (others may run third-party codecs)."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


_allow_numpy_rebuilders()


def load_properties(path: Path) -> dict[str, Any]:
    """Read a case's ``.pkl`` without running code. Raises CaseError if it is damaged or names more than plain data."""
    try:
        with open(path, "rb") as stream:
            properties = _PropertiesUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise CaseError(f"{path} is damaged or not a case's properties ({error}): preprocess again") from error
    except (OSError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise CaseError(f"{path} can't be read ({type(error).__name__}: {error}): preprocess again") from error
    if not isinstance(properties, dict):
        raise CaseError(f"{path}: expected a dict of properties, got {type(properties).__name__}")
    return properties
