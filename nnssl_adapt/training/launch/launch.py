"""Starts a training as several processes on this machine, and sees them to their end.

What ``torchrun`` does, with four things that a training under a scheduler needs and ``torchrun`` has not: SIGUSR1 reaches
the processes as SIGTERM does, they get the time they need to save, their exit code is the command's, and when one dies it
is one line that says which and why. The processes see the same environment as under ``torchrun``.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but torch does not say so

from nnssl_adapt.errors import ConfigurationError, DeviceUnavailable, OtherRankFailed, TrainingError
from nnssl_adapt.files import write_json
from nnssl_adapt.training.launch.distributed import Ranks
from nnssl_adapt.training.run.signals import EXIT_CODE, signals_to_heed, training_begins, training_is_over

logger = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "nnssl_adapt.train")

_TO_NOTICE = 15.0
"""Seconds that the others have to notice that one failed, and to say what they have to say."""

_TO_SAVE = 120.0
"""Seconds that they have when one stopped in good order: then all do, and the main one may still write."""

_TO_END = 10.0
"""Seconds from asking one to end to making it end."""

_ERROR_FILE = "NNSSL_ADAPT_ERROR_FILE"
_LAUNCHER = "NNSSL_ADAPT_LAUNCHER"


def launch_wanted(num_gpus: int, environment: Mapping[str, str] | None = None) -> bool:
    """Whether ``-num_gpus`` asks for processes that are still to be started: in those themselves it is no news.

    Raises ConfigurationError for less than one, or when ``torchrun`` started another number.
    """
    environment = os.environ if environment is None else environment
    if num_gpus < 1:
        raise ConfigurationError(f"-num_gpus {num_gpus}: expected 1 or more")
    if num_gpus == 1:
        return False
    if environment.get("WORLD_SIZE", "1") == "1":
        return True
    started = environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])
    if started != str(num_gpus):
        raise ConfigurationError(
            f"-num_gpus {num_gpus}, but torchrun started {started} processes on this machine: leave -num_gpus out"
        )
    return False


def run_ranks(arguments: Sequence[str], count: int, device: str = "cuda", program: Sequence[str] = PROGRAM) -> int:
    """Run a training as ``count`` processes on this machine; returns their exit code when they end in good order.

    The main rank's output is this process's; what the others have to say is shown when they fail.

    Args:
        arguments: of ``nnUNetv2_train_pretrained``.
        count: processes; with ``device`` ``cuda``, each takes a GPU.
        device: ``cuda`` or ``cpu``.
        program: what is run, with ``arguments`` after it.

    Raises:
        DeviceUnavailable: there are fewer GPUs.
        ConfigurationError: a device that processes can't share.
        TrainingError: one was killed, or failed and the main one can't have said why. The others are ended.
    """
    check_processes(count, device)
    # Held here and not by a rank: no port can be taken away between its choice and its use.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="nnssl_adapt-ranks-") as folder:
        group = _Processes(device)
        with _passing_on(group):
            try:
                for rank in range(count):
                    notes = Path(folder) / f"rank_{rank}"
                    group.start([*program, *arguments], _environment(rank, count, store.port, notes), notes, rank == 0)
                group.wait()
            finally:
                group.end()
        return group.verdict()


def check_processes(count: int, device: str, batch_size: int | None = None) -> None:
    """Raise what speaks against so many processes, before anything long is done for them.

    Raises DeviceUnavailable: there are fewer GPUs; ConfigurationError: less than one, a device that they can't share, or more
    than a batch has samples.
    """
    if count < 1:
        raise ConfigurationError(f"-num_gpus {count}: expected 1 or more")
    if batch_size is not None:
        Ranks(size=count).samples(batch_size)
    if count == 1 or device == "cpu":
        return
    if device != "cuda":
        raise ConfigurationError(
            f"-num_gpus {count} with -device {device}: several processes need -device cuda (or cpu)"
        )
    there = torch.cuda.device_count()
    if there < count:
        raise DeviceUnavailable(
            f"-num_gpus {count}, but this machine shows {there or 'no'} GPU{'s' * (there != 1)}: ask the scheduler for more, "
            "look at CUDA_VISIBLE_DEVICES, or give a smaller -num_gpus"
        )


def _environment(rank: int, count: int, port: int, notes: Path) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // count)),  # unless set: else each takes all cores
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's own name for: the launcher holds the store
        "TORCHELASTIC_RESTART_COUNT": "0",  # which older versions of torch then ask for
        _ERROR_FILE: f"{notes}.json",
        _LAUNCHER: str(os.getpid()),
    }


# -- the processes -------------------------------------------------------------------------------------------------------


@dataclass
class _Processes:
    """The processes of one training, in the order of their ranks."""

    device: str
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    notes: list[Path] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    """Ranks that ended, in that order, up to the moment at which the others were made to."""
    pending: list[int] = field(default_factory=list)
    """Signals that were passed on; to those that start later, too."""

    def start(self, command: Sequence[str], environment: Mapping[str, str], notes: Path, shown: bool) -> None:
        with open(f"{notes}.log", "wb") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if shown else log,
                stderr=None if shown else log,
                start_new_session=True,  # Ctrl-C is passed on, and must not come twice
            )
        self.running.append(process)
        self.notes.append(notes)
        for number in self.pending:
            process.send_signal(number)

    def pass_on(self, number: int) -> None:
        self.pending.append(number)
        for process in self.running:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> None:
        """Until all have ended; when one fails, only as long as the others may need to notice."""
        deadline = float("inf")
        while len(self.ended) < len(self.running) and time.monotonic() < deadline:
            for rank, process in enumerate(self.running):
                if rank not in self.ended and process.poll() is not None:
                    self.ended.append(rank)
                    if process.returncode != 0 and deadline == float("inf"):
                        in_order = process.returncode == EXIT_CODE
                        deadline = time.monotonic() + (_TO_SAVE if in_order else _TO_NOTICE)
            time.sleep(0.05)

    def end(self) -> None:
        """End those that still run, with all that they started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.running:
                if process.poll() is None:
                    _signal_group(process.pid, number)
            until = time.monotonic() + _TO_END
            while time.monotonic() < until and any(process.poll() is None for process in self.running):
                time.sleep(0.05)

    def verdict(self) -> int:
        """The exit code that all have, or the main one's if it has said why; else raises TrainingError for the first cause."""
        codes = {rank: self.running[rank].returncode for rank in self.ended}
        if set(codes.values()) == {0} and len(codes) == len(self.running):
            return 0
        failed = [rank for rank, code in codes.items() if code != 0]
        killed = [rank for rank in failed if codes[rank] < 0]
        if killed and -codes[killed[0]] in self.pending:  # before Python could take note of it
            return EXIT_CODE
        if killed:
            raise TrainingError(self._killed(killed[0], -codes[killed[0]]))
        causes = [
            rank for rank in failed if (self._error(rank) or {}).get("type") != OtherRankFailed.__name__
        ] or failed
        if 0 in causes:
            return codes[0]
        if codes[causes[0]] == EXIT_CODE:  # another one left in good order before the main one could hear of it
            return EXIT_CODE
        raise TrainingError(f"{self._name(causes[0])} failed: {self._last_words(causes[0], codes[causes[0]])}")

    def _killed(self, rank: int, number: int) -> str:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        cause = {
            "SIGKILL": "the usual cause is too little memory: ask for more, or give fewer --workers",
            "SIGBUS": "the usual cause is too little shared memory (/dev/shm): give fewer --workers",
        }.get(name, self._tail(rank) or "the library that crashed has left no message")
        return f"{self._name(rank)} was killed by {name}; {cause}. The others were ended; go on with --c"

    def _name(self, rank: int) -> str:
        gpu = f" (GPU {rank})" if self.device == "cuda" else ""
        return f"rank {rank} of {len(self.running)}{gpu}"

    def _last_words(self, rank: int, code: int) -> str:
        error = self._error(rank)
        return error["message"] if error else self._tail(rank) or f"exit code {code}"

    def _error(self, rank: int) -> dict[str, str] | None:
        try:
            content = json.loads(Path(f"{self.notes[rank]}.json").read_text(encoding="utf-8"))
            return {"type": str(content["type"]), "message": str(content["message"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _tail(self, rank: int) -> str:
        try:
            lines = Path(f"{self.notes[rank]}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return ""
        return " | ".join([line.strip() for line in lines if line.strip()][-3:])[:600]


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError):  # ended meanwhile
        os.killpg(leader, number)


@contextmanager
def _passing_on(group: _Processes) -> Iterator[None]:
    """Pass signals on to the processes instead of dying of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        group.pass_on(number)

    before = {number: signal.getsignal(number) for number in signals_to_heed()}
    try:
        for number in before:
            signal.signal(number, handle)
        training_begins()
        yield
        training_is_over()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- in a process that was started -----------------------------------------------------------------------------------------


def note_error(error: BaseException) -> None:
    """Leave word of what this process fails of, for the launcher, if there is one."""
    if path := os.environ.get(_ERROR_FILE):
        write_json(Path(path), {"type": type(error).__name__, "message": str(error)})


def end_with_launcher() -> None:
    """Have this process get SIGTERM, on which it saves and ends, when its launcher dies. Only on Linux; a no-op elsewhere."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    set_death_signal: Callable[[int, int], int] = ctypes.CDLL(None).prctl
    set_death_signal(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of <sys/prctl.h>
    if os.getppid() != int(launcher):  # it died before
        os.kill(os.getpid(), signal.SIGTERM)
