"""What is said about images that could not be predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nnssl_adapt.errors import NnsslAdaptError

_LISTED = 20


def complaint(error: Exception) -> str:
    """What went wrong with one image, in a line."""
    if isinstance(error, NnsslAdaptError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is too small for a single tile: close other programs on it, or use -device cpu"
    if isinstance(error, MemoryError):
        return "not enough memory"
    return f"{type(error).__name__}: {error}"


def failure_report(failures: Mapping[str, Exception], total: int, output: str | Path | None) -> str:
    """Which of ``total`` images failed (identifier → error), why, and where the others are, if written to ``output``."""
    lines = [f"  {name}: {complaint(error)}" for name, error in failures.items()]
    if len(lines) > _LISTED:
        lines = [*lines[:_LISTED], f"  ... and {len(lines) - _LISTED} more"]
    kept = f"; the others are in {output}" if output is not None and len(failures) < total else ""
    return "\n".join([f"{len(failures)} of {total} images could not be predicted{kept}:", *lines])
