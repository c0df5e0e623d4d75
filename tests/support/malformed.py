"""Contents with anything at any place, for tests of whatever reads files that other people may have written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from nnssl_adapt.errors import NnsslAdaptError

ANYTHING: list[Any] = [
    None,
    True,
    0,
    -1,
    7,
    1.5,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "a\nb" * 40,
]
ANYTHING += [
    [],
    [None],
    [1, 2],
    [[2, 2, 2]] * 3,
    {},
    {"a": None},
    {"0": {"mean": []}},
    [{"train": [], "val": [1]}],
    {"": 0},
]


MISSING = object()
"""Instead of a value: nothing is left at its place."""


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node of the content, its root included."""
    yield path
    listed = enumerate(content) if isinstance(content, (list, tuple)) else ()
    for key, child in content.items() if isinstance(content, dict) else listed:
        yield from places(child, (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place, or without it (:data:`MISSING`)."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    if value is MISSING and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def damages(content: Any, values: Sequence[Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place with every value, or without its own: its path, and the content."""
    for path in places(content):
        for value in [MISSING, *values] if path else values:
            yield path, changed(content, path, value)


def changed_contents(content: Any, seed: int, most: int = 150) -> Iterator[Any]:
    """The content with anything in any place."""
    everything = [(path, value) for path in places(content) for value in ANYTHING]
    for path, value in random.Random(seed).sample(everything, min(most, len(everything))):
        yield changed(content, path, value)


def variants(content: Any, seed: int, most: int = 150) -> Iterator[str]:
    """The same as texts, and texts that are no JSON."""
    for wrong in changed_contents(content, seed, most):
        yield json.dumps(wrong)
    text = json.dumps(content)
    yield from ("", text[: len(text) // 2], "\ufeff" + text, "[" * 5000, "\x00", '{"a": 1, "a": 2}')


def used_or_refused(use: Callable[[], Any], text: str) -> bool:
    """Whether it was used; else it was refused by one of our errors. Anything else fails the test."""
    try:
        use()
    except NnsslAdaptError as error:
        assert str(error) and len(str(error)) < 4000, text
        return False
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error} of {text[:300]}")
    return True
