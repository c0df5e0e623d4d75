"""Slurm's own commands, and what they answer. Nothing here decides anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_adapt.errors import ConfigurationError, NnsslAdaptError

_ANSWERS_WITHIN = 60.0
"""Seconds that a command of Slurm's is waited for."""

_FIELDS = ("%i", "%T", "%r", "%N", "%L")


_LISTS = (
    ("account", "sacctmgr show associations user=$USER"),
    ("partition", "sinfo --summarize"),
    ("qos", "sacctmgr show qos"),
    ("generic resource", "sinfo --format='%P %G'"),
    ("gres", "sinfo --format='%P %G'"),
)
"""Words in a refusal of sbatch's, and commands that list the names which are known. The first one that fits counts:
sbatch says "account or account/partition"."""


class SlurmError(NnsslAdaptError):
    """Slurm refused, or does not answer; the message has its own words."""


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, that Slurm has in its queue.

    Attributes:
        number: such as ``123`` or ``123_4``.
        state: Slurm's word, such as ``RUNNING``.
        reason: why it waits.
        nodes: where it runs.
        time_left: as Slurm writes it.
    """

    number: str
    state: str
    reason: str = ""
    nodes: str = ""
    time_left: str = ""


def require_slurm() -> None:
    """Raise ConfigurationError where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise ConfigurationError(
            "there is no Slurm here (no sbatch on the PATH): submit from a login node, or add --cluster local to run "
            "everything on this machine"
        )


def sbatch(script: Path, flags: Sequence[str] = ()) -> str:
    """Submit a script; returns the job's number. Raises SlurmError with sbatch's own words."""
    # Variables of a job that this runs in would be taken for flags.
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    answer = _run(["sbatch", "--parsable", *flags, str(script)], own)
    if answer.returncode != 0:
        words = _last_words(answer)
        command = next((command for word, command in _LISTS if word in words.lower()), "")
        listed = f" ({command} lists what there is)" if command else ""
        raise SlurmError(f"sbatch refused {script.name}: {words}{listed}", path=script, next_command=command or None)
    return answer.stdout.strip().partition(";")[0]


def queued(numbers: Iterable[str]) -> dict[str, Job]:
    """Jobs of these numbers (of arrays, all their tasks) that wait or run, by number. Raises SlurmError."""
    whole = sorted({number.partition("_")[0] for number in numbers})
    if not whole:
        return {}
    answer = _run(["squeue", "--noheader", "--array", "--jobs", ",".join(whole), "--format", "|".join(_FIELDS)])
    if answer.returncode != 0:
        if "Invalid job id" in answer.stderr:  # all of them are over
            return {}
        raise SlurmError(f"squeue: {_last_words(answer)}")
    rows = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == len(_FIELDS) - 1]
    return {row[0]: Job(*row) for row in rows}


def facts(number: str) -> dict[str, str]:
    """What Slurm still knows of a job, ended or not (``scontrol show job``); empty when it has forgotten it."""
    answer = _run(["scontrol", "show", "job", "--oneliner", number])
    if answer.returncode != 0:
        return {}
    lines = [line for line in answer.stdout.splitlines() if line.strip()]
    return dict(re.findall(r"(\S+?)=(\S*)", lines[0])) if lines else {}


def final_state(number: str) -> str:
    """How a job ended, by ``scontrol`` or, where there is accounting, ``sacct``; empty where neither knows."""
    known = facts(number)
    if known:
        return known.get("JobState", "")
    if shutil.which("sacct") is None:
        return ""
    answer = _run(["sacct", "--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", number])
    words = answer.stdout.split()
    return words[0] if answer.returncode == 0 and words else ""


def requeue(number: str) -> None:
    """Queue a running job again. Raises SlurmError."""
    answer = _run(["scontrol", "requeue", number])
    if answer.returncode != 0:
        raise SlurmError(f"scontrol requeue {number}: {_last_words(answer)}")


def cancel(numbers: Iterable[str]) -> None:
    """Cancel jobs; those that are over are no mistake. Raises SlurmError."""
    wanted = sorted({number.partition("_")[0] for number in numbers})
    if not wanted:
        return
    answer = _run(["scancel", *wanted])
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        raise SlurmError(f"scancel: {_last_words(answer)}")


def _run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWERS_WITHIN, env=environment)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on the PATH: is this a machine of the cluster?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gave no answer within {_ANSWERS_WITHIN:.0f} s: try again later") from None


def _last_words(answer: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    return "; ".join(line.removeprefix("sbatch: error: ") for line in lines) or f"exit code {answer.returncode}"
