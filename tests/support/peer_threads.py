"""nnU-Net's pools of processes as pools of threads: each of those processes imports torch and nnU-Net, which takes seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import Any


class _WithThreads:
    """A context of multiprocessing whose pools are threads."""

    Pool = ThreadPool

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def pool_threads(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on ``multiprocessing.get_context(…).Pool`` makes threads; ``patch`` may be a monkeypatch's ``setattr``."""
    original = multiprocessing.get_context
    patch(multiprocessing, "get_context", lambda method=None: _WithThreads(original(method)))
