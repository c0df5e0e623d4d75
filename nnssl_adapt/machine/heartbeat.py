"""A sign of life beside a lock: a file that its holder renews, so that others can tell a dead holder from a living one."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

EVERY = 20.0
"""Seconds from one beat to the next."""

STALE = 180.0
"""Seconds after which nobody lives: several beats, and the minute for which NFS may remember a file's old time."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        process: its id on its machine.
        machine: name of it.
        job: number of its Slurm job, or empty.
        restarts: how often that job was queued again before.
        since: when it began, as text.
        token: tells this holder from all others.
    """

    process: int
    machine: str
    job: str = ""
    restarts: int = 0
    since: str = ""
    token: str = ""

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> Holder:
        """This process."""
        environment = os.environ if environment is None else environment
        restarts = environment.get("SLURM_RESTART_COUNT", "")
        return cls(
            process=os.getpid(),
            machine=platform.node(),
            job=environment.get("SLURM_JOB_ID", ""),
            restarts=int(restarts) if restarts.isdigit() else 0,
            since=f"{datetime.now():%Y-%m-%d %H:%M}",
            token=secrets.token_hex(8),
        )

    def __str__(self) -> str:
        of_job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.process} on {self.machine}{of_job}, since {self.since}"

    def was_before(self, other: Holder) -> bool:
        """Whether this is an earlier round of ``other``'s job: Slurm starts a job again only when it has ended."""
        return bool(self.job) and self.job == other.job and self.restarts < other.restarts


class Heartbeat:
    """The file of one lock.

    Args:
        path: where it lies, on the file system that the lock's users share.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def holder(self) -> Holder | None:
        """Who beats, or was the last to; None where nobody does or the file can't be read."""
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            return Holder(**content)
        except (OSError, ValueError, TypeError):
            return None

    def age(self) -> float:
        """Seconds since the last beat, by the clock of the file system: machines' own clocks differ."""
        probe = self.path.with_name(f"{self.path.name}-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with open(self.path, "rb") as stream:  # opened: network file systems then look whether it has changed
                beat = os.fstat(stream.fileno()).st_mtime
            probe.touch()
            return max(0.0, probe.stat().st_mtime - beat)
        except OSError:
            return 0.0
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)

    def claim(self, holder: Holder, dead: Holder | None = None) -> bool:
        """Make the file ``holder``'s, in place of one that ``dead`` left. False if another was faster."""
        left = self.holder()
        if left == dead and (dead is not None or (self.path.exists() and self.age() > STALE)):
            with suppress(OSError):  # another may have removed it
                buried = self.path.with_name(f"{self.path.name}-{holder.token}")
                self.path.rename(buried)
                buried.unlink()
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        except OSError as error:
            logger.debug("%s: no heartbeat (%s)", self.path, error)
            return True
        self._beat(holder)
        return True

    @contextmanager
    def beating(self, holder: Holder) -> Iterator[None]:
        """Beat for ``holder``, whose claim it is, until the block ends; then the file vanishes.

        A process that others took for dead, and that lives, ends here: two must not write the same files.
        """
        stop = threading.Event()

        def keep_on() -> None:
            while not stop.wait(EVERY):
                other = self.holder()
                if other is not None and other.token != holder.token:
                    logger.error(
                        "%s: taken over by %s, which took this process for dead: ending", self.path.parent, other
                    )
                    os._exit(1)
                self._beat(holder)

        thread = threading.Thread(target=keep_on, name=f"heartbeat of {self.path.parent.name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(EVERY)
            last = self.holder()
            if last is not None and last.token == holder.token:
                with suppress(OSError):
                    self.path.unlink(missing_ok=True)

    def _beat(self, holder: Holder) -> None:
        """Written in place and flushed to the disk: another machine is to see it."""
        try:
            with open(self.path, "w", encoding="utf-8") as stream:
                json.dump(vars(holder), stream)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:  # a full disk is no reason to end a run that may still need no space
            logger.debug("%s: no heartbeat (%s)", self.path, error)
