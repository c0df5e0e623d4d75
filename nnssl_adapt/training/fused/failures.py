"""What goes wrong where code is compiled for a device, and is done without instead."""

from __future__ import annotations

BACKEND_FAILURES = (
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ImportError,
    OSError,
    AssertionError,
)
"""What compilers raise (Triton's and C++'s, and torch's own around them). An error of the work itself comes again when it is
done without them. Lack of memory is a RuntimeError as well: catch it before."""


def in_words(error: Exception) -> str:
    """The kind of an error and its text, on one line that is not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
