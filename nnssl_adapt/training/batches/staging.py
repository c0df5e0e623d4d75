"""Copies of a fold's cases on a disk of this machine, from which patches are read as soon as they are there.

Network file systems are slow where many small pieces are read. The cases are copied while the first steps already read the
shared store; each is read from its copy from then on. The bytes are the same, so a training is, too.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl_adapt.data.store import CaseStore, StoredCase
from nnssl_adapt.errors import CaseError
from nnssl_adapt.machine.copying import SPARE, Ended, Order, Stage, prefix_of_copies
from nnssl_adapt.text import size_text
from nnssl_adapt.training.batches.store_check import changed_on_disk
from nnssl_adapt.training.launch.distributed import Ranks

logger = logging.getLogger(__name__)

_TO_REMOVE = 60.0
"""Seconds that the copying process has for removing what it copied."""


@contextmanager
def staged(store: CaseStore, cases: Sequence[str], stage: Stage | None, ranks: Ranks) -> Iterator[Staged]:
    """Copy the cases to a disk of this machine while the block runs; the copies vanish when it ends, however it ends.

    To be entered on all ranks: the first one of each machine copies, and all of that machine read the copies. Where nothing
    can be copied, that is said once, and everything is read from ``store``.
    """
    if stage is None:
        yield Staged(store)
        return
    token = ranks.from_main(secrets.token_hex(6))
    machine = os.environ.get("SLURMD_NODENAME") or platform.node()
    folder = stage.folder / f"{prefix_of_copies()}{token}-{machine}"
    copies = Staged(store, folder)
    if ranks.local_rank != 0:
        yield copies
        return
    cases = list(dict.fromkeys(cases))
    if not stage.whole:
        with suppress(OSError):  # the copying process says what is wrong
            stage.folder.mkdir(parents=True, exist_ok=True)
    try:
        with _Copying(store, stage.folder, cases, copies.damaged).running(_order(store, cases, folder, stage.whole)):
            yield copies
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # if the copying process was killed


@dataclass(frozen=True)
class Staged:
    """Cases that are copied already, or will be.

    Attributes:
        store: the shared one.
        folder: of the copies; None: there are none.
        damaged: cases whose bytes differ from their checksums in the store, as far as that was found while copying.
    """

    store: CaseStore
    folder: Path | None = None
    damaged: list[str] = field(default_factory=list)

    def refuse_damaged(self) -> None:
        """Raise CaseError once damage was found. To be called again and again."""
        if self.damaged:
            raise changed_on_disk(self.store, self.damaged)


def open_nearest(store: CaseStore, copies: CaseStore | None, identifier: str) -> StoredCase:
    """A case, from its copy where there is one already. Raises what :meth:`CaseStore.open` raises."""
    if copies is not None and (copies.folder / f"{identifier}.b2nd").is_file():
        with suppress(CaseError):  # removed in this very moment
            return copies.open(identifier)
    return store.open(identifier)


def _order(store: CaseStore, cases: Sequence[str], folder: Path, whole: bool) -> Order:
    groups = []
    for case in cases:
        data, seg, properties = store.checksums(case).items()
        groups.append(tuple((str(path), crc) for path, crc in (seg, properties, data)))
    shared = store.folder / "fg_sampling"  # where newer nnU-Nets keep the places of classes, for all cases
    return Order(str(folder), tuple(groups), (str(shared),) if shared.is_dir() else (), whole, SPARE)


class _Copying:
    """The copying process, seen from the training."""

    def __init__(self, store: CaseStore, stage: Path, cases: Sequence[str], damaged: list[str]) -> None:
        self.store = store
        self.stage = stage
        self.cases = cases
        self.damaged = damaged

    @contextmanager
    def running(self, order: Order) -> Iterator[None]:
        """The process copies until the block ends; then it removes what it copied."""
        process = subprocess.Popen(
            [sys.executable, "-m", "nnssl_adapt.machine.copying"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the training
        )
        listener = threading.Thread(target=self._listen, args=(process,), name="copying", daemon=True)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it was killed
                process.stdin.write(order.to_json() + "\n")
                process.stdin.flush()
            listener.start()
            yield
        finally:
            with suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(_TO_REMOVE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            listener.join(1)
            process.stdout.close()  # type: ignore[union-attr]

    def _listen(self, process: subprocess.Popen[str]) -> None:
        with suppress(ValueError):  # closed
            for line in process.stdout or ():
                self._heard(json.loads(line))

    def _heard(self, message: Mapping[str, Any]) -> None:
        if "impossible" in message:
            self._say_impossible(message)
        elif "begins" in message:
            begins = message["begins"]
            logger.info(
                "copying %d cases (%s) to %s, which has %s free",
                begins["groups"],
                size_text(begins["bytes"]),
                self.stage,
                size_text(begins["free"]),
            )
        else:
            self._say_ended(Ended(**message["ended"]))

    def _say_impossible(self, message: Mapping[str, Any]) -> None:
        if message["impossible"]:
            logger.warning(
                "no copies in %s (%s): all cases are read from %s",
                self.stage,
                message["impossible"],
                self.store.folder,
            )
        else:
            logger.info(
                "%s (SLURM_TMPDIR) has %s free, the cases are %s: no copies",
                self.stage,
                size_text(message["free"]),
                size_text(message["bytes"]),
            )

    def _say_ended(self, ended: Ended) -> None:
        self.damaged += [self.cases[number] for number in ended.damaged]
        if ended.reason:
            why = "the disk is full" if ended.reason == "full" else ended.reason
            logger.warning(
                "%d of %d cases were copied to %s (%s): the others are read from %s",
                ended.groups,
                len(self.cases),
                self.stage,
                why,
                self.store.folder,
            )
        elif not ended.damaged:
            logger.info(
                "all %d cases are read from %s now (copied in %.0f s)", len(self.cases), self.stage, ended.seconds
            )
