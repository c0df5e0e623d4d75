"""Words that many rooms need: lists that end in "and 3 more", sizes, dimensions; and JSON read with a clear error."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnssl_adapt.errors import NnsslAdaptError


def and_more(items: Iterable[Any], limit: int = 5, separator: str = ", ") -> str:
    """``a, b, c and 4 more``: the first ``limit`` items, then the number of the others."""
    shown = [str(item) for item in items]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return separator.join(shown[:limit]) + more


def lines_and_more(lines: Sequence[Any], limit: int = 20, indent: str = "  ") -> str:
    """One item a line, indented; after the first ``limit``, ``… and 4 more``."""
    shown = [f"{indent}{line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"{indent}… and {len(lines) - limit} more")
    return "\n".join(shown)


def dimensions(numbers: Iterable[float], digits: int = 6) -> str:
    """``160 × 160 × 96`` or ``1 × 0.9375 × 0.9375``: a shape, patch or spacing, with so many significant digits."""
    return " × ".join(f"{number:.{digits}g}" for number in numbers)


def size_text(size: float) -> str:
    """Bytes as ``1.5 GiB``; below a tenth of one as ``12.0 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean …?)``, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_json(path: str | Path, error: type[NnsslAdaptError], what: str = "JSON file", expected: type = dict) -> Any:
    """Read a JSON file that somebody else may have written or edited.

    A byte-order mark is allowed. A key that stands twice in one object is an error, since one of the two values would
    be lost without a word.

    Args:
        path: the file.
        error: the class that is raised, with ``path`` set, when the file is missing, is no JSON, or holds something else.
        what: what the file should be, for the message: ``dataset.json``, ``plans file``.
        expected: the type of the outermost value, ``dict`` or ``list``; ``object`` for any.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise error(f"there is no {what} {path}", path=path) from None
    except RecursionError:
        raise error(f"{path} is not a {what}: its content is nested too deeply", path=path) from None
    except (OSError, ValueError) as problem:
        raise error(f"{path} is not a {what}: {problem}", path=path) from problem
    if not isinstance(content, expected):
        wanted = "an object with keys" if expected is dict else "a list" if expected is list else expected.__name__
        raise error(f"{path} is not a {what}: expected {wanted}, got {json.dumps(content)[:60]}", path=path)
    return content


def read_record(path: str | Path) -> dict[str, Any]:
    """A record that we wrote ourselves; empty when it is missing or damaged, which both mean "not done yet"."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; remove one of them")
    return content
