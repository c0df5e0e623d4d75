"""Damage in preprocessed cases: compared with their checksums once, while the training goes on, and told where it is met."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nnssl_adapt.data.arrays import MADE_AGAIN
from nnssl_adapt.data.store import CaseStore, StoredCase
from nnssl_adapt.errors import CaseError
from nnssl_adapt.text import and_more, size_text
from nnssl_adapt.training.run.background import Background

logger = logging.getLogger(__name__)

MOST_BYTES = 4 * 2**30
"""Larger stores are not read from end to end: that takes the disk from the training for minutes."""


@contextmanager
def store_compared(
    store: CaseStore, cases: Sequence[str], most_bytes: int = MOST_BYTES
) -> Iterator[Callable[[], None]]:
    """Compare the cases with their checksums in a thread. To be used around the training.

    Gives a function that raises CaseError, naming the cases, once some were found whose bytes are not those that were written.
    The end of the block ends the comparison.
    """
    files = (store.folder / f"{case}{ending}" for case in cases for ending in (".b2nd", "_seg.b2nd", ".pkl"))
    size = sum(path.stat().st_size for path in files if path.is_file())
    if size > most_bytes:
        logger.info(
            "%s: %s of preprocessed cases are not compared with their checksums (more than %s); the preprocessing command does "
            "with --check",
            store.folder,
            size_text(size),
            size_text(most_bytes),
        )
        yield lambda: None
        return
    over = threading.Event()

    def compare() -> None:
        found: list[str] = []
        for case in cases:
            if over.is_set():
                return
            found += [] if store.is_complete(case, read_all=True) else [case]
        if found:
            raise changed_on_disk(store, found)

    with Background() as background:
        background.submit("checksums", compare)
        try:
            yield background.check
        finally:
            over.set()


def changed_on_disk(store: CaseStore, cases: Sequence[str]) -> CaseError:
    """The error of cases whose bytes are not those that were written."""
    return CaseError(
        f"{store.folder}: {and_more(cases)} changed on the disk since they were preprocessed (the bytes differ from "
        f"their checksums): {MADE_AGAIN}",
        path=store.folder,
    )


@contextmanager
def explained_damage(case: StoredCase) -> Iterator[None]:
    """Turn blosc2's errors, while voxels of a case are read, into a CaseError that names the case and what to do."""
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        raise CaseError(
            f"{case.folder}: the preprocessed case {case.identifier} is damaged ({' '.join(str(error).split())}): {MADE_AGAIN}",
            path=case.folder / f"{case.identifier}.b2nd",
        ) from error
